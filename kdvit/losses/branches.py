"""Early exits that losses put on intermediate features: trained with the student, never exported."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.projectors import BatchNorm2d
from kdvit.signals import SignalInfo, map_to_tokens, tokens_to_map

#: Patch merging stops before a side of the grid falls below this: 14x14 patches become 7x7.
FINAL_GRID = 7
INIT_STD = 0.02


def pooled(x: Tensor) -> Tensor:
    """Mean over positions: a feature map (B, D, h, w) or patch tokens (B, N, D) -> (B, D)."""
    return x.mean(dim=(2, 3)) if x.ndim == 4 else x.mean(dim=1)


class PooledHead(nn.Sequential):
    """The plainest exit: the mean over positions, LayerNorm, a linear classifier; (B, D, h, w) -> (B, C)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pooled(x.to(self[0].weight.dtype)))


class Branch(nn.Module):
    """A small network from one place of a model to logits, as OFA-KD puts on its students.

    ``"transformer"``: while the grid is at least 14x14, 2x2 patches are merged into one; then pre-norm transformer
    blocks, one per place behind this one and at least one; mean over tokens; linear.
    ``"convolution"``: separable convolutions of stride 2 that double the width, one per place behind this one; at the
    last place a 1x1 convolution; mean over positions; linear.

    Args:
        info: what is read there: a feature map, or patch tokens with their grid; any width, any grid from 1x1 on.
        num_classes: C.
        kind: ``"transformer"`` or ``"convolution"``.
        num_behind: how many places of the model come behind this one, 0 for the last.
        width: what merged patches and the last convolution have, usually that of the model's end.

    Raises:
        ValueError: the grid of what is read is not known.

    Example:
        >>> import torch
        >>> info = SignalInfo("patch_tokens", "blocks.2", shape=(196, 32), grid=(14, 14))
        >>> branch = Branch(info, 10, "transformer", num_behind=1, width=64)
        >>> branch(torch.zeros(2, 196, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, info: SignalInfo, num_classes: int, kind: str, num_behind: int, width: int) -> None:
        super().__init__()
        if info.grid is None:
            raise ValueError(
                f"Branch: {info.signal} must have a grid, got none for '{info.model}' at '{info.location}'; "
                "read a feature_map, or pass grid=."
            )
        self.grid = info.grid
        layers = {"transformer": _transformer, "convolution": _convolution}[kind]
        trunk, dim = layers(info, num_behind, width)
        self.trunk = nn.Sequential(*trunk)
        self.head = nn.Linear(dim, num_classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.head.weight.dtype)
        x = tokens_to_map(x, self.grid) if x.ndim == 3 else x
        return self.head(pooled(self.trunk(x)))


def _transformer(info: SignalInfo, num_behind: int, width: int) -> tuple[list[nn.Module], int]:
    """Merging and blocks, and the width that comes out."""
    side, dim = min(info.grid), info.dim
    layers: list[nn.Module] = []
    while side >= 2 * FINAL_GRID:
        layers.append(PatchMerging(dim, width))
        side, dim = -(-side // 2), width
    layers.append(_Flatten())
    num_heads = next(n for n in (4, 2, 1) if dim % n == 0)
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    for _ in range(max(num_behind, 1)):
        layers.append(nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, **options))
    return layers, dim


def _convolution(info: SignalInfo, num_behind: int, width: int) -> tuple[list[nn.Module], int]:
    """Separable convolutions, and the width that comes out."""
    if num_behind == 0:
        return [nn.Conv2d(info.dim, width, kernel_size=1)], width
    dims = [info.dim * 2**i for i in range(num_behind)] + [width]
    return [_separable(*pair) for pair in zip(dims, dims[1:])], width


def _separable(dim: int, out_dim: int) -> nn.Sequential:
    """Twice depthwise 3x3, pointwise, norm, ReLU; the first halves the grid, the second changes the width."""
    return nn.Sequential(
        nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False),
        nn.Conv2d(dim, dim, 1, bias=False),
        BatchNorm2d(dim),
        nn.ReLU(),
        nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        nn.Conv2d(dim, out_dim, 1, bias=False),
        BatchNorm2d(out_dim),
        nn.ReLU(),
    )


class PatchMerging(nn.Module):
    """2x2 neighbours become one position: (B, D, h, w) -> (B, width, h / 2, w / 2); odd sides are padded by zeros."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        merged = F.pixel_unshuffle(x, 2).permute(0, 2, 3, 1)  # (B, h / 2, w / 2, 4 * D)
        return F.gelu(self.reduce(self.norm(merged))).permute(0, 3, 1, 2)


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return map_to_tokens(x)


def initialise(module: nn.Module) -> None:
    """Linear layers and attention: normal with standard deviation 0.02; convolutions: Kaiming, fan-out."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=INIT_STD)
    elif isinstance(module, nn.MultiheadAttention):
        nn.init.trunc_normal_(module.in_proj_weight, std=INIT_STD)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
