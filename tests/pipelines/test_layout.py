"""Samples taken out of calls of real denoisers, put together anew, give what the denoiser gives for each alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.models.description import main_tensor
from stepquant.pipelines.arguments import plain_output
from stepquant.pipelines.layout import Entries, Multiple, Rows, UnknownLayoutError, divided, find_layout, pack, unpack
from stepquant.pipelines.recording import OUTPUT, pattern_of_call


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(*shape: int, count: int, seed: int = 0) -> Tensor:
    """[count, *shape]; a row does not depend on their number."""
    return torch.stack([random(*shape, seed=1000 * seed + index) for index in range(count)])


def z_image(count: int) -> dict[str, Any]:
    return {
        "x": list(rows(16, 1, 8, 8, count=count)), "t": torch.linspace(0.1, 0.9, 3)[:count],
        "cap_feats": list(rows(5, 16, count=count, seed=1)), "return_dict": False,
    }  # fmt: skip


def qwen(count: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(16, 16, count=count), "encoder_hidden_states": rows(7, 16, count=count, seed=1),
        "encoder_hidden_states_mask": torch.ones(count, 7, dtype=torch.long),
        "timestep": torch.linspace(0.1, 0.9, 3)[:count], "img_shapes": [[(1, 4, 4)]] * count, "guidance": None,
    }  # fmt: skip


def ltx(count: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(8, 4, count=count), "encoder_hidden_states": rows(5, 16, count=count, seed=1),
        "timestep": torch.arange(1, count + 1) * 100, "encoder_attention_mask": torch.ones(count, 5),
        "num_frames": 2, "height": 2, "width": 2, "rope_interpolation_scale": (0.5, 32.0, 32.0),
    }  # fmt: skip


def cosmos(count: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(4, 1, 8, 8, count=count), "timestep": torch.arange(1, count + 1).float(),
        "encoder_hidden_states": rows(6, 16, count=count, seed=1), "fps": 30, "attention_mask": None,
    }  # fmt: skip


def ernie(count: int) -> dict[str, Any]:
    return {
        "hidden_states": rows(16, 4, 4, count=count), "timestep": torch.linspace(0.1, 0.9, 3)[:count],
        "text_bth": rows(5, 16, count=count, seed=1), "text_lens": torch.full((count,), 5),
    }  # fmt: skip


def motion(count: int) -> dict[str, Any]:
    text = rows(4, 16, count=count, seed=1)
    return {
        "sample": rows(4, 3, 8, 8, count=count), "timestep": torch.tensor(7),
        "encoder_hidden_states": text.repeat_interleave(3, dim=0), "cross_attention_kwargs": None,
    }  # fmt: skip


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ZImageTransformer2DModel": (z_image, {
        "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 32, "n_layers": 2,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    }),
    "QwenImageTransformer2DModel": (qwen, {
        "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
    }),
    "LTXVideoTransformer3DModel": (ltx, {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "cross_attention_dim": 32, "caption_channels": 16,
    }),
    "CosmosTransformer3DModel": (cosmos, {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
        "concat_padding_mask": False,
    }),
    "ErnieImageTransformer2DModel": (ernie, {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 16,
        "out_channels": 16, "patch_size": 1, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4),
    }),
    "UNetMotionModel": (motion, {
        "block_out_channels": (16, 32), "norm_num_groups": 16, "layers_per_block": 1, "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "num_attention_heads": 2,
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "motion_num_attention_heads": 2,
    }),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**MODELS[name][1]).eval()
    for parameter in model.parameters():  # some are zero at first, and would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_samples_in_any_order_give_the_outputs_of_each(name):
    model, calls = build(name), MODELS[name][0]
    layout = divided(find_layout(calls(1), calls(2)))
    template, tensors = pack(calls(3), layout)
    whole = main_tensor(plain_output(model(**calls(3))))
    for chosen in ([2], [2, 0, 0, 1]):
        arguments = unpack(template, {key: tensor[chosen] for key, tensor in tensors.items()}, len(chosen))
        found = main_tensor(plain_output(model(**arguments)))
        for row, index in enumerate(chosen):
            alone = main_tensor(plain_output(model(**unpack(*pack(calls(3), layout, [index]), 1))))
            torch.testing.assert_close(found[row], whole[index], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found[row], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_one_call_tells_as_much_as_two(name):
    """Where calls with more samples are missing, the call's samples are doubled."""
    if name == "UNetMotionModel":
        pytest.skip("frames are folded into the batch: two calls are needed")
    model, calls = build(name), MODELS[name][0]
    arguments = {key: value for key, value in calls(2).items() if key != "return_dict"}
    pattern = pattern_of_call(model, arguments)
    expected = divided(find_layout(calls(1), calls(2)))
    found = {path: part for path, part in pattern.layout.items() if not path.startswith(OUTPUT)}
    assert found == expected
    assert pattern.same_time == (name == "ErnieImageTransformer2DModel")


def test_what_belongs_to_samples_is_compared_and_not_guessed():
    def call(images: int) -> dict[str, Any]:
        both = 2 * images
        return {
            "x": torch.zeros(both, 4), "rope": (torch.zeros(4, 8), torch.zeros(2)), "frames": torch.zeros(3, both * 5),
            "sizes": [(1, 2)] * both, "count": both, "name": "a", "none": None, "flag": True,
        }  # fmt: skip

    assert divided(find_layout(call(1), call(2))) == {
        "x": Rows(0), "rope.0": None, "rope.1": None, "frames": Rows(1, 5), "sizes": Entries(), "count": Multiple(),
    }  # fmt: skip
    template, tensors = pack(call(2), divided(find_layout(call(1), call(2))), [3])
    alone = unpack(template, tensors, 1)
    assert alone["sizes"] == [(1, 2)] and alone["count"] == 1 and alone["frames"].shape == (3, 5)
    assert pytree.tree_leaves(alone)[-3:] == ["a", None, True]


@pytest.mark.parametrize(("one", "two"), [((2, 2), (4, 4)), ((3,), (4,)), ((2,), (4, 1))])
def test_parts_that_cannot_be_divided_are_rejected(one, two):
    with pytest.raises(UnknownLayoutError, match=r"mask is .*; expected parts that grow"):
        find_layout({"mask": torch.zeros(one)}, {"mask": torch.zeros(two)})
