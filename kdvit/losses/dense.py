"""Dense: the teacher's patch tokens, position by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import as_many, built_width, choice, feature_pair, flag, not_built, several
from kdvit.losses.cls_queue import linear_head
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, match_grids, resize
from kdvit.signals import Grid, Location, ModelInfo, SignalInfo, map_to_tokens, tokens_to_map


def projected(head: Projector, student_map: Tensor) -> Tensor:
    """A linear head at every position: (B, D_s, h, w) -> (B, D_t, h, w), in float32 at least."""
    tokens = at_least_float32(head(map_to_tokens(student_map)))
    return tokens_to_map(tokens, tuple(student_map.shape[2:]))


def token_grid(owner: Loss, info: SignalInfo) -> Grid:
    """The grid of a teacher's patch tokens."""
    if info.grid is None:
        raise ValueError(
            f"{type(owner).__name__}: teacher must have a patch grid, got none for {info.signal} of '{info.model}'; "
            "choose a model of patch tokens, or pass grid=."
        )
    return info.grid


@register("dense")
class Dense(Loss):
    """Pull a linear projection of the student's last map towards the teacher's last maps, position by position.

    L = mean over all elements of (resize(Lin(student)) - teacher)^2

    The teacher's maps are put together channel by channel: the last two blocks, so Lin goes from D_s to 2 * D_t. Every
    position of each of them is standardised over its channels (mean 0, variance 1), which stands for the teacher's
    final norm, as that is known of the last block alone. The student's map is interpolated to the teacher's grid.

    Published: no task loss, this loss 1; 1 mixup weight per batch from U(0, 1), seen alike by both models; gradient
    clipped at 1; LARS 9.0 (earlier 1.5) at batch 1536.

    Args:
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            share of the depth or a module path. Last.
        teacher_stages: the same of the teacher, one or more; the grid of the last one counts, to which others are
            resized by the same rule. The last two.
        standardize: False leaves the teacher's maps as they are.
        normed_teacher: True: the teacher's last patch tokens after its final norm, of a ViT, in place of
            teacher_stages and as they are; as released, but for the second last block.
        resize: how, where the grids differ: "bilinear", "bicubic", "nearest": the student's map is interpolated to
            the teacher's grid; "pool": the larger is average-pooled.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s).
        teacher_feature_map: one (B, D_t, h_t, w_t) per teacher stage.
        teacher_normed_patch_tokens: (B, N, D_t), without prefix tokens, in their place with normed_teacher.

    Returns:
        Scalar >= 0 in squared feature units; 0 where the projected map equals the teacher's.

    Raises:
        ValueError: resize is unknown; inputs differ in B, or from build in D or in number; the grid of the tokens is
            not known.
        TypeError: an argument is of the wrong kind; no teacher's map is given.
        RuntimeError: called before build.

    Source:
        LightlyTrain, Distillation v2, https://github.com/lightly-ai/lightly-train.
        Checked against lightly-ai/lightly-train@8f5a75c; differs in: standardised maps of both blocks (there, through
        the final norm with its weights); any teacher.

    Example:
        >>> import torch
        >>> from kdvit.losses import Dense
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(1, 3, 1, 1), torch.tensor([5.0, 1.0]).view(1, 2, 1, 1)
        >>> loss = Dense(teacher_stages=(-1,))
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=(SignalInfo.of("feature_map", teacher),)))
        >>> _ = loss.head[0].bias.data.copy_(torch.tensor([1.0, 0.0]))
        >>> round(loss(student, (teacher,)).item(), 4)  # (5, 1) is standardised to (1, -1): (0 + 1) / 2
        0.5
    """

    mismatch = Mismatch(
        width="a linear layer, also where they are equal",
        depth="one stage of the student, the last ones of the teacher",
        grid="the student's map is interpolated to the teacher's",
    )

    def __init__(
        self,
        student_stage: Location = -1,
        teacher_stages: Sequence[Location] = (-2, -1),
        standardize: bool = True,
        normed_teacher: bool = False,
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        self.student_stage = student_stage
        self.teacher_stages = several(self, "teacher_stages", teacher_stages)
        self.standardize = flag(self, "standardize", standardize)
        self.normed_teacher = flag(self, "normed_teacher", normed_teacher)
        self.resize = choice(self, "resize", resize, RESIZES)
        self.head: Projector | None = None

    def inputs(self) -> tuple[str, ...]:
        return ("student_feature_map", f"teacher_{'normed_patch_tokens' if self.normed_teacher else 'feature_map'}")

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        student = {"student_feature_map": self.student_stage}
        return student if self.normed_teacher else student | {"teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        if self.normed_teacher:
            tokens = teacher["normed_patch_tokens"]
            self.grid, dims = token_grid(self, tokens), [tokens.dim]
        else:
            dims = [info.dim for info in teacher["feature_map"]]
        self.teacher_dims = tuple(dims)
        self.head = linear_head(student["feature_map"].dim, sum(dims))

    def forward(
        self,
        student_feature_map: Tensor,
        teacher_feature_map: Sequence[Tensor] | None = None,
        teacher_normed_patch_tokens: Tensor | None = None,
    ) -> Tensor:
        if self.head is None:
            raise not_built(self)
        if (teacher_normed_patch_tokens if self.normed_teacher else teacher_feature_map) is None:
            raise TypeError(
                f"Dense: {self.inputs()[1]} must be given for normed_teacher={self.normed_teacher}; pass it by name."
            )
        maps = self._teacher_maps(teacher_feature_map, teacher_normed_patch_tokens)
        for x, dim in zip(maps, self.teacher_dims, strict=True):
            feature_pair(self, student_feature_map, x)
            built_width(self, self.inputs()[1], x, dim)
        # One map on the grid of the last.
        grid = tuple(maps[-1].shape[2:])
        teacher = torch.cat([resize(at_least_float32(x), grid, self.resize) for x in maps], dim=1).detach()
        return F.mse_loss(*match_grids(projected(self.head, student_feature_map), teacher, self.resize))

    def _teacher_maps(self, maps: Sequence[Tensor] | None, tokens: Tensor | None) -> Sequence[Tensor]:
        if self.normed_teacher:
            return [tokens_to_map(tokens, self.grid)]
        as_many(self, self.teacher_stages, teacher_feature_map=maps)
        return [_standardized(x) for x in maps] if self.standardize else maps


def _standardized(x: Tensor) -> Tensor:
    """Each position over its channels: LayerNorm without weights."""
    x = at_least_float32(x).movedim(1, -1)
    return F.layer_norm(x, x.shape[-1:]).movedim(-1, 1)
