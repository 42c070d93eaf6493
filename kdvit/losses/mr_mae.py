"""MR-MAE: features of the teacher where the student sees the image, pixels where it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, choice, count, feature_pair, flag, not_built, number, same_batch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, resize
from kdvit.signals import Grid, Location, ModelInfo, map_to_tokens


@register("mr_mae")
class MRMAE(Loss):
    """Mimic the teacher's features at visible patches of a masked image, reconstruct the pixels of the others.

    L = alpha * mean over visible patches and channels of (M(s) - norm(teacher))^2
      + beta * mean over hidden patches and pixels of (R(s) - norm(pixels))^2

    s are the student's features of the image with mask_ratio of its patches set to 0, the mean of normalised images;
    the teacher has seen all of it. M and R are linear layers behind one LayerNorm; norm() gives each target, a patch's
    channels or its pixels, mean 0 and variance 1. What is hidden cannot be mimicked and what is seen is not
    reconstructed, so the two targets do not disagree. Costs another forward of the student.

    Published: no task loss, 200 to 400 epochs of pretraining, this loss 1, then fine-tuning with labels; teachers are
    CLIP and DINO. alpha = beta is a belief. Every student with a feature map will do; masked images enter a BatchNorm.

    Args:
        alpha: weight >= 0 of the mimicked features. 1.
        beta: weight >= 0 of the reconstructed pixels. 1.
        mask_ratio: share of the patches that are hidden, in (0, 1); at least one stays visible. 0.75.
        normalize: whether the teacher's features are normalised, patch by patch; pixels always are.
        patch_pixels: side of a reconstructed patch; None: that of the student's own, 16 as published. The image is
            average-pooled (or repeated) to that many pixels a patch.
        student_stage: block (ViT) or stage of the student; negative counts from the end; or a module path. Last. Its
            grid is that of the mask.
        teacher_stage: block or stage of the teacher. Last.
        resize: how the teacher's map comes to the student's grid, where it has another: "pool", "bilinear", "bicubic"
            or "nearest".

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the mask;
    ``forward(..., noise=u)`` with u (B, N) in [0, 1) fixes it: the smallest values of a row stay visible.

    Inputs:
        student_feature_map: (B, D_s, h, w) of the whole image: only its shape is used.
        teacher_feature_map: (B, D_t, h, w) of the whole image; the grids may differ.
        images: (B, channels, H, W), normalised, that the student has seen.
        rerun_student: function, images -> {"student_feature_map"}, with graph.

    Returns:
        ``{"mimic", "reconstruct"}``, scalars >= 0, weights included, in shares of the targets' variance; 0 where the
        targets are met.

    Raises:
        ValueError: a number is out of its range; resize is unknown; the student's grid has a single patch, or the size
            of its images is not known; the images have other channels; the inputs differ in B, or are not those above;
            noise of another shape.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Gao et al., Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature Mimicking, IJCV 2023,
        https://arxiv.org/abs/2303.05475; no official code; from the paper, low confidence in the details. Our choice:
        hidden patches are blank instead of left out of the encoder, and the decoder is linear.

    Example:
        >>> import torch
        >>> from kdvit.losses import MRMAE
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> def student(images):  # its features are the pixels: 2x2 patches of one pixel
        ...     return {"student_feature_map": images}
        >>> images, teacher = torch.ones(1, 3, 2, 2), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        >>> loss = MRMAE()
        >>> loss.build(ModelInfo.of(input_size=(3, 2, 2), feature_map=SignalInfo.of("feature_map", images)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher)))
        >>> for p in loss.parameters():
        ...     _ = p.data.zero_()
        >>> terms = loss(images, teacher, images=images, rerun_student=student)
        >>> round(terms["mimic"].item(), 3)  # the variance of the target 1, -1
        1.0
        >>> terms["reconstruct"].item()  # pixels that are all the same have none
        0.0
    """

    mismatch = Mismatch(
        width="a linear layer to the teacher's", depth="one stage of each", grid="the teacher's map is average-pooled"
    )

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        mask_ratio: float = 0.75,
        normalize: bool = True,
        patch_pixels: int | None = None,
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the mimicking off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the reconstruction off")
        self.mask_ratio = number(self, "mask_ratio", mask_ratio, "in (0, 1)", "the published value is 0.75")
        self.normalize = flag(self, "normalize", normalize)
        self.patch_pixels = patch_pixels
        if patch_pixels is not None:
            count(self, "patch_pixels", patch_pixels, "None takes the size of the student's patches")
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.generator: torch.Generator | None = None
        self.mimic: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def extra_forwards(self) -> dict[str, float]:
        return {"student": 1, "teacher": 0}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        info, self.dim = student["feature_map"], teacher["feature_map"].dim
        if info.grid[0] * info.grid[1] < 2:
            raise ValueError(
                f"MRMAE: student grid must have at least 2 patches, got {info.grid[0]}x{info.grid[1]} for "
                f"'{info.model}' at '{info.location}'; choose an earlier stage or larger images."
            )
        if student.input_size is None:
            raise ValueError(
                f"MRMAE: the size of the images of '{info.model}' must be known, got none; pass "
                "Student(model, input_size=(channels, height, width))."
            )
        self.num_channels, height, _ = student.input_size
        self.side = self.patch_pixels or max(1, height // info.grid[0])
        self.norm = Projector(nn.LayerNorm(info.dim))
        self.mimic = Projector(nn.Linear(info.dim, self.dim))
        self.reconstruct = Projector(nn.Linear(info.dim, self.num_channels * self.side**2))

    def forward(
        self,
        student_feature_map: Tensor,
        teacher_feature_map: Tensor,
        images: Tensor,
        rerun_student: Callable[[Tensor], Mapping[str, Tensor]],
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.mimic is None:
            raise not_built(self)
        whole, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        built_width(self, "teacher_feature_map", teacher, self.dim)
        self._check_images(images, whole)
        grid = tuple(whole.shape[2:])
        hidden = self._hide(len(images), grid, noise, images.device)  # (B, N)
        mask = F.interpolate(hidden.reshape(-1, 1, *grid).to(images.dtype), size=images.shape[2:])
        student = rerun_student(images.masked_fill(mask.bool(), 0))["student_feature_map"]

        tokens = self.norm(map_to_tokens(student))
        features = map_to_tokens(resize(teacher, grid, self.resize))
        features = F.layer_norm(features, features.shape[-1:]) if self.normalize else features
        mimic = _error(self.mimic(tokens), features, ~hidden)
        reconstruct = _error(self.reconstruct(tokens), self._pixels(images, grid), hidden)
        return {"mimic": self.alpha * mimic, "reconstruct": self.beta * reconstruct}

    def _hide(self, batch: int, grid: Grid, noise: Tensor | None, device: torch.device) -> Tensor:
        """Which patches (B, N) are hidden, as many in every image."""
        num_patches = grid[0] * grid[1]
        if noise is None:
            own = device if self.generator is None else self.generator.device
            noise = torch.rand(batch, num_patches, generator=self.generator, device=own).to(device)
        elif noise.shape != (batch, num_patches):
            raise ValueError(
                f"MRMAE: noise must have shape {(batch, num_patches)}, got {tuple(noise.shape)}; give one number "
                "per patch."
            )
        num_visible = max(1, int(num_patches * (1 - self.mask_ratio) + 1e-9))
        visible = noise.argsort(dim=1)[:, :num_visible]
        return torch.ones(noise.shape, dtype=torch.bool, device=device).scatter(1, visible, False)

    def _pixels(self, images: Tensor, grid: Grid) -> Tensor:
        """The normalised pixels of every patch, (B, N, channels * side^2)."""
        size = grid[0] * self.side, grid[1] * self.side
        pixels = F.adaptive_avg_pool2d(at_least_float32(images.detach()), size)
        patches = map_to_tokens(F.pixel_unshuffle(pixels, self.side))
        return F.layer_norm(patches, patches.shape[-1:], eps=1e-6)

    def _check_images(self, images: Tensor, student: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.num_channels:
            raise ValueError(
                f"MRMAE: images must have shape (B, {self.num_channels}, H, W), got {tuple(images.shape)}; "
                "give those that the loss was built for."
            )
        same_batch(self, "student_feature_map", student, "images", images)


def _error(x: Tensor, target: Tensor, at: Tensor) -> Tensor:
    """Mean squared error over the patches that a mask (B, N) names."""
    return ((at_least_float32(x) - target).square().mean(dim=2) * at).sum() / at.sum()
