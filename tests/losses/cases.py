"""The losses that the contract tests run, with their options, and inputs made for any of them.

A new loss needs one entry in `CASES` (more for options that change what it reads or computes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdvit.losses import Loss, make
from kdvit.signals import ModelInfo, Progress, SignalInfo

NUM_CLASSES, GRID, NUM_PREFIX, NUM_HEADS = 7, (4, 4), 1, 2
DIMS = {"student": 8, "teacher": 12}


@dataclass(frozen=True)
class Case:
    """A loss with options, and what the contract must know of it.

    Args:
        make: makes the loss.
        wrong_shape: what the error says when the teacher's inputs are one class, token or row short.
        at_match: value of each term (``""`` for a scalar) where the student equals the teacher; terms that have no
            such value are left out.
        extras: inputs for direct callers that take the chance out, given the batch size.
    """

    make: Callable[[], Loss]
    wrong_shape: str
    at_match: Mapping[str, float] = field(default_factory=dict)
    extras: Callable[[int], dict[str, Tensor]] = lambda batch: {}


def _noise(batch: int) -> dict[str, Tensor]:
    return {"noise": torch.rand(batch, 16, generator=torch.Generator().manual_seed(5))}


_CLASSES = "teacher_logits has C=6 but student_logits has C=7; align the heads or pass class_map"
_DIST_CLASSES = "teacher_logits has C=6 but student_dist_logits has C=7; align the heads or pass class_map"
_TOKENS = "TinyMIM: student must have as many tokens as the teacher, got 17 and 16"
_ZERO, _DECOUPLED = {"": 0.0}, {"target": 0.0, "non_target": 0.0}

CASES: dict[str, Case] = {
    "kd": Case(lambda: make("kd"), _CLASSES, _ZERO),
    "kd-standardized": Case(lambda: make("kd", standardize=True, temperature=2), _CLASSES, _ZERO),
    "deit-hard": Case(lambda: make("deit"), _DIST_CLASSES),
    "deit-soft": Case(lambda: make("deit", kind="soft", temperature=3.0), _DIST_CLASSES, _ZERO),
    "deit-standardized": Case(lambda: make("deit", standardize=True, kind="soft"), _DIST_CLASSES, _ZERO),
    "dkd": Case(lambda: make("dkd"), _CLASSES, _DECOUPLED),
    "dkd-standardized": Case(lambda: make("dkd", standardize=True, beta=2.0), _CLASSES, _DECOUPLED),
    "normkd": Case(lambda: make("normkd"), _CLASSES, _ZERO),
    "normkd-dkd": Case(lambda: make("normkd", alpha=4.0, beta=5.0), _CLASSES, _DECOUPLED),
    "vitkd": Case(
        lambda: make("vitkd", alpha=1.0, beta=1.0), "ViTKD: tokens must have shape", {"mimic": 0.0}, extras=_noise
    ),
    "vitkd-three-blocks": Case(
        lambda: make("vitkd", mask_ratio=0.75, student_blocks=(0, 1, -1), teacher_blocks=(0, 1, 20)),
        "ViTKD: tokens must have shape",
        {"mimic": 0.0},
        extras=_noise,
    ),
    "tinymim": Case(lambda: make("tinymim"), _TOKENS, {"qk": 0.0, "vv": 0.0}),
    "tinymim-all": Case(
        lambda: make("tinymim", relations=("vv", "qq", "kk", "qk")),
        _TOKENS,
        dict.fromkeys(("qk", "vv", "qq", "kk"), 0.0),
    ),
    "tinymim-resplit": Case(lambda: make("tinymim", relations=("qq",), num_relation_heads=4), _TOKENS, {"qq": 0.0}),
    "fitnet": Case(lambda: make("fitnet"), "FitNet: teacher_feature_map must have shape"),
}


@dataclass
class Example:
    """Inputs for one loss, and what `Loss.build` is told of them."""

    inputs: dict[str, Any]
    student: ModelInfo
    teacher: ModelInfo


def example(loss: Loss, *, batch: int = 3, same: bool = False, dtype: torch.dtype = torch.float32) -> Example:
    """Random inputs for everything the loss reads; with ``same``, the teacher's are the student's."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    infos: dict[str, dict] = {"student": {}, "teacher": {}}
    for name in loss.inputs():
        side, _, signal = name.partition("_")
        if side not in infos:
            inputs[name] = _context(name, batch, generator)
            continue
        if same and side == "teacher" and (twin := _twin(name, inputs)):
            inputs[name] = inputs[twin]
        else:
            locations = loss.locations().get(name)
            many = isinstance(locations, (tuple, list))
            dim = DIMS["student" if same else side]
            values = tuple(_tensor(signal, batch, dim, generator, dtype) for _ in (locations if many else [0]))
            inputs[name] = values if many else values[0]
        infos[side][signal] = _info(signal, inputs[name])
    return Example(inputs, ModelInfo.of("student", **infos["student"]), ModelInfo.of("teacher", **infos["teacher"]))


def built(case: Case, *, same: bool = False, dtype: torch.dtype = torch.float32) -> Loss:
    """The loss of a case, built for its examples, always with the same weights."""
    loss = case.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = example(loss, same=same)
        loss.build(sizes.student, sizes.teacher)
    return loss.to(dtype)


def _twin(name: str, inputs: dict) -> str | None:
    """The student's input that a teacher's is compared with; a distillation head is compared with ``logits``."""
    twins = (name.replace("teacher_", "student_"), name.replace("teacher_logits", "student_dist_logits"))
    return next((twin for twin in twins if twin in inputs), None)


def _context(name: str, batch: int, generator: torch.Generator) -> Any:
    return {
        "labels": lambda: torch.randint(NUM_CLASSES, (batch,), generator=generator),
        "images": lambda: torch.rand(batch, 3, 8, 8, generator=generator),
        "sample_ids": lambda: torch.arange(batch),
        "progress": lambda: Progress(step=3, epoch=0.5, total_steps=10, total_epochs=2.0),
    }[name]()


def _tensor(signal: str, batch: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    num_patches = GRID[0] * GRID[1]
    num_tokens = NUM_PREFIX + num_patches
    shape = {
        "logits": (NUM_CLASSES,),
        "dist_logits": (NUM_CLASSES,),
        "feature_map": (dim, *GRID),
        "attention": (NUM_HEADS, num_tokens, num_tokens),
        "cls_attention": (NUM_HEADS, num_tokens),
        **dict.fromkeys(("tokens", "normed_tokens"), (num_tokens, dim)),
        **dict.fromkeys(("patch_tokens", "normed_patch_tokens"), (num_patches, dim)),
        **dict.fromkeys(("cls_token", "normed_cls_token", "pooled"), (dim,)),
        **dict.fromkeys(("query", "key", "value"), (NUM_HEADS, num_tokens, dim // NUM_HEADS)),
    }[signal]
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.softmax(-1) if signal.endswith("attention") else x


def _info(signal: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_info(signal, x) for x in value)
    on_patches = signal.endswith("tokens") or signal in ("query", "key", "value", "attention", "feature_map")
    has_prefix = on_patches and "patch" not in signal and signal != "feature_map"
    geometry = {"grid": GRID, "num_prefix_tokens": NUM_PREFIX if has_prefix else 0} if on_patches else {}
    return SignalInfo.of(signal, value, **geometry)
