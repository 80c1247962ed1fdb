"""Quantize the operands of any attention that calls torch's `scaled_dot_product_attention`.

Most attentions of diffusers call it, through ``dispatch_attention_fn`` with its native backend or from an older
processor. While such a module's forward runs, the calls that it makes are computed by a `ScaledDotProduct`. Calls of
other modules and of other threads are not affected.

The first call within a forward is named like the module, the next ones ``MODULE:1``, ``MODULE:2`` and so on.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stepquant.errors import StepquantError
from stepquant.layers.attention import AttentionProcessor, QuantizedAttentionProcessor, can_quantize_attention
from stepquant.layers.scaled_dot_product import ScaledDotProduct, repeat_heads

ATTEND = F.scaled_dot_product_attention
CALLS = "attention_calls"
"""Attribute of an attention module that holds its `AttentionCalls`."""


class AttentionCalls(nn.ModuleDict):
    """The quantized calls within one module's forward: number of the call -> its `ScaledDotProduct`."""

    def __init__(self) -> None:
        super().__init__()
        self.warned = False

    def quantized(self, index: int) -> ScaledDotProduct | None:
        """The attention of one call; None where it stays in floating point. A single one serves every call: Mochi
        makes one for each sample."""
        return self._modules.get(str(index) if len(self) > 1 else "0")  # type: ignore[return-value]

    def warn_unless_seen(self, count: int, owner: str) -> None:
        """Warn once if a forward made no call that could be quantized."""
        if not count and len(self) and not self.warned:
            self.warned = True
            warnings.warn(
                f"an attention ({owner}) ran without torch's scaled_dot_product_attention, so its operands stay in "
                "floating point. Call model.set_attention_backend('native') to quantize them.",
                stacklevel=2,
            )


class _Interception(TorchFunctionMode):
    """Computes the calls of one forward by `calls`, in the thread that entered it."""

    def __init__(self, calls: AttentionCalls) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not ATTEND:
            return func(*args, **kwargs)
        attention = self.calls.quantized(self.count)
        self.count += 1
        return func(*args, **kwargs) if attention is None else attend(attention, *args, **kwargs)


def attend(
    attention: ScaledDotProduct,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, computed by `attention`; without dropout."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    leading = query.shape[:-2]
    if len(leading) != 2:
        if enable_gqa:
            key, value = (repeat_heads(x, query.shape[-3]) for x in (key, value))
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-2:]).reshape(-1, 1, *attn_mask.shape[-2:])
        query, key, value = (
            x.expand(*leading, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (query, key, value)
        )
    output = attention.attend(query, key, value, attn_mask, scale)
    return output.reshape(*leading, *output.shape[-2:])


class InterceptedForward:
    """Replaces the forward of a module that has `AttentionCalls`: an object, so that a copied module gets its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, module.__dict__.get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.before or type(self.module).forward.__get__(self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls: AttentionCalls = getattr(self.module, CALLS)
        interception = _Interception(calls)
        with interception:
            if self.before is None:
                output = type(self.module).forward(self.module, *args, **kwargs)
            else:
                output = self.before(*args, **kwargs)
        calls.warn_unless_seen(interception.count, type(self.module).__name__)
        return output


def install_attention(model: nn.Module, name: str, attention: AttentionProcessor) -> None:
    """Compute the attention `name` of `model` by `attention`: as its processor, where that computes the same.

    Raises:
        StepquantError: if `model` has no such module, or it cannot contain an attention.
    """
    path, _, index = name.partition(":")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise StepquantError(f"the model has no layer {path!r}; the checkpoint belongs to another model.") from None
    if not index and can_quantize_attention(module):
        module.set_processor(attention)  # type: ignore[operator]
        return
    if not any(module.children()):
        raise StepquantError(f"{path!r} is a {type(module).__name__}; expected an attention.")
    if not hasattr(module, CALLS):
        setattr(module, CALLS, AttentionCalls())
        module.forward = InterceptedForward(module)
    getattr(module, CALLS)[index or "0"] = attention


def quantized_attentions(model: nn.Module) -> dict[str, QuantizedAttentionProcessor]:
    """All quantized attentions of `model`, by name."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedAttentionProcessor):
            owner, _, last = path.rpartition(".")
            calls = owner.rpartition(".")[2] == CALLS
            found[_call_name(owner.rpartition(".")[0], last) if calls else owner] = module
    return found


def _call_name(module: str, index: str) -> str:
    return module if index == "0" else f"{module}:{index}"
