"""CC: correlations between the images of a batch, under a Gaussian kernel."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, count, feature_pair, flag, not_built, number
from kdvit.losses.gathering import gather_batch
from kdvit.losses.inner_products import inner_products
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.signals import ModelInfo

MODES = ("correct", "official")


@register("cc")
class CC(Loss):
    """Pull the correlations between the images of a batch towards those of the teacher.

    L = 1 / B^2 * sum_ij (k(x_i, x_j) - k(y_i, y_j))^2,
    k(x, y) = sum_{p=0..order} e^(-2 gamma) * (2 gamma)^p / p! * cos(x, y)^p

    x are the student's features, y the teacher's; k is the Gaussian kernel e^(-gamma |x - y|^2) of features of length
    1, as a Taylor series. The code that the authors gave out, mode "official", computes something else:
    L = mean_i sum_d |Lin_s(x_i) - Lin_t(y_i)|_d * |Lin_s(x_i+1) - Lin_t(y_i+1)|_d over neighbours in the batch. It
    compares no relation of the teacher, depends on the order of the images, and trains both linear layers, so that it
    has the trivial solution of constant embeddings. Either value depends on the batch, and is 0 for one image.

    Published: "official": task weight 1 and this loss 0.02, batches of 64 (CIFAR-100). The weight of "correct" is not
    known to us; 100 makes it comparable to the task loss.

    Args:
        mode: "correct" (the paper's formula) or "official" (the released code's).
        order: degree > 0 of the Taylor series; mode "correct". 2.
        gamma: > 0, of the Gaussian; mode "correct". 0.4.
        embed_dim: width of both linear embeddings; mode "official". 128.
        gather: False: the images of this process's batch are compared, as released; True: those of the batches of all
            processes.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher; the width may differ.

    Returns:
        Scalar >= 0: "correct": at most 1, 0 where all angles between images are equal; "official": squared feature
        units, 0 where no two neighbours differ from the teacher in the same place.

    Raises:
        ValueError: mode is unknown; a number is out of its range; the inputs are not (B, D), differ in B, or in mode
            "official" have other widths than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: mode "official" is called before build.

    Source:
        Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019,
        https://arxiv.org/abs/1904.01802. Checked against HobbitLong/RepDistiller@b84f547, which holds the code that
        the authors sent; differs in: nothing in mode "official"; mode "correct" is from the paper.

    Example:
        >>> import torch
        >>> from kdvit.losses import CC
        >>> student = torch.tensor([[1.0], [3.0]])  # cosine 1
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # cosine 0
        >>> round(CC(order=1, gamma=0.5)(student, teacher).item(), 4)  # 2 of 4 entries differ by e^(-1)
        0.0677
    """

    mismatch = Mismatch(width='any: images are compared; mode "official": linear layers on both')

    def __init__(
        self,
        mode: str = "correct",
        order: int = 2,
        gamma: float = 0.4,
        embed_dim: int = 128,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.mode = choice(self, "mode", mode, MODES)
        self.order = count(self, "order", order, "the published value is 2")
        self.gamma = number(self, "gamma", gamma, "> 0", "the published value is 0.4")
        self.embed_dim = count(self, "embed_dim", embed_dim, "the published value is 128")
        self.gather = flag(self, "gather", gather)
        self.student_embedding: Projector | None = None
        self.teacher_embedding: Projector | None = None

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        if self.mode == "official":
            self.student_embedding = Projector(nn.Linear(student["pooled"].dim, self.embed_dim))
            self.teacher_embedding = Projector(nn.Linear(teacher["pooled"].dim, self.embed_dim))

    def forward(self, student_pooled: Tensor, teacher_pooled: Tensor) -> Tensor:
        student, teacher = feature_pair(
            self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "B, D"
        )
        if self.mode == "official":
            student = self._embed(self.student_embedding, student, "student_pooled")
            teacher = self._embed(self.teacher_embedding, teacher, "teacher_pooled")
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        if self.mode == "official":
            apart = (student - teacher).abs()
            return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)
        return F.mse_loss(self._kernel(student), self._kernel(teacher))

    def _kernel(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, B)."""
        cosines = inner_products(F.normalize(x, dim=1))
        terms = ((2 * self.gamma) ** p / math.factorial(p) * cosines**p for p in range(self.order + 1))
        return math.exp(-2 * self.gamma) * sum(terms)

    def _embed(self, embedding: Projector | None, x: Tensor, name: str) -> Tensor:
        if embedding is None:
            raise not_built(self)
        built_width(self, name, x, embedding[0].in_features)
        return at_least_float32(embedding(x))
