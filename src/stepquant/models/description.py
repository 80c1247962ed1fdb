"""Description of a denoiser for calibration and reconstruction: blocks, layers and their roles."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.attention import can_quantize_attention
from stepquant.layers.clock import TimestepReader
from stepquant.layers.quantized import can_quantize, kept_in_float32
from stepquant.models.blocks import Blocks
from stepquant.models.dataflow import DataFlow, is_layer, leaves_of, trace

TIME_ARGUMENTS = re.compile(r"(^|_)(timesteps?|time)(_r|_ratio)?$|^(t|sigmas?|noise_level)$")
"""Names of arguments that depend on the sampler's step alone, such as LTX-2's `audio_timestep`."""


@dataclass(frozen=True)
class ModelDescription:
    """A denoiser, described by the dotted names of its modules.

    Attributes:
        family: class name of the denoiser.
        blocks: units of reconstruction in execution order: disjoint modules that together contain all `layers`.
        layers: all linears and convolutions that can be quantized, block by block. Inside of a block they are in
            registration order; `stepquant.models.tracing.execution_order` observes the order of execution.
        firsts, lasts: layers that read the noisy sample, and layers that write the output; several where there are
            several modalities, such as video and audio.
        time_layers: linears whose input depends on the timestep alone.
        attentions: attentions whose operands can be quantized, named as in `stepquant.layers.interception`.
        middle: module whose output, float [B, C, H, W] or [B, N, C], represents the content of the image best.
        skip_splits: layer after a skip concatenation -> number of its input channels that come from the trunk; the
            others come from the skip.
        timestep: name of the timestep among the parameters of the denoiser's forward.
        time_unit: the denoiser's timestep per timestep of the scheduler: 1, or 1/1000 where it reads t / 1000.
        unquantized: layer or attention that stays in floating point -> reason.
    """

    family: str
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    firsts: tuple[str, ...]
    lasts: tuple[str, ...]
    time_layers: frozenset[str]
    attentions: tuple[str, ...]
    middle: str
    skip_splits: dict[str, int]
    timestep: str
    time_unit: float
    unquantized: dict[str, str]

    def quantized_bits(self, spec: QuantSpec) -> dict[str, LayerBits]:
        """Return name -> bits of the layers that `spec` quantizes, in the order of `layers`."""
        bits = {}
        for name in self.layers:
            layer = spec.layer_bits(name, first=name in self.firsts, last=name in self.lasts)
            if not layer.is_float and not (spec.exact_time and name in self.time_layers):
                bits[name] = layer
        return bits

    def activation_bits(self, spec: QuantSpec, name: str, bits: int, times: Sequence[float]) -> list[int]:
        """Return the activation bits of a layer that has `bits` without `step_bits`, at each normalized time."""
        edge = name in self.firsts or name in self.lasts
        return spec.bits_over_time(name, bits, times, at_least=min(bits, spec.first_last_bits) if edge else 2)

    def time_layers_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names`, in their order, that are `time_layers`."""
        return tuple(name for name in names if name in self.time_layers)


def describe(model: nn.Module, arguments: dict[str, Any], scheduler_time: float | None = None) -> ModelDescription:
    """Describe a denoiser by the data flow of one call.

    Args:
        arguments: of its forward, by name, as recorded while a pipeline runs. One sample is enough.
        scheduler_time: the scheduler's timestep of this call, to compare with the timestep that the denoiser reads;
            None: both are in the same unit.

    Raises:
        StepquantError: if the forward has no timestep, or no linear or convolution reads an argument.
    """
    timestep = TimestepReader.of(model).name
    if timestep not in arguments:
        raise StepquantError(
            f"the call of {type(model).__name__} has the arguments {', '.join(arguments)}; expected {timestep} among "
            "them. Pass the timestep by name."
        )
    time = torch.as_tensor(arguments[timestep])
    arguments = arguments | {timestep: time}
    flow = trace(model, arguments)
    samples = _sample_arguments(model, arguments, flow)
    firsts = [layer for argument in samples for layer in _first_layers(flow, argument)]
    if not firsts:
        raise StepquantError(
            f"no linear or convolution of {type(model).__name__} reads {' or '.join(samples) or 'its input'}; expected "
            "a denoiser that embeds the noisy sample. Check the arguments of the call."
        )
    blocks = Blocks(model, flow)
    unquantized = _float_layers(model, flow) | _float_attentions(model, flow)
    layers = {
        block: [
            name
            for name, module in ((f"{block}.{path}".rstrip("."), module) for path, module in submodules)
            if is_layer(module) and name not in unquantized
        ]
        for block, submodules in ((block, model.get_submodule(block).named_modules()) for block in blocks.names)
    }
    times = frozenset(name for name in flow.arguments if TIME_ARGUMENTS.search(name)) | {timestep}
    return ModelDescription(
        family=type(model).__name__,
        blocks=tuple(block for block in blocks.names if layers[block]),
        layers=tuple(layer for block in blocks.names for layer in layers[block]),
        firsts=tuple(dict.fromkeys(firsts)),
        lasts=tuple(dict.fromkeys(_last_layer(flow, index, samples) for index in range(len(flow.outputs)))),
        time_layers=frozenset(
            name
            for name, sources in flow.inputs.items()
            if sources.arguments and sources.arguments <= times and isinstance(model.get_submodule(name), nn.Linear)
        ),
        attentions=tuple(_attentions(model, flow, _batch(arguments, samples))),
        middle=_middle(flow, blocks, samples),
        skip_splits={name: split for name, split in flow.splits.items() if name not in unquantized},
        timestep=timestep,
        time_unit=_time_unit(float(time.max()), scheduler_time),
        unquantized=unquantized,
    )


def _sample_arguments(model: nn.Module, arguments: dict[str, Any], flow: DataFlow) -> list[str]:
    """The leaves of the first argument, and for each output of another shape an argument of that shape."""
    leaves = {name: leaf for name, leaf in leaves_of(arguments).items() if _is_floating(leaf)}
    order = [name for name in inspect.signature(model.forward).parameters if name in arguments]
    ranked = sorted(leaves, key=lambda name: order.index(name.split(".")[0]))
    if not ranked:
        return []
    samples = [name for name in ranked if name.split(".")[0] == ranked[0].split(".")[0]]
    for shape in flow.output_shapes:
        same = [name for name in ranked if leaves[name].shape == shape]
        if same and not set(same) & set(samples):
            samples.append(same[0])
    return samples


def _batch(arguments: dict[str, Any], samples: list[str]) -> int:
    """Number of samples of the call, by the first dimension of the noisy sample; several where they are in a list."""
    return max(len(samples), *(len(leaf) for name, leaf in leaves_of(arguments).items() if name in samples))


def _first_layers(flow: DataFlow, argument: str) -> list[str]:
    """The layers that read an argument with no layer before them that does."""
    return [
        name
        for name, sources in flow.inputs.items()
        if argument in sources.arguments
        and not any(argument in flow.inputs[layer].arguments for layer in sources.layers - {name})
    ]


def _last_layer(flow: DataFlow, index: int, samples: list[str]) -> str:
    """The layer that writes an output: of several that are added, the last executed one that knows the sample."""
    direct = [name for name in flow.inputs if name in flow.outputs[index].layers]
    knowing = [name for name in direct if flow.inputs[name].arguments & set(samples)]
    return (knowing or direct or list(flow.inputs))[-1]


def _middle(flow: DataFlow, blocks: Blocks, samples: list[str]) -> str:
    """What comes before the first skip connection ends, else the middle one of the repeated blocks."""
    if flow.splits and flow.before_first_skip:
        return flow.before_first_skip
    repeated = [name for name in blocks.repeated if flow.depends_on(name, frozenset(samples))] or blocks.names
    return repeated[len(repeated) // 2]


def _float_layers(model: nn.Module, flow: DataFlow) -> dict[str, str]:
    """Linears and convolutions that are not quantized -> reason."""
    kept = kept_in_float32(model)
    reasons = {}
    for name, module in model.named_modules():
        if not is_layer(module):
            continue
        if name not in flow.inputs:
            reasons[name] = "was not called"
        elif not can_quantize(module):
            reasons[name] = f"{type(module).__name__} has no quantized form"
        elif name in kept:
            reasons[name] = f"{type(model).__name__} keeps it in float32"
    return reasons


def _attentions(model: nn.Module, flow: DataFlow, batch: int) -> Iterator[str]:
    """Attentions with a processor that is reproduced, and every call of `scaled_dot_product_attention` by a module.

    As many calls as there are samples are those of one attention, sample by sample.
    """
    for name, module in model.named_modules():
        if can_quantize_attention(module):
            yield from [name] if name in flow.order else []
        elif name and any(module.children()):
            calls = flow.attentions[name]
            yield from (f"{name}:{index}" if index else name for index in range(1 if calls == batch else calls))


def _float_attentions(model: nn.Module, flow: DataFlow) -> dict[str, str]:
    """Attentions whose operands are not quantized -> reason."""
    reasons = {}
    for name, module in model.named_modules():
        if can_quantize_attention(module):
            continue
        if name in flow.attentions:
            if not name or not any(module.children()):
                reasons[name] = "its module contains no other"
        elif name in flow.manual_attentions:
            reasons[name] = "computes attention without scaled_dot_product_attention"
        elif hasattr(module, "to_q") and name in flow.order:
            reasons[name] = "linear attention"
    return reasons


def _time_unit(time: float, scheduler_time: float | None) -> float:
    """1/1000 for a time in [0, 1] where the scheduler counts to 1000."""
    return 1e-3 if scheduler_time is not None and time <= 1 < scheduler_time else 1.0


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def main_tensor(output: Any) -> Tensor:
    """Return the tensor that represents an output: the output itself, or the first of a tuple.

    A joint block outputs text and image, both [B, tokens, C]; they are concatenated along the tokens. A list has one
    tensor for each sample; they are stacked.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and len({part.shape if isinstance(part, Tensor) else None for part in output}) == 1:
        return torch.stack(output)
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
    if len(tensors) > 1 and all(part.dim() == 3 and part.shape[-1] == tensors[0].shape[-1] for part in tensors):
        return torch.cat(tensors, dim=1)
    return tensors[0] if tensors else main_tensor(output[0])
