"""Student and Teacher: a model, what is known of it, and the signals that are read out of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.bridge import ImageBridge
from kdvit.signals import CALLABLE_SIGNALS, CLASS_SIGNALS, SignalInfo
from kdvit.taps.family import Grid, logits_of
from kdvit.taps.listener import Listener
from kdvit.taps.probing import probe
from kdvit.taps.reader import Request

Size = tuple[int, int, int]
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


class Wrapper(Listener):
    """What Student and Teacher share. Facts that the model states itself need not be given.

    Args:
        model: any nn.Module, or a model name (see `kdvit.models.create_model`).
        input_size: (channels, height, width) of its images.
        mean: per-channel mean of the normalisation that the model expects.
        std: per-channel standard deviation of it.
        num_prefix_tokens: class, distillation and register tokens in tokens that are read by module path.
        grid: (h, w) of the patch tokens that are read by module path.
        name: how errors and `describe` call it.
    """

    role = "Model"

    def __init__(
        self,
        model: nn.Module | str,
        *,
        input_size: Size | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_prefix_tokens: int | None = None,
        grid: Grid | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, (nn.Module, str)) or isinstance(model, Wrapper):
            raise TypeError(
                f"{self.role}: model must be a torch.nn.Module or a model name, got {type(model).__name__}; "
                "pass the plain model."
            )
        if input_size is not None and (len(input_size) != 3 or any(axis < 1 for axis in input_size)):
            raise ValueError(
                f"{self.role}: input_size must be (channels, height, width), got {input_size}; write (3, 224, 224)."
            )
        name = name or (model if isinstance(model, str) else _name_of(model))
        model = self.create(model) if isinstance(model, str) else model
        super().__init__(model, name, num_prefix_tokens=num_prefix_tokens, grid=grid)
        family = self.family()
        self.stated_size = tuple(input_size) if input_size is not None else family.input_size()
        # What a Distiller settles on for this pair, where the model takes several sizes or states none.
        self.input_size = self.stated_size
        self.takes_any_size = family.takes_any_size()
        if mean is None and std is None:
            self.normalisation = _in_channels(family.normalisation(), self.stated_size)
        else:
            self.normalisation = self._given(mean, std)

    def create(self, name: str) -> nn.Module:
        from kdvit.models import create_model

        return create_model(name)

    def _given(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalisation:
        if mean is None or std is None:
            raise ValueError(f"{self.role}: mean and std must be given together; give both or neither.")
        allowed = {1, self.stated_size[0] if self.stated_size is not None else len(mean)}
        if len(mean) != len(std) or len(mean) not in allowed or min(std) <= 0:
            raise ValueError(
                f"{self.role}: mean and std must have one value, or one for each channel, and std > 0, got "
                f"mean={tuple(mean)} and std={tuple(std)}; give those of the model's training images."
            )
        return tuple(mean), tuple(std)

    def own(self) -> Wrapper:
        """This wrapper; or, where it serves a Distiller already, one more around the same model, with its own taps."""
        if self._reader is None:
            return self
        other = copy.copy(self)
        other.deafen()
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.input_size = self.stated_size
        return other

    def listen(self, requests: Sequence[Request]) -> dict[Request, SignalInfo]:
        try:
            return super().listen(requests)
        except Exception:
            self._check_runs()  # a model that does not run at all explains itself here
            raise

    def _check_runs(self) -> None:
        try:
            probe(self.model, self.model, self.input_size)
        except Exception as error:
            size = "x".join(map(str, self.input_size))
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise ValueError(
                f"{self.role}: '{self.name}' cannot run on {size} images ({reason}); "
                "pass input_size=(channels, height, width) of the images that it takes."
            ) from error


class Student(Wrapper):
    """The model that learns.

    Example:
        >>> student = Student(torch.nn.Flatten(), input_size=(1, 2, 2))
        >>> student(torch.ones(3, 1, 2, 2))[0].shape
        torch.Size([3, 4])
    """

    role = "Student"

    def forward(self, images: Tensor) -> tuple[Tensor | None, dict[Request, Any]]:
        """(the logits that the model gives at inference, or None where it has none; the signals)."""
        output, signals = self.read(images)
        try:
            return logits_of(output, self.name), signals
        except TypeError:  # a backbone without a classifier trains on feature losses alone
            return None, signals


class Teacher(Wrapper):
    """The model that teaches: frozen, always in eval mode, and fed with what it was trained on.

    Args:
        model: any nn.Module, or a model name, whose published weights are then loaded.
        class_map: for each class of the student, the teacher's class: a teacher of many classes teaches a subset.
        dtype: run the teacher in another precision, such as ``torch.bfloat16``; its signals come back in float32. None:
            as it is, which for a model that is in half precision throughout is this one.
        input_size: see `Wrapper`; images of another size are resized to it where given, or where the model
            takes no other.
        mean, std, num_prefix_tokens, grid, name: see `Wrapper`.

    Raises:
        ValueError: a weight is NaN or infinite, or the class map is empty.
    """

    role = "Teacher"
    stops_early = True

    def __init__(
        self,
        model: nn.Module | str,
        *,
        class_map: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(model, **facts)
        if facts.get("input_size") is not None:
            self.takes_any_size = False
        for name, weight in self.model.state_dict().items():
            if weight.is_floating_point() and not torch.isfinite(weight).all():
                raise ValueError(
                    f"Teacher: the weights of '{self.name}' must be finite, got NaN or infinity in '{name}'; "
                    "load a sound checkpoint."
                )
        self.register_buffer("class_map", None if class_map is None else _classes(class_map), persistent=False)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"Teacher: dtype must be a floating point torch.dtype, got {dtype!r}; pass torch.bfloat16.")
        if dtype is not None:
            self.model.to(dtype)
        given = {p.dtype for p in self.model.parameters()}
        self.dtype = given.pop() if dtype is None and given in ({torch.float16}, {torch.bfloat16}) else dtype
        self.bridge = ImageBridge()
        self.model.requires_grad_(False)
        self.eval()

    def create(self, name: str) -> nn.Module:
        from kdvit.models import create_model

        return create_model(name, pretrained=True)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode, whatever is asked."""
        return super().train(False)

    def listen(self, requests: Sequence[Request]) -> dict[Request, SignalInfo]:
        infos = super().listen(requests)
        for request, info in infos.items():
            if request.signal in CLASS_SIGNALS and self.class_map is not None:
                if int(self.class_map.max()) >= info.dim or int(self.class_map.min()) < 0:
                    raise ValueError(
                        f"Teacher: class_map must name classes in 0..{info.dim - 1}, got "
                        f"{int(self.class_map.min())}..{int(self.class_map.max())}; map onto the teacher's classes."
                    )
                infos[request] = replace(info, shape=(len(self.class_map), *info.shape[1:]))
        return infos

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[Request, Any]:
        """The signals for the student's images, without a graph."""
        if not self._requests:
            return {}
        _, signals = self.read(self._prepare(images))
        return {request: self._finish(request, value) for request, value in signals.items()}

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, C) in the student's classes, for the student's images."""
        logits = logits_of(self.model(self._prepare(images)), self.name).float()
        return logits if self.class_map is None else logits[:, self.class_map]

    def classifier(self) -> nn.Linear:
        """A frozen float32 copy of the last layer, pooled (B, D) -> logits (B, C) in the student's classes.

        Raises:
            ValueError: the model has no linear classifier, or none that is known.
        """
        head = self.family().classifier_layer()
        weight, bias = head.weight.detach().flatten(1), head.bias
        if self.class_map is not None:
            weight, bias = weight[self.class_map], bias[self.class_map] if bias is not None else None
        copied = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
        with torch.no_grad():
            copied.weight.copy_(weight)
            if bias is not None:
                copied.bias.copy_(bias)
        return copied.requires_grad_(False)

    def _prepare(self, images: Tensor) -> Tensor:
        if self.model.training:  # somebody called .train() on the model behind our back
            self.model.eval()
        images = self.bridge(images)
        return images if self.dtype is None else images.to(self.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        if self.dtype is not None:  # a Distiller that is moved to another precision leaves the teacher in its own
            self.model.to(self.dtype)
        return self

    def _finish(self, request: Request, value: Any) -> Any:
        if request.signal in CALLABLE_SIGNALS:
            dtype = next((p.dtype for p in self.model.parameters()), None)  # losses compute in float32
            return lambda x: self._finish(Request("logits"), value(x.to(dtype)).to(x.dtype))
        if request.signal in CLASS_SIGNALS and self.class_map is not None:
            value = value[:, self.class_map]
        return value if self.dtype is None else value.float()


def _in_channels(normalisation: Normalisation | None, size: Size | None) -> Normalisation | None:
    """What the model states, in its own channels: timm states three values for a model of one channel too."""
    if normalisation is None or size is None or len(normalisation[0]) in (1, size[0]):
        return normalisation
    return tuple((sum(values) / len(values),) for values in normalisation) if size[0] == 1 else None


def _classes(class_map: Sequence[int]) -> Tensor:
    try:
        if isinstance(class_map, Mapping):
            raise TypeError("a mapping would be read by its keys alone")
        classes = [index(number) for number in class_map]
    except TypeError as error:
        raise TypeError(
            f"Teacher: class_map must list class numbers of the teacher, got {class_map!r}; write one for each class "
            "of the student, in its order: [281, 7, 0]."
        ) from error
    if not classes:
        raise ValueError("Teacher: class_map must name at least one class, got none; leave it out to keep all.")
    return torch.tensor(classes)


def _name_of(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture") or type(model).__name__
