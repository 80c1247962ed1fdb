import torch

from stepquant.calibration.fake_quant.weight import WeightPoint


def test_codes_stand_for_the_simulated_weight():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    for bits in (4, 6, 8):
        point = WeightPoint(weight, bits, (3, 5), "minmax")
        for _ in range(2):
            scale, zero_point = point.quantizer.grid.expanded(weight)
            codes = point.codes(weight)
            assert torch.allclose((codes.float() - zero_point) * scale, point(weight))
            rounding = point.adaround(weight)
            low, high = (0 - zero_point) * scale, ((1 << bits) - 1 - zero_point) * scale
            start = torch.maximum(torch.minimum(weight, high), low)
            assert torch.allclose(point(weight), start, atol=1e-5), "the soft weight starts at the unrounded one"
            rounding.data = torch.randn(rounding.shape, generator=generator)
            point.freeze(weight)
        if bits == 8:
            assert bool((point.zero_point == 128).all())


def test_codes_of_a_smoothed_weight_stand_for_the_simulated_weight():
    torch.manual_seed(5)
    weight = torch.randn(6, 8, 3, 3)
    point = WeightPoint(weight, 4, (3, 5), "minmax")
    point.smooth(weight, torch.rand(8) + 0.1)
    for start in (point.adaround, point.finetune):
        start(weight).data.normal_()
        point.freeze(weight)
        scale, zero_point = point.quantizer.grid.expanded(weight)
        torch.testing.assert_close((point.codes(weight).float() - zero_point) * scale, point(weight))


def test_lsq_starts_at_the_codes_and_trains_weight_and_scale():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    for bits in (4, 8):
        point = WeightPoint(weight, bits, (3, 5), "least-error")
        moved = point.codes(weight).int() + torch.randint(-1, 2, weight.shape, generator=generator)
        point.set_codes(moved.clamp(0, (1 << bits) - 1).to(torch.uint8))  # not the nearest: gptq-rounded
        scale_before = point.scale.clone()
        start = point(weight).clone()
        learned = weight.clone()
        (logarithm,) = point.lsq(learned)
        assert logarithm.shape == (2, 6), "a scale for each group and output channel"
        assert torch.allclose(point(learned), start, atol=1e-6)
        learned.requires_grad_()
        target = 1.5 * weight
        optimizer = torch.optim.Adam([{"params": [learned, logarithm], "lr": 0.02}])
        errors = []
        for _ in range(60):
            error = (point(learned) - target).square().mean()
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.2 * errors[0]
        before = point(learned).detach()
        point.freeze(learned)
        assert bool((point.scale > 1.1 * scale_before).all())
        scale, zero_point = point.quantizer.grid.expanded(weight)
        assert torch.allclose((point.codes(learned).float() - zero_point) * scale, before, atol=1e-6)


def test_the_gradient_of_a_weight_scale_follows_lsq():
    """``1 / sqrt(numel * qmax)`` times the sum over a channel and group of ``code - w/s``, or the clipped end."""
    weight = torch.randn(3, 6, 2, 2, generator=torch.Generator().manual_seed(5))
    point = WeightPoint(weight, 4, (2, 4), "least-error")
    (logarithm,) = point.lsq(weight.clone())
    weight[0, 0, 0, 0] = 100.0  # far outside
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(6))
    (point(weight) * upstream).sum().backward()
    for group, channels in enumerate((slice(0, 2), slice(2, 6))):
        scale, zero_point = point.scale[group], point.zero_point[group]
        for out in range(3):
            steps = weight[out, channels] / scale[out]
            codes = (steps.round() + zero_point[out]).clamp(0, 15) - zero_point[out]
            inside = (steps >= -zero_point[out]) & (steps <= 15 - zero_point[out])
            slope = torch.where(inside, codes - steps, codes) * upstream[out, channels]
            expected = slope.sum() / (steps.numel() * 15) ** 0.5 * scale[out]  # of the logarithm: times the scale
            assert torch.allclose(logarithm.grad[group, out], expected, rtol=1e-4, atol=1e-6)
