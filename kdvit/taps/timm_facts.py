"""What every timm model says of itself: input size, normalisation, classifier."""

from __future__ import annotations

from torch import nn

from kdvit.taps.family import Family, Source, logits_of
from kdvit.taps.tap import TapPoint


class TimmFacts(Family):
    """The part that all timm families share. timm itself is not imported: a timm model brings it."""

    def input_size(self) -> tuple[int, int, int] | None:
        if hasattr(self.model, "pretrained_cfg"):
            return tuple(self._input_config()["input_size"])
        # A class of timm's built without its factory says nothing of itself, and timm would answer 3x224x224.
        size = getattr(getattr(self.model, "patch_embed", None), "img_size", None)
        return (self.model.in_chans, *size) if size else None

    def takes_any_size(self) -> bool:
        return not self._input_config()["fixed_input_size"]

    def _input_config(self) -> dict:
        from timm.models import get_model_input_config  # timm is loaded already: the model is one of its own

        return get_model_input_config(self.model)

    def classifier_source(self, signal: str) -> Source:
        """``logits``, ``dist_logits``, ``pooled`` or ``head``."""
        if signal == "logits":
            return Source("output", (), lambda output: logits_of(output, self.name))
        if signal == "dist_logits":
            if not isinstance(getattr(self.model, "head_dist", None), nn.Module):
                raise self.cannot(signal, None)
            return Source("head_dist", (TapPoint("head_dist"),), lambda logits: logits)
        path = self.classifier_path()
        classifier = self.model.get_submodule(path)
        convolves = isinstance(classifier, nn.Conv2d)  # ResNetV2, DLA: a 1x1 convolution over a 1x1 map
        if signal == "pooled":
            point = TapPoint(path, "input")
            return Source(path, (point,), lambda call: call[0][0].flatten(1) if convolves else call[0][0])
        head = (lambda pooled: classifier(pooled[..., None, None]).flatten(1)) if convolves else classifier
        return Source(path, (), lambda: head)

    def class_head_source(self) -> Source:
        """The class token's own logits of a distilled model."""
        return Source("head", (TapPoint("head"),), lambda logits: logits)

    def classifier_layer(self) -> nn.Linear | nn.Conv2d:
        return self.linear(self.model.get_submodule(self.classifier_path()))

    def classifier_path(self) -> str:
        """The dotted path of the last linear layer."""
        classifier = self.model.get_classifier()
        classifier = classifier[0] if isinstance(classifier, tuple) else classifier
        for path, module in self.model.named_modules():
            if module is classifier and path:
                return path
        raise self.cannot("pooled", None)
