"""A student that is shipped with a loss's projector and the teacher's classifier (SimKD, PromptKD)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kdvit.losses.factory import make
from kdvit.losses.loss import Loss, needs, split_input
from kdvit.losses.wrapper import LossWrapper
from kdvit.signals import Location, ModelInfo, SignalInfo
from kdvit.taps.listener import Listener
from kdvit.taps.reader import pick, requests_of

#: The entry of config.json that says how to make one again.
CONFIG_KEY = "kdvit_deployed_student"


class DeployedStudent(nn.Module):
    """images (B, C, H, W) -> logits (B, classes): the student's signals through a loss's `Loss.predict`.

    Args:
        student: listens to what the loss reads.
        loss: built, with the teacher's classifier adopted; shared with the Distiller that trains it.
        wanted: where each of the loss's student signals is read.
        built_for: what the loss was built for, of student and teacher.
    """

    def __init__(
        self,
        student: Listener,
        loss: Loss,
        wanted: Mapping[str, Location | Sequence[Location] | None],
        built_for: tuple[ModelInfo, ModelInfo],
    ) -> None:
        super().__init__()
        while isinstance(loss, LossWrapper):  # schedules play no part at inference
            loss = loss.loss
        self.student, self.loss = student, loss
        # As plain values, which can be copied: a ModelInfo cannot.
        self.built_for = tuple(map(_plain, built_for))
        signals = {name: split_input(name)[1] for name in inspect.signature(loss.predict).parameters}
        self.reads = {name: (signal, wanted[signal]) for name, signal in signals.items()}

    def forward(self, images: Tensor) -> Tensor:
        _, signals = self.student.read(images)
        return self.loss.predict(**{name: pick(*read, signals) for name, read in self.reads.items()})

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The student's, so that other tools find its input size and normalisation."""
        config = getattr(self.student.model, "pretrained_cfg", None) or {}
        return {**config, "input_size": self.student.input_size}

    @property
    def num_classes(self) -> int:
        return self.loss.head.out_features


def deployment_config(deployed: DeployedStudent) -> dict[str, Any]:
    """What `load_deployed` needs beside the student's architecture and all weights, as plain JSON values."""
    loss, student = deployed.loss, deployed.student
    return {
        "loss": loss.name,
        "options": {name: getattr(loss, name) for name in inspect.signature(type(loss)).parameters},
        "input_size": student.input_size,
        "built_for": deployed.built_for,
        "head": {"shape": [loss.head.in_features, loss.head.out_features], "bias": loss.head.bias is not None},
    }


def load_deployed(folder: str | Path) -> DeployedStudent:
    """The deployed student that `kdvit.save_model` wrote: alone, without the teacher.

    Raises:
        ValueError: the weights do not fit the config.
    """
    import timm
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())[CONFIG_KEY]
    loss = make(config["loss"], **{name: _tuples(value) for name, value in config["options"].items()})
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    student = Listener(model, "student", input_size=tuple(config["input_size"]))
    built_for = tuple(map(_info, config["built_for"]))
    loss.build(*built_for)
    loss.adopt_head(nn.Linear(*config["head"]["shape"], bias=config["head"]["bias"]).requires_grad_(False))
    deployed = DeployedStudent(student, loss, needs(loss, "student"), built_for)
    student.listen([request for read in deployed.reads.values() for request in requests_of(*read)])
    try:
        deployed.load_state_dict(load_file(folder / "model.safetensors"))
    except RuntimeError as error:
        raise ValueError(
            f"model folder '{folder}' must hold the weights of its config.json, and does not; save the model again."
        ) from error
    return deployed.eval()


def _plain(info: ModelInfo) -> dict[str, Any]:
    def entry(signal: SignalInfo | tuple[SignalInfo, ...]) -> Any:
        return [entry(one) for one in signal] if isinstance(signal, tuple) else asdict(signal)

    signals = {name: entry(signal) for name, signal in info.signals.items()}
    return {"name": info.name, "num_classes": info.num_classes, "signals": signals, "input_size": info.input_size}


def _info(plain: Mapping[str, Any]) -> ModelInfo:
    def entry(value: Any) -> SignalInfo | tuple[SignalInfo, ...]:
        if isinstance(value, list):
            return tuple(map(entry, value))
        return SignalInfo(**{name: _tuples(fact) for name, fact in value.items()})

    signals = {name: entry(value) for name, value in plain["signals"].items()}
    return ModelInfo(plain["name"], plain["num_classes"], signals, _tuples(plain["input_size"]))


def _tuples(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
