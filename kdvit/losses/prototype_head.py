"""The head that self-supervised models of the DINO family are trained with."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class PrototypeHead(nn.Module):
    """Scores of an embedding against prototypes: a small network, length 1, a linear layer without bias.

    Layers have the names of DINOv3's heads, so the weights of a released head load as they are.

    Args:
        dim: width of the embedding.
        num_prototypes: K.
        hidden_dim: width inside.
        bottleneck_dim: width in front of the last layer.
        num_layers: linear layers in front of the last one, GELU between.

    Inputs:
        x: (..., dim).

    Returns:
        (..., num_prototypes).

    Example:
        >>> import torch
        >>> PrototypeHead(4, 10, hidden_dim=8, bottleneck_dim=3)(torch.rand(2, 5, 4)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        self.dim, self.num_prototypes = dim, num_prototypes
        self.hidden_dim, self.bottleneck_dim, self.num_layers = hidden_dim, bottleneck_dim, num_layers
        dims = [dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for pair in zip(dims, dims[1:]):
            layers += [nn.Linear(*pair), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1]) if num_layers > 1 else layers[0]
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        # 1e-6: a blank image has an embedding of length 0, and its gradient shall not be 1e12.
        return self.last_layer(F.normalize(self.mlp(x), dim=-1, eps=1e-6))

    def __repr__(self) -> str:
        names = ("dim", "num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers")
        return f"PrototypeHead({', '.join(f'{name}={getattr(self, name)}' for name in names)})"
