"""KDFAS: covariance between tokens, a matrix that does not know how wide the features are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdvit.losses.checks import as_many, choice, feature_pair, paired
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.relations import gram_distance
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, map_to_tokens

#: What is averaged for the mean that is subtracted, as an axis of (B, N, D).
_AXES = {"channels": 2, "tokens": 1}


@register("kdfas")
class KDFAS(Loss):
    """Pull the covariances between the student's patches, at several stages, towards the teacher's.

    L = sum over stages of mean over B and entries of (C_s - C_t)^2,  C = (F - mean F) (F - mean F)^T / (D - 1)

    F are the N patches of an image, (N, D); C is (N, N), so that no projector is needed where the widths differ.
    The features keep their scale: models whose features differ much in size need a weight that fits.

    Published: beside KD on the logits, for face anti-spoofing; the paper's weights are not known to us.

    Args:
        center: which mean is taken away: "channels": of each patch over its channels, which makes C the covariance of
            patches whose observations are the channels; "tokens": of each channel over the patches.
        resize: where the grids differ: "pool" averages the larger to the smaller; "bilinear", "bicubic" and "nearest"
            bring the student's to the teacher's.
        student_stages: stages (CNN, hierarchical) or blocks (ViT) of the student, indices or shares of the depth.
        teacher_stages: as many of the teacher, pair by pair.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid, un-normed.
        teacher_feature_map: one (B, D_t, h, w) per stage.

    Returns:
        Scalar >= 0 in feature units to the fourth power; 0 where the covariances are equal, as for maps that differ by
        an order of the channels, or by an offset that ``center`` takes away.

    Raises:
        ValueError: an option is unknown; the lists of stages differ in length; inputs differ in B or are not one map
            for each stage.
        TypeError: an argument is of the wrong kind.

    Source:
        Zhang et al., KDFAS: Multi-stage Knowledge Distillation Vision Transformer for Face Anti-spoofing, PRCV 2023,
        https://doi.org/10.1007/978-981-99-8469-5_13: no official code; from the paper, its abstract: a covariance
        matrix against different widths, at several stages, beside KL of the logits. Our choice: what is centred, the
        squared error, the stages, and patches without prefix tokens.

    Example:
        >>> import torch
        >>> from kdvit.losses import KDFAS
        >>> student = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).view(1, 2, 1, 2)  # patches (1, 3) and (2, 2)
        >>> teacher = torch.zeros(1, 5, 1, 2)
        >>> loss = KDFAS(student_stages=(-1,), teacher_stages=(-1,))
        >>> loss((student,), (teacher,)).item()  # C_s = [[2, 0], [0, 0]]: 2^2 / 4
        1.0
    """

    mismatch = Mismatch(width="covariances have none", depth="pairs of stages", grid="the larger is average-pooled")

    def __init__(
        self,
        center: str = "channels",
        resize: str = "pool",
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
    ) -> None:
        super().__init__()
        self.center = choice(self, "center", center, _AXES)
        self.resize = choice(self, "resize", resize, RESIZES)
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def forward(self, student_feature_map: tuple[Tensor, ...], teacher_feature_map: tuple[Tensor, ...]) -> Tensor:
        maps = {"student_feature_map": student_feature_map, "teacher_feature_map": teacher_feature_map}
        as_many(self, self.student_stages, **maps)
        distances = []
        for pair in zip(student_feature_map, teacher_feature_map, strict=True):
            resized = match_grids(*feature_pair(self, *pair), self.resize)
            distances.append(gram_distance(*(self._centred(map_to_tokens(x)) for x in resized)))
        return torch.stack(distances).sum()

    def _centred(self, tokens: Tensor) -> Tensor:
        """(B, N, D) whose Gram matrix is the covariance."""
        centred = tokens - tokens.mean(dim=_AXES[self.center], keepdim=True)
        return centred * max(tokens.shape[2] - 1, 1) ** -0.5
