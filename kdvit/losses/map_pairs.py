"""Feature maps of both models as pairs, stage by stage, with what must fit checked."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdvit.losses.checks import as_many, feature_pair
from kdvit.losses.loss import Loss
from kdvit.signals import Location


def map_pairs(
    owner: Loss,
    stages: Sequence[Location],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    signal: str = "feature_map",
) -> list[tuple[Tensor, Tensor]]:
    """One pair of maps (B, D, h, w) per stage, in float32 at least; the teacher's are detached."""
    names = f"student_{signal}", f"teacher_{signal}"
    as_many(owner, stages, **dict(zip(names, (student, teacher), strict=True)))
    return [feature_pair(owner, s, t, *names) for s, t in zip(student, teacher, strict=True)]
