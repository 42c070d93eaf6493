"""The losses that the contract tests run, with their options, and inputs made for any of them.

A new loss needs one entry in `CASES` (more for options that change what it reads or computes).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdvit.losses import Loss, PrototypeHead, make
from kdvit.losses.loss import CONTEXT_INPUTS, SECOND_VIEW, SIDES, reads_teachers, split_input
from kdvit.schedules import Linear
from kdvit.signals import CALLABLE_SIGNALS, MAP_SIGNALS, ModelInfo, Progress, SignalInfo, tokens_to_map
from tests.losses.tiny_generator import tiny_generator

NUM_CLASSES, GRID, NUM_PREFIX, NUM_HEADS, NUM_SAMPLES = 7, (4, 4), 1, 2, 20
DIMS = {"student": 8, "teacher": 12}
IMAGE_SIZE = (3, 8, 8)
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


def _replacement(batch: int) -> dict[str, Tensor]:
    """Noise for query, key and value of the teacher's heads and patches, the same for all channels."""
    return {"noise": torch.rand(batch, 3, NUM_HEADS, 16, 1, generator=torch.Generator().manual_seed(6))}


def _negatives(batch: int) -> dict[str, Tensor]:
    """Others for each image: five rows after its own."""
    return {"negatives": (torch.arange(batch)[:, None] + torch.arange(1, 6)) % NUM_SAMPLES}


class _AnyWidth(PrototypeHead):
    """The head of a teacher whose embeddings may be narrower than it was made for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, self.dim - x.shape[-1])))


def teacher_heads() -> dict[str, PrototypeHead]:
    """Heads for the class token and the patches, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        heads = [_AnyWidth(DIMS["teacher"], k, hidden_dim=8, bottleneck_dim=4) for k in (6, 5)]
        for head in heads:
            nn.init.normal_(head.last_layer.weight, std=0.1)
    return dict(zip(("cls_head", "patch_head"), heads))


def _patch_noise(batch: int, views: int) -> dict[str, Tensor]:
    """Other patches for every image."""
    return {"noise": torch.stack([_noise(views)["noise"].roll(i, dims=1) for i in range(batch)])}


_CLASSES = "teacher_logits has C=6 but student_logits has C=7; align the heads or pass class_map"
_DIST_CLASSES = "teacher_logits has C=6 but student_dist_logits has C=7; align the heads or pass class_map"
_DENSE_DIST_CLASSES = _DIST_CLASSES.replace("dist", "dense_dist")
_DENSE_CLASSES = "teacher_dense_logits has C=6 but student_dense_logits has C=7; align the heads or pass class_map"
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
    "minilm": Case(
        lambda: make("minilm"), _TOKENS.replace("TinyMIM", "MiniLM"), dict.fromkeys(("qq", "kk", "vv"), 0.0)
    ),
    "minilm-v1": Case(
        lambda: make("minilm", relations=("qk", "vv"), weights=(1, 0.5), num_relation_heads="model"),
        _TOKENS.replace("TinyMIM", "MiniLM"),
        {"qk": 0.0, "vv": 0.0},
    ),
    "attndistill": Case(
        lambda: make("attndistill"), "AttnDistill: teacher_normed_cls_token must have shape", {"attention": 0.0}
    ),
    "attndistill-merged": Case(
        lambda: make("attndistill", cls_weight=0.5, attention_weight=20, num_layers=2, temperature=2, aggregate=True),
        "AttnDistill: teacher_normed_cls_token must have shape",
        {"attention": 0.0},
    ),
    "manifold": Case(lambda: make("manifold"), at_match={"patch": 0.0, "sample": 0.0, "random": 0.0}, any_shape=True),
    "manifold-gather": Case(
        lambda: make("manifold", patch_weight=1, student_stages=(-1,), teacher_stages=(0.7,), gather=True),
        at_match={"patch": 0.0, "sample": 0.0, "random": 0.0},
        any_shape=True,
    ),
    "attention_probe": Case(
        lambda: make("attention_probe"), "AttentionProbe: teacher_patch_tokens must have N=16 like student", _ZERO
    ),
    "attention_probe-cosine": Case(
        lambda: make("attention_probe", normalize="channels", student_blocks=(-1,), teacher_blocks=(7,)),
        "AttentionProbe: teacher_patch_tokens must have N=16 like student",
        _ZERO,
    ),
    "kdfas": Case(lambda: make("kdfas"), at_match=_ZERO, any_shape=True),
    "kdfas-tokens": Case(
        lambda: make("kdfas", center="tokens", resize="bilinear", student_stages=(0,), teacher_stages=(0.3,)),
        at_match=_ZERO,
        any_shape=True,
    ),
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
    "vit_frd": Case(lambda: make("vit_frd", student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0)), any_shape=True),
    "vit_frd-coarse": Case(
        lambda: make("vit_frd", num_cells=2, temperature=1.0, student_stages=(1.0,), teacher_stages=(0.7,)),
        any_shape=True,
    ),
    "sam_net": Case(lambda: make("sam_net"), any_shape=True, at_match=_ZERO),
    "sam_net-bilinear": Case(
        lambda: make("sam_net", temperature=1.0, resize="bilinear"), any_shape=True, at_match=_ZERO
    ),
    "cfd": Case(lambda: make("cfd"), "CFD: teacher_pooled must have D=12 as in build, got D=11"),
    "cfd-entropies": Case(
        lambda: make("cfd", temperature=1.0, beta=0.5, gamma=0.6, gather=True),
        "CFD: teacher_pooled must have D=12 as in build, got D=11",
        {"feature": 0.0},
    ),
    "dmkd": Case(lambda: make("dmkd"), any_shape=True),
    "dmkd-bilinear": Case(lambda: make("dmkd", threshold=1.2, temperature=2.0, resize="bilinear"), any_shape=True),
    "vid": Case(lambda: make("vid"), any_shape=True),
    "vid-interpolated": Case(
        lambda: make("vid", init_variance=1.0, student_stages=(1.0,), teacher_stages=(0.7,), resize="bilinear"),
        any_shape=True,
    ),
    "mgd": Case(lambda: make("mgd"), "MGD: noise must have shape (3, 12) for mask='spatial'", extras=_noise),
    "mgd-interpolated": Case(
        lambda: make("mgd", mask_ratio=0.65, teacher_stage=0.5, resize="nearest"),
        "MGD: noise must have shape (3, 12) for mask='spatial'",
        extras=_noise,
    ),
    "pkd": Case(lambda: make("pkd"), at_match=_ZERO, any_shape=True),
    "pkd-gather": Case(
        lambda: make("pkd", student_stages=(0.5, -1), teacher_stages=(0.5, -1), resize="bicubic", gather=True),
        at_match=_ZERO,
        any_shape=True,
    ),
    "reviewkd": Case(lambda: make("reviewkd"), "ReviewKD: teacher_pooled must have D=12 as in build"),
    "reviewkd-maps": Case(
        lambda: make("reviewkd", pooled=False, mid_dim=5, student_stages=(0.5, 1.0), teacher_stages=(0.5, 1.0)),
        any_shape=True,
    ),
    "ofd": Case(lambda: make("ofd"), any_shape=True),
    "ofd-interpolated": Case(
        lambda: make("ofd", student_stages=(1.0,), teacher_stages=(1.0,), resize="bilinear"), any_shape=True
    ),
    "at": Case(lambda: make("at"), at_match=_ZERO, any_shape=True),
    "at-cubes": Case(
        lambda: make("at", power=3, student_stages=(0.5, -1), teacher_stages=(1, -1), resize="bilinear"),
        at_match=_ZERO,
        any_shape=True,
    ),
    "nst": Case(lambda: make("nst"), at_match=_ZERO, any_shape=True),
    "nst-interpolated": Case(
        lambda: make("nst", student_stages=(-1,), teacher_stages=(0.7,), resize="nearest"),
        at_match=_ZERO,
        any_shape=True,
    ),
    "sp": Case(lambda: make("sp"), at_match=_ZERO, any_shape=True),
    "sp-gather": Case(lambda: make("sp", student_stage=0.5, gather=True), at_match=_ZERO, any_shape=True),
    "rkd": Case(lambda: make("rkd"), at_match={"distance": 0.0, "angle": 0.0}, any_shape=True),
    "rkd-distance": Case(
        lambda: make("rkd", distance_weight=1.0, angle_weight=0.0, gather=True),
        at_match={"distance": 0.0},
        any_shape=True,
    ),
    "pkt": Case(lambda: make("pkt"), at_match=_ZERO, any_shape=True),
    "pkt-gather": Case(lambda: make("pkt", eps=1e-5, gather=True), at_match=_ZERO, any_shape=True),
    "cc": Case(lambda: make("cc"), at_match=_ZERO, any_shape=True),
    "cc-third-order": Case(lambda: make("cc", order=3, gamma=1.0, gather=True), at_match=_ZERO, any_shape=True),
    "cwd": Case(lambda: make("cwd"), at_match=_ZERO, any_shape=True),
    "cwd-spatial": Case(
        lambda: make("cwd", temperature=1.0, norm="spatial", resize="bicubic"), at_match=_ZERO, any_shape=True
    ),
    "cwd-logits": Case(lambda: make("cwd", signal="dense_logits"), _DENSE_CLASSES, _ZERO),
    "skd": Case(lambda: make("skd"), _CLASSES),
    "skd-hot": Case(lambda: make("skd", temperature=1.0, softening=8.0), _CLASSES),
    "mkd": Case(lambda: make("mkd"), _CLASSES, _ZERO),
    "mkd-soft": Case(lambda: make("mkd", student_temperature=2.0, teacher_temperature=0.5, meta_interval=1), _CLASSES),
    "ptloss": Case(lambda: make("ptloss"), _CLASSES),
    "ptloss-given": Case(
        lambda: make("ptloss", degree=2, coefficients=[[0.5 * c, 1.0 - 0.2 * c] for c in range(7)], temperature=2.0),
        _CLASSES,
    ),
    "srrl": Case(lambda: make("srrl"), "SRRL: teacher_pooled must have D=12 as in build"),
    "srrl-pooled": Case(
        lambda: make("srrl", feature="pooled", relu=False, alpha=0.5), "SRRL: teacher_pooled must have D=12 as in build"
    ),
    "simkd": Case(lambda: make("simkd"), "SimKD: teacher_pooled must have D=12 as in build"),
    "simkd-pooled": Case(
        lambda: make("simkd", feature="pooled", factor=3, relu=False),
        "SimKD: teacher_pooled must have D=12 as in build",
    ),
    "promptkd": Case(lambda: make("promptkd"), "PromptKD: teacher_pooled must have D=12 as in build"),
    "promptkd-clip": Case(
        lambda: make("promptkd", normalize=True, logit_scale=5.0, temperature=2.0),
        "PromptKD: teacher_pooled must have D=12 as in build",
    ),
    "crosskd": Case(lambda: make("crosskd"), "CrossKD: teacher_tokens must have shape (3, 17, 12)"),
    "crosskd-quality-focal": Case(
        lambda: make("crosskd", response="quality_focal", temperature=2.0), "CrossKD: teacher_tokens must have shape"
    ),
    "afd": Case(lambda: make("afd"), any_shape=True),
    "afd-two": Case(
        lambda: make("afd", student_stages=(0.5, 1.0), teacher_stages=(0, -1), attention_dim=16), any_shape=True
    ),
    "ca_mkd": Case(
        lambda: make("ca_mkd"), _CLASSES.replace("teacher_", "teachers_"), {"logits": 0.0}, soft_labels="shares"
    ),
    "ca_mkd-student": Case(
        lambda: make("ca_mkd", confidence="student", temperature=1.0),
        _CLASSES.replace("teacher_", "teachers_"),
        {"logits": 0.0},
        soft_labels="shares",
    ),
    "mmkd": Case(lambda: make("mmkd", batch_size=8), _CLASSES.replace("teacher_", "teachers_"), {"logits": 0.0}),
    "ft": Case(lambda: make("ft"), any_shape=True),
    "ft-powers": Case(
        lambda: make("ft", factor_ratio=0.75, activation_power=1, distance_power=2, resize="bilinear"), any_shape=True
    ),
    "cross_arch": Case(
        lambda: make("cross_arch"),
        "CrossArch: teacher_query must have shape (B, 2, 17, 6) as in build",
        extras=_replacement,
    ),
    "cross_arch-fine": Case(
        lambda: make("cross_arch", alpha=0.5, beta=2.0, replace_ratio=0.3, neighbourhood=2),
        "CrossArch: teacher_query must have shape (B, 2, 17, 6) as in build",
        extras=_replacement,
    ),
    "dearkd": Case(lambda: make("dearkd"), any_shape=True),
    "mr_mae": Case(lambda: make("mr_mae"), any_shape=True, extras=_noise, detached=("student_feature_map",)),
    "mr_mae-plain": Case(
        lambda: make("mr_mae", mask_ratio=0.5, normalize=False, patch_pixels=2, resize="bilinear"),
        any_shape=True,
        extras=_noise,
        detached=("student_feature_map",),
    ),
    "pfi": Case(lambda: make("pfi"), _DENSE_CLASSES, _ZERO),
    "takt": Case(lambda: make("takt"), "TAKT: teacher_pooled must have D=12 as in build, got D=11"),
    "takt-official": Case(
        lambda: make("takt", num_heads=2, root=2.0, mode="official"),
        "TAKT: teacher_pooled must have D=12 as in build, got D=11",
    ),
    "tat": Case(lambda: make("tat"), any_shape=True),
    "tat-teacher-asks": Case(lambda: make("tat", query="teacher", num_heads=2), any_shape=True),
    # In eval mode, in which a batch changes no memory: the contract compares batches. Z is then that of each batch.
    "crd": Case(
        lambda: make("crd", dim=6, num_negatives=5, num_samples=NUM_SAMPLES).eval(),
        "CRD: teacher_pooled must have D=12 as in build, got D=11",
        extras=_negatives,
        detached=("student_logits",),
        stops_gradient=True,
    ),
    "crd-relax": Case(
        lambda: make("crd", dim=6, num_negatives=5, num_samples=NUM_SAMPLES, other_labels=False).eval(),
        "CRD: teacher_pooled must have D=12 as in build, got D=11",
        extras=_negatives,
        stops_gradient=True,
    ),
    # In eval mode, in which a batch changes no queue.
    "cls_queue": Case(
        lambda: make("cls_queue", queue_size=8).eval(), "ClsQueue: teacher_pooled must have D=12 as in build, got D=11"
    ),
    "cls_queue-normed": Case(
        lambda: make("cls_queue", temperature=0.5, queue_size=8, normed_teacher=True).eval(),
        "ClsQueue: teacher_normed_cls_token must have D=12 as in build, got D=11",
    ),
    "dense": Case(lambda: make("dense"), any_shape=True),
    "dense-normed": Case(
        lambda: make("dense", normed_teacher=True), "tokens_to_map: patch_tokens must have 4x4 = 16 tokens, got 15"
    ),
    "dense-plain": Case(lambda: make("dense", teacher_stages=(0.5,), standardize=False, resize="pool"), any_shape=True),
    "cls_dense": Case(
        lambda: make("cls_dense", queue_size=8).eval(), "ClsDense: teacher_pooled must have D=12 as in build, got D=11"
    ),
    "cls_dense-normed": Case(
        lambda: make("cls_dense", local_weight=2.0, queue_size=8, normed_teacher=True, resize="pool").eval(),
        "tokens_to_map: patch_tokens must have 4x4 = 16 tokens, got 15",
    ),
    "dino_heads": Case(
        lambda: make("dino_heads", **teacher_heads(), hidden_dim=16, bottleneck_dim=4),
        "DINOHeads: teacher_normed_cls_token must have D=12 as in build, got D=11",
        extras=lambda batch: _patch_noise(batch, views=2),
    ),
    "dino_heads-one-view": Case(
        lambda: make("dino_heads", **teacher_heads(), gram_weight=1.0, views=1, hidden_dim=16, bottleneck_dim=4),
        "DINOHeads: teacher_normed_cls_token must have D=12 as in build, got D=11",
        extras=lambda batch: _patch_noise(batch, views=1),
    ),
    "dino_heads-gram": Case(
        lambda: make("dino_heads", cls_weight=0.0, patch_weight=0.0, gram_weight=2.0, gram_negatives="clamp"),
        "tokens_to_map: patch_tokens must have 4x4 = 16 tokens, got 15",
    ),
}


@dataclass
class Example:
    """Inputs for one loss, and what `Loss.build` is told of them."""

    inputs: dict[str, Any]
    student: ModelInfo
    teacher: ModelInfo | tuple[ModelInfo, ...]


def example(
    loss: Loss,
    *,
    batch: int = 3,
    same: bool = False,
    dtype: torch.dtype = torch.float32,
    prefix: Mapping[str, int] | None = None,
) -> Example:
    """Random inputs for everything the loss reads; with ``same``, the teacher's are the student's.

    ``prefix`` has the number of prefix tokens of ``student`` and ``teacher``, `NUM_PREFIX` where left out.
    """
    prefix = {"student": NUM_PREFIX, "teacher": NUM_PREFIX, **(prefix or {})}
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
        many = isinstance(locations, (tuple, list))
        for dim in dims[side]:
            twin = _twin(name, inputs) if same and side != "student" else None
            if twin and isinstance(inputs[twin], tuple) == many:
                values.append(inputs[twin])
                continue
            at = tuple(
                _signal(signal, batch, DIMS["student"] if same else dim, generator, dtype, prefix[SIDES[side]])
                for _ in (locations if many else [0])
            )
            values.append(at if many else at[0])
        inputs[name] = tuple(values) if side == "teachers" else values[0]
        for info, value in zip(infos[side], values, strict=True):
            info[signal] = _info(signal, value, prefix[SIDES[side]])
    teachers = tuple(ModelInfo.of("teacher", **info) for info in infos["teachers"])
    teacher = teachers if reads_teachers(loss) else ModelInfo.of("teacher", **infos["teacher"][0])
    return Example(inputs, ModelInfo.of("student", IMAGE_SIZE, **infos["student"][0]), teacher)


def built(case: Case, *, same: bool = False, dtype: torch.dtype = torch.float32, seed: int = 3) -> Loss:
    """The loss of a case, built for its examples, with weights that depend on the seed alone."""
    loss = case.make()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
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
        "images": lambda: torch.rand(batch, *IMAGE_SIZE, generator=generator),
        "sample_ids": lambda: torch.arange(batch),
        "progress": lambda: Progress(step=3, epoch=0.5, total_steps=10, total_epochs=2.0),
        "rerun_student": lambda: _rerun,
    }[name]()


_PATCH_WEIGHT = torch.randn(3 * 2 * 2, NUM_CLASSES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def _rerun(images: Tensor) -> dict[str, Tensor]:
    """A student of one linear layer for 3x8x8 images: logits, and logits and features on a grid of 4x4 patches."""
    patches = torch.nn.functional.unfold(images.double(), kernel_size=2, stride=2).transpose(1, 2)  # (B, N, 12)
    dense = (patches @ _PATCH_WEIGHT).to(torch.promote_types(images.dtype, torch.float32))
    features = torch.cat([dense, dense[:, :, :1] * dense[:, :, 1:2]], dim=2)  # with a mean, so that patches see others
    return {
        "student_logits": dense.mean(1),
        "student_dense_logits": tokens_to_map(dense, GRID),
        "student_feature_map": tokens_to_map(features + features.mean(dim=1, keepdim=True), GRID),
    }


def _signal(signal: str, batch: int, dim: int, generator: torch.Generator, dtype: torch.dtype, num_prefix: int) -> Any:
    if signal not in CALLABLE_SIGNALS:
        return _tensor(signal, batch, dim, generator, dtype, num_prefix)
    classifier = nn.Linear(dim, NUM_CLASSES).requires_grad_(False)
    classifier.weight.copy_(torch.randn(NUM_CLASSES, dim, generator=generator))
    classifier.bias.copy_(torch.randn(NUM_CLASSES, generator=generator))
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


def _tensor(
    signal: str, batch: int, dim: int, generator: torch.Generator, dtype: torch.dtype, num_prefix: int
) -> Tensor:
    num_patches = GRID[0] * GRID[1]
    num_tokens = num_prefix + num_patches
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


def _info(signal: str, value: Any, num_prefix: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_info(signal, x, num_prefix) for x in value)
    if signal in CALLABLE_SIGNALS:
        return SignalInfo(signal, "given", ())
    on_patches = signal.endswith(("tokens", "attention")) or signal in ("query", "key", "value", *MAP_SIGNALS)
    has_prefix = on_patches and "patch" not in signal and signal not in MAP_SIGNALS
    geometry = {"grid": GRID, "num_prefix_tokens": num_prefix if has_prefix else 0} if on_patches else {}
    return SignalInfo.of(signal, value, **geometry)
