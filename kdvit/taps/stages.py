"""timm models made of stages: CNNs (ResNet, ConvNeXt, ...) and hierarchical transformers (Swin, PVT, MaxViT, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdvit.signals import Location, map_to_tokens, tokens_to_map
from kdvit.taps.family import Source
from kdvit.taps.probing import probe
from kdvit.taps.tap import TapPoint
from kdvit.taps.timm_facts import TimmFacts

#: Classes whose stages give (B, h, w, D) without saying so in ``output_fmt``, as Swin does.
UNDECLARED_CHANNELS_LAST = ("VisionTransformerSAM", "VOLO", "Sequencer2d")


class TimmStages(TimmFacts):
    """Any timm model with ``feature_info``: stage i is its i-th entry (for a ResNet, 0 is the stem).

    Windowed and pooled attention of hierarchical transformers is not token attention over one grid: it is refused.
    """

    kind = "a model of stages"
    no_attention = "a model of stages without token attention over one grid"

    def __init__(self, model: nn.Module, name: str, **geometry) -> None:
        super().__init__(model, name, **geometry)
        self.stages = [stage["module"] for stage in model.feature_info]
        self.widths = [stage["num_chs"] for stage in model.feature_info]
        self.channels_last = (
            getattr(model, "output_fmt", "NCHW") == "NHWC" or type(model).__name__ in UNDECLARED_CHANNELS_LAST
        )

    def num_blocks(self) -> int:
        return len(self.stages)

    def source(self, signal: str, location: Location | None, input_size: tuple[int, int, int] | None) -> Source:
        if isinstance(location, str) and not (signal == "feature_map" and location in self.stages):
            if signal == "feature_map" and self.channels_last:
                raise ValueError(
                    f"{self.name} gives no feature_map at '{location}': inside this model maps are channels-last; "
                    f"read a stage, 0..{len(self.stages) - 1}."
                )
            return self.by_path(signal, location)
        if signal in ("logits", "dist_logits", "pooled", "head"):
            return self.classifier_source(signal)
        if signal == "dense_logits":
            return self._dense_logits()
        if signal not in ("feature_map", "pre_activation"):
            raise self.cannot(signal, location)
        stage = self.stages.index(location) if isinstance(location, str) else location
        stage = self.index(stage, len(self.stages), "stage")
        path, width = self.stages[stage], self.widths[stage]
        self.check_path(path)  # a few of timm's feature_info name modules that the model does not have

        def to_map(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.ndim != 4:
                return x  # refused when it is described
            x = x.permute(0, 3, 1, 2) if self.channels_last else x
            if x.shape[1] != width:
                raise ValueError(
                    f"{self.name}: feature_map of stage {stage} must have {width} channels, got shape {tuple(x.shape)} "
                    f"at '{path}'; choose another stage, or a module path."
                )
            return x

        last = self._last_activation(path, input_size) if signal == "pre_activation" else None
        return Source(path, (TapPoint(path),) if last is None else (TapPoint(last, "copied input"),), to_map)

    def _last_activation(self, stage: str, input_size: tuple[int, int, int] | None) -> str | None:
        """The path of the ReLU whose output is the stage's own; None where the stage does not end in one."""
        if isinstance(self.model.get_submodule(stage), nn.ReLU):
            return stage
        inside = [(path, m) for path, m in self.model.named_modules() if f"{path}.".startswith(f"{stage}.")]
        given: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda module, args, out, path=path: given.update({path: out}))
            for path, module in inside
            if path == stage or isinstance(module, nn.ReLU)
        ]
        try:
            probe(self.model, self.model, input_size or self.input_size())
        finally:
            for handle in handles:
                handle.remove()
        own = given.pop(stage, None)
        return next((path for path, out in given.items() if out is own), None)

    def _dense_logits(self) -> Source:
        """The classifier on every position of the map that the model pools, as if the image were that position."""
        paths = ("global_pool", "head.global_pool")
        modules = dict(self.model.named_modules())
        path = next((path for path in paths if path in modules), None)
        if path is None or not self._classifies_single_positions(modules[path]):
            raise self.cannot("dense_logits", None)

        def classify(call: tuple) -> Tensor:
            feature_map = call[0][0]
            batch, *axes = feature_map.shape
            grid = axes[:2] if self.channels_last else axes[1:]
            positions = feature_map.flatten(0, 2) if self.channels_last else map_to_tokens(feature_map).flatten(0, 1)
            single = positions[:, None, None] if self.channels_last else positions[..., None, None]
            return tokens_to_map(self.model.forward_head(single).unflatten(0, (batch, -1)), tuple(grid))

        return Source(f"{path} -> head", (TapPoint(path, "input"),), classify)

    def _classifies_single_positions(self, pooling: nn.Module) -> bool:
        """Whether all of ``forward_head`` is behind the pooling and a function of one position.

        VGG has a part of its classifier in front of the pooling; BatchNorm would count every position as an image.
        """
        norms = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        pooled, ran = [], []
        handles = [norm.register_forward_pre_hook(lambda module, _: ran.append(module)) for norm in norms]
        handles.append(pooling.register_forward_pre_hook(lambda _, call: pooled.append(call[0].shape)))

        def run(position: Tensor) -> None:
            position = position.permute(0, 2, 3, 1) if self.channels_last else position
            self.model.forward_head(position)
            pooled.append(position.shape)

        try:
            probe(run, self.model, (self.model.num_features, 1, 1))
        finally:
            for handle in handles:
                handle.remove()
        return not ran and len(set(pooled)) == 1

    def gives(self) -> Sequence[str]:
        return (
            "logits, dense_logits, pooled, head",
            f"feature_map, pre_activation of stages 0..{len(self.stages) - 1}",
            "tokens, patch_tokens, feature_map of a dotted module path",
        )
