"""Check the quantized denoisers of a pipeline, or one without a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from stepquant.assembly import pipeline_with, quantized_copy, record_in
from stepquant.calibration.samples import CalibrationSet
from stepquant.check.diagnosis import Finished, diagnose
from stepquant.check.result import Check, Mend, Policy, floor_of
from stepquant.distributed import Ranks
from stepquant.errors import LowQualityWarning, StepquantError
from stepquant.quality.blame import on_device, sample_decibels
from stepquant.quality.held_out import IMAGES, HeldOut, HeldOutCalls, HeldOutImages
from stepquant.recipes import Context
from stepquant.recipes.rounded import with_overrides
from stepquant.runtime import Backend


@contextmanager
def placed_all(contexts: Iterable[Context]) -> Iterator[None]:
    """Compute every denoiser where its context says."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context.placed())
        yield


@contextmanager
def _placed(finished: Sequence[Finished]) -> Iterator[None]:
    """The same for the quantized ones, too."""
    with placed_all(each.context for each in finished), ExitStack() as stack:
        for each in finished:
            context = each.context
            stack.enter_context(on_device(each.denoiser, context.description.blocks, context.device))
        yield


def checked_pipeline(pipeline: Any, finished: Sequence[Finished], policy: Policy, backend: Backend) -> Any:
    """Check a quantized pipeline; returns it with the result in its provenance, and with bits raised if so asked.

    Raises:
        StepquantError: in mode ``"error"``, for a fidelity below the floor.
    """
    finished = _checked(finished, check_images, policy, backend)
    return pipeline_with(pipeline, {each.context.component: each.denoiser for each in finished}), finished


def checked_model(finished: Finished, calls: CalibrationSet, policy: Policy, backend: Backend) -> Finished:
    """`checked_pipeline` of a denoiser without a pipeline, on calls that were recorded."""
    (better,) = _checked([finished], partial(check_calls, calls), policy, backend)
    return better


def _checked(
    finished: Sequence[Finished],
    measure: Callable[[Sequence[Finished]], tuple[Check, HeldOut]],
    policy: Policy,
    backend: Backend,
) -> Sequence[Finished]:
    """The denoisers with the check's result in their provenance, one of them with higher bits if the policy raises."""
    progress = finished[0].context.progress

    def measured() -> tuple[Check, HeldOut]:
        check, held_out = measure(finished)
        return (check if policy.target is None else replace(check, floor=policy.target)), held_out

    with _placed(finished):
        check, held_out = measured()
        if not check.holds:
            check = replace(check, diagnosis=diagnose(finished, check, held_out, backend, dynamic=not policy.raises))
    mend = None if check.diagnosis is None else check.diagnosis.mend
    if policy.raises and mend is not None:
        progress.note(f"{check.sentence()} That is done, and checked again.")
        finished = [with_mend(each, mend, backend) for each in finished]
        with _placed(finished):
            check, _ = measured()
    if not check.holds and policy.mode == "error":
        raise StepquantError(check.sentence())
    for each in finished:
        record_in(each.denoiser, {"check": check.record()})
    if not check.holds:
        warnings.warn(check.sentence(), LowQualityWarning, stacklevel=5)
    return finished


def with_mend(each: Finished, mend: Mend, backend: Backend) -> Finished:
    """The denoiser with the bits that mend it, if it is the one; its record names the raised layers."""
    if each.context.component != mend.component:
        return each
    spec = with_overrides(each.context.spec, mend.overrides)
    requested = each.record.get("requested_spec", each.record["spec"])
    record = each.record | {"spec": spec.model_dump(mode="json"), "requested_spec": requested, "raised": mend.overrides}
    denoiser = quantized_copy(each.context.denoiser, mend.quantization, spec, record, backend)
    return Finished(replace(each.context, spec=spec), mend.quantization, denoiser, record)


def check_images(finished: Sequence[Finished]) -> tuple[Check, HeldOutImages]:
    """Generate the held-out samples in full precision and with the quantized denoisers of one pipeline."""
    context = finished[0].context
    request = context.request
    quantized = {each.context.component: each.denoiser for each in finished}
    with context.progress.task("Checking on held-out samples", 2 * IMAGES * request.steps) as advance:
        held_out = HeldOutImages.generate(
            context.pipeline, request, context.calibration.images, IMAGES, context.seed, compared=quantized,
            on_step=lambda: advance(IMAGES),
        )  # fmt: skip
        found = sample_decibels(held_out, quantized)
        advance(IMAGES * request.steps)
    measure = "PSNR" if held_out.reference.dim() in (4, 5) else "SNR"
    floor = floor_of([each.context.spec for each in finished], measure)
    errors = Ranks.current().broadcast(held_out.step_error)
    return Check(tuple(found), measure, floor, request.steps, errors), held_out


def check_calls(calls: CalibrationSet, finished: Sequence[Finished]) -> tuple[Check, HeldOutCalls]:
    """Compare the outputs of a denoiser without a pipeline on recorded calls."""
    (each,) = finished
    held_out = HeldOutCalls.of(each.context.denoiser, calls)
    found = sample_decibels(held_out, {each.context.component: each.denoiser})
    return Check(tuple(found), "SNR", floor_of([each.context.spec], "SNR"), held_out.steps, {}), held_out
