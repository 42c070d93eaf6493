"""ViTKD: mimic the teacher's shallow blocks, generate its last tokens from half of the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import not_built, number, paired, same_grid
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.mgd import generation_block
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, linear
from kdvit.signals import Location, ModelInfo, map_to_tokens, tokens_to_map

Tokens = tuple[Tensor, ...]


@register("vitkd")
class ViTKD(Loss):
    """Pull the student's first blocks, and a reconstruction of masked last tokens, towards the teacher's.

    L = alpha / B * sum_l sse(Lin_l(student_l), teacher_l)
      + beta / (mask_ratio * B) * sse over masked tokens of (G(mask(Lin(student_normed))), teacher_normed)

    sse is the sum of squared errors; mask() replaces a random part of each image's tokens by one learnt vector; G is
    Conv3x3, ReLU, Conv3x3 on the patch grid. A Lin exists only where the widths differ.

    Published: task weight 1 and this loss 1 (alpha and beta hold its weights); also beside NKD.

    Args:
        alpha: weight >= 0 of the mimicking term. 3e-5: small, because the loss is a sum over tokens and channels.
        beta: weight >= 0 of the generation term. 3e-6.
        mask_ratio: share of the tokens that are masked, in (0, 1). 0.5.
        student_blocks: blocks to mimic with, usually the first two: (0, 1).
        teacher_blocks: as many blocks of the teacher, pair by pair.

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the mask;
    ``forward(..., noise=u)`` with u (B, N) in [0, 1) fixes it: the smallest values of a row stay.

    Inputs:
        student_patch_tokens: one (B, N, D_s) per student block, un-normed, without prefix tokens.
        teacher_patch_tokens: one (B, N, D_t) per teacher block, un-normed, without prefix tokens.
        student_normed_patch_tokens: (B, N, D_s), after the final norm, without prefix tokens.
        teacher_normed_patch_tokens: (B, N, D_t), after the final norm, without prefix tokens.

    Returns:
        ``{"mimic", "generate"}``, scalars >= 0 in squared feature units, weights included; mimic is 0 where the
        (projected) tokens are equal.

    Raises:
        ValueError: a number is out of its range; the lists of blocks differ in length; the grids differ or are not
            known; tokens of another number than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Yang et al., ViTKD: Feature-based Knowledge Distillation for Vision Transformers, CVPRW 2024, Eq. 8,
        https://arxiv.org/abs/2209.02432. Checked against yzd-v/cls_KD@1e5d48f; differs in: any number of prefix
        tokens, any grid (there: 1, square).

    Example:
        >>> import torch
        >>> from kdvit.losses import ViTKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> def info(x):
        ...     shallow, normed = (SignalInfo.of(s, x, grid=(2, 2)) for s in ("patch_tokens", "normed_patch_tokens"))
        ...     return ModelInfo.of(patch_tokens=(shallow, shallow), normed_patch_tokens=normed)
        >>> student, teacher = torch.zeros(5, 4, 3), torch.ones(5, 4, 3)
        >>> loss = ViTKD(alpha=0.5)
        >>> loss.build(info(student), info(teacher))
        >>> terms = loss((student, student), (teacher, teacher), student, teacher)
        >>> terms["mimic"].item()  # 0.5 * 2 blocks * 4 tokens * 3 channels * (0 - 1)^2
        12.0
    """

    mismatch = Mismatch(
        width="linear layer where they differ", depth="pairs of blocks, and the last ones", grid="refused"
    )

    def __init__(
        self,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        student_blocks: Sequence[Location] = (0, 1),
        teacher_blocks: Sequence[Location] = (0, 1),
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the mimicking term off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the generation term off")
        self.mask_ratio = number(self, "mask_ratio", mask_ratio, "in (0, 1)", "the published value is 0.5")
        self.student_blocks, self.teacher_blocks = paired(
            self, "student_blocks", student_blocks, "teacher_blocks", teacher_blocks
        )
        self.generator: torch.Generator | None = None
        self.generation: Projector | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_patch_tokens": self.student_blocks, "teacher_patch_tokens": self.teacher_blocks}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        deep_student, deep_teacher = student["normed_patch_tokens"], teacher["normed_patch_tokens"]
        shallow = list(zip(student["patch_tokens"], teacher["patch_tokens"], strict=True))
        for pair in [*shallow, (deep_student, deep_teacher)]:
            same_grid(self, *pair)
        self.grid, dim = deep_student.grid, deep_teacher.dim
        self.shallow_projectors = nn.ModuleList(linear(s.dim, t.dim) for s, t in shallow)
        self.deep_projector = linear(deep_student.dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.generation = generation_block(dim)

    def forward(
        self,
        student_patch_tokens: Tokens,
        teacher_patch_tokens: Tokens,
        student_normed_patch_tokens: Tensor,
        teacher_normed_patch_tokens: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.generation is None:
            raise not_built(self)
        if not len(student_patch_tokens) == len(teacher_patch_tokens) == len(self.student_blocks):
            raise ValueError(
                f"ViTKD: patch tokens must be a tuple of {len(self.student_blocks)} blocks for both models, got "
                f"{len(student_patch_tokens)} and {len(teacher_patch_tokens)}; give one tensor per block."
            )
        num_tokens = self.grid[0] * self.grid[1]
        for tokens in (*student_patch_tokens, *teacher_patch_tokens, teacher_normed_patch_tokens):
            if tokens.shape[:2] != (len(student_normed_patch_tokens), num_tokens):
                raise ValueError(
                    f"ViTKD: tokens must have shape (B, {num_tokens}, D) with one B, got {tuple(tokens.shape)}; "
                    "drop the prefix tokens, and build the loss for this image size."
                )
        return {
            "mimic": self.alpha * self._mimic(student_patch_tokens, teacher_patch_tokens),
            "generate": self.beta * self._generate(student_normed_patch_tokens, teacher_normed_patch_tokens, noise),
        }

    def _mimic(self, student: Tokens, teacher: Tokens) -> Tensor:
        pairs = zip(self.shallow_projectors, student, teacher, strict=True)
        return sum(_mean_sse(lin(s), t) for lin, s, t in pairs)

    def _generate(self, student: Tensor, teacher: Tensor, noise: Tensor | None) -> Tensor:
        batch, num_tokens, _ = student.shape
        if noise is None:
            device = student.device if self.generator is None else self.generator.device
            noise = torch.rand(batch, num_tokens, generator=self.generator, device=device).to(student.device)
        num_kept = int(num_tokens * (1 - self.mask_ratio))
        kept, masked = noise.argsort(dim=1).unsqueeze(-1).split([num_kept, num_tokens - num_kept], dim=1)
        projected = self.deep_projector(_take(student, kept)).to(self.mask_token.dtype)
        dim = projected.shape[-1]
        tokens = self.mask_token.expand(batch, num_tokens, dim).scatter(1, kept.expand(-1, -1, dim), projected)
        generated = map_to_tokens(self.generation(tokens_to_map(tokens, self.grid)))
        return _mean_sse(_take(generated, masked), _take(teacher, masked)) / self.mask_ratio


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens (B, M, D) that an index (B, M, 1) names."""
    return tokens.gather(1, index.expand(-1, -1, tokens.shape[-1]))


def _mean_sse(x: Tensor, target: Tensor) -> Tensor:
    """Sum of squared errors, mean over the batch."""
    return F.mse_loss(at_least_float32(x), at_least_float32(target.detach()), reduction="sum") / len(x)
