"""AFD: every map of the teacher finds the maps of the student that it can teach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.activity import activity, as_direction
from kdvit.losses.branches import pooled
from kdvit.losses.checks import as_many, count, feature_pair, not_built, several, several_positions
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import BatchNorm1d, Projector
from kdvit.losses.resizing import resize
from kdvit.signals import Location, ModelInfo

Maps = Sequence[Tensor]


@register("afd")
class AFD(Loss):
    """Pull where the student's maps are active towards where the teacher's are, most for the pairs that fit.

    L = sum_t mean_i sum_s a_its * mean over positions of (v(F_s) - v(F_t))^2,
    v(F) = f / |f|, f = mean over channels of F^2;  a_it: = softmax over s((B_t k_s . q_t + p_t . p_s) / sqrt(d)),
    q_t = BatchNorm(Linear_t(mean over positions of F_t)), k_s = ReLU(BatchNorm(Linear_s(mean over positions of F_s)))

    s and t run over the maps of the student and the teacher: their numbers may differ. f of the student is pooled to
    the teacher's grid; (B_t k_s) for all t is BatchNorm(Linear(k_s)), over all images and s together; p are learned
    places. A teacher's map thus chooses among the student's, image by image, and what it does not choose it leaves
    alone. The choice is trained by this loss too, so that it favours pairs that are near already.

    Published: task weight 1, this loss 200 and beside it 0.9 `KD` of temperature 4; CIFAR-100, 240 epochs, every
    residual block of both CNNs.

    Args:
        student_stages: blocks or stages of the student, shares of its depth, or module paths; one or more.
        teacher_stages: the same of the teacher; as many as one likes.
        attention_dim: d > 0, the width of q, k and p. 128.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per student stage; of a ViT its patch tokens on their grid.
        teacher_feature_map: one (B, D_t, h, w) per teacher stage.

    Returns:
        Scalar >= 0, at most the sum over t of 2 / positions; 0 where all maps are active at the same places.

    Raises:
        ValueError: a list of stages is empty; attention_dim is not positive; no map of one
            model has more than one position; inputs differ in B, are not (B, D, h, w), or not as many as the stages.
        TypeError: attention_dim is no integer; stages are a single one.
        RuntimeError: called before build.

    Source:
        Ji et al., Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching, AAAI 2021,
        https://arxiv.org/abs/2102.02973. Checked against clovaai/attention-feature-distillation@dd990d0; differs in:
        no bias before BatchNorm or behind that of B, stages by shares of the depth.

    Example:
        >>> import torch
        >>> from kdvit.losses import AFD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> def model(*maps):
        ...     return ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))
        >>> left, right = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 1, 2)
        >>> loss = AFD(student_stages=(-1,), teacher_stages=(0.5, 1.0))
        >>> loss.build(model(left), model(left, right))
        >>> round(loss((left,), (left, right)).item(), 4)  # 0 + ((1 - 0)^2 + (0 - 1)^2) / 2 positions
        1.0
    """

    mismatch = Mismatch(
        width="means over channels are compared; linear layers to attention_dim weigh them",
        depth="each teacher stage chooses among all student stages",
        grid="the student's is pooled to the teacher's",
    )

    def __init__(
        self,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        attention_dim: int = 128,
    ) -> None:
        super().__init__()
        self.student_stages = several(self, "student_stages", student_stages)
        self.teacher_stages = several(self, "teacher_stages", teacher_stages)
        self.attention_dim = count(self, "attention_dim", attention_dim, "the published value is 128")
        self.bilinear: Projector | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        for model in (student, teacher):
            several_positions(self, [(info.grid, info.grid) for info in model["feature_map"]])
        dim, num_teacher_maps = self.attention_dim, len(self.teacher_stages)
        self.keys = nn.ModuleList(_linear_norm(info.dim, dim) for info in student["feature_map"])
        self.queries = nn.ModuleList(_linear_norm(info.dim, dim) for info in teacher["feature_map"])
        self.bilinear = _linear_norm(dim, num_teacher_maps * dim)
        self.bilinear[1].register_parameter("bias", None)  # the softmax over s takes any away
        self.student_places = nn.Parameter(torch.empty(len(self.student_stages), dim))
        self.teacher_places = nn.Parameter(torch.empty(num_teacher_maps, dim))
        nn.init.xavier_normal_(self.student_places)
        nn.init.xavier_normal_(self.teacher_places)

    def forward(self, student_feature_map: Maps, teacher_feature_map: Maps) -> Tensor:
        if self.bilinear is None:
            raise not_built(self)
        as_many(self, self.student_stages, student_feature_map=student_feature_map)
        as_many(self, self.teacher_stages, teacher_feature_map=teacher_feature_map)
        student = [feature_pair(self, x, teacher_feature_map[0])[0] for x in student_feature_map]
        teacher = [feature_pair(self, student_feature_map[0], x)[1] for x in teacher_feature_map]
        attention = self._attention(student, teacher)  # (B, T, S)
        active = [activity(x) for x in student]
        distances = []
        for target in teacher:
            grid = tuple(target.shape[2:])
            ours = torch.stack([as_direction(resize(x, grid, "pool")) for x in active], dim=1)  # (B, S, h * w)
            theirs = as_direction(activity(target)).unsqueeze(1)
            distances.append((ours - theirs).square().mean(dim=2))
        return (attention * torch.stack(distances, dim=1)).sum(dim=(1, 2)).mean()

    def _attention(self, student: Maps, teacher: Maps) -> Tensor:
        """The weights of the student's maps for each map of the teacher, (B, T, S)."""
        keys = torch.stack([F.relu(layer(pooled(x))) for layer, x in zip(self.keys, student, strict=True)], dim=1)
        queries = torch.stack([layer(pooled(x)) for layer, x in zip(self.queries, teacher, strict=True)], dim=1)
        # One BatchNorm over B * S rows; (B, S, d) -> (B, S, T, d)
        wanted = self.bilinear(keys.flatten(0, 1)).reshape(*keys.shape[:2], len(teacher), self.attention_dim)
        with torch.autocast(keys.device.type, enabled=False):
            scores = torch.einsum("bstd,btd->bts", at_least_float32(wanted), at_least_float32(queries))
            scores = scores + self.teacher_places @ self.student_places.T
            return (scores / self.attention_dim**0.5).softmax(dim=2)


def _linear_norm(dim: int, out_dim: int) -> Projector:
    return Projector(nn.Linear(dim, out_dim, bias=False), BatchNorm1d(out_dim))
