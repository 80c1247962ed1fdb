"""Smoothing channels between activation and weight: ``y = sum_c (x_c / m_c) (w_c m_c)``, whatever m is.

One scale must serve all channels of an activation, and its steps are as wide as its largest channel asks for. Dividing
each channel by a number of its own before rounding, and multiplying the weight's input channel by the same, moves the
difficulty into the weight, which has a scale for every output channel and is gptq-rounded for its rounding. SmoothQuant
(arXiv 2211.10438) folds the division into the layer before; here it is part of quantizing, which multiplies every value
by ``1 / scale`` anyway, so any layer can be smoothed and the integer product does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.affine import affine_from_range, fake_quantize
from stepquant.core.ranges import least_error_range, minmax_range
from stepquant.progress import Progress

KEPT_COLUMNS = 512
"""Positions of each activation that the search looks at, spread over all samples."""
SIZES = (("rms", 0.25, 0.0), ("rms", 0.5, 0.25), ("largest", 0.5, 0.25), ("largest", 0.75, 0.25))
"""What is tried: how the size of a channel is measured, and the exponents a and b. Of a grid of 48 such choices, on
layers of the reference models, these four have nearly all that the whole grid has."""


CANDIDATES = 20
"""Ranges tried for each of them."""


@torch.no_grad()
def find_smoothing(
    calibrated: CalibrationModel, samples: CalibrationSet, batch_size: int, progress: Progress
) -> dict[str, Tensor]:
    """Name -> smoothing, float32 [in], of every layer that is better off with one; see `best_smoothing`.

    Layers are seen in full precision. Those without quantized activations and grouped convolutions are left out.
    """
    layers = {name: layer for name, layer in calibrated.layers.items() if _can_smooth(layer)}
    columns: dict[str, list[Tensor]] = {name: [] for name in layers}
    batches = list(samples.batches(batch_size))
    each = -(-KEPT_COLUMNS // len(batches))

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: CalibratedLayer, inputs: tuple[Tensor, ...]) -> None:
            assert layer.input_point is not None
            flat = inputs[0].movedim(layer.input_point.layout.channel_dim, 0).flatten(1)
            columns[name].append(flat[:, torch.linspace(0, flat.shape[1] - 1, each).long()])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    for layer in calibrated.layers.values():
        layer.weight_point.bypassed = True
    with progress.task("Observing channels", len(samples)) as advance:
        for chosen in batches:
            calibrated.model(**samples.arguments(chosen))
            advance(chosen.stop - chosen.start)
    for handle in handles:
        handle.remove()
    for layer in calibrated.layers.values():
        layer.weight_point.bypassed = False
    factors = {}
    with progress.task("Smoothing channels", len(layers)) as advance:
        for name, layer in layers.items():
            found = best_smoothing(layer, torch.cat(columns.pop(name), dim=1).to(layer.weight.device))
            if found is not None:
                factors[name] = found
            advance(1)
    return factors


def best_smoothing(layer: CalibratedLayer, x: Tensor) -> Tensor | None:
    """Of ``m_c = |x_c|^a / |w_c|^b`` for all `SIZES`, the one of least output error; None if that is m = 1.

    The error of a layer's output is taken as if rounding errors were uncorrelated,
    ``sum_c |w_c|^2 E|dx_c|^2 + E|x_c|^2 |dw_c|^2``, with weights rounded to nearest.

    Args:
        x: float [in, n], the layer's input at n positions.
    """
    weight = layer.weight.transpose(0, 1).flatten(1)
    best, least = None, output_error(layer, x, torch.ones(len(x), device=x.device))
    for kind, a, b in SIZES:
        smoothing = _size(x, kind) ** a / _size(weight, kind) ** b
        smoothing = smoothing / smoothing.log().mean().exp()
        error = output_error(layer, x, smoothing)
        if error < least:
            best, least = smoothing, error
    return best


def output_error(layer: CalibratedLayer, x: Tensor, smoothing: Tensor) -> float:
    """What `best_smoothing` minimises; x: float [in, n], smoothing: float [in]."""
    activation, weight = layer.input_point, layer.weight_point
    assert activation is not None
    values = layer.weight.transpose(0, 1).flatten(1)
    total = 0.0
    start = 0
    for size in activation.layout.group_sizes or (len(x),):
        part = slice(start, start := start + size)
        divided = x[part] / smoothing[part, None]
        error = _range_error(divided.reshape(1, -1), activation.bits, minmax=False).view_as(divided)
        total += float((error.mean(dim=1) * smoothing[part].square() * values[part].square().sum(dim=1)).sum())
    start = 0
    for size in weight.group_sizes:
        part = slice(start, start := start + size)
        multiplied = (layer.weight[:, part].transpose(1, -1) * smoothing[part]).transpose(1, -1)
        error = _range_error(multiplied.flatten(1), weight.bits, minmax=weight.bits == 8).view_as(multiplied)
        error = error.transpose(0, 1).flatten(1).sum(dim=1)
        total += float((error / smoothing[part].square() * x[part].square().mean(dim=1)).sum())
    return total


def _range_error(values: Tensor, bits: int, *, minmax: bool) -> Tensor:
    """Squared rounding errors of each row of `values` [rows, n] on its own grid."""
    stride = -(-values.shape[1] // (1 << 14))
    low, high = minmax_range(values)
    if not minmax:
        low, high = least_error_range(values[:, ::stride], bits, low=low, high=high, candidates=CANDIDATES)
    scale, zero_point = affine_from_range(low, high, bits, symmetric=minmax)
    return (fake_quantize(values, scale[:, None], zero_point[:, None], bits) - values).square()


def _can_smooth(layer: CalibratedLayer) -> bool:
    grouped = isinstance(layer.inner, nn.Conv2d) and layer.inner.groups > 1
    return layer.input_point is not None and not grouped


def _size(values: Tensor, kind: str) -> Tensor:
    """Size of each channel [C, n]; a dead one's is no smaller than a hundredth of the mean."""
    size = values.abs().amax(dim=1) if kind == "largest" else values.square().mean(dim=1).sqrt()
    return size.clamp(min=float(size.mean()) * 1e-2 + 1e-12)
