"""Stochastic samplers that reduce their noise by the noise of quantization (PTQD, arXiv 2305.10657, section 3.3).

    sigma'^2 = max(0, sigma^2 - c^2 v)

with sigma^2 the variance of the noise that the sampler adds in a step, c the coefficient of the predicted noise in the
next sample, and v the variance of the residual after the output correction. Guidance combines two predictions, so that
their residual is larger than v and the reduction smaller than it could be.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from stepquant.layers.correction import OutputCorrection, correction_of


def correct_sampler(pipeline: Any, denoiser: nn.Module) -> None:
    """Replace the sampler of `pipeline` by one that accounts for the residual, if its denoiser has a correction."""
    correction = correction_of(denoiser)
    if correction is not None:
        pipeline.register_modules(scheduler=with_less_noise(pipeline.scheduler, correction))


def with_less_noise(scheduler: Any, correction: OutputCorrection) -> Any:
    """Return a copy of a sampler that adds less noise: DDPM of fixed variance, or DDIM, which matters with eta > 0.

    Any other sampler, or prediction than epsilon, is returned unchanged. The copy saves and loads as its base class.
    """
    if type(scheduler) not in _QUIETER or scheduler.config.prediction_type != "epsilon":
        return scheduler
    if isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type not in ("fixed_small", "fixed_large"):
        return scheduler
    base = type(scheduler)
    copied = base.from_config(scheduler.config)
    # Named after its base class, which is what the index of a saved pipeline contains.
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
    """Return the cumulative products of alpha at a timestep and at the next one of the sampler."""
    return cumulative[timestep], cumulative[earlier] if earlier >= 0 else final


def _less(variance: Tensor, factor: Tensor, correction: OutputCorrection, timestep: Any) -> Tensor:
    residual = correction.at(correction.variance, torch.as_tensor(timestep).float().cpu())
    return (variance - factor.square() * residual).clamp(min=0)
