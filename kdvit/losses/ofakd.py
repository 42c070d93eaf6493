"""OFA-KD: a teacher of any architecture, whose logits teach the student at every depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdvit.losses.branches import Branch
from kdvit.losses.checks import choice, logit_pair, not_built, number, same_batch, same_classes, several
from kdvit.losses.labels import hard_labels
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.signals import Location, ModelInfo

KINDS = ("auto", "transformer", "convolution")


def enhanced_rows(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """-sum_c ((p_c + m_c)^epsilon - m_c) * log q_c of each row, m the one-hot label: (B, C), (B, C), (B,) -> (B,)."""
    teacher = teacher_logits.softmax(dim=1)
    target = torch.expm1(epsilon * torch.log1p(teacher.gather(1, labels[:, None])))  # (1 + p_y)^epsilon - 1
    weights = (teacher**epsilon).scatter(1, labels[:, None], target)
    return -(weights * student_logits.log_softmax(dim=1)).sum(dim=1)


@register("ofakd")
class OFAKD(Loss):
    """Pull the student's logits, and those of branches at several depths of it, towards the teacher's, target first.

    L = kd_weight * l(student) + branch_weight * sum_k l(branch_k(feature_k)),
    l(z) = -mean_i sum_c ((p_c + m_c)^epsilon - m_c) * log q_c,  p = softmax(teacher / T), q = softmax(z / T)

    m is the one-hot label: epsilon > 1 puts more on the target the surer the teacher is of it, and less on unlikely
    classes. There is no factor T^2. Branches (`kdvit.losses.branches.Branch`) train with the student and are not
    exported. With epsilon 1, l is the cross-entropy with the teacher's probabilities.

    Published: task weight 1 and this loss 1; epsilon 1.5 on ImageNet, 1 on CIFAR-100; T 1. Branches of a ViT of 12
    blocks behind blocks (1, 3, 9, 11), of a CNN behind its four stages: (0.25, 0.5, 0.75, 1.0).

    Args:
        epsilon: exponent > 0.
        temperature: T > 0.
        kd_weight: weight >= 0 of the student's own logits.
        branch_weight: weight >= 0 of the sum over branches.
        student_stages: where branches sit: blocks, stages or shares of the depth, from shallow to deep.
        branch_epsilons: exponents > 0, one per branch, in place of epsilon there; None for epsilon everywhere.
        branch: ``"transformer"`` or ``"convolution"`` layers in the branches; ``"auto"``: transformer where all places
            have one width and grid, as in a ViT, convolution where they differ, as in a CNN.

    Inputs:
        student_logits: (B, C), raw.
        teacher_logits: (B, C), raw.
        student_feature_map: one (B, D, h, w) per branch, un-normed; of a ViT its patch tokens on their grid.
        labels: (B,) class indices, or (B, C) soft labels, of which the largest counts.

    Returns:
        ``{"logits", "branches"}``, scalars >= 0 in nats, weights included; as a cross-entropy not 0 at a match.

    Raises:
        ValueError: a number is out of its range; branch_epsilons are not as many as student_stages; branch is not
            known; inputs differ in B or C; the grid of a feature map is not known.
        TypeError: an argument is of the wrong kind; labels of shape (B,) are no integers.
        RuntimeError: called before build.

    Source:
        Hao et al., One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation, NeurIPS
        2023, https://arxiv.org/abs/2310.19444. As the code does, epsilon raises every class (in the paper's text, the
        target's alone). Checked against Hao840/OFAKD@f7bb896; differs in: finite for logits of any size (there, NaN);
        ViT branches average patch tokens (there, the class token); CNN branches end in the width of the student's
        last place (there, the teacher's if larger); any grid (there, ViT: even and square).

    Example:
        >>> import torch
        >>> from kdvit.losses import OFAKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher, maps = torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]).log(), (torch.ones(1, 8, 2, 2),)
        >>> loss = OFAKD(epsilon=2.0, branch_weight=0.0, student_stages=(1.0,))
        >>> loss.build(ModelInfo.of(logits=SignalInfo.of("logits", student),
        ...                         feature_map=(SignalInfo.of("feature_map", maps[0]),)),
        ...            ModelInfo.of(logits=SignalInfo.of("logits", teacher)))
        >>> terms = loss(student, teacher, maps, torch.tensor([0]))
        >>> round(terms["logits"].item(), 4)  # ((1/2 + 1)^2 - 1 + (1/2)^2) * ln 2
        1.0397
    """

    mismatch = Mismatch(
        width="any: branches end in logits",
        depth="branches at shares of the student's depth",
        grid="branches for any grid",
    )

    def __init__(
        self,
        epsilon: float = 1.0,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        branch_weight: float = 1.0,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        branch_epsilons: Sequence[float] | None = None,
        branch: str = "auto",
    ) -> None:
        super().__init__()
        advice = "1.0 takes the teacher's probabilities as they are"
        self.epsilon = number(self, "epsilon", epsilon, "> 0", advice)
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.kd_weight = number(self, "kd_weight", kd_weight, ">= 0", "0 switches the student's own logits off")
        self.branch_weight = number(self, "branch_weight", branch_weight, ">= 0", "0 switches the branches off")
        self.student_stages = several(self, "student_stages", student_stages)
        self.branch_epsilons = branch_epsilons
        if branch_epsilons is not None:
            self.branch_epsilons = tuple(number(self, "branch_epsilons", e, "> 0", advice) for e in branch_epsilons)
            if len(self.branch_epsilons) != len(self.student_stages):
                raise ValueError(
                    f"OFAKD: branch_epsilons must be as many as student_stages, got {len(self.branch_epsilons)} for "
                    f"{len(self.student_stages)}; give one per branch."
                )
        self.branch = choice(self, "branch", branch, KINDS)
        self.branches: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        num_classes = student["logits"].dim
        same_classes(self, num_classes, teacher["logits"].dim)
        infos = student["feature_map"]
        kind = self.branch
        if kind == "auto":
            kind = "transformer" if len({(info.dim, info.grid) for info in infos}) == 1 else "convolution"
        self.branches = nn.ModuleList(
            Branch(info, num_classes, kind, num_behind=len(infos) - 1 - i, width=infos[-1].dim)
            for i, info in enumerate(infos)
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_feature_map: tuple[Tensor, ...],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        if self.branches is None:
            raise not_built(self)
        student, teacher = logit_pair(self, student_logits, teacher_logits)
        labels = hard_labels(self, labels, student)
        for x in student_feature_map:
            same_batch(self, "student_logits", student, "student_feature_map", x)
        exits = [at_least_float32(branch(x)) for branch, x in zip(self.branches, student_feature_map, strict=True)]
        exponents = self.branch_epsilons or (self.epsilon,) * len(exits)
        rows = [self._rows(z, teacher, labels, epsilon) for z, epsilon in zip(exits, exponents, strict=True)]
        return {
            "logits": self.kd_weight * self._rows(student, teacher, labels, self.epsilon).mean(),
            "branches": self.branch_weight * torch.stack(rows).sum(dim=0).mean(),
        }

    def _rows(self, logits: Tensor, teacher: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        return enhanced_rows(logits / self.temperature, teacher / self.temperature, labels, epsilon)
