"""FitNet: a hint from a teacher's feature map."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import not_built
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.signals import Location, ModelInfo


@register("fitnet")
class FitNet(Loss):
    """Pull a feature map of the student, through a small regressor, towards a feature map of the teacher.

    L = mean over all elements of (r(student) - teacher)^2,  r = ReLU(BatchNorm(Conv(student)))

    The convolution bridges width and grid: student grid twice the teacher's: 3x3, stride 2; half of it: transposed
    4x4, stride 2; otherwise larger by n: (1 + n) x (1 + n), which is 1x1 for equal grids. It has no bias, because
    BatchNorm takes any away. A ViT's map is its patch tokens on their grid.

    Published: task weight 1 and this loss 100.

    Args:
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            module path.
        teacher_stage: the same of the teacher.

    Inputs:
        student_feature_map: (B, D_s, h_s, w_s).
        teacher_feature_map: (B, D_t, h_t, w_t), best behind a ReLU: r(student) has no negative values.

    Returns:
        Scalar >= 0 in squared feature units; 0 where the regressed map equals the teacher's.

    Raises:
        ValueError: the grid of the student is smaller than the teacher's, and not half of it; a map of another shape
            than in build.
        RuntimeError: called before build.

    Source:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, Eq. 3, https://arxiv.org/abs/1412.6550. Checked
        against HobbitLong/RepDistiller@b84f547; differs in: no bias before BatchNorm.

    Example:
        >>> import torch
        >>> from kdvit.losses import FitNet
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(2, 8, 4, 4), torch.ones(2, 16, 4, 4)
        >>> loss = FitNet()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher)))
        >>> loss(student, teacher).item()  # zeros stay zeros: (0 - 1)^2
        1.0
    """

    mismatch = Mismatch(
        width="the regressor's convolution",
        depth="one stage of each",
        grid="strided, transposed or larger convolution, else refused",
    )

    def __init__(self, student_stage: Location = -1, teacher_stage: Location = -1) -> None:
        super().__init__()
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.conv: nn.Module | None = None
        self.norm: nn.BatchNorm2d | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        student_map, teacher_map = student["feature_map"], teacher["feature_map"]
        (height, width), (teacher_height, teacher_width) = student_map.grid, teacher_map.grid
        dims = student_map.dim, teacher_map.dim
        if (height, width) == (2 * teacher_height, 2 * teacher_width):
            self.conv = nn.Conv2d(*dims, kernel_size=3, stride=2, padding=1, bias=False)
        elif (2 * height, 2 * width) == (teacher_height, teacher_width):
            self.conv = nn.ConvTranspose2d(*dims, kernel_size=4, stride=2, padding=1, bias=False)
        elif height >= teacher_height and width >= teacher_width:
            kernel_size = (1 + height - teacher_height, 1 + width - teacher_width)
            self.conv = nn.Conv2d(*dims, kernel_size=kernel_size, bias=False)
        else:
            raise ValueError(
                f"FitNet: student grid must be half the teacher's or at least as large, got {height}x{width} for "
                f"{teacher_height}x{teacher_width}; choose stages whose grids fit."
            )
        self.norm = nn.BatchNorm2d(teacher_map.dim)

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        if self.conv is None:
            raise not_built(self)
        regressed = F.relu(self.norm(self.conv(student_feature_map.to(self.conv.weight.dtype))))
        if regressed.shape != teacher_feature_map.shape:
            raise ValueError(
                f"FitNet: teacher_feature_map must have shape {tuple(regressed.shape)} to fit student_feature_map, "
                f"got {tuple(teacher_feature_map.shape)}; build the loss for these sizes."
            )
        return F.mse_loss(at_least_float32(regressed), at_least_float32(teacher_feature_map.detach()))
