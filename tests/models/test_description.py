import pytest
import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.models import denoiser_name, describe
from stepquant.pipelines.call import kind_of

PIPELINES = ("unconditional_pipeline", "class_pipeline", "text_pipeline")


def call(pipeline, batch: int = 2):
    """One forward pass of a pipeline's denoiser with random inputs."""
    model = getattr(pipeline, denoiser_name(pipeline))
    size = model.config.sample_size
    arguments = {"sample": torch.randn(batch, model.config.in_channels, size, size)}
    if kind_of(pipeline) == "class":
        arguments = {"hidden_states": arguments["sample"], "class_labels": torch.arange(batch)}
    if hasattr(pipeline, "text_encoder"):
        arguments["encoder_hidden_states"] = torch.randn(batch, 7, model.config.cross_attention_dim)
    return model(timestep=torch.arange(batch) * 300, **arguments)


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_are_disjoint_complete_and_in_execution_order(name, request):
    pipeline = request.getfixturevalue(name)
    model = getattr(pipeline, denoiser_name(pipeline))
    description = describe(model)
    ran: list[str] = []
    handles = [
        model.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in description.blocks
    ]
    call(pipeline)
    for handle in handles:
        handle.remove()
    assert ran == list(description.blocks)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert sorted(description.layers) == sorted(layers), "every layer in exactly one block"


@pytest.mark.parametrize("name", PIPELINES)
def test_time_layers_depend_only_on_the_timestep(name, request):
    """With other noise and conditions, the inputs of time layers stay the same; those of other layers change."""
    pipeline = request.getfixturevalue(name)
    model = getattr(pipeline, denoiser_name(pipeline))
    description = describe(model)
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in description.layers}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].append(args[0]))
        for layer in description.layers
    ]
    for seed in (0, 1):
        torch.manual_seed(seed)
        call(pipeline)
    for handle in handles:
        handle.remove()
    fixed = {layer for layer, inputs in seen.items() if torch.equal(inputs[0], inputs[len(inputs) // 2])}
    by_class = {layer for layer in fixed if "norm1.linear" in layer or layer == "proj_out_1"}
    assert fixed - by_class == set(description.time_layers)


@pytest.mark.parametrize("name", ["unconditional_pipeline", "text_pipeline"])
def test_skip_splits_match_the_concatenations(name, request, monkeypatch):
    pipeline = request.getfixturevalue(name)
    original, widths = torch.cat, []

    def spy(tensors, dim=0, **kwargs):
        if dim == 1 and len(tensors) == 2 and tensors[0].dim() == 4:
            widths.append((tensors[0].shape[1], tensors[1].shape[1]))
        return original(tensors, dim=dim, **kwargs)

    monkeypatch.setattr(torch, "cat", spy)
    call(pipeline)
    monkeypatch.undo()
    splits = describe(pipeline.unet).skip_splits
    conv1 = {name: split for name, split in splits.items() if name.endswith("conv1")}
    found = [(split, pipeline.unet.get_submodule(name).in_channels - split) for name, split in conv1.items()]
    assert found == widths and widths


def test_an_unknown_denoiser_is_rejected():
    with pytest.raises(StepquantError, match="Linear"):
        describe(nn.Linear(1, 1))
    with pytest.raises(StepquantError, match="no denoiser"):
        denoiser_name(object())
