"""MGD: the teacher's whole map, generated from a part of the student's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, feature_pair, not_built, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv1x1
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

MASKS = ("spatial", "channel")


def generation_block(dim: int) -> Projector:
    """What fills masked positions from their neighbours: 3x3 convolution, ReLU, 3x3 convolution."""
    return Projector(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1))


@register("mgd")
class MGD(Loss):
    """Generate the teacher's feature map from the student's, of which a random part is set to zero.

    L = 1/B * sum over all elements of (G(m * a(student)) - teacher)^2,  G = Conv3x3(ReLU(Conv3x3(.)))

    a is a 1x1 convolution where the widths differ. m is 0 at a random share of the positions, or of the channels, of
    each image; masked or not, all elements count. A ViT's map is its patch tokens on their grid.

    Published: task weight 1 and this loss 7e-5 with mask_ratio 0.15 (ImageNet; 49 positions, 512 to 2048 channels: it
    is a sum over both), 2e-5 with 0.65 (detection, one stage; two stages 5e-7 with 0.45) or 0.75 (segmentation).

    Args:
        mask_ratio: expected share that is masked, in (0, 1). Classification: 0.15.
        mask: "spatial": positions, as in the paper and in the code for detection; "channel": channels, as in the code
            for classification.
        student_stage: stage or block of the student: an index, a share of the depth, or a module path.
        teacher_stage: the same of the teacher.
        resize: where the grids differ, "pool": the larger is average-pooled to the smaller; "bilinear", "bicubic",
            "nearest": the student's map is interpolated to the teacher's grid.

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the mask;
    ``forward(..., noise=u)`` with u in [0, 1), (B, h * w) or (B, D_t), fixes it: as released, "spatial" keeps where u
    <= 1 - mask_ratio, "channel" where u >= mask_ratio.

    Inputs:
        student_feature_map: (B, D_s, h, w).
        teacher_feature_map: (B, D_t, h, w).

    Returns:
        Scalar >= 0 in squared feature units, summed over positions and channels; 0 where the generated map equals
        the teacher's.

    Raises:
        ValueError: mask_ratio is out of its range; mask or resize is unknown; inputs differ in B; the teacher's has
            another width than in build; noise does not fit.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Yang et al., Masked Generative Distillation, ECCV 2022, section 3, https://arxiv.org/abs/2205.01529. Checked
        against yzd-v/MGD@2c9da0b; differs in: its weight alpha is left to the recipe; grids may differ.

    Example:
        >>> import torch
        >>> from kdvit.losses import MGD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.rand(5, 8, 2, 2), torch.ones(5, 3, 2, 2)
        >>> loss = MGD()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher)))
        >>> _ = loss.generation[2].weight.data.zero_(), loss.generation[2].bias.data.zero_()
        >>> loss(student, teacher).item()  # zeros are generated: 3 channels * 4 positions * (0 - 1)^2
        12.0
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ", depth="one stage of each", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        mask_ratio: float = 0.15,
        mask: str = "spatial",
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.mask_ratio = number(self, "mask_ratio", mask_ratio, "in (0, 1)", "the published value is 0.15")
        self.mask = choice(self, "mask", mask, MASKS)
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.generator: torch.Generator | None = None
        self.generation: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        dim = teacher["feature_map"].dim
        self.align = conv1x1(student["feature_map"].dim, dim)
        self.generation = generation_block(dim)

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor, noise: Tensor | None = None) -> Tensor:
        if self.generation is None:
            raise not_built(self)
        student, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        student, teacher = match_grids(student, teacher, self.resize)
        aligned = self.align(student)
        built_width(self, "teacher_feature_map", teacher, aligned.shape[1])
        generated = at_least_float32(self.generation(aligned * self._kept(teacher, noise).to(aligned.dtype)))
        return F.mse_loss(generated, teacher, reduction="sum") / len(teacher)

    def _kept(self, teacher: Tensor, noise: Tensor | None) -> Tensor:
        """Where the student's map stays: (B, 1, h, w) or (B, D, 1, 1)."""
        batch, dim, height, width = teacher.shape
        shape = (batch, height * width) if self.mask == "spatial" else (batch, dim)
        if noise is None:
            device = teacher.device if self.generator is None else self.generator.device
            noise = torch.rand(shape, generator=self.generator, device=device).to(teacher.device)
        elif tuple(noise.shape) != shape:
            raise ValueError(
                f"MGD: noise must have shape {shape} for mask='{self.mask}', got {tuple(noise.shape)}; "
                "draw one number for each entry that may be masked."
            )
        if self.mask == "spatial":
            return (noise <= 1 - self.mask_ratio).view(batch, 1, height, width)
        return (noise >= self.mask_ratio).view(batch, dim, 1, 1)
