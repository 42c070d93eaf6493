"""How far a student is from each of several teachers, image by image: what a loss weighs teachers with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdvit.losses.checks import as_many, feature_pair, logit_pair
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import conv_norm
from kdvit.losses.resizing import match_grids
from kdvit.signals import ModelInfo


def projectors_to(owner: Loss, student: ModelInfo, teachers: Sequence[ModelInfo]) -> nn.ModuleList:
    """From the student's feature map to that of each teacher: ReLU(BatchNorm(1x1 convolution)).

    Raises:
        ValueError: there is a single teacher, which needs no weights.
    """
    if len(teachers) < 2:
        raise ValueError(
            f"{type(owner).__name__}: teachers must be at least 2, got {len(teachers)}; pass a list of teachers, or "
            "choose a loss of one teacher."
        )
    return nn.ModuleList(conv_norm(student["feature_map"].dim, teacher["feature_map"].dim) for teacher in teachers)


def logit_distances(
    owner: Loss, student: Tensor, teachers: Sequence[Tensor], projectors: nn.ModuleList, temperature: float
) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each image: (B, number of teachers)."""
    as_many(owner, projectors, teachers_logits=teachers)
    pairs = (logit_pair(owner, student, teacher, teacher_name="teachers_logits") for teacher in teachers)
    rows = [kl_rows(s / temperature, t / temperature) for s, t in pairs]
    return temperature**2 * torch.stack(rows, dim=1)


def project(
    owner: Loss, student: Tensor, teachers: Sequence[Tensor], projectors: nn.ModuleList, resize: str
) -> list[tuple[Tensor, Tensor]]:
    """For each teacher the student's map, resized and projected, and the teacher's, of one shape (B, D_t, h, w)."""
    as_many(owner, projectors, teachers_feature_map=teachers)
    pairs = []
    for projector, teacher in zip(projectors, teachers, strict=True):
        ours, theirs = feature_pair(owner, student, teacher, teacher_name="teachers_feature_map")
        ours, theirs = match_grids(ours, theirs, resize)
        ours = at_least_float32(projector(ours))
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{type(owner).__name__}: teachers_feature_map must have D={ours.shape[1]} as in build, got "
                f"D={theirs.shape[1]}; build the loss for these teachers, in their order."
            )
        pairs.append((ours, theirs))
    return pairs


def map_distances(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean squared difference of each image: (B, number of teachers)."""
    return torch.stack([(ours - theirs).square().flatten(1).mean(dim=1) for ours, theirs in pairs], dim=1)
