"""ClsDense: where an image stands among others, and each of its patches among the image's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdvit.losses.checks import built_width, choice, count, feature_pair, flag, not_built, number
from kdvit.losses.cls_queue import TeacherQueue, linear_head, queue_kl, unit
from kdvit.losses.dense import projected, token_grid
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.relations import relation_kl
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Grid, Location, ModelInfo, map_to_tokens, tokens_to_map


@register("cls_dense")
class ClsDense(Loss):
    """Pull the student's similarities between images, and between patches of an image, towards the teacher's.

    L = mean_i KL(softmax(t_i Q^T / T_g) || softmax(s_i Q^T / T_g))
      + local_weight * mean_{i,n} KL(softmax(y_in Y_i^T / T_l) || softmax(x_in X_i^T / T_l))

    The first term is `ClsQueue`'s, with its queue Q. Y_i are the teacher's patch tokens of image i and X_i those of
    the student, behind a linear layer of their own and interpolated to the teacher's grid; all vectors have length 1.
    A patch's similarity to itself, which is 1, stays in the softmax. No labels.

    Published: no task loss, this loss 1; 1 mixup weight per batch from U(0, 1), seen alike by both models; gradient
    clipped at 1; AdamW 5e-4 or LARS 1.8 at batch 1536.

    Args:
        temperature_global: T_g > 0. 0.07.
        temperature_local: T_l > 0. 0.07.
        local_weight: weight >= 0 of the second term. 1.
        queue_size: as of `ClsQueue`.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student's patches; negative counts from the
            end; or a share of the depth or a module path. Last.
        teacher_stage: the same of the teacher.
        normed_teacher: False: the teacher's pooled features and its map at teacher_stage, for any model; True: its
            class token and patch tokens after the final norm, as released, for a ViT. Take True for a ViT: few channels
            dominate the cosines of its un-normed tokens.
        resize: how, where the grids differ: "bilinear", "bicubic", "nearest": the student's map is interpolated to
            the teacher's grid; "pool": the larger is average-pooled.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        student_feature_map: (B, D_s', h_s, w_s).
        teacher_pooled: (B, D_t), the same of the teacher.
        teacher_feature_map: (B, D_t', h_t, w_t).
        teacher_normed_cls_token: (B, D_t), in place of teacher_pooled with normed_teacher.
        teacher_normed_patch_tokens: (B, N, D_t), without prefix tokens, in place of teacher_feature_map.

    Returns:
        ``{"global": first term, "local": second term}``, scalars >= 0 in nats, local_weight included; 0 where the
        similarities are equal.

    Raises:
        ValueError: a number is out of its range; resize is unknown; inputs differ in B, or from build in D; the grid
            of the tokens is not known; that of a model is 1x1.
        TypeError: an argument is of the wrong kind; an input of the teacher is missing.
        RuntimeError: called before build.

    Source:
        LightlyTrain, Distillation v3, https://github.com/lightly-ai/lightly-train.
        Checked against lightly-ai/lightly-train@8f5a75c; differs in: one queue (there, one per process); the
        student's un-normed map of a ViT (there, behind its final norm); any teacher.

    Example:
        >>> import torch
        >>> from kdvit.losses import ClsDense
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> pooled, same = torch.ones(1, 2), torch.ones(1, 2, 1, 2)
        >>> other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # two patches at right angles
        >>> info = ModelInfo.of(pooled=SignalInfo.of("pooled", pooled),
        ...                     feature_map=SignalInfo.of("feature_map", other))
        >>> loss = ClsDense(temperature_local=1.0, queue_size=4)
        >>> loss.build(info, info)
        >>> terms = loss(pooled, same, pooled, other)
        >>> round(terms["local"].item(), 4)  # scores (1, 0) against (1, 1): 0.7311 ln 1.4621 + 0.2689 ln 0.5379
        0.1109
    """

    mismatch = Mismatch(
        width="linear layers, also where they are equal",
        depth="the pooled features and one stage",
        grid="the student's map is interpolated to the teacher's",
    )

    def __init__(
        self,
        temperature_global: float = 0.07,
        temperature_local: float = 0.07,
        local_weight: float = 1.0,
        queue_size: int | None = None,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        normed_teacher: bool = False,
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        self.temperature_global = number(
            self, "temperature_global", temperature_global, "> 0", "the published value is 0.07"
        )
        self.temperature_local = number(
            self, "temperature_local", temperature_local, "> 0", "the published value is 0.07"
        )
        self.local_weight = number(self, "local_weight", local_weight, ">= 0", "0 switches the local term off")
        self.queue_size = queue_size
        if queue_size is not None:
            count(self, "queue_size", queue_size, "None follows the number of training images")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.normed_teacher = flag(self, "normed_teacher", normed_teacher)
        self.resize = choice(self, "resize", resize, RESIZES)
        self.queue: TeacherQueue | None = None

    def inputs(self) -> tuple[str, ...]:
        return ("student_pooled", "student_feature_map", *(f"teacher_{signal}" for signal in self._teacher_signals))

    @property
    def _teacher_signals(self) -> tuple[str, str]:
        return ("normed_cls_token", "normed_patch_tokens") if self.normed_teacher else ("pooled", "feature_map")

    def locations(self) -> Mapping[str, Location]:
        student = {"student_feature_map": self.student_stage}
        return student if self.normed_teacher else student | {"teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        infos = [teacher[signal] for signal in self._teacher_signals]
        self.grid = token_grid(self, infos[1])
        self._check_grid(student["feature_map"].grid)
        self.teacher_dims = tuple(info.dim for info in infos)
        self.global_head = linear_head(student["pooled"].dim, self.teacher_dims[0])
        self.local_head = linear_head(student["feature_map"].dim, self.teacher_dims[1])
        self.queue = TeacherQueue(self.queue_size, self.teacher_dims[0])

    def _check_grid(self, student_grid: Grid) -> None:
        """One patch alone has nothing to be similar to: its term would be the same whatever the student does.

        Interpolation makes more patches of it, but they are all alike.
        """
        grid = min(self.grid[0], student_grid[0]), min(self.grid[1], student_grid[1])
        if self.local_weight and grid == (1, 1):
            raise ValueError(
                "ClsDense: grid must have at least 2 patches to compare, got 1x1; choose earlier stages or larger "
                "images, or pass local_weight=0."
            )

    def allocate(self, num_samples: int) -> None:
        if self.queue is None:
            raise not_built(self)
        self.queue.allocate(num_samples)

    def forward(
        self,
        student_pooled: Tensor,
        student_feature_map: Tensor,
        teacher_pooled: Tensor | None = None,
        teacher_feature_map: Tensor | None = None,
        teacher_normed_cls_token: Tensor | None = None,
        teacher_normed_patch_tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.queue is None:
            raise not_built(self)
        given = (teacher_pooled, teacher_feature_map)
        if self.normed_teacher:
            given = (teacher_normed_cls_token, teacher_normed_patch_tokens)
        names = self.inputs()[2:]
        for name, x in zip(names, given, strict=True):
            if x is None:
                raise TypeError(
                    f"ClsDense: {name} must be given for normed_teacher={self.normed_teacher}; pass it by name."
                )
        pooled, patches = given
        patches = tokens_to_map(patches, self.grid) if self.normed_teacher else patches
        student, teacher = feature_pair(self, student_pooled, pooled, "student_pooled", names[0], "B, D")
        student_map, teacher_map = feature_pair(self, student_feature_map, patches, teacher_name=names[1])
        for name, x, dim in zip(names, (teacher, teacher_map), self.teacher_dims, strict=True):
            built_width(self, name, x, dim)
        return {
            "global": self._global(student, teacher),
            "local": self.local_weight * self._local(student_map, teacher_map),
        }

    def _global(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher = unit(teacher)
        queue = self.queue(teacher, remember=self.training)
        return queue_kl(unit(self.global_head(student)), teacher, queue, self.temperature_global)

    def _local(self, student: Tensor, teacher: Tensor) -> Tensor:
        maps = match_grids(projected(self.local_head, student), teacher, self.resize)
        x, y = (unit(map_to_tokens(m))[:, None] for m in maps)  # (B, 1, N, D)
        return relation_kl(x / self.temperature_local, x, y / self.temperature_local, y)
