"""Two processes connected by gloo: the same result as one process, and no deadlock when one is killed."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import stepquant
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.optimize.reconstruction import GPTQ
from stepquant.pipelines.generate import generate, generate_many
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.recipes import QAT, QDiffusion, QuEST, Recipe, Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks
from stepquant.settings import Iterations
from stepquant.workspace import Workspace

# Forked children inherit the imported modules.
context = get_context("fork")


def run(work: Callable[[Ranks], object], folder: Path, count: int = 2) -> list[int | None]:
    """Run `work` in each of `count` processes; return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_child, args=(work, folder, rank, count)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a process hangs"
    return [process.exitcode for process in processes]


def _child(work: Callable[[Ranks], object], folder: Path, rank: int, count: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        work(Ranks.current())
    except StepquantError as error:
        (folder / f"error-{rank}").write_text(str(error))
        os._exit(2)
    os._exit(0)


def test_mapped_results_arrive_everywhere_in_order(tmp_path):
    def work(ranks: Ranks) -> None:
        worked = []

        def square(item: int) -> tuple[torch.Tensor, dict[str, object]]:
            worked.append(item)
            return torch.full((2, item), item**2, dtype=torch.bfloat16), {"item": item, "none": None}

        results = list(ranks.map(square, range(5)))
        assert worked == list(range(5))[ranks.rank :: 2]
        for item, (tensor, rest) in enumerate(results):
            assert tensor.shape == (2, item) and tensor.dtype == torch.bfloat16 and bool((tensor == item**2).all())
            assert rest == {"item": item, "none": None}
        assert ranks.gather(ranks.rank) == [0, 1]
        parameter = torch.nn.Parameter(torch.zeros(3))
        other = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.full((3,), float(1 + ranks.rank))
        ranks.all_reduce_gradients([parameter, other])
        assert parameter.grad.tolist() == [3, 3, 3] and other.grad.tolist() == [0, 0]

    assert run(work, tmp_path) == [0, 0]


def test_shares_cover_every_item_once():
    for items in (0, 1, 3, 16):
        for count in (1, 2, 5, 64):
            parts = [list(range(items))[Ranks(rank, count).share(items)] for rank in range(count)]
            assert [item for part in parts for item in part] == list(range(items))


def quantize(pipeline, folder: Path, **arguments):
    return stepquant.quantize(
        pipeline,
        "w4a8",
        calibration=stepquant.Calibration(samples=11, steps=3, trajectories=9),
        workspace=folder,
        **arguments,
    )


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# Trajectories, observed ranges, rounding in closed form: without training, results are equal bit for bit.
EXACT = {
    "minmax": {"recipe": "minmax"},
    "gptq": {"recipe": QDiffusion(iterations=0)},
    "per-step scales": {
        "recipe": QuEST(rounding_iterations=0, time_iterations=0, iterations=0, critical="attention"),
    },
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_several_processes_write_the_same_bytes_as_one(name, count, unconditional_pipeline, tmp_path):
    if count == 3 and name != "gptq":
        pytest.skip("one recipe is enough for an odd number of processes")
    alone = quantize(unconditional_pipeline, tmp_path / "alone", **EXACT[name])
    stepquant.save(alone, tmp_path / "one")

    def work(ranks: Ranks) -> None:
        together = quantize(unconditional_pipeline, tmp_path / "together", **EXACT[name])
        stepquant.save(together, tmp_path / "several")

    assert run(work, tmp_path / "run", count) == [0] * count
    assert_same_files(tmp_path / "one", tmp_path / "several")


def assert_nearly_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Up to 2 % of the bytes of codes may differ, and scales by 5 %.

    Summed in another order, gradients move a weight near the edge of its cell, which affects later blocks.
    """
    codes = differ = 0
    for name, mine in one.items():
        if name.endswith("weight_packed"):
            codes += mine.numel()
            differ += int((mine != other[name]).sum())
        elif name.endswith("_scale"):
            assert torch.allclose(mine, other[name], rtol=0.05), name
    assert differ <= 0.02 * codes


class TrainScales(Recipe):
    """Weights rounded in closed form, then activation scales trained with QDrop."""

    iterations: Iterations = 6

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),
            AddQuantizers(split_skips=True),
            ReconstructBlocks(iterations=self.iterations, rounding=GPTQ(rate=0.0), drop_probability=0.5),
        ]


TRAINED = {
    "network-wise": {
        "recipe": QuEST(rounding_iterations=0, time_iterations=2, iterations=3, weight_rate=0.05),
    },
}


def test_processes_divide_a_training_batch(unconditional_pipeline, tmp_path, monkeypatch):
    """Two and three of five samples: the gradients sum to those of one process."""
    kind, sizes, gradients = type(unconditional_pipeline.unet), [], []
    forward, add = kind.forward, Ranks.all_reduce_gradients

    @functools.wraps(forward)  # sample collection reads its signature
    def counted(self, sample, *args, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    def added(self, parameters):
        add(self, parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))

    monkeypatch.setattr(kind, "forward", counted)
    monkeypatch.setattr(Ranks, "all_reduce_gradients", added)
    arguments = {"distill": True, "recipe": QAT(intervals="static", iterations=1, batch_size=5)}
    arguments |= {"calibration": stepquant.Calibration(samples=8, steps=4)}
    stepquant.train(unconditional_pipeline, "w8a8", workspace=tmp_path / "alone", **arguments)
    assert sizes.pop() == 5
    alone = gradients.pop()

    def work(ranks: Ranks) -> None:
        stepquant.train(unconditional_pipeline, "w8a8", workspace=tmp_path / "together", **arguments)
        assert sizes == [3 if ranks.rank else 2]
        # With another batch size, products in bfloat16 sum in another order.
        assert torch.linalg.vector_norm(gradients[0] - alone) < 0.02 * torch.linalg.vector_norm(alone)

    assert run(work, tmp_path / "run") == [0, 0]


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_two_processes_agrees_up_to_rounding(name, text_pipeline, tmp_path):
    """QDrop noise is drawn per sample, so a divided minibatch differs only in the order of summation."""
    alone = quantize(text_pipeline, tmp_path / "alone", **TRAINED[name]).unet

    def work(ranks: Ranks) -> None:
        unet = quantize(text_pipeline, tmp_path / "together", **TRAINED[name]).unet
        if ranks.is_main:
            torch.save(unet.state_dict(), tmp_path / "state")

    assert run(work, tmp_path / "run") == [0, 0]
    assert_nearly_equal(alone.state_dict(), torch.load(tmp_path / "state"))


def test_processes_generate_the_same_images_as_one(unconditional_pipeline, tmp_path):
    request = make_request(unconditional_pipeline, 2)
    alone = [generate(unconditional_pipeline, request, range(start, start + 4), 5) for start in (0, 4, 8)]

    def work(ranks: Ranks) -> None:
        images = generate_many(unconditional_pipeline, request, 12, 5, Progress(), "", 4, ranks)
        assert torch.equal(images, torch.cat(alone))

    assert run(work, tmp_path) == [0, 0]


class Killed(Progress):
    """Kill the process (SIGKILL) after `units` of one task."""

    def __init__(self, task: str, units: int) -> None:
        self.name, self.left = task, units

    @contextmanager
    def task(self, description: str, total: int):
        def advance(n: int) -> None:
            if description.startswith(self.name):
                self.left -= n
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        yield advance


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_exits_and_the_run_can_continue(victim, unconditional_pipeline, tmp_path):
    settings = {"recipe": TrainScales(iterations=2)}
    whole = quantize(unconditional_pipeline, tmp_path / "whole", **settings).unet.state_dict()

    def work(ranks: Ranks) -> None:
        progress = Killed("Reconstructing", 12) if ranks.rank == victim else None
        quantize(unconditional_pipeline, tmp_path / "killed", progress=progress, **settings)

    codes = run(work, tmp_path / "run")
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2
    assert "Run the same command again" in (tmp_path / "run" / f"error-{1 - victim}").read_text()
    stored = {path.name for path in (tmp_path / "killed").glob("block-*")}
    assert len(stored) >= 4, "finished blocks are stored"
    continued = quantize(unconditional_pipeline, tmp_path / "killed", **settings).unet.state_dict()
    assert whole.keys() == continued.keys()
    assert all(bool(torch.isfinite(value.float()).all()) for value in continued.values())


def test_only_the_main_process_writes(tmp_path):
    Workspace(tmp_path, Ranks(1, 2)).save("stage", {"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
