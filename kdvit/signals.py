"""The vocabulary that losses, taps and wrappers share: signal names, their geometry, and what a model is.

``B`` batch, ``P`` prefix tokens (class, distillation, registers), ``N`` patch tokens, ``D`` width, ``H`` heads,
``d`` head width, ``C`` classes.

=============================  ====================  ========================================================
signal                         shape                 what exactly
=============================  ====================  ========================================================
``logits``                     (B, C)                raw; the class head's alone when ``dist_logits`` is read too
``dist_logits``                (B, C)                raw, of the distillation head
``dense_logits``               (B, C, h, w)          raw, of the classifier applied to every patch token or position
``dense_dist_logits``          (B, C, h, w)          the same with the distillation head
``tokens`` of block i          (B, P+N, D)           the residual stream after block i, un-normed
``patch_tokens`` of block i    (B, N, D)             the same without the prefix
``cls_token`` of block i       (B, D)                the first prefix token of it
``normed_tokens``              (B, P+N, D)           the last block's tokens after the model's final norm
``normed_patch_tokens``        (B, N, D)             the same without the prefix
``normed_cls_token``           (B, D)                the first prefix token of it
``feature_map`` of stage i     (B, D, h, w)          a CNN or hierarchical stage; a ViT's patch tokens on their grid
``pre_activation`` of stage i  (B, D, h, w)          the same in front of the stage's last ReLU, where it ends in one
``pooled``                     (B, D)                what the classifier sees
``query``, ``key``, ``value``  (B, H, P+N, d)        what the attention product of block i really uses
``attention`` of block i       (B, H, P+N, P+N)      probabilities after the softmax, float32
``cls_attention`` of block i   (B, H, P+N)           the class token's row of it
``head``                       callable              pooled -> logits; gradients flow through it
``tail`` of block i            callable              tokens after block i -> logits; gradients flow through it
=============================  ====================  ========================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType

from torch import Tensor

#: Signals that exist once in a model and take no location.
MODEL_SIGNALS = (
    "logits",
    "dist_logits",
    "dense_logits",
    "dense_dist_logits",
    "normed_tokens",
    "normed_patch_tokens",
    "normed_cls_token",
    "pooled",
    "head",
)
#: Signals that are read at a block or stage: an index (negative counts from the end), a share of the depth in (0, 1]
#: (0.5: where half of the blocks have run), or a dotted module path.
LOCATED_SIGNALS = (
    "tokens",
    "patch_tokens",
    "cls_token",
    "feature_map",
    "pre_activation",
    "query",
    "key",
    "value",
    "attention",
    "cls_attention",
    "tail",
)
SIGNALS = MODEL_SIGNALS + LOCATED_SIGNALS
#: Signals that only a model with attention blocks can give.
ATTENTION_SIGNALS = ("query", "key", "value", "attention", "cls_attention")
#: Signals that are functions, not tensors.
CALLABLE_SIGNALS = ("head", "tail")
#: Signals of shape (B, channels, h, w).
MAP_SIGNALS = ("feature_map", "pre_activation", "dense_logits", "dense_dist_logits")
#: Signals whose second axis is the class.
CLASS_SIGNALS = ("logits", "dist_logits", "dense_logits", "dense_dist_logits")

Location = int | float | str
Grid = tuple[int, int]


@dataclass(frozen=True)
class SignalInfo:
    """What is known of one signal before training: where it comes from, its shape and its geometry.

    Args:
        signal: name, one of `SIGNALS`.
        location: the dotted module path that it is read at, or ``"output"``.
        shape: its shape without the batch axis; () for a callable.
        num_prefix_tokens: P, the prefix tokens on its token axis (0 where it has none).
        grid: (h, w) of its patch tokens or feature map, None where it has no grid.
        model: the model's name, for error sentences.
    """

    signal: str
    location: str
    shape: tuple[int, ...]
    num_prefix_tokens: int = 0
    grid: Grid | None = None
    model: str = "model"

    @property
    def dim(self) -> int:
        """Width: channels of a feature map, classes of logits, head width of query/key/value, else the last axis."""
        return self.shape[0] if self.signal in MAP_SIGNALS else self.shape[-1]

    @property
    def num_heads(self) -> int:
        """Heads of query, key, value and attention."""
        return self.shape[0]

    @classmethod
    def of(cls, signal: str, tensor: Tensor, **geometry) -> SignalInfo:
        """Describe a tensor at hand, for a loss that is built without a model (a REPL, a test)."""
        if signal in MAP_SIGNALS:
            geometry.setdefault("grid", tuple(tensor.shape[-2:]))
        return cls(signal, geometry.pop("location", "given"), tuple(tensor.shape[1:]), **geometry)


@dataclass(frozen=True)
class ModelInfo:
    """What a loss may know of a model when it builds its projectors.

    ``info[signal]`` is the `SignalInfo` of a signal that the loss reads, or a tuple of them where the loss reads
    it at several locations.

    Args:
        name: of the model, for error sentences.
        num_classes: C, where the model has a classifier that some loss reads.
        signals: what the loss reads.
        input_size: (channels, height, width) of its images, where known.
    """

    name: str
    num_classes: int | None = None
    signals: Mapping[str, SignalInfo | tuple[SignalInfo, ...]] = field(default_factory=lambda: MappingProxyType({}))
    input_size: tuple[int, int, int] | None = None

    def __getitem__(self, signal: str) -> SignalInfo | tuple[SignalInfo, ...]:
        if signal not in self.signals:
            raise ValueError(f"{self.name}: signal '{signal}' was not read; known here: {', '.join(self.signals)}")
        return self.signals[signal]

    @classmethod
    def of(
        cls,
        name: str = "model",
        input_size: tuple[int, int, int] | None = None,
        **signals: SignalInfo | tuple[SignalInfo, ...],
    ) -> ModelInfo:
        """Put `SignalInfo` together by hand: ``ModelInfo.of(logits=SignalInfo.of("logits", tensor))``."""

        def named(info: SignalInfo | tuple[SignalInfo, ...]) -> SignalInfo | tuple[SignalInfo, ...]:
            return tuple(map(named, info)) if isinstance(info, tuple) else replace(info, model=name)

        return cls(name, None, MappingProxyType({key: named(info) for key, info in signals.items()}), input_size)


@dataclass(frozen=True)
class Progress:
    """Where training stands, for losses and weights that change with it. Steps and epochs count from 0."""

    step: int = 0
    epoch: float = 0.0
    total_steps: int = 1
    total_epochs: float = 1.0


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` when a known name is close to ``word``, else an empty string."""
    match = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def tokens_to_map(patch_tokens: Tensor, grid: Grid) -> Tensor:
    """Lay patch tokens (B, N, D) out on their grid: (B, D, h, w). N must be h * w: no prefix token among them."""
    batch, num_tokens, dim = patch_tokens.shape
    if num_tokens != grid[0] * grid[1]:
        raise ValueError(
            f"tokens_to_map: patch_tokens must have {grid[0]}x{grid[1]} = {grid[0] * grid[1]} tokens, "
            f"got {num_tokens}; drop the prefix tokens, or pass the grid of this image size."
        )
    return patch_tokens.transpose(1, 2).reshape(batch, dim, *grid)


def map_to_tokens(feature_map: Tensor) -> Tensor:
    """Flatten a feature map (B, D, h, w) into patch tokens (B, h * w, D)."""
    return feature_map.flatten(2).transpose(1, 2)
