"""The optimization loop: interruption, gradient clipping, averaging, and equality with torch."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from stepquant.distributed import Ranks
from stepquant.optimize.trainer import SAVE_EVERY, Checkpoint, optimize
from stepquant.workspace import Workspace


class Stop(Exception):
    """Simulates a kill."""


def stop_after(iterations):
    left = [iterations]

    def advance(n: int) -> None:
        left[0] -= n
        if left[0] < 0:
            raise Stop

    return advance


def minimize(folder, iterations=2 * SAVE_EVERY, advance=lambda n: None):
    torch.manual_seed(0)
    x = torch.zeros(3, requires_grad=True)

    def loss(iteration: int) -> torch.Tensor:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(iteration))
        return (x - 1 + 0.1 * noise).square().sum()

    checkpoint = Checkpoint(Workspace(folder), "stage")
    optimize([{"params": [x], "lr": 0.1}], loss, iterations, ranks=Ranks(), advance=advance, checkpoint=checkpoint)
    return x.detach()


def test_an_interrupted_optimization_ends_in_the_same_bytes(tmp_path):
    whole = minimize(tmp_path / "whole")
    assert torch.allclose(whole, torch.ones(3), atol=0.05)
    with pytest.raises(Stop):
        minimize(tmp_path / "killed", advance=stop_after(SAVE_EVERY + 10))
    assert torch.equal(minimize(tmp_path / "killed"), whole)


def test_gradients_are_clipped_and_weights_averaged(tmp_path):
    def run(name, advance=lambda n: None, **options):
        x = torch.zeros(2, requires_grad=True)
        seen = []

        def loss(iteration: int) -> torch.Tensor:
            seen.append(x.detach().clone())
            return (x * torch.tensor([1000.0, 0.0])).sum() if iteration % 2 else (x - 1).square().sum()

        checkpoint = Checkpoint(Workspace(tmp_path / name), "stage")
        groups = [{"params": [x], "lr": 0.1}]
        optimize(groups, loss, 2 * SAVE_EVERY, ranks=Ranks(), advance=advance, checkpoint=checkpoint, **options)
        return x.detach(), seen

    free, _ = run("free")
    clipped, steps = run("clipped", clip_norm=1.0)
    assert abs(float(clipped[0] - 1)) < abs(float(free[0] - 1)), "huge gradients do not dominate the others"
    averaged, same = run("averaged", clip_norm=1.0, ema_decay=0.9)
    assert torch.equal(torch.stack(steps), torch.stack(same)), "averaging does not affect training"
    expected = torch.zeros(2)
    for iteration, x in enumerate([*steps[1:], clipped]):
        expected.lerp_(x, 1 - min(0.9, (1 + iteration) / (10 + iteration)))
    assert torch.allclose(averaged, expected) and not torch.equal(averaged, clipped)
    with pytest.raises(Stop):
        run("killed", stop_after(SAVE_EVERY + 10), clip_norm=1.0, ema_decay=0.9)
    assert torch.equal(run("killed", clip_norm=1.0, ema_decay=0.9)[0], averaged)


@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_those_of_torch_bit_for_bit(fused):
    """With a cosine schedule in closed form, or torch's recursive one."""

    def start():
        return torch.linspace(-1, 1, 7).requires_grad_()

    def loss(x):
        return (x.square() - 0.3).square().sum()

    def by_hand(recursive):
        x = start()
        optimizer = torch.optim.Adam([x], lr=0.05, fused=fused)
        schedule = CosineAnnealingLR(optimizer, 20)
        for iteration in range(20):
            optimizer.zero_grad()
            loss(x).backward()
            if not recursive:
                optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * iteration / 20))
            optimizer.step()
            if recursive:
                schedule.step()
        return x.detach()

    for recursive in (False, True):
        x = start()
        options = {"schedule": lambda optimizer, n, _: CosineAnnealingLR(optimizer, n)} if recursive else {}
        optimize(
            [{"params": [x], "lr": 0.05}], lambda _, x=x: loss(x), 20, ranks=Ranks(), advance=lambda n: None,
            fused=fused, **options,
        )  # fmt: skip
        assert torch.equal(x.detach(), by_hand(recursive))
