import torch

from stepquant.calibration.fake_quant.weight import WeightPoint


def test_weight_codes_agree_with_the_simulated_weight_nearest_and_learned():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    for bits in (4, 6, 8):
        quantizer = WeightPoint(weight, bits, (3, 5), "minmax")
        for _ in range(2):
            scale, zero_point = quantizer.quantizer.grid.expanded(weight)
            codes = quantizer.codes(weight)
            assert torch.allclose((codes.float() - zero_point) * scale, quantizer(weight))
            rounding = quantizer.adaround(weight)
            low, high = (0 - zero_point) * scale, ((1 << bits) - 1 - zero_point) * scale
            start = torch.maximum(torch.minimum(weight, high), low)
            assert torch.allclose(quantizer(weight), start, atol=1e-5), "the soft weight starts at the unrounded one"
            rounding.data = torch.randn(rounding.shape, generator=generator)
            quantizer.freeze(weight)
        if bits == 8:
            assert bool((quantizer.zero_point == 128).all())


def test_codes_of_a_balanced_weight_are_those_of_the_simulated_one():
    torch.manual_seed(5)
    weight = torch.randn(6, 8, 3, 3)
    quantizer = WeightPoint(weight, 4, (3, 5), "minmax")
    quantizer.smooth(weight, torch.rand(8) + 0.1)
    for start in (quantizer.adaround, quantizer.finetune):
        start(weight).data.normal_()
        quantizer.freeze(weight)
        scale, zero_point = quantizer.quantizer.grid.expanded(weight)
        torch.testing.assert_close((quantizer.codes(weight).float() - zero_point) * scale, quantizer(weight))


def test_a_released_weight_starts_at_its_codes_and_moves_with_its_scale():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    for bits in (4, 8):
        quantizer = WeightPoint(weight, bits, (3, 5), "least-error")
        moved = quantizer.codes(weight).int() + torch.randint(-1, 2, weight.shape, generator=generator)
        quantizer.set_codes(moved.clamp(0, (1 << bits) - 1).to(torch.uint8))  # not the nearest: gptq-rounded
        scale_before = quantizer.scale.clone()
        start = quantizer(weight).clone()
        learned = weight.clone()
        (logarithm,) = quantizer.lsq(learned)
        assert logarithm.shape == (2, 6), "a scale for each group and output channel"
        assert torch.allclose(quantizer(learned), start, atol=1e-6)
        learned.requires_grad_()
        target = 1.5 * weight
        optimizer = torch.optim.Adam([{"params": [learned, logarithm], "lr": 0.02}])
        errors = []
        for _ in range(60):
            error = (quantizer(learned) - target).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.2 * errors[0]
        before = quantizer(learned).detach()
        quantizer.freeze(learned)
        assert bool((quantizer.scale > 1.1 * scale_before).all())
        scale, zero_point = quantizer.quantizer.grid.expanded(weight)
        assert torch.allclose((quantizer.codes(learned).float() - zero_point) * scale, before, atol=1e-6)


def test_the_gradient_of_a_weight_scale_is_that_of_lsq():
    """``1 / sqrt(numel * qmax)`` times the sum over a channel and group of ``code - w/s``, or the clipped end."""
    weight = torch.randn(3, 6, 2, 2, generator=torch.Generator().manual_seed(5))
    quantizer = WeightPoint(weight, 4, (2, 4), "least-error")
    (logarithm,) = quantizer.lsq(weight.clone())
    weight[0, 0, 0, 0] = 100.0  # far outside
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (quantizer(weight) * upstream).sum().backward()
    for group, channels in enumerate((slice(0, 2), slice(2, 6))):
        scale, zero_point = quantizer.scale[group], quantizer.zero_point[group]
        for out in range(3):
            steps = weight[out, channels] / scale[out]
            codes = (steps.round() + zero_point[out]).clamp(0, 15) - zero_point[out]
            inside = (steps >= -zero_point[out]) & (steps <= 15 - zero_point[out])
            slope = torch.where(inside, codes - steps, codes) * upstream[out, channels]
            expected = slope.sum() / (steps.numel() * 15) ** 0.5 * scale[out]  # of the logarithm: times the scale
            assert torch.allclose(logarithm.grad[group, out], expected, rtol=1e-4, atol=1e-6)
