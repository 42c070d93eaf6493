"""FT: factor transfer, from a teacher whose map an autoencoder has put into fewer words."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.activity import activity, as_direction
from kdvit.losses.checks import choice, count, feature_pair, not_built, number, several_positions
from kdvit.losses.gathering import gather_batch
from kdvit.losses.latch import Latch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

_SLOPE = 0.1


class Paraphraser(nn.Module):
    """An autoencoder of feature maps: D -> D -> factor_dim -> factor_dim channels, and back; the grid stays."""

    def __init__(self, dim: int, factor_dim: int) -> None:
        super().__init__()
        dims = (dim, dim, factor_dim, factor_dim)
        self.encoder = Projector(*_convolutions(nn.Conv2d, dims))
        self.decoder = Projector(*_convolutions(nn.ConvTranspose2d, dims[::-1]))

    def forward(self, x: Tensor) -> Tensor:
        """The map, as it is after both."""
        return self.decoder(self.encoder(x))


def _convolutions(kind: type[nn.Module], dims: tuple[int, ...]) -> list[nn.Module]:
    pairs = zip(dims, dims[1:])
    return [layer for pair in pairs for layer in (kind(*pair, 3, padding=1), nn.LeakyReLU(_SLOPE))]


def _translator(dim: int, factor_dim: int) -> Projector:
    dims = (dim, dim, factor_dim, factor_dim)
    pairs = zip(dims, dims[1:])
    return Projector(*(x for pair in pairs for x in (*conv_norm(*pair, 3, relu=False), nn.LeakyReLU(_SLOPE))))


@register("ft")
class FT(Loss):
    """Pull where the student's translated map is active towards where the teacher's paraphrased map is.

    L = mean over images and positions of |a(translator(F_s)) - a(encoder(F_t))|^p,
    a(F) = f / |f|, f = mean over channels of |F|^q

    Encoder and translator are three 3x3 convolutions each, with LeakyReLU (0.1) and, in the translator, BatchNorm;
    both end with the same number of channels ("factors"). The translator is trained with the student.

    The encoder is the first half of an autoencoder (the paraphraser), which `calibrate` trains before the student, on
    the teacher's maps of held-out images: Adam, a fixed number of steps, batches drawn by a seed, mean squared error.
    Then it is frozen, and a resumed run has it from its checkpoint. Released, it trains for 30 epochs of the (whole,
    augmented) training set with SGD; there is one pass of held-out images here, so many of them are better than few.
    Until then the encoder is what it was drawn as.

    Published: CIFAR-100 task weight 1 and this loss 200 (RepDistiller).

    Args:
        factor_ratio: > 0, the number of factors as a share of the teacher's channels. 0.5.
        activation_power: q > 0, an integer. 2.
        distance_power: p > 0, an integer. 1.
        student_stage: block or stage of the student. -1, the last.
        teacher_stage: the same of the teacher. -1, the last.
        resize: where the grids differ: "pool" (the larger factors are average-pooled), "bilinear", "bicubic" or
            "nearest" (the student's are interpolated).
        paraphraser_steps: > 0, steps of Adam in `calibrate`.
        paraphraser_batch_size: > 0, images in each. 64.
        paraphraser_lr: learning rate > 0 of Adam.
        paraphraser_seed: draws the batches.

    Inputs:
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teacher_feature_map: (B, D_t, h, w); of `calibrate`: those of all held-out images.

    Returns:
        Scalar >= 0, for p = 1 at most sqrt(2 / positions); 0 where both are active at the same places.

    Raises:
        ValueError: a number is out of its range; resize is unknown; one of the grids has a single position; the
            maps differ in B, or are not (B, D, h, w); the maps to calibrate with are none or not finite.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018,
        https://arxiv.org/abs/1802.04977. Checked against HobbitLong/RepDistiller@b84f547; differs in: how the
        paraphraser is trained (see above), no bias before BatchNorm, |.| in odd powers.

    Example:
        >>> import torch
        >>> from kdvit.losses import FT
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> x = torch.rand(8, 4, 3, 3)
        >>> info = ModelInfo.of(feature_map=SignalInfo.of("feature_map", x))
        >>> loss = FT(paraphraser_steps=2)
        >>> loss.build(info, info)
        >>> loss.needs_calibration(), loss.calibrate(x), loss.needs_calibration()
        (True, None, False)
        >>> loss.translator = loss.paraphraser.encoder  # a student that says the same in the same words
        >>> loss(x, x).item()
        0.0
    """

    mismatch = Mismatch(
        width="both become factor_ratio * D_t factors", depth="one stage of each", grid="the larger is average-pooled"
    )
    fixed_options = ("factor_ratio", "paraphraser_lr")

    def __init__(
        self,
        factor_ratio: float = 0.5,
        activation_power: int = 2,
        distance_power: int = 1,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
        paraphraser_steps: int = 1000,
        paraphraser_batch_size: int = 64,
        paraphraser_lr: float = 1e-3,
        paraphraser_seed: int = 0,
    ) -> None:
        super().__init__()
        self.factor_ratio = number(self, "factor_ratio", factor_ratio, "> 0", "the published value is 0.5")
        self.activation_power = count(self, "activation_power", activation_power, "the published value is 2")
        self.distance_power = count(self, "distance_power", distance_power, "the published value is 1")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        advice = "it trains the autoencoder of the teacher's maps"
        self.paraphraser_steps = count(self, "paraphraser_steps", paraphraser_steps, advice)
        self.paraphraser_batch_size = count(self, "paraphraser_batch_size", paraphraser_batch_size, advice)
        self.paraphraser_lr = number(self, "paraphraser_lr", paraphraser_lr, "> 0", advice)
        if isinstance(paraphraser_seed, bool) or not isinstance(paraphraser_seed, int):
            raise TypeError(f"FT: paraphraser_seed must be an integer, got {paraphraser_seed!r}; 0 will do.")
        self.paraphraser_seed = paraphraser_seed
        self.calibrated = Latch()
        self.translator: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        grids = student["feature_map"].grid, teacher["feature_map"].grid
        several_positions(self, [grids])
        dim = teacher["feature_map"].dim
        factor_dim = max(1, int(self.factor_ratio * dim))
        self.translator = _translator(student["feature_map"].dim, factor_dim)
        self.paraphraser = Paraphraser(dim, factor_dim).requires_grad_(False)
        self.calibrated.set(False)  # what was trained for another teacher does not count

    def needs_calibration(self) -> bool:
        return not self.calibrated

    def calibrate(self, teacher_feature_map: Tensor) -> None:
        """Train the paraphraser: teacher_feature_map (B, D_t, h, w) of held-out images."""
        if self.translator is None:
            raise not_built(self)
        if not len(teacher_feature_map) or not teacher_feature_map.isfinite().all():
            raise ValueError("FT: teacher_feature_map must be finite and not empty; check the calibration images.")
        trained = self._trained(teacher_feature_map)
        with torch.no_grad():
            for own, found in zip(self.paraphraser.parameters(), trained.parameters(), strict=True):
                own.copy_(gather_batch(found[None])[0])  # that of the first process, to the last digit
        self.calibrated.set()

    def _trained(self, maps: Tensor) -> Paraphraser:
        # A copy learns: for everybody else the paraphraser never requires a gradient.
        learner = copy.deepcopy(self.paraphraser).requires_grad_(True)
        optimizer = torch.optim.Adam(learner.parameters(), lr=self.paraphraser_lr)
        generator = torch.Generator().manual_seed(self.paraphraser_seed)
        size = (min(self.paraphraser_batch_size, len(maps)),)
        for _ in range(self.paraphraser_steps):
            drawn = torch.randint(len(maps), size, generator=generator)
            batch = at_least_float32(maps[drawn.to(maps.device)].detach())
            with torch.enable_grad():
                error = F.mse_loss(at_least_float32(learner(batch)), batch)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        return learner

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        if self.translator is None:
            raise not_built(self)
        student, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        with torch.no_grad():
            target = at_least_float32(self.paraphraser.encoder(teacher))
        student, target = match_grids(at_least_float32(self.translator(student)), target, self.resize)
        student, target = (as_direction(activity(x, self.activation_power)) for x in (student, target))
        return (student - target).abs().pow(self.distance_power).mean()
