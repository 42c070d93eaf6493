"""Runs of several parts: pretrain with features, then fine-tune with labels; each part is a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from kdvit.data import ImageData, TransformSettings
from kdvit.distiller import Distiller
from kdvit.training.settings import Training
from kdvit.training.trainer import Result, Trainer


@dataclass(frozen=True)
class Stage:
    """One part of a run.

    Args:
        name: of its folder, behind its number.
        distiller: makes what this part minimises, around the student that all parts train.
        settings: of this part; its schedule starts anew.
        transform: see `Trainer`.
    """

    name: str
    distiller: Callable[[], Distiller]
    settings: Training
    transform: TransformSettings | None = None


def run_stages(
    stages: Sequence[Stage], data: ImageData, folder: str | Path, *, resume: bool = False, quiet: bool = False
) -> list[Result]:
    """Train the parts one after the other, each in ``folder/1-NAME``, ``folder/2-NAME``, ...

    The student goes on with the weights that the part before saved: those of the average where there is one. Optimizer,
    learning rate and the losses' own parameters start anew.

    Args:
        stages: whose distillers all hold the same student model.
        data: see `Trainer`.
        folder: made if missing.
        resume: finished parts are not trained again, and a part that was stopped goes on where it was.
        quiet: show nothing.

    Returns:
        The result of each part; the last one's ``folder / "student"`` is the student.

    Raises:
        ValueError: there is no part, two have one name, or they hold different students; and what `Trainer` raises.

    Example:
        ``run_stages([Stage("features", lambda: Distiller(teacher, student, ["vitkd"], task_loss=None), Training()),
        Stage("labels", lambda: Distiller(None, student, []), Training(epochs=5, lr=1e-4))], data, "runs/two")``
    """
    names = [stage.name for stage in stages]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"run_stages: stages must have different names, at least one, got {names}; name each once.")
    results: list[Result] = []
    student: nn.Module | None = None
    for number, stage in enumerate(stages, start=1):
        distiller = stage.distiller()
        if student is not None and distiller.student.model is not student:
            raise ValueError(
                f"run_stages: all stages must train one student model, got another one in '{stage.name}'; make the "
                "student once, before the stages."
            )
        student = distiller.student.model
        trainer = Trainer(
            distiller,
            data,
            stage.settings,
            Path(folder) / f"{number}-{stage.name}",
            transform=stage.transform,
            resume=resume,
            title=stage.name,
            quiet=quiet,
        )
        results.append(trainer.fit())
        trainer.weights.adopt_average()
    return results
