"""Replayed blocks of real denoisers get and give what they do inside of the whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.calibration.buckets import Bucket
from stepquant.calibration.samples import CalibrationSet, join
from stepquant.models import describe
from stepquant.models.description import main_tensor
from stepquant.optimize.replay import Replay
from stepquant.pipelines.layout import divided, find_layout, pack
from tests.pipelines.test_layout import MODELS, build


def samples_of(name: str) -> tuple[CalibrationSet, dict[str, Any]]:
    """Three samples, and the call that they come from."""
    calls = MODELS[name][0]
    timestep = "t" if name.startswith("ZImage") else "timestep"

    def call(count: int) -> dict[str, Any]:
        arguments = {key: value for key, value in calls(count).items() if key != "return_dict"}
        return arguments | {timestep: torch.as_tensor(arguments[timestep]).expand(count)}

    template, tensors = pack(call(3), divided(find_layout(call(1), call(2))))
    numbers = torch.arange(3)
    return CalibrationSet((Bucket(template, tensors),), call(3)[timestep].float(), numbers, numbers, {}), call(3)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_blocks_of_any_model_are_replayed(name, tmp_path):
    model = build(name)
    samples, arguments = samples_of(name)
    blocks = describe(model, samples.arguments(slice(0, 1))).blocks
    seen: dict[str, Any] = {}
    for block in blocks:

        def keep(_module: Any, args: Any, kwargs: Any, output: Any, block: str = block) -> None:
            seen[block] = ((args, kwargs), main_tensor(output))

        model.get_submodule(block).register_forward_hook(keep, with_kwargs=True)
    model(**arguments)
    expected = dict(seen)
    replay = Replay(model, samples, 2, tmp_path)
    for block in blocks:
        inputs = replay.inputs(block)
        for mine, theirs in zip(*map(pytree.tree_leaves, (inputs.at(slice(0, 3)), expected[block][0])), strict=True):
            if isinstance(theirs, Tensor):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4, msg=f"input of {block}")
            elif isinstance(theirs, int | float | str | None):
                assert mine == theirs, block
        output = replay.run(block, inputs).at(slice(0, 3)).block
        torch.testing.assert_close(output, expected[block][1], rtol=1e-3, atol=1e-4, msg=f"output of {block}")
        chosen = torch.tensor([2, 0])
        (args, kwargs), module = inputs.at(chosen), model.get_submodule(block)
        again = replay._outputs[block].at(chosen)
        torch.testing.assert_close(main_tensor(module(*args, **kwargs)), main_tensor(again), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_samples_of_unequal_length_are_replayed_in_buckets(tmp_path):
    model = build("QwenImageTransformer2DModel")
    sets = []
    for number, (length, time) in enumerate([(7, 0.1), (5, 0.3), (7, 0.5), (5, 0.7), (5, 0.9)]):
        call = samples_of("QwenImageTransformer2DModel")[0].arguments(slice(number % 3, number % 3 + 1))
        call["encoder_hidden_states"] = call["encoder_hidden_states"][:, :length]
        call["encoder_hidden_states_mask"] = call["encoder_hidden_states_mask"][:, :length]
        call["timestep"] = torch.tensor([time])
        layout = divided(find_layout(call, {**call, **{k: _twice(v) for k, v in call.items()}}))
        position = torch.tensor([number])
        sets.append(CalibrationSet((Bucket(*pack(call, layout)),), call["timestep"], position, position, {}))
    samples = join(sets, tmp_path / "samples")
    assert [len(bucket) for bucket in samples.buckets] == [2, 3]
    assert samples.numbers.tolist() == [0, 2, 1, 3, 4]
    torch.testing.assert_close(samples.timesteps, torch.tensor([0.1, 0.5, 0.3, 0.7, 0.9]))
    stored = CalibrationSet.from_tensors(samples.to_tensors())
    assert samples.first(3).numbers.tolist() == stored.first(3).numbers.tolist() == [0, 2, 1]
    assert list(samples.batches(2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    for _ in range(20):
        chosen = samples.minibatch(4, torch.Generator().manual_seed(0))
        assert bool((chosen < 2).all()) or bool((chosen >= 2).all())
    with pytest.raises(ValueError, match="several buckets"):
        samples.arguments(slice(1, 3))

    blocks = describe(model, samples.arguments(slice(0, 1))).blocks
    (tmp_path / "replay").mkdir()
    replay = Replay(model, stored, 2, tmp_path / "replay")
    for block in blocks:
        outputs = replay.run(block, replay.inputs(block))
    for position, number in enumerate(samples.numbers.tolist()):
        alone: list[Tensor] = []
        handle = model.get_submodule(blocks[-1]).register_forward_hook(lambda *args, a=alone: a.append(args[2]))
        model(**sets[number].arguments(slice(0, 1)))
        handle.remove()
        found = outputs.at(slice(position, position + 1)).block
        torch.testing.assert_close(found, main_tensor(alone[0]), rtol=1e-3, atol=1e-4)


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) else value and value * 2
