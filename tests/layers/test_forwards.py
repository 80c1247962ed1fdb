"""A forward that is replaced for a while is put back as it was."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from stepquant.layers.forwards import replaced_forwards


@pytest.mark.parametrize("hooked", [True, False])
def test_forwards_are_put_back(hooked):
    layer = nn.Linear(2, 2)
    if hooked:
        add_hook_to_module(layer, ModelHook())
    before, x = vars(layer).get("forward"), torch.ones(1, 2)
    expected = layer(x)
    with pytest.raises(KeyError), replaced_forwards({layer: lambda x: 2 * x}):
        assert torch.equal(layer(x), 2 * x)
        raise KeyError
    assert vars(layer).get("forward") is before
    assert torch.equal(layer(x), expected)
