"""Smoothing: shift the size differences of input channels from the activation to the weight.

    y = sum_c (x_c / m_c) (w_c m_c)    for any factors m > 0

One scale serves all channels of an activation, so its largest channel determines the steps of all. Dividing each
channel by a factor before rounding, and multiplying the weight's input channel by it, moves the difficulty to the
weight, which has a scale per output channel and is rounded by GPTQ. SmoothQuant (arXiv 2211.10438) folds the division
into the preceding layer. Here it is part of quantizing the activation, which multiplies every value by ``1 / scale``
anyway, so any layer can be smoothed and the integer product does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.affine import affine_from_range, fake_quantize
from stepquant.core.ranges import least_error_range, minmax_range
from stepquant.progress import Progress

KEPT_COLUMNS = 512
"""Positions of each activation that the search looks at, spread over all samples."""

SIZES = (("rms", 0.25, 0.0), ("rms", 0.5, 0.25), ("largest", 0.5, 0.25), ("largest", 0.75, 0.25))
"""Candidates: the measure of a channel's size, and the exponents a and b. On layers of the reference models, these four
reach nearly what a grid of 48 reaches."""

RANGES = 20
"""Ranges that are tried for each candidate."""

ALL_ONES = 1e-5
"""A candidate whose factors differ from 1 by less does nothing that its rounding errors would not do."""


@torch.no_grad()
def find_smoothing(
    calibrated: CalibrationModel, samples: CalibrationSet, batch_size: int, progress: Progress
) -> dict[str, Tensor]:
    """Search the smoothing of every layer in full precision, see `best_smoothing`.

    Layers with unquantized activations and grouped convolutions are left out.

    Returns:
        Name -> factors, float32 [in], of the layers that gain from smoothing.
    """
    layers = {name: layer for name, layer in calibrated.layers.items() if _can_smooth(layer)}
    columns: dict[str, list[Tensor]] = {name: [] for name in layers}
    batches = list(samples.batches(batch_size))
    per_batch = -(-KEPT_COLUMNS // len(batches))

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: CalibratedLayer, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(layer.input_point, ActivationPoint)
            flat = inputs[0].movedim(layer.input_point.layout.channel_dim, 0).flatten(1)
            columns[name].append(flat[:, torch.linspace(0, flat.shape[1] - 1, per_batch).long()])

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
            best = best_smoothing(layer, torch.cat(columns.pop(name), dim=1).to(layer.weight.device))
            if best is not None:
                factors[name] = best
            advance(1)
    return factors


@torch.no_grad()
def best_smoothing(layer: CalibratedLayer, x: Tensor) -> Tensor | None:
    """Choose among ``m_c = |x_c|^a / |w_c|^b`` for all `SIZES` the one of least output error.

    The error assumes uncorrelated rounding errors, ``sum_c |w_c|^2 E|dx_c|^2 + E|x_c|^2 |dw_c|^2``, with weights
    rounded to nearest.

    Args:
        x: float32 [in, n], the layer's input at n positions.

    Returns:
        The factors, float32 [in]; None if m = 1 is best.
    """
    weight = layer.weight.transpose(0, 1).flatten(1)
    best, least = None, output_error(layer, x, torch.ones(len(x), device=x.device))
    for kind, a, b in SIZES:
        smoothing = _size(x, kind) ** a / _size(weight, kind) ** b
        smoothing = smoothing / smoothing.log().mean().exp()
        if bool(((smoothing - 1).abs() < ALL_ONES).all()):
            continue
        error = output_error(layer, x, smoothing)
        if error < least:
            best, least = smoothing, error
    return best


def output_error(layer: CalibratedLayer, x: Tensor, smoothing: Tensor) -> float:
    """The error that `best_smoothing` minimizes, for x float32 [in, n] and factors float32 [in]."""
    activation, weight = layer.input_point, layer.weight_point
    assert isinstance(activation, ActivationPoint)
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
    """Squared rounding errors of `values` [rows, n], each row on its own grid."""
    stride = -(-values.shape[1] // (1 << 14))
    low, high = minmax_range(values)
    if not minmax:
        low, high = least_error_range(values[:, ::stride], bits, low=low, high=high, candidates=RANGES)
    scale, zero_point = affine_from_range(low, high, bits, symmetric=minmax)
    return (fake_quantize(values, scale[:, None], zero_point[:, None], bits) - values).square()


def _can_smooth(layer: CalibratedLayer) -> bool:
    return isinstance(layer.input_point, ActivationPoint) and getattr(layer.inner, "groups", 1) == 1


def _size(values: Tensor, kind: str) -> Tensor:
    """Size of each channel of values [C, n], at least a hundredth of the mean size."""
    size = values.abs().amax(dim=1) if kind == "largest" else values.square().mean(dim=1).sqrt()
    return size.clamp(min=float(size.mean()) * 1e-2 + 1e-12)
