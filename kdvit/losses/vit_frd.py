"""Inspired by ViT-FRD: features of several stages, regrouped into a few tokens before they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, count, not_built, number, paired
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.precision import at_least_float32
from kdvit.losses.resizing import resize
from kdvit.losses.sam_net import normed_positions
from kdvit.signals import Location, ModelInfo, map_to_tokens, tokens_to_map

Maps = tuple[Tensor, ...]


@register("vit_frd")
class ViTFRD(Loss):
    """Inspired by ViT-FRD: pull a few tokens, recombined from a stage of the student, towards the teacher's groups.

    L = sum over pairs of stages of mean over all elements of (R_s(student) - R_t(teacher))^2
    R_s(X) = V A x,  A = softmax over positions of (Q seeds(x)) (K x)^T / sqrt(D_s)
    R_t(Y) = C y,  C = softmax over groups of cos(seeds(y), y) / T, each row then scaled to sum 1

    x and y are the positions of a map, each position layer-normed (without learnt scale); seeds() averages them over
    the cells of a coarse grid, so that a group starts from the same region of the image in both models. Q, K and V are
    learnt, Q and V with a bias: attention of k tokens to all positions. R_t has nothing to learn.

    From the paper's title and its summary in a survey: that features of a CNN teacher and a ViT student are recombined
    by low-rank attention and by clustering, and then matched at several stages. Its text was not accessible, so all
    else is ours: the forms of R_s and R_t, the seeds, layer norm, that the teacher's side has no weights (else both
    sides could agree on a constant), images' classes in place of segmentation, and every default.

    Published: the paper's numbers are not known to us; task weight 1 and this loss 1 are our choice.

    Args:
        num_cells: cells of the coarse grid along a side; num_cells^2 groups, k. 4.
        temperature: T > 0 of the teacher's clustering; the smaller, the harder. 0.1.
        student_stages: blocks, stages or shares of the depth, from shallow to deep.
        teacher_stages: as many of the teacher, pair by pair.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid.
        teacher_feature_map: one (B, D_t, h, w) per stage; the grids may differ.

    Returns:
        Scalar >= 0, squared and without unit: the teacher's positions are layer-normed.

    Raises:
        ValueError: a number is out of its range; the lists of stages differ in length; not one map per stage, or maps
            that are not (B, D, h, w), differ in B, or have other widths than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Fan et al., ViT-FRD: A Vision Transformer Model for Cardiac MRI Image Segmentation Based on Feature
        Recombination Distillation, IEEE Access 2023, a paper that we could not open (journal:
        https://ieeeaccess.ieee.org): no official code; from the paper comes the idea alone, see above.

    Example:
        >>> import torch
        >>> from kdvit.losses import ViTFRD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = (torch.zeros(1, 3, 2, 2),), (torch.tensor([1.0, -1.0]).view(1, 2, 1, 1),)
        >>> loss = ViTFRD(num_cells=1, student_stages=(1.0,), teacher_stages=(1.0,))
        >>> loss.build(*(ModelInfo.of(feature_map=tuple(SignalInfo.of("feature_map", x) for x in maps))
        ...              for maps in (student, teacher)))
        >>> _ = torch.nn.init.zeros_(loss.recombine[0].value.bias)
        >>> round(loss(student, teacher).item(), 3)  # one group each: ((0 - 1)^2 + (0 + 1)^2) / 2
        1.0
    """

    mismatch = Mismatch(
        width="attention with the teacher's output width", depth="pairs of stages", grid="as many groups of any grid"
    )

    def __init__(
        self,
        num_cells: int = 4,
        temperature: float = 0.1,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
    ) -> None:
        super().__init__()
        self.num_cells = count(self, "num_cells", num_cells, "4 makes 16 groups")
        self.temperature = number(self, "temperature", temperature, "> 0", "0.1 makes groups that hardly overlap")
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.recombine: nn.ModuleList | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        pairs = zip(student["feature_map"], teacher["feature_map"], strict=True)
        self.recombine = nn.ModuleList(_Recombination(s.dim, t.dim, self.num_cells) for s, t in pairs)

    def forward(self, student_feature_map: Maps, teacher_feature_map: Maps) -> Tensor:
        if self.recombine is None:
            raise not_built(self)
        pairs = map_pairs(self, self.student_stages, student_feature_map, teacher_feature_map)
        distances = []
        for recombine, (student, teacher) in zip(self.recombine, pairs, strict=True):
            recombined = at_least_float32(recombine(student))
            built_width(self, "teacher_feature_map", teacher, recombined.shape[2])
            distances.append(F.mse_loss(recombined, self._groups(teacher)))
        return torch.stack(distances).sum()

    def _groups(self, teacher: Tensor) -> Tensor:
        """Soft clusters of the positions: (B, D, h, w) -> (B, k, D)."""
        tokens, seeds = _tokens_and_seeds(teacher, self.num_cells)
        with torch.autocast(teacher.device.type, enabled=False):
            cosines = F.normalize(seeds, dim=-1) @ F.normalize(tokens, dim=-1).transpose(1, 2)
            members = (cosines / self.temperature).softmax(dim=1)  # (B, k, N)
            # A group that no position belongs to keeps a small weight: it stays finite.
            return (members / members.sum(dim=2, keepdim=True).clamp_min(1e-6)) @ tokens


class _Recombination(nn.Module):
    """A few tokens that attend to all positions: (B, D, h, w) -> (B, k, out_dim)."""

    def __init__(self, dim: int, out_dim: int, num_cells: int) -> None:
        super().__init__()
        self.num_cells = num_cells
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)  # a bias would cancel in the softmax
        self.value = nn.Linear(dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, seeds = _tokens_and_seeds(x.to(self.value.weight.dtype), self.num_cells)
        scores = self.query(seeds) @ self.key(tokens).transpose(1, 2) * tokens.shape[-1] ** -0.5
        weights = scores.softmax(dim=2)  # (B, k, N)
        # The mean first, and then V: k positions are cheaper than N, and the rows of A sum to 1.
        return self.value(weights.to(tokens.dtype) @ tokens)


def _tokens_and_seeds(x: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """The positions of a map, layer-normed, and their means over the cells of a coarse grid."""
    tokens = normed_positions(x)
    seeds = resize(tokens_to_map(tokens, tuple(x.shape[2:])), (num_cells, num_cells), "pool")
    return tokens, map_to_tokens(seeds)
