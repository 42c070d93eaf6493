"""Fine-grained manifold distillation: cosine similarities among patches, within images and across them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import as_many, choice, count, feature_pair, flag, number, paired
from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.relations import gram_distance
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, map_to_tokens

#: Patches shorter than this count as having no direction.
EPS = 1e-6


@register("manifold")
class Manifold(Loss):
    """Pull the cosine similarities among the student's patches towards those among the teacher's.

    L = mean over pairs of stages of (patch_weight * d_patch + sample_weight * d_sample + random_weight * d_random),
    d = mean over entries of (X_s X_s^T - X_t X_t^T)^2, rows of X: patches, each scaled to length 1

    patch: the N patches of an image; sample: the B patches at one position; random: num_random of all B * N patches,
    the same ones of both models. The last two compare images, so they depend on the batch. Widths need not agree.

    Published: task weight 0 (alpha_d 1), this loss 1, and KD of weight 1 and temperature 1; without drop-path.

    Args:
        patch_weight: weight >= 0 of the relations within an image. 4.
        sample_weight: weight >= 0 of the relations at one position across images. 0.1.
        random_weight: weight >= 0 of the relations among random patches. 0.2.
        num_random: K > 0, how many of them; all where there are no more. 192.
        resize: where the grids differ: "pool" averages the larger to the smaller; "bilinear", "bicubic" and "nearest"
            bring the student's to the teacher's.
        student_stages: stages (CNN, hierarchical) or blocks (ViT) of the student; published, for 12 blocks:
            (0, 1, 2, 3, 8, 9, 10, 11).
        teacher_stages: as many of the teacher, pair by pair; published, for 24 blocks: (0, 1, 2, 3, 20, 21, 22, 23).
        gather: False: images are compared within this process's batch, as released; True: within the batches of all
            processes.

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the random
    patches; ``forward(..., noise=u)``, one (B, N) with values in [0, 1) for each pair of stages, fixes them: those
    with the smallest values.

    Inputs:
        student_feature_map: one (B, D_s, h, w) per stage; of a ViT its patch tokens on their grid, un-normed.
        teacher_feature_map: one (B, D_t, h, w) per stage.

    Returns:
        ``{"patch", "sample", "random"}``, scalars in [0, 4] times their weight; 0 where the similarities are equal, as
        for maps that differ by a rotation of the channels or by the lengths of patches.

    Raises:
        ValueError: a number is out of its range; the lists of stages differ in length; inputs differ in B or are not
            one map for each stage; noise of another shape.
        TypeError: an argument is of the wrong kind.

    Source:
        Hao et al., Learning Efficient Vision Transformers via Fine-Grained Manifold Distillation, NeurIPS 2022,
        https://arxiv.org/abs/2107.01378. Checked against Hao840/manifold-distillation@1096b82; differs in:
        patches alone are compared (there, the student's first N_s - N_t tokens are dropped, so that class tokens stay
        where both models have one, and a teacher with more than the student gives nonsense); grids may differ; no
        merging of patches (off in the recipes).

    Example:
        >>> import torch
        >>> from kdvit.losses import Manifold
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # two patches, at a right angle
        >>> teacher = torch.tensor([[3.0, 1.0]]).view(1, 1, 1, 2)  # in the same direction
        >>> loss = Manifold(student_stages=(-1,), teacher_stages=(-1,))
        >>> terms = loss((student,), (teacher,))
        >>> terms["patch"].item()  # 4 * (0 + 1 + 1 + 0) / 4
        2.0
        >>> terms["sample"].item()  # one image is like itself
        0.0
    """

    mismatch = Mismatch(width="similarities have none", depth="pairs of stages", grid="the larger is average-pooled")

    def __init__(
        self,
        patch_weight: float = 4.0,
        sample_weight: float = 0.1,
        random_weight: float = 0.2,
        num_random: int = 192,
        resize: str = "pool",
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.patch_weight = number(self, "patch_weight", patch_weight, ">= 0", "0 switches it off")
        self.sample_weight = number(self, "sample_weight", sample_weight, ">= 0", "0 switches it off")
        self.random_weight = number(self, "random_weight", random_weight, ">= 0", "0 switches it off")
        self.num_random = count(self, "num_random", num_random, "the published value is 192")
        self.resize = choice(self, "resize", resize, RESIZES)
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.gather = flag(self, "gather", gather)
        self.generator: torch.Generator | None = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_feature_map": self.student_stages, "teacher_feature_map": self.teacher_stages}

    def forward(
        self,
        student_feature_map: tuple[Tensor, ...],
        teacher_feature_map: tuple[Tensor, ...],
        noise: tuple[Tensor, ...] | None = None,
    ) -> dict[str, Tensor]:
        maps = {"student_feature_map": student_feature_map, "teacher_feature_map": teacher_feature_map}
        as_many(self, self.student_stages, **maps, **({} if noise is None else {"noise": noise}))
        distances: dict[str, list[Tensor]] = {"patch": [], "sample": [], "random": []}
        for stage, pair in enumerate(zip(student_feature_map, teacher_feature_map, strict=True)):
            x, y = match_grids(*feature_pair(self, *pair), self.resize)
            x, y = (F.normalize(map_to_tokens(z), dim=2, eps=EPS) for z in (x, y))  # (B, N, D)
            distances["patch"].append(gram_distance(x, y))
            order = self._order(x, None if noise is None else noise[stage])
            if self.gather:
                x, y = gather_batch(x), gather_batch(y)
            distances["sample"].append(gram_distance(x.transpose(0, 1), y.transpose(0, 1)))
            x, y = x.flatten(0, 1), y.flatten(0, 1)
            rows = slice(None) if order is None else order.topk(self.num_random, largest=False).indices
            distances["random"].append(gram_distance(x[rows], y[rows]))
        weights = {"patch": self.patch_weight, "sample": self.sample_weight, "random": self.random_weight}
        return {name: weights[name] * torch.stack(values).mean() for name, values in distances.items()}

    def _order(self, tokens: Tensor, noise: Tensor | None) -> Tensor | None:
        """A number for each of the patches that are compared, or None where all of them take part."""
        shape = tokens.shape[:2]
        if noise is None:
            device = tokens.device if self.generator is None else self.generator.device
            noise = torch.rand(shape, generator=self.generator, device=device).to(tokens.device)
        elif noise.shape != shape:
            raise ValueError(
                f"Manifold: noise must have shape {tuple(shape)}, got {tuple(noise.shape)}; give one number per patch."
            )
        # Every process draws for its own images; together they are the same choice everywhere.
        noise = (gather_batch(noise) if self.gather else noise).flatten()
        return noise if len(noise) > self.num_random else None
