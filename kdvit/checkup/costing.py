"""What training will take, in words: gradients' balance, time, memory, what a stored teacher would save."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kdvit.cache.teacher import StoredTeacher, live_fault
from kdvit.checkup.findings import Finding, StepCost
from kdvit.checkup.plan import Plan
from kdvit.checkup.rehearsal import Rehearsed
from kdvit.checkup.wording import counted, duration, listed, mib
from kdvit.distiller import Distiller
from kdvit.wrappers import Teacher

#: A loss with less of the gradient is as good as switched off; and what a weight would be for a part that counts.
MIN_SHARE, FAIR_SHARE = 0.01, 0.1
#: Share of a CUDA device's memory that may be in use.
MAX_MEMORY = 0.9


def look_at_numbers(rehearsed: Rehearsed) -> Finding:
    if rehearsed.first_bad:
        return Finding(
            "error",
            "numbers",
            f"{rehearsed.first_bad} is NaN or infinite in the first {counted(rehearsed.num_steps, 'step')}.",
            "look at what goes into it; lower the weight or the learning rate, or train without mixed precision.",
        )
    return Finding(
        "ok",
        "numbers",
        f"finite in {counted(rehearsed.num_steps, 'step')}: weights, images, signals, losses, gradients",
    )


def look_at_gradients(distiller: Distiller, rehearsed: Rehearsed) -> Iterator[Finding]:
    """Which parameters do not learn, and whether that is to be expected."""
    trained = [name for name, p in distiller.named_parameters() if p.requires_grad]
    idle = {f"losses.{loss.name}." for loss in rehearsed.losses if loss.weight == 0}
    unmoved = [name for name in rehearsed.unmoved if not name.startswith(tuple(idle))]
    for names, sentence, cure in (
        (
            unmoved,
            f"exactly zero in all {counted(rehearsed.num_steps, 'step')} for",
            "a dead unit, a term that is cut off, a factor of 0; freeze the parameter if that is meant.",
        ),
        (
            rehearsed.missing,
            "missing in the step, though a loss reaches them in eval mode, for",
            "look for a branch that runs in eval mode alone.",
        ),
        (
            rehearsed.stray,
            "there in the step, though no loss reaches them in eval mode (so that DDP will not average them), for",
            "look for a branch that runs in training mode alone.",
        ),
    ):
        if names:
            words = f"the gradient is {sentence} {counted(len(names), 'parameter')}: {listed(names)}."
            yield Finding("warning", "gradients", words, cure)
    if not (unmoved or rehearsed.missing or rehearsed.stray) and not rehearsed.first_bad:
        unreached = distiller.parameters_without_gradient
        but = f"; {len(unreached)} lie behind what the losses read: {listed(unreached)}" if unreached else ""
        count = sum(name not in set(unreached) for name in trained)
        yield Finding("ok", "gradients", f"reach {count} of {counted(len(trained), 'trainable tensor')}{but}")


def look_at_balance(distiller: Distiller, rehearsed: Rehearsed) -> Iterator[Finding]:
    """Losses that hardly count at the start."""
    known = [loss for loss in rehearsed.losses if loss.gradient_share is not None]
    if len(known) < 2:
        return
    small = [loss for loss in known if loss.gradient_share < MIN_SHARE and not _comes_later(distiller, loss.name)]
    largest = max(known, key=lambda loss: loss.gradient_share)
    for loss in small:
        share, rest = loss.gradient_share, 1 - loss.gradient_share
        factor = FAIR_SHARE / (1 - FAIR_SHARE) * rest / share if share > 0 else 0
        weight = f"a weight of {factor * loss.weight:.2g} would give it {100 * FAIR_SHARE:.0f} %; " if factor else ""
        against = f"'{largest.name}' has {100 * largest.gradient_share:.3g} %"
        yield Finding(
            "warning",
            "weights",
            f"'{loss.name}' has {100 * share:.2g} % of the gradient at the start, {against}: it is as good as off.",
            f"{weight}or leave it out." if weight else "give it a weight, or leave it out.",
        )
    if not small:
        parts = [
            f"{loss.name} {100 * loss.gradient_share:.0f} %{' (its schedule starts later)' if loss.weight == 0 else ''}"
            for loss in known
        ]
        yield Finding("ok", "weights", f"of the gradient at the start: {listed(parts, 6)}")


def look_at_time(distiller: Distiller, cost: StepCost, plan: Plan, device: str) -> Iterator[Finding]:
    """Time of the run, and without the teacher."""
    seconds = cost.total_seconds
    words = f"{duration(seconds)} a step, {cost.images_per_second:,.0f} images/s on {device}"
    total = None
    if plan.num_steps is not None:
        total = plan.num_steps * seconds + _evaluation_seconds(cost, plan)
        evaluations = f" and {counted(plan.num_evaluations, 'evaluation')}" if plan.num_evaluations else ""
        words += f"; {counted(plan.num_steps, 'step')}{evaluations} take about {duration(total)}"
    waits = cost.seconds["data"] / seconds
    if waits > 0.3:
        words += f"; {100 * waits:.0f} % of it waits for data: more --num-workers may help"
    yield Finding("ok", "time", words)
    if "teacher" not in cost.seconds:
        return
    share = cost.seconds["teacher"] / seconds
    words = f"takes {100 * share:.0f} % of a step"
    live = [f"{name} {live_fault(loss)}" for name, loss in distiller.losses.items() if live_fault(loss)]
    if all(isinstance(teacher, StoredTeacher) for teacher in distiller.teachers):
        words = f"stored: reading it takes {100 * share:.0f} % of a step, beside what the loader does"
    elif live:
        words += f"; it must be live: {listed(live)}"
    elif total is not None:
        saved = total - plan.num_steps * cost.seconds["teacher"]
        words += f"; on a stored one (`kdvit cache build`) a run takes about {duration(saved)} instead"
    else:
        words += f"; on a stored one (`kdvit cache build`) it takes {duration(seconds - cost.seconds['teacher'])}"
    yield Finding("ok", "teacher time", words)


def look_at_memory(distiller: Distiller, rehearsed: Rehearsed, device: torch.device) -> Finding:
    """Peak, and the parts that are known."""
    if rehearsed.out_of_memory:
        return Finding(
            "error",
            "memory",
            f"step {rehearsed.num_steps + 1} does not fit into the memory of {device}.",
            "use smaller batches (with more accumulation steps), mixed precision, or a stored teacher.",
        )
    live = [teacher for teacher in distiller.teachers if isinstance(teacher, Teacher)]
    teachers = sum(x.numel() * x.element_size() for teacher in live for x in teacher.model.parameters())
    parts = {
        "student and projectors": rehearsed.weight_bytes,
        "gradients": rehearsed.gradient_bytes,
        "optimizer": rehearsed.optimizer_bytes,
        "teacher": teachers,
    }
    known = ", ".join(f"{name} {mib(size)}" for name, size in parts.items() if size)
    where = "of this device" if device.type == "cuda" else "of this process"
    words = f"{mib(rehearsed.peak_bytes)} at the peak {where}; of these {known}"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if rehearsed.peak_bytes > MAX_MEMORY * total:
            cure = "use smaller batches, or mixed precision: what is left over is needed too."
            return Finding("warning", "memory", f"{words}; the device has {mib(total)}.", cure)
    return Finding("ok", "memory", words)


def _comes_later(distiller: Distiller, name: str) -> bool:
    """A weight that a schedule raises later may be 0 now."""
    return callable(distiller.weights[name])


def _evaluation_seconds(cost: StepCost, plan: Plan) -> float:
    """The student is evaluated so often, each teacher once; an image takes what it takes in a step."""
    one = {phase: seconds / cost.num_images for phase, seconds in cost.seconds.items()}
    student = plan.num_evaluations * (one["data"] + one["student"])
    teacher = one["data"] + one.get("teacher", 0.0) if plan.num_evaluations else 0.0
    return plan.num_test_images * (student + teacher)
