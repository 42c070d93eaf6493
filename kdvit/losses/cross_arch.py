"""Cross-architecture distillation: a student's map in the attention space and the feature space of a transformer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.attending import attend, split_channels
from kdvit.losses.checks import built_width, choice, count, feature_pair, not_built, number, same_batch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, resize
from kdvit.signals import Grid, Location, ModelInfo, SignalInfo, map_to_tokens

_SIGNALS = ("query", "key", "value")


@register("cross_arch")
class CrossArch(Loss):
    """Give the student's map the queries, keys and values of a transformer teacher, and its features.

    L = alpha * mean (attn(g(Q_s), g(K_s), g(V_s)) - attn(Q_t, K_t, V_t))^2
      + alpha * mean (V_s V_s^T - V_t V_t^T)^2 / d
      + beta * mean (GL(student) - teacher)^2,  attn(Q, K, V) = softmax(Q K^T / sqrt(d)) V

    Partially cross attention: three 3x3 convolutions make Q_s, K_s and V_s, with the teacher's heads; g replaces each
    number in them by the teacher's with probability replace_ratio. GL, group-wise linear: neighbouring positions
    share a linear layer. All means are over B, heads, positions and channels. The teacher's prefix tokens are left
    out before the softmax, and the student's map is first brought to the grid of the teacher's patches.

    Published: beside the task loss with weight 1, the first two terms and the third with weight 1 each; also an
    adversarial term over several views of the student's features, with a discriminator: left out here.

    Args:
        alpha: weight >= 0 of the partially cross attention. 1.
        beta: weight >= 0 of the group-wise linear features. 1.
        replace_ratio: share in [0, 1) of the numbers that are the teacher's. 0.5.
        neighbourhood: side of the square of positions that share a linear layer. 4: 16 layers for 14x14 patches.
        dropout: probability in [0, 1) that a number in the student's map is dropped before the linear layers, in
            training. The paper has it, its value is not known to us.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            module path. Last.
        teacher_block: block of the teacher, a transformer. Last.
        resize: how the student's map comes to the teacher's grid: "bilinear", "bicubic", "nearest", or "pool" for
            students with a finer grid.

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws replacement and
    dropout; ``forward(..., noise=u)`` with u in [0, 1), of shape (B, 3, H, N, d) or with 1 in some places, fixes
    the replacement in query, key and value: where u is below replace_ratio, the numbers are the teacher's.

    Inputs:
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teacher_query, teacher_key, teacher_value: (B, H, P+N, d) each, as the attention product uses them.
        teacher_feature_map: (B, D_t, h, w), the patch tokens of that block on their grid.

    Returns:
        ``{"attention", "value", "feature"}``, scalars >= 0, weights included, in squared feature units (value: to the
        power of two); each 0 where what it compares is equal.

    Raises:
        ValueError: an option is out of its range or unknown; the teacher has not one query for each patch; the inputs
            differ in B, or are not those above; noise of another shape.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Liu et al., Cross-Architecture Knowledge Distillation, ACCV 2022, Eqs. 3 to 6,
        https://arxiv.org/abs/2207.05273; no official code; from the paper. Our choice: means instead of sums, one
        attention for each head, patch tokens alone, and resizing.

    Example:
        >>> import torch
        >>> from kdvit.losses import CrossArch
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher, x = torch.ones(1, 2, 1, 1), torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0)
        >>> qkv = {name: SignalInfo.of(name, x) for name in ("query", "key", "value")}  # one head of width 1
        >>> loss = CrossArch()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher), **qkv))
        >>> for p in loss.parameters():
        ...     _ = p.data.zero_()
        >>> terms = loss(student, x, x, x, teacher, noise=torch.ones(1, 3, 1, 1, 1))  # nothing is replaced
        >>> [terms[name].item() for name in ("attention", "value", "feature")]  # (0 - 2)^2, (0 - 2 * 2)^2, (0 - 3)^2
        [4.0, 16.0, 9.0]
    """

    mismatch = Mismatch(
        width="convolutions and linear layers to the teacher's",
        heads="the student gets the teacher's",
        depth="one stage and one block",
        grid="the student's map is resized",
    )

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 1.0,
        replace_ratio: float = 0.5,
        neighbourhood: int = 4,
        dropout: float = 0.0,
        student_stage: Location = -1,
        teacher_block: Location = -1,
        resize: str = "bilinear",
    ) -> None:
        super().__init__()
        self.alpha = number(self, "alpha", alpha, ">= 0", "0 switches the partially cross attention off")
        self.beta = number(self, "beta", beta, ">= 0", "0 switches the linear features off")
        self.replace_ratio = self._ratio("replace_ratio", replace_ratio, "the published value is 0.5")
        self.neighbourhood = count(self, "neighbourhood", neighbourhood, "the published value is 4")
        self.dropout = self._ratio("dropout", dropout, "0 drops nothing")
        self.student_stage = student_stage
        self.teacher_block = teacher_block
        self.resize = choice(self, "resize", resize, RESIZES)
        self.generator: torch.Generator | None = None
        self.convolutions: nn.ModuleList | None = None

    def _ratio(self, name: str, value: float, advice: str) -> float:
        value = number(self, name, value, ">= 0", advice)
        if value >= 1:
            raise ValueError(f"CrossArch: {name} must be < 1, got {value}; {advice}.")
        return value

    def locations(self) -> Mapping[str, Location]:
        teacher = {f"teacher_{signal}": self.teacher_block for signal in (*_SIGNALS, "feature_map")}
        return {"student_feature_map": self.student_stage, **teacher}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        dim, features = student["feature_map"].dim, teacher["feature_map"]
        taught: list[SignalInfo] = [teacher[signal] for signal in _SIGNALS]
        self.grid, self.dim, self.num_heads = features.grid, features.dim, taught[0].num_heads
        self.num_prefix_tokens = taught[0].num_prefix_tokens
        self.shapes = tuple(info.shape for info in taught)
        num_patches = self.grid[0] * self.grid[1]
        if taught[0].shape[1] - self.num_prefix_tokens != num_patches:
            raise ValueError(
                f"CrossArch: teacher must have one query for each of {num_patches} patches, got "
                f"{taught[0].shape[1] - self.num_prefix_tokens} for '{teacher.name}'; choose a teacher whose attention "
                "sees the whole image."
            )
        self.convolutions = nn.ModuleList(
            Projector(nn.Conv2d(dim, self.num_heads * info.dim, 3, padding=1)) for info in taught
        )
        self.groups = neighbourhoods(self.grid, self.neighbourhood)
        self.linears = nn.ModuleList(Projector(nn.Linear(dim, self.dim)) for _ in self.groups)

    def forward(
        self,
        student_feature_map: Tensor,
        teacher_query: Tensor,
        teacher_key: Tensor,
        teacher_value: Tensor,
        teacher_feature_map: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.convolutions is None:
            raise not_built(self)
        student, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        theirs = [self._patches(*x, student) for x in zip(_SIGNALS, (teacher_query, teacher_key, teacher_value))]
        self._check_map(teacher)
        student = resize(student, self.grid, self.resize)
        own = [split_channels(at_least_float32(conv(student)), self.num_heads) for conv in self.convolutions]
        return {
            "attention": self.alpha * self._attention(own, theirs, noise),
            "value": self.alpha * _value_distance(own[2], theirs[2]),
            "feature": self.beta * self._feature(student, teacher),
        }

    def _attention(self, own: list[Tensor], theirs: list[Tensor], noise: Tensor | None) -> Tensor:
        batch, *rest = own[0].shape
        shape = (batch, 3, *rest)
        if noise is None:
            noise = self._draw(shape, own[0])
        elif noise.ndim != 5 or any(size not in (1, wanted) for size, wanted in zip(noise.shape, shape)):
            raise ValueError(
                f"CrossArch: noise must have shape {shape}, or 1 in some places of it, got {tuple(noise.shape)}; give "
                "one number for each that may be replaced."
            )
        replaced = (noise < self.replace_ratio).expand(-1, 3, -1, -1, -1).unbind(dim=1)
        mixed = [torch.where(at, t, s) for at, t, s in zip(replaced, theirs, own, strict=True)]
        scale = own[0].shape[-1] ** -0.5
        return F.mse_loss(attend(*mixed, scale), attend(*theirs, scale))

    def _feature(self, student: Tensor, teacher: Tensor) -> Tensor:
        tokens, target = map_to_tokens(student), map_to_tokens(teacher)
        if self.training and self.dropout:
            tokens = tokens * (self._draw(tokens.shape, tokens) >= self.dropout) / (1 - self.dropout)
        projected = [at_least_float32(linear(tokens[:, at])) for linear, at in zip(self.linears, self.groups)]
        # A mean over all positions does not ask for their order.
        return F.mse_loss(torch.cat(projected, dim=1), torch.cat([target[:, at] for at in self.groups], dim=1))

    def _draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        return torch.rand(shape, generator=self.generator, device=device).to(like.device)

    def _patches(self, signal: str, x: Tensor, student: Tensor) -> Tensor:
        """A teacher's query, key or value without prefix tokens, (B, H, N, d)."""
        name, shape = f"teacher_{signal}", self.shapes[_SIGNALS.index(signal)]
        if tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"CrossArch: {name} must have shape (B, {', '.join(map(str, shape))}) as in build, got "
                f"{tuple(x.shape)}; build the loss for these sizes."
            )
        same_batch(self, "student_feature_map", student, name, x)
        return at_least_float32(x.detach()[:, :, self.num_prefix_tokens :])

    def _check_map(self, teacher: Tensor) -> None:
        built_width(self, "teacher_feature_map", teacher, self.dim)
        if tuple(teacher.shape[2:]) != tuple(self.grid):
            raise ValueError(
                f"CrossArch: teacher_feature_map must have the grid {self.grid[0]}x{self.grid[1]} as in build, got "
                f"{teacher.shape[2]}x{teacher.shape[3]}; build the loss for this image size."
            )


def neighbourhoods(grid: Grid, side: int) -> list[list[int]]:
    """The positions, counted along rows, of each side x side square of a grid; squares at its far edges are smaller.

    Example:
        >>> neighbourhoods((2, 3), 2)
        [[0, 1, 3, 4], [2, 5]]
    """
    height, width = grid
    return [
        [
            row * width + column
            for row in range(*_span(top, side, height))
            for column in range(*_span(left, side, width))
        ]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _span(start: int, side: int, end: int) -> tuple[int, int]:
    return start, min(start + side, end)


def _value_distance(x: Tensor, y: Tensor) -> Tensor:
    """mean (x x^T - y y^T)^2 / d of (B, H, N, d), by one product: one tensor with an entry for each pair."""
    with torch.autocast(x.device.type, enabled=False):
        left, right = torch.cat([x, y], dim=-1), torch.cat([x, -y], dim=-1)
        return (left @ right.transpose(-2, -1)).square().mean() / x.shape[-1]
