"""CrossKD: the student's tokens through the rest of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import choice, logit_pair, not_built, number
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.pkd import standardized_channels
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, resize
from kdvit.signals import Location, ModelInfo

RESPONSES = ("kl", "quality_focal")
EPS = 1e-6


@register("crosskd")
class CrossKD(Loss):
    """Pull what the teacher's last blocks say to the student's patch tokens towards what they say to the teacher's own.

    L = T^2 * mean_i KL(softmax(teacher_i / T) || softmax(z_i / T)),  z = tail([prefix, a(Conv1x1(student))])

    tail: the frozen teacher behind teacher_block, through which the gradient flows into the student. a: resized to the
    teacher's grid, then each channel shifted and scaled to mean and standard deviation of the teacher's patch tokens,
    over all positions of this process's batch (as a BatchNorm: not gathered). The prefix tokens are the teacher's own,
    so any number of them fits; the student's play no part. A Conv1x1, without bias because a takes any away, exists
    where the widths differ. The task loss and this one meet in the student's first blocks and not at its head.
    "quality_focal": T^2 * mean_i sum_c BCE(q_c, p_c) * |q_c - p_c|, q = sigmoid(z_i / T), p = sigmoid(teacher_i / T),
    for teachers whose classes are independent.

    Published: for detectors, task weight 1 and this loss 1 with "quality_focal", behind convolution 3 of the 4 of the
    detection head. For recognition, blocks, "kl" and T are our choice.

    Args:
        temperature: T > 0.
        response: ``"kl"`` or ``"quality_focal"``.
        student_stage: stage or block of the student.
        teacher_block: block of the teacher. Not its last where the class token is the classifier's input, and better
            not near it: late prefix tokens know the answer without the student's.
        resize: where the grids differ: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, or ``"pool"`` (average).

    Inputs:
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teacher_tokens: (B, P+N, D_t), un-normed, with prefix tokens.
        teacher_tail: tokens (B, P+N, D_t) -> logits (B, C).
        teacher_logits: (B, C), raw.

    Returns:
        Scalar >= 0 in nats * T^2; 0 where both predictions are equal.

    Raises:
        ValueError: temperature is not positive; response or resize is not known; the teacher has no patch grid; its
            tokens have another shape than in build; the batches differ; in eval mode: the tail does not depend on
            the patch tokens.
        TypeError: temperature is no number.
        RuntimeError: called before build.

    Source:
        Wang et al., CrossKD: Cross-Head Knowledge Distillation for Object Detection, CVPR 2024,
        https://arxiv.org/abs/2306.11369. Checked against jbwang1997/CrossKD@87e156a; differs in: blocks of a ViT
        instead of a head's convolutions, so no ReLU behind a; projector and resize, where there both heads are alike;
        the mean over images instead of a detector's number of positives; no box branch.

    Example:
        >>> import torch
        >>> from kdvit.losses import CrossKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student = torch.tensor([[[[5.0, 3.0]], [[4.0, 4.0]]]])  # two channels on a 1x2 grid
        >>> teacher = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])  # two patch tokens
        >>> loss = CrossKD()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(tokens=SignalInfo.of("tokens", teacher, grid=(1, 2))))
        >>> def tail(tokens):
        ...     return tokens[:, 0]
        >>> # The student's first token becomes (2, 0): ln(cosh(1)) away from the teacher's (0, 0).
        >>> round(loss(student, teacher, tail, tail(teacher)).item(), 4)
        0.4338
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ", depth="one block of each", grid="resized to the teacher's"
    )

    def __init__(
        self,
        temperature: float = 1.0,
        response: str = "kl",
        student_stage: Location = 0.5,
        teacher_block: Location = 0.5,
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.response = choice(self, "response", response, RESPONSES)
        self.student_stage = student_stage
        self.teacher_block = teacher_block
        self.resize = choice(self, "resize", resize, RESIZES)
        self.projector: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {
            "student_feature_map": self.student_stage,
            "teacher_tokens": self.teacher_block,
            "teacher_tail": self.teacher_block,
        }

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        tokens, student_dim = teacher["tokens"], student["feature_map"].dim
        if tokens.grid is None:
            raise ValueError(
                f"CrossKD: teacher must have a patch grid, got none for tokens of '{tokens.model}' at "
                f"'{tokens.location}'; choose a model of patch tokens, or pass grid=."
            )
        self.grid, self.num_prefix_tokens, self.dim = tokens.grid, tokens.num_prefix_tokens, tokens.dim
        same_width = student_dim == self.dim
        self.projector = Projector(*([] if same_width else [nn.Conv2d(student_dim, self.dim, 1, bias=False)]))

    def forward(
        self,
        student_feature_map: Tensor,
        teacher_tokens: Tensor,
        teacher_tail: Callable[[Tensor], Tensor],
        teacher_logits: Tensor,
    ) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        if teacher_tokens.shape != (len(student_feature_map), num_tokens, self.dim):
            raise ValueError(
                f"CrossKD: teacher_tokens must have shape ({len(student_feature_map)}, {num_tokens}, {self.dim}) to "
                f"fit student_feature_map, got {tuple(teacher_tokens.shape)}; build the loss for these sizes."
            )
        teacher = at_least_float32(teacher_tokens.detach())
        prefix, patches = teacher[:, : self.num_prefix_tokens], teacher[:, self.num_prefix_tokens :]
        projected = at_least_float32(self.projector(student_feature_map))
        student = as_teacher_tokens(resize(projected, self.grid, self.resize), patches)
        crossed = teacher_tail(torch.cat([prefix, student], dim=1))
        if not self.training and not torch.compiler.is_compiling():
            with torch.no_grad():
                blind = teacher_tail(torch.cat([prefix, torch.zeros_like(student)], dim=1))
            if torch.equal(blind, crossed):
                raise ValueError(
                    "CrossKD: teacher_tail must depend on the patch tokens, got one that reads the prefix tokens "
                    f"alone; choose an earlier teacher_block than {self.teacher_block!r}."
                )
        student_logits, logits = logit_pair(self, crossed.to(student.dtype), teacher_logits, "teacher_tail's logits")
        student_logits, logits = student_logits / self.temperature, logits / self.temperature
        rows = (kl_rows if self.response == "kl" else quality_focal_rows)(student_logits, logits)
        return self.temperature**2 * rows.mean()


def as_teacher_tokens(feature_map: Tensor, patch_tokens: Tensor) -> Tensor:
    """A map (B, D, h, w) as tokens (B, N, D) with mean and deviation of the teacher's (B, N, D) in each channel."""
    batch, num_tokens, _ = patch_tokens.shape
    correction = int(batch * num_tokens > 1)  # a single value has no unbiased deviation
    deviation, mean = torch.std_mean(patch_tokens, dim=(0, 1), correction=correction)
    tokens = standardized_channels(feature_map, EPS).T.unflatten(0, (batch, num_tokens))
    return tokens * deviation + mean


def quality_focal_rows(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Binary cross-entropy to the teacher's scores, times the distance from them: (B, C), (B, C) -> (B,)."""
    target = teacher_logits.sigmoid()
    distance = (student_logits.sigmoid() - target).abs()
    return (F.binary_cross_entropy_with_logits(student_logits, target, reduction="none") * distance).sum(dim=1)
