"""What a Distiller step costs over a hand-written loop that does the same: deit_tiny <- deit_small, 224 px, batch 16.

Command   python benchmarks/step_overhead.py [--rounds 15] [--batch-size 16] [--device cpu]

Each round times one step of the Distiller and one of the hand-written loop, back to back in one process, on the same
weights and images, in alternating order; the figure is the median over rounds of the ratio's two medians. The
hand-written loops are what a careful engineer writes for one method: a frozen teacher under no_grad and plain forward
hooks. Gradients of both are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import timm
import torch
from measuring import Step, interleaved, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F

import kdvit
from kdvit.cost import device_name
from kdvit.losses import KD, TinyMIM, ViTKD


def hand_written_kd(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Step:
    def step() -> None:
        with torch.no_grad():
            target = F.log_softmax(teacher(images) / 4.0, dim=1)
        logits = student(images)
        kd = F.kl_div(F.log_softmax(logits / 4.0, dim=1), target, reduction="batchmean", log_target=True)
        (F.cross_entropy(logits, labels) + 16.0 * kd).backward()

    return step


def hand_written_vitkd(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, loss: ViTKD) -> Step:
    """The projectors are taken from ``loss``, so that both sides train the same weights; it is called directly."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, args, output: seen.__setitem__(name, output)

    for side, model in (("s", student), ("t", teacher)):
        model.blocks[0].register_forward_hook(keep(f"{side}0"))
        model.blocks[1].register_forward_hook(keep(f"{side}1"))
        model.norm.register_forward_hook(keep(f"{side}n"))

    def step() -> None:
        with torch.no_grad():
            teacher(images)
        logits = student(images)
        terms = loss(
            (seen["s0"][:, 1:], seen["s1"][:, 1:]), (seen["t0"][:, 1:], seen["t1"][:, 1:]),
            seen["sn"][:, 1:], seen["tn"][:, 1:],
        )  # fmt: skip
        (F.cross_entropy(logits, labels) + terms["mimic"] + terms["generate"]).backward()

    return step


def hand_written_tinymim(student: nn.Module, teacher: nn.Module, images: Tensor, heads: int) -> Step:
    """The official computation: q k^T and v v^T of the last blocks, re-split into ``heads``, softmax, KL."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, args, output: seen.__setitem__(name, output)

    student.blocks[-1].attn.qkv.register_forward_hook(keep("s"))
    teacher.blocks[-1].attn.qkv.register_forward_hook(keep("t"))

    def relations(qkv: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = qkv.shape
        q, k, v = qkv.reshape(batch, length, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)
        scale = q.shape[-1] ** -0.5
        return (q * scale) @ k.transpose(-2, -1), (v * scale) @ v.transpose(-2, -1)

    def step() -> None:
        with torch.no_grad():
            teacher(images)
            targets = [r.log_softmax(-1) for r in relations(seen["t"])]
        student(images)
        total = torch.zeros(())
        for scores, target in zip(relations(seen["s"]), targets, strict=True):
            rows = scores.numel() // scores.shape[-1]
            total = total + F.kl_div(scores.log_softmax(-1), target, reduction="sum", log_target=True) / rows
        total.backward()

    return step


def compare(name: str, ours: Step, theirs: Step, models: tuple[nn.Module, nn.Module], rounds: int) -> None:
    """Print the ratio of the medians, after checking that both steps give the student the same gradients."""
    gradients = []
    for step, model in zip((ours, theirs), models, strict=True):
        torch.manual_seed(0)
        step()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for key, gradient in gradients[0].items():
        other = gradients[1][key]
        if (gradient is None) != (other is None):
            raise SystemExit(f"{name}: only one of both loops gives '{key}' a gradient")
        if gradient is not None and not torch.allclose(gradient, other, rtol=1e-3, atol=1e-6):
            raise SystemExit(f"{name}: gradients of '{key}' differ by {(gradient - other).abs().max():.2e}")

    def cleared(step: Step, model: nn.Module) -> Step:
        def run() -> None:
            step()
            model.zero_grad()

        return run

    steps = {"ours": cleared(ours, models[0]), "theirs": cleared(theirs, models[1])}
    interleaved(steps, 1)  # warms up
    times = interleaved(steps, rounds)
    medians = {which: statistics.median(values) for which, values in times.items()}
    print(
        f"{name:<8} Distiller {medians['ours'] * 1e3:8.1f} ms  hand-written {medians['theirs'] * 1e3:8.1f} ms  "
        f"ratio of medians {medians['ours'] / medians['theirs']:.3f}  "
        f"median of paired ratios {spread(ratios(times['ours'], times['theirs']))}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+", default=["kd", "vitkd", "tinymim"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    teacher = timm.create_model("deit_small_patch16_224").to(device).eval().requires_grad_(False)
    student = timm.create_model("deit_tiny_patch16_224").to(device).train()
    images = torch.randn(arguments.batch_size, 3, 224, 224, device=device)
    labels = torch.randint(0, 1000, (arguments.batch_size,), device=device)
    print(f"torch {torch.__version__}, {device_name(device)}, batch {arguments.batch_size}, {arguments.rounds} rounds")
    for method in arguments.methods:
        measure(method, student, teacher, images, labels, arguments.rounds)
    count_teacher_blocks(images)


def measure(method: str, student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> None:
    loss = {"kd": KD(4.0), "vitkd": ViTKD(), "tinymim": TinyMIM(num_relation_heads=6)}[method]
    task = None if method == "tinymim" else "cross_entropy"
    distiller = kdvit.Distiller(copy.deepcopy(teacher), copy.deepcopy(student), losses=[loss], task_loss=task)
    distiller.train()
    pair = copy.deepcopy((student, teacher))
    theirs = {
        "kd": lambda: hand_written_kd(*pair, images, labels),
        "vitkd": lambda: hand_written_vitkd(*pair, images, labels, loss),
        "tinymim": lambda: hand_written_tinymim(*pair, images, heads=6),
    }[method]()
    compare(
        method, lambda: distiller(images, labels).loss.backward(), theirs, (distiller.student.model, pair[0]), rounds
    )


def count_teacher_blocks(images: Tensor) -> None:
    """TinyMIM reads block 18 of 24 (index 17): show which of the teacher's blocks run."""
    teacher = timm.create_model("deit_tiny_patch16_224", depth=24)
    student = timm.create_model("deit_tiny_patch16_224", depth=2)
    distiller = kdvit.Distiller(teacher, student, losses=[TinyMIM(teacher_block=17)], task_loss=None)
    ran: list[int] = []
    for index, block in enumerate(teacher.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    distiller(images[:2].cpu())
    print(f"tinymim at teacher block 18 of 24: blocks {ran[0] + 1}..{ran[-1] + 1} ran")


if __name__ == "__main__":
    main()
