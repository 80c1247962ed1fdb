"""Samplers that add noise of their own, and the less of it the more quantization has added (PTQD, section 3.3).

    sigma'^2 = max(0, sigma^2 - c^2 v)

with sigma^2 the variance of the noise that the sampler adds at a step, c the factor that the predicted noise enters the
next sample with, and v the variance of the residual after the output's correction. Guidance mixes two predictions and
makes their residual larger than v: what is taken off is then less than what could be.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from stepquant.layers.correction import OutputCorrection, correction_of


def correct_sampler(pipeline: Any, denoiser: nn.Module) -> None:
    """Give `pipeline` a sampler that makes room for its denoiser's residual, if that carries a correction."""
    correction = correction_of(denoiser)
    if correction is not None:
        pipeline.register_modules(scheduler=with_less_noise(pipeline.scheduler, correction))


def with_less_noise(scheduler: Any, correction: OutputCorrection) -> Any:
    """A copy of a sampler that adds less noise: DDPM of fixed variance and DDIM where eta > 0, both predicting noise.

    Any other sampler is returned as it is. The copy saves and loads as the class it was made from.
    """
    if type(scheduler) not in _QUIETER or scheduler.config.prediction_type != "epsilon":
        return scheduler
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type not in ("fixed_small", "fixed_large"):
        return scheduler
    base = type(scheduler)
    copied = base.from_config(scheduler.config)
    # Under the name of its origin, which is what is written into the index of a saved pipeline.
    copied.__class__ = type(base.__name__, (_QUIETER[base], base), {"__module__": base.__module__})
    copied.correction = correction
    return copied


class _QuieterDDPM(DDPMScheduler):
    correction: OutputCorrection

    def _get_variance(self, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        variance = super()._get_variance(t, *args, **kwargs)
        earlier = self.previous_timestep(t)
        alpha, alpha_earlier = _alphas(self.alphas_cumprod, self.one, t, earlier)
        into_x0 = ((1 - alpha) / alpha) ** 0.5
        factor = alpha_earlier**0.5 * (1 - alpha / alpha_earlier) / (1 - alpha) * into_x0
        return _less(variance, factor, self.correction, t)


class _QuieterDDIM(DDIMScheduler):
    correction: OutputCorrection

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        if eta > 0 and variance_noise is None:
            earlier = timestep - self.config.num_train_timesteps // self.num_inference_steps
            alpha, alpha_earlier = _alphas(self.alphas_cumprod, self.final_alpha_cumprod, timestep, earlier)
            variance = eta**2 * self._get_variance(timestep, earlier)
            factor = (1 - alpha_earlier - variance) ** 0.5 - (alpha_earlier * (1 - alpha) / alpha) ** 0.5
            share = _less(variance, factor, self.correction, timestep) / variance.clamp(min=1e-20)
            shape, dtype, device = model_output.shape, model_output.dtype, model_output.device
            variance_noise = share.sqrt() * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            generator = None
        return super().step(
            model_output, timestep, sample, eta, use_clipped_model_output, generator, variance_noise, return_dict
        )


_QUIETER: dict[type, type] = {DDPMScheduler: _QuieterDDPM, DDIMScheduler: _QuieterDDIM}


def _alphas(cumulative: Tensor, final: Tensor, timestep: Any, earlier: Any) -> tuple[Tensor, Tensor]:
    """Cumulative products of alpha at a timestep and at the one that the sampler goes to."""
    return cumulative[timestep], cumulative[earlier] if earlier >= 0 else final


def _less(variance: Tensor, factor: Tensor, correction: OutputCorrection, timestep: Any) -> Tensor:
    residual = correction.at(correction.variance, torch.as_tensor(timestep).float().cpu())
    return (variance - factor.square() * residual).clamp(min=0)
