"""Write docs/compatibility.md, what works between which models: ``python tools/compatibility_page.py`` tries it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from kdvit import Bilevel, Distiller, Progress, Student, Teacher, calibrate, losses
from kdvit.losses import Loss, Mismatch, make
from kdvit.losses.image_generator import ImageGenerator
from kdvit.losses.loss import reads_teachers

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
_HEAD = """# What works between which models

Made by `python tools/compatibility_page.py`, which builds a `kdvit.Distiller` of every method for every pair and takes
one step; a test makes it again and keeps it current. "yes": the loss is finite and the student gets a gradient from it.
A number: refused when the Distiller is made, with the sentence below. Models are tiny, of 32x32 images and 5 classes,
so that the CNN's last map is 1x1; grids, heads and token kinds are what matters here. Methods of several teachers have
two of the kind.
"""
NUM_CLASSES = 5
SIZE = (3, 32, 32)


def _vit(**options) -> nn.Module:
    facts = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=NUM_CLASSES)
    return timm.create_model("vit_tiny_patch16_224", **facts | options)


def _swin() -> nn.Module:
    facts = dict(img_size=32, patch_size=4, window_size=4, embed_dim=12, depths=(1, 1, 2), num_heads=(1, 2, 2))
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=NUM_CLASSES, **facts)


def _cnn(width: int) -> nn.Module:
    channels = tuple(width * factor for factor in (1, 2, 3, 4))
    return timm.create_model("resnet18", channels=channels, layers=(1, 1, 1, 1), num_classes=NUM_CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": _vit,
    "wide ViT": lambda: _vit(embed_dim=36),
    "deep ViT": lambda: _vit(depth=6),
    "ViT of 4 heads": lambda: _vit(num_heads=4),
    "ViT of smaller patches": lambda: _vit(patch_size=4),
    "ViT with 4 registers": lambda: _vit(embed_dim=36, reg_tokens=4),
    "ViT without prefix": lambda: _vit(class_token=False, global_pool="avg"),
    "distilled ViT": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2,
        num_classes=NUM_CLASSES,
    ),
    "CNN": lambda: _cnn(8),
    "wide CNN": lambda: _cnn(12),
    "Swin": _swin,
    "plain": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, NUM_CLASSES)
    ),
    "other plain": lambda: nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, NUM_CLASSES)),
}  # fmt: skip
#: (student, teacher, what the column is about).
PAIRS = (
    ("ViT", "wide ViT", "width"),
    ("ViT", "deep ViT", "depth"),
    ("ViT", "ViT of 4 heads", "heads"),
    ("ViT", "ViT of smaller patches", "patch size"),
    ("ViT", "ViT with 4 registers", "P=1 from P=5"),
    ("ViT without prefix", "ViT with 4 registers", "P=0 from P=5"),
    ("distilled ViT", "wide ViT", "P=2 from P=1"),
    ("ViT", "CNN", "CNN teaches ViT"),
    ("CNN", "ViT", "ViT teaches CNN"),
    ("CNN", "wide CNN", "CNN teaches CNN"),
    ("Swin", "ViT", "ViT teaches Swin"),
    ("ViT", "Swin", "Swin teaches ViT"),
    ("plain", "other plain", "plain modules"),
)
#: Rows beside the default options: what the defaults do not suit, and options that widen what fits.
OPTIONS: dict[str, dict[str, dict | Callable[[nn.Module], dict]]] = {
    "cls_queue": {"cls_queue, queue_size=8": {"queue_size": 8}},
    "cls_dense": {"cls_dense, queue_size=8": {"queue_size": 8}},
    "crd": {"crd, num_negatives=4": {"num_negatives": 4}},
    "cskd": {"cskd": {}, "cskd, head=class": {"head": "class"}},
    "cwd": {"cwd": {}, "cwd, signal=dense_logits": {"signal": "dense_logits"}},
    "dino_heads": {"dino_heads": {}, "dino_heads, cls_head=..., patch_head=...": lambda teacher: _dino_heads(teacher)},
    "ft": {"ft, paraphraser_steps=2": {"paraphraser_steps": 2}},
    "mekd": {"mekd": {}, "mekd, generator=...": {"generator": ImageGenerator(NUM_CLASSES, 32, 3, width=4)}},
    "psd": {"psd, rounds=2": {"rounds": 2}},
    "sdd": {"sdd, scales=(1, 2)": {"scales": (1, 2)}},
    "simkd": {"simkd": {}, "simkd, feature=pooled": {"feature": "pooled"}},
    "tinymim": {"tinymim": {}, "tinymim, num_relation_heads=4": {"num_relation_heads": 4}},
    "tinyvit": {"tinyvit, k=2": {"k": 2}},
}


@dataclass(frozen=True)
class Cell:
    """What came of one method for one pair: the sentence that it was refused with, or none."""

    refusal: str | None


def _dino_heads(teacher: nn.Module) -> dict[str, nn.Module]:
    """Stand-ins for the heads that a DINO teacher was trained with."""
    width = getattr(teacher, "num_features", 1)
    return {"cls_head": nn.Linear(width, 6), "patch_head": nn.Linear(width, 6)}


def rows() -> dict[str, Callable[[nn.Module], Loss]]:
    """A maker of the loss for each row, given the teacher."""

    def maker(name: str, options: dict | Callable[[nn.Module], dict]) -> Callable[[nn.Module], Loss]:
        return lambda teacher: make(name, **(options(teacher) if callable(options) else options))

    return {
        row: maker(name, options) for name in losses.names() for row, options in OPTIONS.get(name, {name: {}}).items()
    }


def table() -> dict[str, list[Cell]]:
    """Every method with every pair."""
    torch.manual_seed(0)
    models = {name: make_model().eval() for name, make_model in MODELS.items()}
    return {
        row: [_attempt(make_loss(models[teacher]), models[student], models[teacher]) for student, teacher, _ in PAIRS]
        for row, make_loss in rows().items()
    }


def _attempt(loss: Loss, student: nn.Module, teacher: nn.Module) -> Cell:
    student.requires_grad_(True)
    student.zero_grad()
    teachers = [Teacher(model, input_size=SIZE, name="teacher") for model in _as_many(teacher, loss)]
    try:
        torch.manual_seed(0)
        # Without a task loss, so that the gradient is the method's own.
        distiller = Distiller(teachers, Student(student, input_size=SIZE, name="student"), [loss], task_loss=None)
    except ValueError as error:
        return Cell(str(error))
    images, labels = torch.randn(4, *SIZE), torch.arange(4)
    progress = Progress(total_steps=10, total_epochs=1.0)
    context = {"sample_ids": labels, "progress": progress}
    context |= {"second_images": torch.randn(4, *SIZE)} if distiller.reads_second_view else {}
    distiller.allocate(8)
    distiller.train()
    calibrate(distiller, [(torch.randn(8, *SIZE), torch.arange(8) % NUM_CLASSES)])
    Bilevel(distiller).step(images, labels, torch.randn(4, *SIZE), labels, lr=1e-3, **context)
    out = distiller(images, labels, **context)
    out.loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    if not (out.loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)):
        raise RuntimeError(f"{loss!r}: the loss or its gradient is not finite for {student} and {teacher}.")
    if not any(g.abs().max() > 0 for g in gradients):
        raise RuntimeError(f"{loss!r}: the student gets no gradient.")
    distiller._deafen()
    return Cell(None)


def _as_many(teacher: nn.Module, loss: Loss) -> list[nn.Module]:
    """Methods of several teachers get two of the kind."""
    return [teacher, copy.deepcopy(teacher)] if reads_teachers(loss) else [teacher]


def page(cells: dict[str, list[Cell]] | None = None) -> str:
    """The whole page."""
    cells = table() if cells is None else cells
    sentences: dict[str, int] = {}
    for row in cells.values():
        for cell in row:
            if cell.refusal is not None:
                sentences.setdefault(cell.refusal, len(sentences) + 1)
    header = [f"{what}: {student} <- {teacher}" for student, teacher, what in PAIRS]
    lines = [
        _HEAD,
        f"| method | {' | '.join(header)} |",
        f"|---|{'---|' * len(header)}",
        *(
            f"| `{name}` | {' | '.join('yes' if c.refusal is None else f'[{sentences[c.refusal]}]' for c in row)} |"
            for name, row in cells.items()
        ),
        "",
        "## Refused with",
        "",
        *(f"{number}. {sentence}" for sentence, number in sentences.items()),
        "",
        _POLICIES,
        "| method | width | heads | depth | grid |",
        "|---|---|---|---|---|",
        *filter(None, map(_policy, losses.names())),
        "",
    ]
    return "\n".join(lines)


_POLICIES = """## Where the models differ

What each method that reads more than logits does; empty where that plays no part. Prefix tokens (class, distillation,
registers) may be of any number on either side: their number is known, and none gets into a patch grid.
"""


def _policy(name: str) -> str | None:
    mismatch = losses.get(name).mismatch
    if mismatch == Mismatch():
        return None
    return f"| `{name}` | {mismatch.width} | {mismatch.heads} | {mismatch.depth} | {mismatch.grid} |"


def is_sentence(refusal: str) -> bool:
    """Whether a refusal is one sentence that says what to do."""
    return re.fullmatch(r"[^\n]+[;:] [^\n]+\.", refusal) is not None


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
