"""What the table of families checks: each check is a method of `Case` that returns a cell, or raises."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import stepquant as sq
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.config import QuantSpec
from stepquant.errors import first_line
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import quantized_modules
from stepquant.models import describe
from tests.families.family import Family

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RELOAD_ROUNDING = 1e-4
"""Largest difference of outputs in full precision, after diffusers saves and loads a pipeline, that is rounding."""


class NotSupported(Exception):
    """Diffusers itself does not support this for the model; the message says what it cannot do."""


class Case:
    """One family, built once; the quantized pipeline is made when a check needs it first."""

    def __init__(self, family: Family, folder: Path, samples: int = 32) -> None:
        self.family, self.folder, self.samples = family, folder, samples
        self.pipeline = family.build(folder / "parts")
        self.pipeline.set_progress_bar_config(disable=True)

    def quantize(self, bits: str | QuantSpec, **arguments: Any) -> Any:
        """Quantize every denoiser of the family at the same bits."""
        return sq.quantize(
            self.pipeline, self.spec(bits), calibration=sq.Calibration(samples=self.samples, steps=self.family.steps),
            prompts=self.family.prompts(self.pipeline), inputs=self.family.call, **arguments,
        )  # fmt: skip

    def spec(self, bits: str | QuantSpec) -> Any:
        names = self.family.denoisers
        return bits if len(names) == 1 else dict.fromkeys(names, bits)

    @cached_property
    def quantized(self) -> Any:
        return self.quantize("w8a8", recipe="minmax")

    @cached_property
    def saved(self) -> Path:
        self.quantized.save_pretrained(self.folder / "saved")
        return self.folder / "saved"

    @cached_property
    def calls(self) -> dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
        """Positional arguments, keyword arguments and output of all calls of each denoiser in one plain call."""
        calls: dict[str, list[Any]] = {name: [] for name in self.family.denoisers}
        begun: list[Any] = []  # a UNet takes the residuals of an adapter out of the list that it is given
        handles = []
        for name, own in calls.items():
            module = getattr(self.pipeline, name)
            handles += [
                module.register_forward_pre_hook(
                    lambda _module, args, kwargs: begun.append(copied((args, kwargs))), with_kwargs=True
                ),
                module.register_forward_hook(
                    lambda _module, _args, _kwargs, output, own=own: own.append((*begun.pop(), copied(output))),
                    with_kwargs=True,
                ),
            ]
        self.run(self.pipeline)
        for handle in handles:
            handle.remove()
        return calls

    def run(self, pipeline: Any) -> list[Tensor]:
        """Return the output of a plain call of the pipeline: a list of float tensors."""
        pipeline.set_progress_bar_config(disable=True)
        arguments = self.family.arguments(pipeline)
        if "output_type" in inspect.signature(type(pipeline).__call__).parameters:
            arguments = {"output_type": "np"} | arguments
        with torch.no_grad():
            output = pipeline(**arguments)
        values = output.values() if isinstance(output, dict) else output
        arrays = [value for value in values if value is not None and not isinstance(value, bool)]
        return [torch.as_tensor(np.asarray(array)).float() for array in arrays]

    def minmax(self) -> str:
        assert self.quantized is not None
        return "yes"

    def reconstruct(self) -> str:
        """Block reconstruction at W4A8, one iteration per block; the result generates."""
        quantized = self.quantize("w4a8", recipe="q-diffusion", hyperparameters={"iterations": 1})
        assert all(output.isfinite().all() for output in self.run(quantized)), "the output is not finite"
        return "yes"

    def save(self) -> str:
        assert (self.saved / "stepquant.json").is_file()
        return "yes"

    def load(self) -> str:
        """`stepquant.load` and diffusers' `from_pretrained` give the same, bit for bit, and so does what was saved."""
        self.check_reload()
        outputs = self.run(sq.load(self.saved))
        for other in (type(self.pipeline).from_pretrained(self.saved), self.quantized):
            for output, expected in zip(outputs, self.run(other), strict=True):
                # Memory of other alignment changes the rounding of float32 in a few autoencoders and text encoders.
                same = torch.equal(output, expected) or (
                    self.reload_change and (output - expected).abs().max() < RELOAD_ROUNDING
                )
                assert same, f"outputs differ by {(output - expected).abs().max():.1e} after loading"
        return "yes"

    def check_reload(self) -> None:
        """Raise `NotSupported` if diffusers cannot load the full-precision pipeline that it saves, or changes it."""
        with tempfile.TemporaryDirectory() as folder:
            self.pipeline.save_pretrained(folder)
            try:
                loaded = type(self.pipeline).from_pretrained(folder)
            except Exception as error:
                raise NotSupported(f"diffusers cannot load the pipeline that it saved: {first_line(error)}") from None
            pairs = zip(self.run(loaded), self.run(self.pipeline), strict=True)
            self.reload_change = max(float((a - b).abs().max()) for a, b in pairs)
        if self.reload_change > RELOAD_ROUNDING:
            raise NotSupported(
                f"in full precision, outputs differ by {self.reload_change:.1e} after diffusers saves and loads it"
            )

    def sample(self) -> str:
        """The quantized pipeline generates finite output of the shapes of full precision."""
        outputs, expected = self.run(self.quantized), self.run(self.pipeline)
        assert [output.shape for output in outputs] == [output.shape for output in expected], "other shapes"
        assert all(output.isfinite().all() for output in outputs), "the output is not finite"
        return "yes"

    def integers(self) -> str:
        """How many linears, convolutions and attentions run in integers."""
        counts = {"linears": [0, 0], "convolutions": [0, 0], "attentions": [0, 0]}
        for name in self.family.denoisers:
            done = quantized_modules(getattr(self.quantized, name))
            counts["attentions"][0] += len(quantized_attentions(getattr(self.quantized, name)))
            assert self.calls[name]
            with AttentionCounter() as counter:
                self._replayed(name, getattr(self.pipeline, name))
            counts["attentions"][1] += counter.count
            for path, module in getattr(self.pipeline, name).named_modules():
                kind = "linears" if isinstance(module, nn.Linear) else "convolutions"
                if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                    counts[kind][0] += path in done
                    counts[kind][1] += 1
        return ", ".join(f"{done}/{total} {kind}" for kind, (done, total) in counts.items() if total)

    def error(self) -> float:
        """Largest relative error of a denoiser's output at W8A8, on the calls of the full-precision pipeline."""
        return self._error(self.quantized)

    def dynamic_error(self) -> float:
        """The same with a range for each token or pixel."""
        return self._error(self.quantize(QuantSpec(bits="w8a8", activations="dynamic"), recipe="minmax"))

    def _error(self, quantized: Any) -> float:
        return max(self._differences(lambda name: getattr(quantized, name), lambda a, b: (a - b).norm() / b.norm()))

    def identity(self) -> str:
        """The instrumented denoiser without any quantizer active equals the original, but for rounding of float32."""
        worst = max(self._differences(self._instrumented, lambda a, b: (a - b).abs().mean() / b.abs().max()))
        assert worst <= 1e-6, f"outputs differ by {worst:.1e} with all quantizers disabled"
        return "yes"

    def _instrumented(self, name: str) -> nn.Module:
        denoiser = getattr(self.pipeline, name)
        args, kwargs, _ = self.calls[name][0]
        arguments = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments
        arguments.pop("self")
        description = describe(denoiser, arguments) if takes_arguments(describe) else describe(denoiser)
        instrumented = insert_fake_quantizers(denoiser, description, QuantSpec.parse("w8a8"))
        for layer in instrumented.layers.values():
            layer.weight_point.bypassed = True
        return instrumented.model

    def _differences(
        self, denoiser: Callable[[str], nn.Module], difference: Callable[[Tensor, Tensor], Tensor]
    ) -> list[float]:
        """Differences of each output to the original's, on the recorded calls."""
        differences = []
        for name, calls in self.calls.items():
            module = denoiser(name)
            for args, kwargs, expected in calls:
                with torch.no_grad():
                    output = module(*copied(args), **copied(kwargs))
                pairs = zip(tensors(output), tensors(expected), strict=True)
                differences += [float(difference(a, b)) for a, b in pairs if b.any()]
        assert all(math.isfinite(found) for found in differences), "the output is not finite"
        return differences

    def lora(self) -> str:
        """A LoRA, loaded into the quantized denoiser, changes the output; unloading it restores the output."""
        name = self.family.denoisers[0]
        original = getattr(self.pipeline, name)
        if not hasattr(original, "load_lora_adapter"):
            raise NotSupported(f"{type(original).__name__} takes no LoRA adapters")
        linears = [path for path, module in original.named_modules() if isinstance(module, nn.Linear)]
        trained = copy.deepcopy(original)
        targets = linears[len(linears) // 3 : len(linears) // 3 + 2]
        trained.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
        for path, parameter in trained.named_parameters():
            if "lora_" in path:
                nn.init.normal_(parameter, std=0.3)
        adapted = self._copied_denoiser(name)
        before = self._replayed(name, adapted)
        adapted.load_lora_adapter(get_peft_model_state_dict(trained), prefix=None)
        assert not close(self._replayed(name, adapted), before, 1e-4), "the LoRA changes nothing"
        adapted.unload_lora()
        assert close(self._replayed(name, adapted), before, 0), "unloading the LoRA does not restore the output"
        return "yes"

    def offload(self) -> str:
        """Sequential offloading: the parameters and integers of a module are loaded only while it runs."""
        name = self.family.denoisers[0]
        original = copy.deepcopy(getattr(self.pipeline, name))
        cpu_offload(original, execution_device=torch.device("cpu"))
        try:
            self._replayed(name, original)
        except RuntimeError as error:
            raise NotSupported(f"accelerate cannot offload {type(original).__name__}: {first_line(error)}") from None
        denoiser = self._copied_denoiser(name)
        before = self._replayed(name, denoiser)
        integers_only = not any(parameter.numel() for parameter in denoiser.parameters())
        cpu_offload(denoiser, execution_device=torch.device("cpu"), offload_buffers=integers_only)
        assert any(x.is_meta for x in (*denoiser.parameters(), *denoiser.buffers())), "nothing was offloaded"
        # Blocks are not fused while the parameters of their norms are offloaded, so codes may round differently.
        assert close(self._replayed(name, denoiser), before, 0.05), "the output changes"
        return "yes"

    def _copied_denoiser(self, name: str) -> Any:
        return copy.deepcopy(getattr(self.quantized, name))

    def _replayed(self, name: str, module: nn.Module) -> list[Tensor]:
        args, kwargs, _ = self.calls[name][0]
        with torch.no_grad():
            return tensors(module(*copied(args), **copied(kwargs)))


class AttentionCounter(TorchFunctionMode):
    """Counts the calls of torch's attention."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is F.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def takes_arguments(function: Callable[..., Any]) -> bool:
    return len(inspect.signature(function).parameters) > 1


def tensors(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(tree) if isinstance(tree, dict) else tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def close(outputs: list[Tensor], expected: list[Tensor], tolerance: float) -> bool:
    """Whether each output is within a share of the norm of what is expected."""
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(outputs, expected, strict=True))


COLUMNS: dict[str, Callable[[Case], str | float]] = {
    "minmax": Case.minmax,
    "sample": Case.sample,
    "save": Case.save,
    "load": Case.load,
    "q-diffusion": Case.reconstruct,
    "integers": Case.integers,
    "error": Case.error,
    "identity": Case.identity,
    "lora": Case.lora,
    "offload": Case.offload,
}
"""Column of the table -> check."""
