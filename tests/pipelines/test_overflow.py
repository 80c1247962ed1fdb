import copy

import pytest
import torch

import stepquant
from stepquant.errors import StepquantError
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

SMALL = stepquant.Calibration(samples=4, steps=4)


@pytest.fixture
def pipeline(unconditional_pipeline):
    return copy.deepcopy(unconditional_pipeline)


def test_an_overflow_is_reported_with_the_layer_where_it_begins(pipeline):
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight.fill_(3e38)
    with pytest.raises(StepquantError) as caught:
        stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=SMALL)
    message = str(caught.value)
    assert "step 1 of the sampler" in message and "timestep 750" in message
    assert "layer mid_block.resnets.0.conv1 outputs" in message
    assert "\n" not in message


def test_the_step_is_the_one_where_it_first_appears(pipeline):
    """A time embedding that overflows below timestep 400: the third of four steps."""
    layer = pipeline.unet.time_embedding.linear_2
    original = layer.forward
    times = []

    def forward(x, *args):
        return original(x) * (float("nan") if times[-1] < 400 else 1)

    pipeline.unet.register_forward_pre_hook(lambda _module, args: times.append(float(args[1])))
    layer.forward = forward
    with pytest.raises(StepquantError, match=r"step 3 of the sampler \(timestep 250\): layer time_embedding.linear_2"):
        generate(pipeline, make_request(pipeline, 4), range(2), 0)


def test_a_fault_between_layers_names_the_layer_it_reaches(pipeline):
    attention = pipeline.unet.mid_block.attentions[0]
    with torch.no_grad():  # finite queries and keys whose product is not
        attention.to_q.weight.mul_(1e25)
        attention.to_k.weight.mul_(1e25)
    with pytest.raises(StepquantError, match=r"mid_block\.attentions\.0") as caught:
        generate(pipeline, make_request(pipeline, 2), range(1), 0)
    assert "the operation before layer mid_block.attentions.0.to_out.0" in str(caught.value)


def test_a_fault_in_the_conditions_is_distinguished(text_pipeline):
    pipeline = copy.deepcopy(text_pipeline)
    with torch.no_grad():
        for name, parameter in pipeline.text_encoder.named_parameters():
            if "final_layer_norm" in name:
                parameter.fill_(float("nan"))
    with pytest.raises(StepquantError, match="its input already contains NaN"):
        generate(pipeline, make_request(pipeline, 2), range(1), 0)


def test_hooks_are_removed_from_a_finite_model(pipeline):
    hooks = len(pipeline.unet._forward_hooks)
    generate(pipeline, make_request(pipeline, 2), range(1), 0)
    assert len(pipeline.unet._forward_hooks) == hooks
