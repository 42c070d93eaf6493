"""What brings a student's features to the teacher's width: trained with the student, not exported."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Projector(nn.Sequential):
    """Layers that compute in their own precision, float32 under a model in half precision; without layers, nothing."""

    def forward(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        return super().forward(x if parameter is None else x.to(parameter.dtype))


def linear(student_dim: int, teacher_dim: int) -> Projector:
    """A linear layer for vectors and tokens (..., D_s) -> (..., D_t); nothing where the widths are equal."""
    return Projector() if student_dim == teacher_dim else Projector(nn.Linear(student_dim, teacher_dim))


def conv1x1(student_dim: int, teacher_dim: int) -> Projector:
    """A 1x1 convolution for maps (B, D_s, h, w) -> (B, D_t, h, w); nothing where the widths are equal."""
    return Projector() if student_dim == teacher_dim else Projector(nn.Conv2d(student_dim, teacher_dim, kernel_size=1))


def conv_norm(dim: int, out_dim: int, kernel_size: int = 1, *, relu: bool = True) -> Projector:
    """Convolution without bias, BatchNorm, and (or not) ReLU; the grid stays."""
    layers: list[nn.Module] = [
        nn.Conv2d(dim, out_dim, kernel_size, padding=kernel_size // 2, bias=False),
        BatchNorm2d(out_dim),
    ]
    return Projector(*layers, *([nn.ReLU()] if relu else []))


class _SingleValue(nn.modules.batchnorm._BatchNorm):
    """BatchNorm that uses its running statistics for a single value per channel, where a batch has none."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class BatchNorm1d(_SingleValue, nn.BatchNorm1d):
    """For (B, D); a batch of one uses the running statistics."""


class BatchNorm2d(_SingleValue, nn.BatchNorm2d):
    """For (B, D, h, w); a batch of one on a 1x1 grid uses the running statistics."""
