"""TAKT: the teacher's pooled features, adapted to the student's space."""

from __future__ import annotations

import math

from torch import Tensor, nn

from kdvit.losses.checks import built_width, choice, count, feature_pair, not_built, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.signals import ModelInfo

MODES = ("correct", "official")


@register("takt")
class TAKT(Loss):
    """Pull the student's pooled features towards the teacher's behind a trained adapter.

    L = mean_i sum over channels of (A(n(teacher_i)) - student_i)^2,  n(x) = sign(x) * (|x| / T)^(1 / root),
    A(x) = mean over heads of <Q x, K x> / sqrt(D_s) * V x

    Q, K and V are linear layers of each head from the teacher's width to the student's: of a single vector
    "attention" is one number, without softmax. The adapter stands on the teacher's side and is trained along, here by
    the student's optimizer; the student needs no projector, and keeps its space. n shrinks large features.

    Published: task weight 1 and this loss 0.3, for features of whole slides with 200 epochs of Adam. The teacher was
    trained before with `kdvit.losses.transport.feature_transport` between its features of two domains.

    Args:
        num_heads: heads of the adapter. 8.
        temperature: T > 0 of n. 0.1.
        root: > 0, of n. 3.
        mode: "correct" keeps the sign of a feature, as n is meant; "official" loses it, as the released code: the same
            where features lie behind a ReLU.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t).

    Returns:
        Scalar >= 0, squared feature units summed over the student's channels; 0 where the adapted features are the
        student's.

    Raises:
        ValueError: a number is out of its range; mode is unknown; the inputs differ in B, or are not those above.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Xiong et al., TAKT: Target-Aware Knowledge Transfer for Whole Slide Image Classification, MICCAI 2024,
        https://arxiv.org/abs/2303.05780. Checked against BearCleverProud/TAKT@dcfe1c1; differs in: the sign (see
        mode), batches (there, one bag a step), and no optimizer of the adapter's own.

    Example:
        >>> import torch
        >>> from kdvit.losses import TAKT
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.ones(1, 5)
        >>> loss = TAKT()
        >>> loss.build(ModelInfo.of(pooled=SignalInfo.of("pooled", student)),
        ...            ModelInfo.of(pooled=SignalInfo.of("pooled", teacher)))
        >>> _ = loss.requires_grad_(False).value[0].weight.zero_(), loss.value[0].bias.zero_()
        >>> loss(student, teacher).item()  # an adapter without values: 3^2 + 4^2
        25.0
    """

    mismatch = Mismatch(width="an adapter from the teacher's to the student's", depth="the pooled features of each")

    def __init__(self, num_heads: int = 8, temperature: float = 0.1, root: float = 3.0, mode: str = "correct") -> None:
        super().__init__()
        self.num_heads = count(self, "num_heads", num_heads, "the published value is 8")
        self.temperature = number(self, "temperature", temperature, "> 0", "the published value is 0.1")
        self.root = number(self, "root", root, "> 0", "the published value is 3")
        self.mode = choice(self, "mode", mode, MODES)
        self.query: Projector | None = None

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.dims = student["pooled"].dim, teacher["pooled"].dim
        # All heads in one layer; each row is initialised as it would be alone.
        self.query, self.key, self.value = (
            Projector(nn.Linear(self.dims[1], self.num_heads * self.dims[0])) for _ in range(3)
        )

    def forward(self, student_pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
        if self.query is None:
            raise not_built(self)
        names = "student_pooled", "teacher_pooled"
        student, teacher = feature_pair(self, student_pooled, teacher_pooled, *names, "B, D")
        for name, x, dim in zip(names, (student, teacher), self.dims, strict=True):
            built_width(self, name, x, dim)
        return (self._adapt(self._shrink(teacher)) - student).square().sum(dim=1).mean()

    def _shrink(self, x: Tensor) -> Tensor:
        size = (x.abs() / self.temperature) ** (1 / self.root)
        return size if self.mode == "official" else x.sign() * size

    def _adapt(self, x: Tensor) -> Tensor:
        query, key, value = (
            at_least_float32(layer(x)).unflatten(1, (self.num_heads, -1))  # (B, H, D_s)
            for layer in (self.query, self.key, self.value)
        )
        scores = (query * key).sum(dim=2, keepdim=True) / math.sqrt(self.dims[0])
        return (scores * value).mean(dim=1)
