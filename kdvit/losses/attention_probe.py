"""Attention Probe: how the class token relates to every patch, and which pictures are worth training on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import as_many, choice, feature_pair, paired, same_grid
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Grid, Location, ModelInfo, map_to_tokens, tokens_to_map

Tokens = tuple[Tensor, ...]

#: Features shorter than this count as having no direction.
EPS = 1e-6
NORMALIZE = ("tokens", "channels")


def selection_score(cls_attention: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """How evenly a class token's attention spreads over the patches, for choosing among unlabelled pictures.

    s = cos(attention of the class token to the patches, in head 0; the uniform distribution)

    The paper distils on the pictures with the smallest ``0.05 * (s of block 3 + s of block 7) + 0.9 * cross-entropy of
    the teacher's logits with its own prediction``: those on which the teacher is sure, and looks somewhere.

    Args:
        cls_attention: (B, H, P+N), probabilities; of a teacher of 12 blocks the signals of blocks 3 and 7.
        num_prefix_tokens: P, which are left out.

    Returns:
        (B,) in (0, 1], 1 where all patches get the same.

    Example:
        >>> import torch
        >>> selection_score(torch.tensor([[[0.2, 0.4, 0.4]], [[0.2, 0.0, 0.8]]]))  # even; one of two: 1 / sqrt(2)
        tensor([1.0000, 0.7071])
    """
    patches = at_least_float32(cls_attention[:, 0, num_prefix_tokens:])
    return F.cosine_similarity(patches, torch.ones_like(patches), dim=1)


@register("attention_probe")
class AttentionProbe(Loss):
    """Pull the relation of the student's class token with every patch, at several blocks, towards the teacher's.

    L = mean over blocks, B and N of (r(student) - r(teacher))^2,  r_n = <cls', patch'_n>

    ' scales each channel to length 1 over the class token and the patches of an image, or, by option, each token to
    length 1 over its channels. Other prefix tokens are left out. Widths need not agree, though with "tokens" r grows
    with the width.

    Published: this loss 0.8, KD of weight 1 at temperature 4, and a term with a noise-adaptation matrix on the
    teacher's predictions, which is not here; no labels: pictures from the wild that `selection_score` helps to choose.

    Args:
        normalize: "tokens": each channel over the tokens, as released; "channels": each token over its channels, which
            makes r the cosine of both, comparable between widths.
        resize: where the patch grids differ: "pool" averages the larger to the smaller; "bilinear", "bicubic" and
            "nearest" bring the student's to the teacher's.
        student_blocks: blocks of the student, indices or shares of the depth; published: 3, 7 and 11 of 0 to 11, which
            the default is too.
        teacher_blocks: as many of the teacher, pair by pair.

    Inputs:
        student_cls_token: one (B, D_s) per block, un-normed.
        teacher_cls_token: one (B, D_t) per block, un-normed.
        student_patch_tokens: one (B, N, D_s) per block, un-normed, without prefix tokens.
        teacher_patch_tokens: one (B, N, D_t) per block, un-normed, without prefix tokens.

    Returns:
        Scalar >= 0; 0 where the relations are equal.

    Raises:
        ValueError: an option is unknown; the lists of blocks differ in length; inputs differ in B, are not one for each
            block, or have another number of patches than in build.
        TypeError: an argument is of the wrong kind.

    Source:
        Wang et al., Attention Probe: Vision Transformer Distillation in the Wild, ICASSP 2022,
        https://doi.org/10.1109/ICASSP43922.2022.9747484. Checked against techmonsterwang/AttentionProbe@41a3cc0;
        differs in: any depth, grid and number of prefix tokens (there: 12, equal, 1).

    Example:
        >>> import torch
        >>> from kdvit.losses import AttentionProbe
        >>> cls, patch = torch.tensor([[3.0]]), torch.tensor([[[4.0]]])  # one channel, one patch: (0.6, 0.8)
        >>> loss = AttentionProbe(student_blocks=(-1,), teacher_blocks=(-1,))
        >>> round(loss((cls,), (0 * cls,), (patch,), (patch,)).item(), 4)  # (0.6 * 0.8 - 0 * 1)^2
        0.2304
    """

    mismatch = Mismatch(
        width="no projector: r sums over channels", depth="pairs of blocks", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        normalize: str = "tokens",
        resize: str = "pool",
        student_blocks: Sequence[Location] = (0.33, 0.66, 1.0),
        teacher_blocks: Sequence[Location] = (0.33, 0.66, 1.0),
    ) -> None:
        super().__init__()
        self.normalize = choice(self, "normalize", normalize, NORMALIZE)
        self.resize = choice(self, "resize", resize, RESIZES)
        self.student_blocks, self.teacher_blocks = paired(
            self, "student_blocks", student_blocks, "teacher_blocks", teacher_blocks
        )
        self.grids: list[tuple[Grid, Grid]] | None = None  # of each pair, where they differ

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {
            f"{side}_{signal}": blocks
            for side, blocks in (("student", self.student_blocks), ("teacher", self.teacher_blocks))
            for signal in ("cls_token", "patch_tokens")
        }

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        pairs = list(zip(student["patch_tokens"], teacher["patch_tokens"], strict=True))
        for pair in pairs:
            if None in (info.grid for info in pair):
                same_grid(self, *pair)  # refuses, and says whose is not known
        self.grids = [(s.grid, t.grid) for s, t in pairs]

    def forward(
        self,
        student_cls_token: Tokens,
        teacher_cls_token: Tokens,
        student_patch_tokens: Tokens,
        teacher_patch_tokens: Tokens,
    ) -> Tensor:
        tokens = {"student_cls_token": student_cls_token, "teacher_cls_token": teacher_cls_token}
        patches = {"student_patch_tokens": student_patch_tokens, "teacher_patch_tokens": teacher_patch_tokens}
        as_many(self, self.student_blocks, **tokens, **patches)
        distances = []
        for block, (student, teacher) in enumerate(zip(*patches.values(), strict=True)):
            student, teacher = self._on_one_grid(block, student, teacher)
            probes = (
                self._probe("student", student_cls_token[block], student),
                self._probe("teacher", teacher_cls_token[block].detach(), teacher),
            )
            distances.append(F.mse_loss(*probes))
        return torch.stack(distances).mean()

    def _on_one_grid(self, block: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens (B, N, D) of both models, as many of each."""
        names = "student_patch_tokens", "teacher_patch_tokens"
        student, teacher = feature_pair(self, student, teacher, *names, axes="B, N, D")
        grids = None if self.grids is None else self.grids[block]
        if grids is not None and grids[0] != grids[1]:
            maps = (tokens_to_map(x, grid) for x, grid in zip((student, teacher), grids, strict=True))
            student, teacher = (map_to_tokens(x) for x in match_grids(*maps, self.resize))
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"AttentionProbe: teacher_patch_tokens must have N={student.shape[1]} like student_patch_tokens, got "
                f"N={teacher.shape[1]}; drop the prefix tokens, and call build where the grids differ."
            )
        return student, teacher

    def _probe(self, side: str, cls_token: Tensor, patches: Tensor) -> Tensor:
        """r of one model, (B, N)."""
        wanted = patches.shape[0], patches.shape[2]
        if cls_token.shape != wanted:
            raise ValueError(
                f"AttentionProbe: {side}_cls_token must have shape {tuple(wanted)} to fit {side}_patch_tokens, got "
                f"{tuple(cls_token.shape)}; give both of the same block."
            )
        cls_token = at_least_float32(cls_token)
        if self.normalize == "tokens":
            # Both factors have the same divisor, so that one of them can take it twice.
            square = cls_token.square() + patches.square().sum(dim=1)
            cls_token = cls_token / square.clamp_min(EPS**2)
        else:
            cls_token, patches = F.normalize(cls_token, dim=1, eps=EPS), F.normalize(patches, dim=2, eps=EPS)
        with torch.autocast(patches.device.type, enabled=False):
            return (patches @ cls_token.unsqueeze(2)).squeeze(2)
