"""MTKD-SSR: channels and exit logits of every stage, and a student that reviews its own deeper exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.branches import PooledHead, pooled
from kdvit.losses.checks import logit_pair, not_built, number, paired, same_batch, same_classes
from kdvit.losses.kd import kl_rows
from kdvit.losses.labels import label_shares
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import linear
from kdvit.signals import Location, ModelInfo

Maps = tuple[Tensor, ...]


@register("mtkd_ssr")
class MTKDSSR(Loss):
    """Pull channel attention and exit logits of every stage towards the teacher's, and each exit towards the next.

    L = alpha * sum_{k=1..K} mean_i |a(student_k) - a(teacher_k)|^2
      + beta * T^2 * sum_{k=1..K} mean_i KL(t_k || s_k)
      + gamma * T^2 * sum_{k<K} mean_i KL(s_{k+1} || s_k)
      + sum_{k<K} cross-entropy(teacher exit k, labels)

    a(x): the mean of each channel over positions, the vector scaled to length 1; the student's is first projected
    where the widths differ. s_k = softmax(logits of exit k / T), t_k the teacher's; exit K is the model's own logits.
    The other exits are a linear classifier on the normed mean over positions, for both models made and trained here
    and not exported. Every target is without gradient; the teacher's exits learn from the labels alone.

    Published: the paper's numbers are not known to us; all defaults, task weight 1 and this loss 1 are our choice.

    Args:
        alpha: weight >= 0 of stage-wise channel distillation (SCD). At most 4 per stage.
        beta: weight >= 0 of stage-wise response distillation (SRD).
        gamma: weight >= 0 of cross-stage review distillation (CRD).
        temperature: T > 0.
        student_stages: at least two blocks, stages or shares of the depth, from shallow to deep.
        teacher_stages: as many of the teacher, pair by pair.

    Inputs:
        student_logits: (B, C), raw.
        teacher_logits: (B, C), raw.
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid.
        teacher_feature_map: one (B, D_t, h, w) per stage; the grids may differ.
        labels: (B,) class indices, or (B, C) soft labels, whose shares count.

    Returns:
        ``{"channel", "response", "review", "teacher_exits"}``, scalars >= 0, weights included: squared distance,
        then nats * T^2, then nats. channel is 0 where the projected channels are proportional.

    Raises:
        ValueError: a number is out of its range; the lists of stages differ in length or have less than two; inputs
            differ in B or C; the labels fit neither (B,) nor (B, C).
        TypeError: an argument is of the wrong kind; labels of shape (B,) are no integers.
        RuntimeError: called before build.

    Source:
        Gou et al., Multi-target Knowledge Distillation via Student Self-reflection, IJCV 2023,
        https://doi.org/10.1007/s11263-023-01792-z: no official code; from the paper, its abstract: the three terms at
        every stage. Our choice: scaled channel means as attention, their distance, the form of the exits, that
        the teacher's exits train along, and that an exit reviews the next one.

    Example:
        >>> import torch
        >>> from kdvit.losses import MTKDSSR
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> def model(logits, maps):
        ...     return ModelInfo.of(logits=SignalInfo.of("logits", logits),
        ...                         feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))
        >>> logits = torch.zeros(1, 2)
        >>> student = (torch.tensor([3.0, 4.0]).view(1, 2, 1, 1),) * 2
        >>> teacher = (torch.tensor([4.0, 3.0]).view(1, 2, 1, 1),) * 2
        >>> loss = MTKDSSR(student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0))
        >>> loss.build(model(logits, student), model(logits, teacher))
        >>> terms = loss(logits, logits, student, teacher, torch.tensor([0]))
        >>> round(terms["channel"].item(), 4)  # 2 stages * ((3/5 - 4/5)^2 + (4/5 - 3/5)^2)
        0.16
    """

    mismatch = Mismatch(width="linear layer where they differ", depth="pairs of stages", grid="any: maps are averaged")

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the channel term off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the response term off")
        self.gamma = number(self, "gamma", gamma, ">= 0", "0 switches the review off")
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        if len(self.student_stages) < 2:
            raise ValueError("MTKDSSR: student_stages must be at least 2, got 1; a single exit has none to review.")
        self.student_exits: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        num_classes = student["logits"].dim
        same_classes(self, num_classes, teacher["logits"].dim)
        student_maps, teacher_maps = student["feature_map"], teacher["feature_map"]
        self.student_exits = nn.ModuleList(PooledHead(info.dim, num_classes) for info in student_maps[:-1])
        self.teacher_exits = nn.ModuleList(PooledHead(info.dim, num_classes) for info in teacher_maps[:-1])
        # A projection of the mean over positions is the mean of a 1x1 convolution.
        self.projectors = nn.ModuleList(linear(s.dim, t.dim) for s, t in zip(student_maps, teacher_maps, strict=True))

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feature_map: Maps,
        teacher_feature_map: Maps,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        if self.student_exits is None:
            raise not_built(self)
        student, teacher = logit_pair(self, student_logits, teacher_logits)
        for side, maps in (("student", student_feature_map), ("teacher", teacher_feature_map)):
            for x in maps:
                same_batch(self, "student_logits", student, f"{side}_feature_map", x)
        labels = label_shares(self, labels, student)
        teacher_maps = [x.detach() for x in teacher_feature_map]

        student_exits = [at_least_float32(head(x)) for head, x in zip(self.student_exits, student_feature_map[:-1])]
        teacher_exits = [at_least_float32(head(x)) for head, x in zip(self.teacher_exits, teacher_maps[:-1])]
        own = [*student_exits, student]
        return {
            "channel": self.alpha * self._channel(student_feature_map, teacher_maps),
            "response": self.beta * self._kl(own, [*teacher_exits, teacher]),
            "review": self.gamma * self._kl(student_exits, own[1:]),
            "teacher_exits": sum(F.cross_entropy(z, labels) for z in teacher_exits),
        }

    def _channel(self, student: Maps, teacher: Sequence[Tensor]) -> Tensor:
        # The parameters of losses stay float32 under a model in half precision.
        dtype = next(self.student_exits.parameters()).dtype
        distances = [
            (_attention(projector(pooled(s.to(dtype)))) - _attention(pooled(t.to(dtype)))).square().sum(dim=1).mean()
            for projector, s, t in zip(self.projectors, student, teacher, strict=True)
        ]
        return torch.stack(distances).sum()

    def _kl(self, student: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        rows = [
            kl_rows(s / self.temperature, t.detach() / self.temperature) for s, t in zip(student, targets, strict=True)
        ]
        return self.temperature**2 * torch.stack(rows).sum(dim=0).mean()


def _attention(channels: Tensor) -> Tensor:
    """Channel means (B, D) as a direction, whatever their scale."""
    return F.normalize(at_least_float32(channels), dim=1, eps=1e-6)
