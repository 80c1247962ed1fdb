"""The loss of block reconstruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerOutputs:
    """Outputs of a block and of layers inside it.

    Attributes:
        block: float [B, ...], channels second (images) or last (tokens).
        layers: name -> float [B, ...].
    """

    block: Tensor
    layers: dict[str, Tensor]

    @staticmethod
    @contextmanager
    def recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
        """Collect the outputs of `layers` by name while the context lasts."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
                outputs[name] = output

            return hook

        handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def error(
    outputs: LayerOutputs,
    targets: LayerOutputs,
    block_weight: float = 1.0,
    layer_weight: float = 0.0,
    power: float = 2.0,
) -> Tensor:
    """``block_weight |B_q - B_fp|^2 + layer_weight sum_l |l_q - l_fp|^2``, a scalar; `power` replaces the exponent 2.

    Errors are summed over channels and averaged over the rest (EDA-DM, arXiv 2401.04585; with `layer_weight` 0 it is
    BRECQ's block error with the Fisher matrix taken as identity, arXiv 2102.05426).
    """
    total = block_weight * squared_error(outputs.block, targets.block, power)
    for name, target in targets.layers.items():
        total = total + layer_weight * squared_error(outputs.layers[name], target, power)
    return total


def squared_error(x: Tensor, target: Tensor, power: float = 2.0) -> Tensor:
    """``|x - target|^power``, summed over channels (dimension 1 of images, else the last), averaged over the rest."""
    difference = x - target.to(x.device)
    raised = difference.square() if power == 2 else difference.abs().pow(power)
    return raised.sum(dim=1 if x.dim() == 4 else -1).mean()
