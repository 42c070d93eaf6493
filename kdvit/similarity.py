"""How alike the layers of two models are, whatever their widths and grids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.inner_products import inner_products
from kdvit.signals import Grid, map_to_tokens
from kdvit.taps.reader import Request
from kdvit.wrappers import Student, Teacher, Wrapper

#: Positions along an axis at most, where relations within an image are compared: those of a ViT/16 at 224 pixels.
_MAX_GRID = 14


@dataclass(frozen=True)
class LayerSimilarity:
    """Every layer of a student beside every layer of a teacher.

    Args:
        student_layers: module paths of the S student layers, front to back.
        teacher_layers: module paths of the T teacher layers, front to back.
        cka: (S, T) float64, which images are alike: `linear_cka` of the maps averaged over their positions.
        relation_distance: (S, T) float64, which places of an image are alike: see `layer_similarity`.
    """

    student_layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    cka: Tensor
    relation_distance: Tensor


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Centred kernel alignment of two sets of features for the same n samples, in its debiased form.

    CKA = HSIC(x, y) / sqrt(HSIC(x, x) * HSIC(y, y)), with the unbiased estimator HSIC_1 of linear kernels. The plain
    form goes to 1 where there are fewer samples than features, whatever these are; this one stays near 0 for features
    that have nothing to do with each other. Both are blind to rotations, shifts and a common scale.

    Args:
        x: (n, D_x), n >= 4.
        y: (n, D_y).

    Returns:
        Scalar float64 in [-1, 1], 1 for equal features; NaN where features are the same for all samples.

    Raises:
        ValueError: another shape, or fewer than 4 samples.

    Source: Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019,
        https://arxiv.org/abs/1905.00414; HSIC_1: Song et al., Feature Selection via Dependence Maximization, JMLR 2012,
        as in Nguyen et al., Do Wide and Deep Networks Learn the Same Things?, ICLR 2021,
        https://arxiv.org/abs/2010.15327, but over all samples at once, not averaged over batches.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [5.0, 1.0]])
        >>> quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> round(linear_cka(x, 3 * x @ quarter_turn + 1).item(), 6)
        1.0
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"linear_cka: x and y must be (n, D_x) and (n, D_y), got {tuple(x.shape)} and {tuple(y.shape)}; "
            "give one row of features for each sample."
        )
    if len(x) < 4:
        raise ValueError(f"linear_cka: n must be >= 4 samples, got {len(x)}; give more.")
    pairs = _PairMoments(1, 1)
    pairs.add([x], [y])
    return pairs.cka()[0, 0]


@torch.no_grad()
def layer_similarity(
    student: Student, teacher: Teacher, batches: Iterable[Tensor], num_layers: int = 6
) -> LayerSimilarity:
    """Compare layers at equal shares of the depth of two models, on the same images.

    Read is the ``feature_map`` behind 1/num_layers, 2/num_layers, ... of the blocks (ViT) or stages (CNN, Swin); a
    model of fewer gives each of them. Prefix tokens play no part. Only sums are kept from batch to batch, so the memory
    does not grow with the number of images, and the result does not depend on how they are cut into batches.

    * ``cka``: `linear_cka` with one row per image, its map averaged over the positions.
    * ``relation_distance``: root mean square, over all images and pairs of different positions, of the difference
      between the two models' cosine similarities of the features at these positions. Maps are averaged onto the smaller
      grid of both first, of at most 14 x 14. In [0, 2], 0 where both relate the places of an image alike; NaN where the
      grid has a single position. It is what Gram anchoring measures (Simeoni et al., DINOv3, 2025,
      https://arxiv.org/abs/2508.10104), as a root mean square.

    Both models run in eval mode and are left as they were: modes, taps, statistics.

    Args:
        student: its images are what ``batches`` holds.
        teacher: paired with the student by a `kdvit.Distiller` where their images differ (normalisation, size).
        batches: (B, C, H, W) each, on the models' device; at least 4 images together.
        num_layers: of each model, at most.

    Raises:
        ValueError: a model is neither a transformer nor made of stages, too few images, or num_layers < 1.
    """
    if num_layers < 1:
        raise ValueError(f"layer_similarity: num_layers must be >= 1, got {num_layers}; 6 suits most models.")
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("layer_similarity: batches must hold at least 4 images, got none; give more.")
    if not isinstance(first, Tensor) or first.ndim != 4:
        got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(f"layer_similarity: batches must be tensors of images (B, C, H, W), got {got}; stack them.")
    num_images = 0
    with _listening(student, first, num_layers) as (ours, student_layers):
        with _listening(teacher, teacher.bridge(first[:1]), num_layers) as (theirs, teacher_layers):
            pairs = _PairMoments(len(student_layers), len(teacher_layers))
            squares = torch.zeros(len(student_layers), len(teacher_layers), dtype=torch.float64)
            for images in chain([first], batches):
                num_images += len(images)
                _, learned = ours(images)
                taught = theirs(images)
                maps = [learned[request].float() for request in student_layers]
                targets = [taught[request].float() for request in teacher_layers]
                pairs.add([x.mean((2, 3)) for x in maps], [y.mean((2, 3)) for y in targets])
                squares += _relation_squares(maps, targets)
    if num_images < 4:
        raise ValueError(f"layer_similarity: batches must hold at least 4 images, got {num_images}; give more.")
    names = tuple(student_layers.values()), tuple(teacher_layers.values())
    return LayerSimilarity(*names, pairs.cka(), (squares / num_images).sqrt())


@contextmanager
def _listening(wrapper: Wrapper, images: Tensor, num_layers: int) -> Iterator[tuple[Wrapper, dict[Request, str]]]:
    """The wrapper with taps at its layers, in eval mode; and the module path of each."""
    modes = {module: module.training for module in wrapper.modules()}
    ear = wrapper.own()
    size, ear.input_size = ear.input_size, tuple(images.shape[1:])  # the grid of some models follows from it
    try:
        count = min(num_layers, ear.family().num_blocks() or num_layers)
        requests = [Request("feature_map", step / count) for step in range(1, count + 1)]
        infos = ear.listen(requests)
        ear.eval()
        yield ear, {request: infos[request].location for request in requests}
    finally:
        ear.deafen()
        ear.input_size = size
        for module, training in modes.items():
            module.training = training


class _PairMoments:
    """Sums over samples from which the HSIC of every pair of S and T feature sets follows exactly.

    A sample is extended from x to (|x|^2, x, 1): the sum of the outer products of two such rows holds the number of
    samples, the means, the products of the features and of their lengths. It is kept in float64 on the CPU, of features
    minus those of the first sample, so that a large common part costs no precision.
    """

    def __init__(self, num_student: int, num_teacher: int) -> None:
        self.cross = {pair: 0.0 for pair in product(range(num_student), range(num_teacher))}
        self.own = ([0.0] * num_student, [0.0] * num_teacher)
        self.first: tuple[list[Tensor], list[Tensor]] | None = None

    def add(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """One batch: (B, D) each."""
        student, teacher = ([x.detach().cpu().double() for x in side] for side in (student, teacher))
        if self.first is None:
            self.first = [x[:1] for x in student], [y[:1] for y in teacher]
        sides = [
            [_extended(x - first) for x, first in zip(side, firsts, strict=True)]
            for side, firsts in zip((student, teacher), self.first, strict=True)
        ]
        for own, side in zip(self.own, sides, strict=True):
            for index, x in enumerate(side):
                own[index] = own[index] + x.T @ x
        for s, t in self.cross:
            self.cross[s, t] = self.cross[s, t] + sides[0][s].T @ sides[1][t]

    def cka(self) -> Tensor:
        """(S, T)."""
        ours, theirs = (torch.stack([_hsic(moments) for moments in own]) for own in self.own)
        cross = torch.stack([_hsic(moments) for moments in self.cross.values()]).view(len(ours), len(theirs))
        return cross / (ours[:, None] * theirs).sqrt()


def _extended(x: Tensor) -> Tensor:
    """(B, D) -> (B, D + 2): |x|^2, x, 1."""
    return torch.cat([x.square().sum(1, keepdim=True), x, torch.ones_like(x[:, :1])], dim=1)


def _hsic(moments: Tensor) -> Tensor:
    """n (n - 3) HSIC_1 of linear kernels; the factor cancels in CKA.

    With centred features X, Y and their squared lengths k, l:
    |X^T Y|^2 - n / (n - 2) * k.l + sum(k) sum(l) / ((n - 1) (n - 2)).
    """
    num_samples = moments[-1, -1]
    mean_x, mean_y = moments[1:-1, -1] / num_samples, moments[-1, 1:-1] / num_samples
    # |x - mean|^2 = (1, -2 mean, |mean|^2) . (|x|^2, x, 1)
    length_x, length_y = _centred_length(mean_x), _centred_length(mean_y)
    products = moments[1:-1, 1:-1] - num_samples * mean_x[:, None] * mean_y
    lengths = length_x @ moments @ length_y
    total_x, total_y = length_x @ moments[:, -1], moments[-1] @ length_y
    pairs = (num_samples - 1) * (num_samples - 2)
    return products.square().sum() - num_samples / (num_samples - 2) * lengths + total_x * total_y / pairs


def _centred_length(mean: Tensor) -> Tensor:
    return torch.cat([mean.new_ones(1), -2 * mean, mean.square().sum()[None]])


def _relation_squares(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """(S, T): sum over images of the mean over pairs of positions of the squared difference of cosine similarities."""
    known: dict[tuple[int, int, Grid], Tensor] = {}

    def cosines(side: int, layer: int, grid: Grid) -> Tensor:
        """(B, N, N), N the positions of a grid."""
        if (side, layer, grid) not in known:
            tokens = map_to_tokens(F.adaptive_avg_pool2d((student, teacher)[side][layer], grid))
            known[side, layer, grid] = inner_products(F.normalize(tokens, dim=-1))
        return known[side, layer, grid]

    squares = torch.full((len(student), len(teacher)), torch.nan, dtype=torch.float64)
    for s, t in product(range(len(student)), range(len(teacher))):
        shapes = zip(student[s].shape[2:], teacher[t].shape[2:], strict=True)
        grid = tuple(min(ours, theirs, _MAX_GRID) for ours, theirs in shapes)
        num_positions = grid[0] * grid[1]
        if num_positions > 1:
            difference = (cosines(0, s, grid) - cosines(1, t, grid)).square()
            # The diagonal adds nothing, but rounding: a position is like itself in both.
            difference.diagonal(dim1=1, dim2=2).zero_()
            squares[s, t] = difference.sum((1, 2)).cpu().double().sum() / (num_positions * (num_positions - 1))
    return squares
