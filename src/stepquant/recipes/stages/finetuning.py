"""Stages that train through the whole network: rank the layers, finetune some of them, train all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache

from stepquant.calibration.fake_quant.generator import TURNS
from stepquant.calibration.sensitivity import Method, Sensitivity, measure
from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.optimize.batches import Batches, TrajectoryBatches, image_batches
from stepquant.optimize.network import Finetuning, finetune
from stepquant.optimize.qat import Training, train
from stepquant.recipes.context import Context
from stepquant.recipes.stage import LEARNING, Cost, Stage, State, Workload
from stepquant.recipes.stages.samples import trajectories
from stepquant.settings import Positive, Share

TIME, CRITICAL = "time", "critical"
"""Groups of layers that `Finetune.layers` may name."""


class RankLayers(Stage):
    """Rank layers by the error that quantizing each causes, and choose the critical ones, the time layers aside."""

    method: Method = "leave-one-out"
    samples: Positive = 64
    """Of the calibration samples, how many are looked at."""
    share: Share = 0.05
    """Of all weights, that the critical layers have together at most."""

    def cost(self, workload: Workload) -> Cost:
        samples = min(self.samples, workload.calibration.samples)
        # On average half of the blocks answer from memory.
        return Cost(f"rank {workload.layers} layers", samples * (2 + workload.layers / 2))

    def run(self, context: Context, state: State) -> None:
        # The share plays no part in what is measured.
        key = self.replace(share=0.0).key(context, state)
        state.ranking = measure(
            state.model,
            context.description.blocks,
            state.samples.first(self.samples),
            self.method,
            batch_size=context.chunk,
            workspace=context.workspace,
            stage=key,
            progress=context.progress,
        )
        state.critical = most_critical(state.ranking, self.share, _time_layers(context, state))
        errors = (f"{name} {state.ranking.mean[name]:.1%}" for name in state.critical)
        context.progress.note("critical layers: " + ", ".join(errors))


def most_critical(ranking: Sensitivity, share: float, excluded: Collection[str] = ()) -> tuple[str, ...]:
    """The layers that cause most error, most first, which have at most `share` of all weights together."""
    left = share * sum(ranking.sizes.values())
    chosen = []
    for name in ranking.ranking():
        if name not in excluded and ranking.sizes[name] <= left and ranking.mean[name] > 0:
            left -= ranking.sizes[name]
            chosen.append(name)
    return tuple(chosen)


class Finetune(Finetuning, Stage):
    """Train weights, biases and activation scales of some layers against full precision, through the network."""

    layers: tuple[str, ...]
    """Which: ``"time"``, those that depend on the timestep alone; ``"critical"``, those that `RankLayers` chose; or
    regular expressions over names."""
    frozen: tuple[str, ...] = ()
    """Those whose scales stay as they are."""

    def check(self, context: Context) -> None:
        context.check_whole("finetuning")

    def cost(self, workload: Workload) -> Cost:
        batch = min(self.batch_size, workload.calibration.samples)
        what = f"{self.name[:1].lower()}{self.name[1:]}, {self.iterations} iterations"
        return Cost(what, (LEARNING + 1) * self.iterations * batch, held=batch, copies=0.5)

    def run(self, context: Context, state: State) -> None:
        finetune(
            context.reference,
            state.model,
            state.samples,
            tuple(dict.fromkeys(self._names(self.layers, context, state))),
            self,
            frozen=frozenset(self._names(self.frozen, context, state)),
            workspace=context.workspace,
            key=self.key(context, state),
            seed=context.seed,
            progress=context.progress,
        )

    def _names(self, groups: tuple[str, ...], context: Context, state: State) -> Iterator[str]:
        for group in groups:
            if group == TIME:
                yield from _time_layers(context, state)
            elif group == CRITICAL:
                yield from state.critical
            else:
                names = [name for name in state.model.layers if re.search(group, name)]
                if not names:
                    raise StepquantError(f"no layer of the model is one of {group!r}: choose others with `critical`.")
                yield from names


def _time_layers(context: Context, state: State) -> tuple[str, ...]:
    return context.description.time_layers_in(state.model.layers)


class Train(Training, Stage):
    """Train everything at once, on images or on full precision's answers (quantization-aware training)."""

    distill: bool = False
    """Learn full precision's answers on the images; without images they are learned anyway, on trajectories."""
    refresh: int = 500
    """Iterations after which other trajectories are generated; 0 keeps the first."""

    def check(self, context: Context) -> None:
        context.check_whole("training")

    def cost(self, workload: Workload) -> Cost:
        what = f"training, {self.iterations} iterations"
        return Cost(what, LEARNING * self.iterations * self.batch_size, held=self.batch_size, copies=5)

    def run(self, context: Context, state: State) -> None:
        images = context.images
        # Noised images come at every timestep, and the paper's features serve; trajectories leave some out.
        generation = self.generation
        if images is None and not generation.published:
            generation = generation.replace(turns=TURNS)
        learned_from = "trajectories" if images is None else images.key()
        train(
            state.model,
            self._batches(context, learned_from),
            self.replace(generation=generation),
            workspace=context.workspace,
            key=digest([self.key(context, state), learned_from]),
            seed=context.seed,
            progress=context.progress,
        )

    def _batches(self, context: Context, learned_from: str) -> Batches:
        if context.images is None:
            collected = lru_cache(1)(lambda index: trajectories(context, index))
            return TrajectoryBatches(collected, self.refresh, self.batch_size)
        name = f"latents-{digest([context.sampling_key, self.version, learned_from])[:16]}"
        return image_batches(
            context.pipeline,
            context.reference,
            context.images,
            lambda compute: context.cached(name, compute, shared=True)["latents"],
            size=self.batch_size,
            distill=self.distill,
            progress=context.progress,
        )
