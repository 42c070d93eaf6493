"""The losses that the contract tests run, with their options, and inputs made for any of them.

A new loss needs one entry in `CASES` (more for options that change what it reads or computes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.losses import Loss, make
from kdvit.losses.loss import CONTEXT_INPUTS, SECOND_VIEW, reads_teachers, split_input
from kdvit.schedules import Linear
from kdvit.signals import CALLABLE_SIGNALS, MAP_SIGNALS, ModelInfo, Progress, SignalInfo, tokens_to_map
from tests.losses.tiny_generator import tiny_generator

NUM_CLASSES, GRID, NUM_PREFIX, NUM_HEADS, NUM_SAMPLES = 7, (4, 4), 1, 2, 20
DIMS = {"student": 8, "teacher": 12}
#: Widths of several teachers.
TEACHER_DIMS = (12, 10)


@dataclass(frozen=True)
class Case:
    """A loss with options, and what the contract must know of it.

    Args:
        make: makes the loss.
        wrong_shape: what the error says when the teacher's inputs are one class, token or row short; not for losses
            without a teacher, and not where `any_shape`.
        any_shape: the teacher's widths and grids are its own affair, also beside those that the loss was built for.
        at_match: value of each term (``""`` for a scalar) where the student equals the teacher; terms that have no
            such value are left out.
        extras: inputs for direct callers that take the chance out, given the batch size.
        soft_labels: what soft labels count as: their "largest" class, or "shares" of classes.
        detached: student inputs that are read without a gradient.
        stops_gradient: the gradient deliberately leaves a part of the formula out, so it is not the derivative.
    """

    make: Callable[[], Loss]
    wrong_shape: str = ""
    at_match: Mapping[str, float] = field(default_factory=dict)
    extras: Callable[[int], dict[str, Tensor]] = lambda batch: {}
    any_shape: bool = False
    soft_labels: str = "largest"
    detached: tuple[str, ...] = ()
    stops_gradient: bool = False


def _noise(batch: int) -> dict[str, Tensor]:
    return {"noise": torch.rand(batch, 16, generator=torch.Generator().manual_seed(5))}


_CLASSES = "teacher_logits has C=6 but student_logits has C=7; align the heads or pass class_map"
_DIST_CLASSES = "teacher_logits has C=6 but student_dist_logits has C=7; align the heads or pass class_map"
_DENSE_DIST_CLASSES = _DIST_CLASSES.replace("dist", "dense_dist")
_TOKENS = "TinyMIM: student must have as many tokens as the teacher, got 17 and 16"
_MULTI_LEVEL = {"kd": 0.0, "class": 0.0, "batch": 0.0}
_ZERO, _DECOUPLED = {"": 0.0}, {"target": 0.0, "non_target": 0.0}

CASES: dict[str, Case] = {
    "kd": Case(lambda: make("kd"), _CLASSES, _ZERO),
    "kd-scheduled": Case(lambda: make("kd", temperature=Linear(8.0, 2.0)), _CLASSES, _ZERO),
    "kd-standardized": Case(lambda: make("kd", standardize=True, temperature=2), _CLASSES, _ZERO),
    "deit-hard": Case(lambda: make("deit"), _DIST_CLASSES),
    "deit-soft": Case(lambda: make("deit", kind="soft", temperature=3.0), _DIST_CLASSES, _ZERO),
    "deit-standardized": Case(lambda: make("deit", standardize=True, kind="soft"), _DIST_CLASSES, _ZERO),
    "dkd": Case(lambda: make("dkd"), _CLASSES, _DECOUPLED),
    "dkd-standardized": Case(lambda: make("dkd", standardize=True, beta=2.0), _CLASSES, _DECOUPLED),
    "normkd": Case(lambda: make("normkd"), _CLASSES, _ZERO),
    "normkd-dkd": Case(lambda: make("normkd", alpha=4.0, beta=5.0), _CLASSES, _DECOUPLED),
    "nkd": Case(lambda: make("nkd"), _CLASSES),
    "nkd-standardized": Case(lambda: make("nkd", standardize=True, temperature=3.0), _CLASSES),
    "tfkd-self": Case(lambda: make("tfkd"), _CLASSES, _ZERO),
    "tfkd-self-standardized": Case(lambda: make("tfkd", standardize=True), _CLASSES, _ZERO),
    "tfkd-regularization": Case(lambda: make("tfkd", kind="regularization"), soft_labels="shares"),
    "tfkd-label-smoothing": Case(lambda: make("tfkd", kind="label_smoothing"), soft_labels="shares"),
    "ttm": Case(lambda: make("ttm"), _CLASSES),
    "ttm-official": Case(lambda: make("ttm", mode="official"), _CLASSES),
    "ttm-one": Case(lambda: make("ttm", gamma=1.0), _CLASSES, _ZERO),
    "wttm": Case(lambda: make("wttm"), _CLASSES),
    "wttm-official": Case(lambda: make("wttm", mode="official"), _CLASSES),
    "wttm-one": Case(lambda: make("wttm", gamma=1.0), _CLASSES, _ZERO),
    "tinyvit": Case(lambda: make("tinyvit", k=3), _CLASSES),
    "tinyvit-official": Case(lambda: make("tinyvit", k=3, mode="official"), _CLASSES),
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
    "dist": Case(lambda: make("dist"), _CLASSES),
    "dist-gather": Case(lambda: make("dist", eps=1e-12, gather=True), _CLASSES, {"inter": 0.0, "intra": 0.0}),
    "dist-standardized": Case(lambda: make("dist", standardize=True, beta=2.0), _CLASSES),
    "atkd": Case(lambda: make("atkd"), _CLASSES, {"kd": 0.0}, soft_labels="shares"),
    "atkd-layer-norm": Case(
        lambda: make("atkd", variant="layer_norm", alpha=0.5), _CLASSES, {"kd": 0.0}, soft_labels="shares"
    ),
    "ntce": Case(lambda: make("ntce"), _CLASSES),
    "ntce-plain-kd": Case(lambda: make("ntce", factors=(0.0,)), _CLASSES, _ZERO),
    "ntce-diversity": Case(lambda: make("ntce", diversity=True), _CLASSES),
    "mlld": Case(lambda: make("mlld"), _CLASSES, _MULTI_LEVEL, soft_labels="shares"),
    "mlld-official": Case(
        lambda: make("mlld", mode="official", standardize_kd=True, gather=True),
        _CLASSES,
        _MULTI_LEVEL,
        soft_labels="shares",
    ),
    "uskd": Case(lambda: make("uskd"), soft_labels="shares", stops_gradient=True),
    "uskd-cls-token": Case(
        lambda: make("uskd", feature="cls_token", student_stage=0.75), soft_labels="shares", stops_gradient=True
    ),
    "ofakd": Case(lambda: make("ofakd"), _CLASSES),
    "ofakd-convolution": Case(
        lambda: make("ofakd", branch_epsilons=(1.0, 1.5), student_stages=(0.5, 1.0), branch="convolution"), _CLASSES
    ),
    "mtkd_ssr": Case(lambda: make("mtkd_ssr"), _CLASSES, {"channel": 0.0}, soft_labels="shares", stops_gradient=True),
    "mekd": Case(lambda: make("mekd", generator=tiny_generator(NUM_CLASSES)), _CLASSES, {"image": 0.0, "kl": 0.0}),
    "mekd-hard-l2": Case(
        lambda: make("mekd", generator=tiny_generator(NUM_CLASSES), distance="l2", response="hard"), _CLASSES
    ),
    "cskd": Case(lambda: make("cskd"), _DENSE_DIST_CLASSES),
    "cskd-soft": Case(
        lambda: make("cskd", kind="soft", decay="cosine", head="class"),
        "teacher_logits has C=6 but student_dense_logits has C=7; align the heads or pass class_map",
        _ZERO,
    ),
    "sdd": Case(lambda: make("sdd"), _CLASSES, {"consistent": 0.0, "complementary": 0.0}),
    "sdd-dkd": Case(lambda: make("sdd", base="dkd"), _CLASSES, {"consistent": 0.0, "complementary": 0.0}),
    "sdd-nkd": Case(lambda: make("sdd", base="nkd"), _CLASSES),
    "sdd-nkd-official": Case(lambda: make("sdd", base="nkd", scales=(1, 2), mode="official"), _CLASSES),
    "psd": Case(
        lambda: make("psd"),
        soft_labels="shares",
        detached=("student_logits", "student_dense_logits"),
        stops_gradient=True,
    ),
    "fitnet": Case(lambda: make("fitnet"), "FitNet: teacher_feature_map must have shape"),
    "skd": Case(lambda: make("skd"), _CLASSES),
    "skd-hot": Case(lambda: make("skd", temperature=1.0, softening=8.0), _CLASSES),
    "mkd": Case(lambda: make("mkd"), _CLASSES, _ZERO),
    "mkd-soft": Case(lambda: make("mkd", student_temperature=2.0, teacher_temperature=0.5, meta_interval=1), _CLASSES),
    "ptloss": Case(lambda: make("ptloss"), _CLASSES),
    "ptloss-given": Case(
        lambda: make("ptloss", degree=2, coefficients=[[0.5 * c, 1.0 - 0.2 * c] for c in range(7)], temperature=2.0),
        _CLASSES,
    ),
}


@dataclass
class Example:
    """Inputs for one loss, and what `Loss.build` is told of them."""

    inputs: dict[str, Any]
    student: ModelInfo
    teacher: ModelInfo | tuple[ModelInfo, ...]


def example(loss: Loss, *, batch: int = 3, same: bool = False, dtype: torch.dtype = torch.float32) -> Example:
    """Random inputs for everything the loss reads; with ``same``, the teacher's are the student's."""
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    dims = {"student": (DIMS["student"],), "teacher": (DIMS["teacher"],), "teachers": TEACHER_DIMS}
    infos: dict[str, list[dict]] = {side: [{} for _ in dims[side]] for side in dims}
    for name in loss.inputs():
        side, signal = split_input(name)
        if name in CONTEXT_INPUTS:
            inputs[name] = _context(name, batch, generator)
            continue
        locations = loss.locations().get(name.removeprefix(SECOND_VIEW))
        values = []
        for dim in dims[side]:
            if same and side != "student" and (twin := _twin(name, inputs)):
                values.append(inputs[twin])
                continue
            many = isinstance(locations, (tuple, list))
            at = tuple(
                _signal(signal, batch, DIMS["student"] if same else dim, generator, dtype)
                for _ in (locations if many else [0])
            )
            values.append(at if many else at[0])
        inputs[name] = tuple(values) if side == "teachers" else values[0]
        for info, value in zip(infos[side], values, strict=True):
            info[signal] = _info(signal, value)
    teachers = tuple(ModelInfo.of("teacher", **info) for info in infos["teachers"])
    teacher = teachers if reads_teachers(loss) else ModelInfo.of("teacher", **infos["teacher"][0])
    return Example(inputs, ModelInfo.of("student", **infos["student"][0]), teacher)


def built(case: Case, *, same: bool = False, dtype: torch.dtype = torch.float32) -> Loss:
    """The loss of a case, built for its examples, always with the same weights."""
    loss = case.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sizes = example(loss, same=same)
        loss.build(sizes.student, sizes.teacher)
        loss.allocate(NUM_SAMPLES)
        if loss.predict is not None:
            loss.adopt_head(nn.Linear(DIMS["student" if same else "teacher"], NUM_CLASSES).requires_grad_(False))
    return loss.to(dtype)


def _twin(name: str, inputs: dict) -> str | None:
    """The student's input that a teacher's is compared with; a distillation head is compared with ``logits``."""
    name = name.replace("teachers_", "teacher_")
    swaps = (("teacher_", "student_"), ("teacher_logits", "student_dist_logits"),
             ("teacher_dense_logits", "student_dense_dist_logits"))  # fmt: skip
    twins = [name.replace(old, new) for old, new in swaps]
    return next((twin for twin in twins if twin in inputs), None)


def _context(name: str, batch: int, generator: torch.Generator) -> Any:
    return {
        "labels": lambda: torch.randint(NUM_CLASSES, (batch,), generator=generator),
        "images": lambda: torch.rand(batch, 3, 8, 8, generator=generator),
        "sample_ids": lambda: torch.arange(batch),
        "progress": lambda: Progress(step=3, epoch=0.5, total_steps=10, total_epochs=2.0),
        "rerun_student": lambda: _rerun,
    }[name]()


_PATCH_WEIGHT = torch.randn(3 * 2 * 2, NUM_CLASSES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _rerun(images: Tensor) -> dict[str, Tensor]:
    """A student of one linear layer for 3x8x8 images: logits, and logits on a grid of 4x4 patches."""
    patches = torch.nn.functional.unfold(images.double(), kernel_size=2, stride=2).transpose(1, 2)  # (B, N, 12)
    dense = (patches @ _PATCH_WEIGHT).to(torch.promote_types(images.dtype, torch.float32))
    return {
        "student_logits": dense.mean(1),
        "student_dense_logits": tokens_to_map(dense, GRID),
    }


def _signal(signal: str, batch: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Any:
    if signal not in CALLABLE_SIGNALS:
        return _tensor(signal, batch, dim, generator, dtype)
    classifier = nn.Linear(dim, NUM_CLASSES).requires_grad_(False)
    classifier.weight.copy_(torch.randn(NUM_CLASSES, dim, generator=generator))
    return _Callable(classifier.to(dtype), signal)


class _Callable(nn.Module):
    """A teacher's ``head``, or a ``tail``: tanh, so that it is no linear function, mean over tokens, the head.

    As those of a Teacher, in its own precision.
    """

    def __init__(self, classifier: nn.Linear, signal: str) -> None:
        super().__init__()
        self.classifier, self.pools = classifier, signal == "tail"

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.classifier.weight.dtype)
        return self.classifier(x.tanh().mean(dim=1) if self.pools else x)


def _tensor(signal: str, batch: int, dim: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    num_patches = GRID[0] * GRID[1]
    num_tokens = NUM_PREFIX + num_patches
    shape = {
        "logits": (NUM_CLASSES,),
        "dist_logits": (NUM_CLASSES,),
        "dense_logits": (NUM_CLASSES, *GRID),
        "dense_dist_logits": (NUM_CLASSES, *GRID),
        **dict.fromkeys(("feature_map", "pre_activation"), (dim, *GRID)),
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
    if signal in CALLABLE_SIGNALS:
        return SignalInfo(signal, "given", ())
    on_patches = signal.endswith("tokens") or signal in ("query", "key", "value", "attention", *MAP_SIGNALS)
    has_prefix = on_patches and "patch" not in signal and signal not in MAP_SIGNALS
    geometry = {"grid": GRID, "num_prefix_tokens": NUM_PREFIX if has_prefix else 0} if on_patches else {}
    return SignalInfo.of(signal, value, **geometry)
