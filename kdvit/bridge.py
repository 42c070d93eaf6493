"""From the student's images to the teacher's: channels, size and normalisation, on tensors, inside the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from kdvit.wrappers import Student, Teacher


class ImageBridge(nn.Module):
    """x_teacher = resize(x_student * std_s / std_t + (mean_s - mean_t) / std_t).

    Args:
        channels: channels that the teacher takes; grey images are repeated.
        size: (height, width) that the teacher takes, None for any.
        scale: per-channel factor of the change of normalisation, None where there is none to make.
        shift: per-channel offset of it.
    """

    def __init__(
        self,
        channels: int | None = None,
        size: tuple[int, int] | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.size = size
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    @classmethod
    def between(cls, student: Student, teacher: Teacher) -> ImageBridge:
        """What must be done to the student's images so that the teacher sees what it was trained on.

        Raises:
            ValueError: the sizes have different shapes, or colours would have to be invented.
        """
        channels = size = None
        ours, theirs = student.input_size, teacher.input_size
        if ours is not None and theirs is not None:
            if ours[0] != theirs[0] and ours[0] != 1:
                raise ValueError(
                    f"Teacher: '{teacher.name}' takes {theirs[0]} channels but student '{student.name}' gets "
                    f"{ours[0]}; choose a teacher and a student with the same channels."
                )
            channels = theirs[0] if ours[0] != theirs[0] else None
            if not teacher.takes_any_size:
                size = theirs[1:]
                if ours[1] * size[1] != ours[2] * size[0]:
                    raise ValueError(
                        f"Teacher: '{teacher.name}' takes {size[0]}x{size[1]} images and the student's are "
                        f"{ours[1]}x{ours[2]}: resizing would distort them; choose an input_size of one shape."
                    )
                if size == ours[1:] and student.takes_any_size is False:
                    size = None
        scale = shift = None
        if student.normalisation and teacher.normalisation and student.normalisation != teacher.normalisation:
            (mean_s, std_s), (mean_t, std_t) = (map(torch.tensor, n) for n in _alike(student, teacher))
            scale, shift = (std_s / std_t).view(-1, 1, 1), ((mean_s - mean_t) / std_t).view(-1, 1, 1)
        return cls(channels, size, scale, shift)

    def forward(self, images: Tensor) -> Tensor:
        if self.channels is not None:
            images = images.expand(-1, self.channels, -1, -1)
        if self.scale is not None:
            images = images * self.scale + self.shift
        if self.size is not None and images.shape[-2:] != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True)
        return images

    def describe(self) -> str:
        """The steps in words."""
        steps = [
            f"repeat to {self.channels} channels" if self.channels is not None else "",
            "change of normalisation" if self.scale is not None else "",
            f"resize to {self.size[0]}x{self.size[1]} where they differ" if self.size is not None else "",
        ]
        return ", ".join(filter(None, steps)) or "none"


def _alike(student: Student, teacher: Teacher) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Both normalisations with one number of channels."""
    count = max(len(values) for n in (student.normalisation, teacher.normalisation) for values in n)
    return [
        tuple(values * count if len(values) == 1 else values for values in n)
        for n in (student.normalisation, teacher.normalisation)
    ]
