"""What losses on attention, channels and memories hold and take next to their formulas written plainly, at ViT-B size.

Command   python benchmarks/feature_memory.py [--methods tinymim minilm ...] [--rounds 5] [--batch-size 32]
                                              [--device cpu]

Forward and backward of the loss alone, on random signals of a ViT-B student (D 768, 12 heads) and a ViT-L teacher
(D 1024, 16 heads), 196 patches and a class token. The plain version of each is in this file, from the formula in the
loss's docstring: softmax and logarithm apart, all pairs by broadcasting, whole attention where its first row is read.
Value and gradients of both are compared before anything is measured. Each round runs both in turn, in alternating
order, in one process; times are medians over rounds. Memory is the peak of what torch allocates beyond the inputs: the
gradients that are asked for are in it. On a CPU, the tensors as large as an attention (B, H, L, L) that are alive at
once are counted too. Prints a table for docs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from measuring import PeakMemory, Step, interleaved, ratios
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.cost import device_name
from kdvit.losses import Loss, make
from kdvit.signals import ModelInfo, SignalInfo

GRID, DIMS, HEADS = (14, 14), {"student": 768, "teacher": 1024}, {"student": 12, "teacher": 16}
NUM_TOKENS = 1 + GRID[0] * GRID[1]
MIB = 2**20

#: Called without arguments: the loss, with its graph.
Value = Callable[[], Tensor]


@dataclass(frozen=True)
class Subject:
    """One row: the loss and its formula, as functions of the same leaves.

    Args:
        ours: the registered loss.
        plain: the formula.
        leaves: what gradients are compared of, by name.
        unit: floats of one attention-sized tensor (B, H, L, L), with the heads that the formula has.
        note: what is peculiar to the row.
    """

    ours: Value
    plain: Value
    leaves: Mapping[str, Tensor]
    unit: int
    note: str = ""


def plain_relations(
    loss: Loss, given: Mapping[str, Tensor], relations: tuple[str, ...], num_heads: int, weight: float
) -> Tensor:
    """TinyMIM and MiniLM: sum over relations of mean over rows of KL(R_t || R_s), R = softmax(x y^T / sqrt(d))."""

    def relation(side: str, pair: str) -> Tensor:
        signals = {"q": "query", "k": "key", "v": "value"}
        x, y = (given[f"{side}_{signals[letter]}"].transpose(1, 2).flatten(2) for letter in pair)
        x, y = (z.unflatten(2, (num_heads, -1)).transpose(1, 2) for z in (x, y))
        return (x @ y.transpose(-2, -1) / math.sqrt(x.shape[-1])).softmax(dim=-1)

    total = torch.zeros((), device=given["student_value"].device)
    for pair in relations:
        p, q = relation("teacher", pair), relation("student", pair)
        total = total + weight * (p * (p.log() - q.log())).sum(dim=-1).mean()
    return total


def relations(name: str, batch_size: int, device: torch.device) -> Subject:
    """TinyMIM in 16 heads, to which it re-splits both; MiniLM in 32, the most that divide both widths."""
    num_heads = {"tinymim": 16, "minilm": 32}[name]
    pairs = {"tinymim": ("qk", "vv"), "minilm": ("qq", "kk", "vv")}[name]
    loss = make(name, num_relation_heads=num_heads)
    given = {}
    for side in ("student", "teacher"):
        shape = (batch_size, HEADS[side], NUM_TOKENS, DIMS[side] // HEADS[side])
        for signal in ("query", "key", "value"):
            given[f"{side}_{signal}"] = torch.randn(shape, device=device)
    given = {key: given[key] for key in loss.inputs()}
    leaves = {key: x.requires_grad_() for key, x in given.items() if key.startswith("student")}
    weight = {"tinymim": 1.0, "minilm": 1 / 3}[name]
    return Subject(
        lambda: sum(loss(**given).values()),
        lambda: plain_relations(loss, given, pairs, num_heads, weight),
        leaves,
        batch_size * num_heads * NUM_TOKENS**2,
        f"{len(pairs)} relations in {num_heads} heads",
    )


def attndistill(name: str, batch_size: int, device: torch.device) -> Subject:
    """From query and key, as the taps do it: the loss reads the class token's row, so no more is computed."""
    loss = make(name)
    queries, keys, infos = {}, {}, {}
    for side, signal in (("student", "cls_token"), ("teacher", "normed_cls_token")):
        shape = (batch_size, HEADS[side], NUM_TOKENS, DIMS[side] // HEADS[side])
        queries[side], keys[side] = torch.randn(shape, device=device), torch.randn(shape, device=device)
        token = SignalInfo(signal, "given", (DIMS[side],))
        row = SignalInfo("cls_attention", "given", (HEADS[side], NUM_TOKENS), 1, GRID)
        infos[side] = ModelInfo.of(side, **{signal: token, "cls_attention": row})
    loss.build(infos["student"], infos["teacher"])
    loss.to(device)
    student, teacher = (torch.randn(batch_size, dim, device=device) for dim in DIMS.values())
    leaves = {"query": queries["student"], "key": keys["student"], "cls_token": student}
    leaves = {key: x.requires_grad_() for key, x in leaves.items()} | dict(loss.named_parameters())

    def row(side: str) -> Tensor:
        query, key = queries[side], keys[side]
        return (query[:, :, :1] * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)[:, :, 0]

    def merged(side: str) -> Tensor:
        query, key = queries[side], keys[side]
        attention = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(dim=-1)[:, :, 0]
        one = (attention.clamp(min=1e-5).log().sum(dim=1) / loss.temperature).softmax(dim=-1).clamp(1e-5, 0.996)
        return one / one.sum(dim=-1, keepdim=True)

    def plain() -> Tensor:
        s, t = merged("student"), merged("teacher").detach()
        kl = (t * (t.log() - s.log())).sum() / batch_size
        return loss.cls_weight * F.mse_loss(loss.projector(student), teacher) + loss.attention_weight * kl

    return Subject(
        lambda: sum(loss(student, teacher, row("student"), row("teacher").detach()).values()),
        plain,
        leaves,
        batch_size * HEADS["student"] * NUM_TOKENS**2,
        "with the attention from query and key; 12 and 16 heads become one",
    )


def nst(name: str, batch_size: int, device: torch.device) -> Subject:
    """All pairs of channels by broadcasting, as released, hold B * D_s * D_t * N floats: 19 GiB for 32 images."""
    batch_size = min(batch_size, 1)
    loss = make(name, student_stages=(-1,), teacher_stages=(-1,))
    student, teacher = (torch.randn(batch_size, dim, *GRID, device=device) for dim in DIMS.values())
    student.requires_grad_()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        x, y = (F.normalize(z.flatten(2), dim=2) for z in (x, y))
        return (x[:, :, None] * y[:, None]).sum(dim=-1).square().mean()

    return Subject(
        lambda: loss((student,), (teacher,)),
        lambda: kernel(student, student) + kernel(teacher, teacher) - 2 * kernel(student, teacher),
        {"feature_map": student},
        batch_size * HEADS["student"] * NUM_TOKENS**2,
        f"one pair of stages, batch {batch_size}: for more images the plain version is too large",
    )


def crd(name: str, batch_size: int, device: torch.device, num_samples: int = 50000) -> Subject:
    """K = 16384 negatives of 50000 images, embeddings of 128; with the rows of the memory looked up at once."""
    loss = make(name, num_samples=num_samples, other_labels=False)
    infos = (ModelInfo.of(side, pooled=SignalInfo("pooled", "given", (dim,))) for side, dim in DIMS.items())
    loss.build(*infos)
    loss.to(device)
    student, teacher = (torch.randn(batch_size, dim, device=device) for dim in DIMS.values())
    ids = torch.arange(batch_size, device=device)
    negatives = torch.randint(num_samples, (batch_size, loss.num_negatives), device=device)
    loss(student, teacher, ids, negatives=negatives)  # the first batch fixes Z
    loss.eval()  # from here on memories stay, so that both versions see the same
    student.requires_grad_()
    index = torch.cat([ids[:, None], negatives], dim=1)

    def contrast(head: nn.Module, x: Tensor, memory: Tensor, log_z: Tensor) -> Tensor:
        rows = memory[index]  # (B, 1 + K, dim)
        scores = (F.normalize(head(x), dim=1)[:, None] * rows).sum(dim=-1)
        h = (scores / loss.temperature).exp() / log_z.exp()
        noise = loss.num_negatives / num_samples
        own, others = h[:, :1] / (h[:, :1] + noise + 1e-7), noise / (h[:, 1:] + noise + 1e-7)
        return -(own.log().sum() + others.log().sum()) / len(x)

    def plain() -> Tensor:
        first = contrast(loss.student_head, student, loss.teacher_memory, loss.log_z[0])
        return first + contrast(loss.teacher_head, teacher, loss.student_memory, loss.log_z[1])

    return Subject(
        lambda: sum(loss(student, teacher, ids, negatives=negatives).values()),
        plain,
        {"pooled": student} | dict(loss.named_parameters()),
        batch_size * HEADS["student"] * NUM_TOKENS**2,
        f"{loss.num_negatives} negatives of {num_samples} images; it has no attention",
    )


SUBJECTS = {"tinymim": relations, "minilm": relations, "attndistill": attndistill, "nst": nst, "crd": crd}


def step_of(value: Value, leaves: Mapping[str, Tensor]) -> Step:
    """Forward and backward; gradients of the step before are gone first."""

    def step() -> None:
        for x in leaves.values():
            x.grad = None
        value().backward()

    return step


def check(name: str, subject: Subject) -> None:
    """Stop where the two versions differ by more than rounding."""
    found = []
    for value in (subject.ours, subject.plain):
        step_of(value, subject.leaves)()
        found.append([value().detach(), *(x.grad for x in subject.leaves.values())])
    for what, ours, plain in zip(["value", *subject.leaves], *found, strict=True):
        difference = (ours - plain).abs().max().item() / plain.abs().max().item()
        if not difference < 1e-3:
            raise SystemExit(f"{name}: '{what}' of the two versions differs by {difference:.1e} of the largest entry")


def held(step: Step, subject: Subject, device: torch.device) -> tuple[int, int | None]:
    """Of a step, beyond the inputs: bytes held at most, and attention-sized tensors alive at once (None on CUDA).

    Gradients of the step before do not count.
    """
    for x in subject.leaves.values():
        x.grad = None
    with PeakMemory(device) as peak:
        step()
    if device.type == "cuda":
        return peak.num_bytes, None
    size = 4 * subject.unit
    large = [(x > 0) - (x < 0) if abs(x) >= size else 0 for x in peak.changes]
    return peak.num_bytes, max(accumulate(large))


def measure(name: str, subject: Subject, rounds: int, device: torch.device) -> str:
    """A row of the table."""
    check(name, subject)
    steps = [step_of(value, subject.leaves) for value in (subject.ours, subject.plain)]
    peaks = [held(step, subject, device) for step in steps]
    times = interleaved(dict(zip(("ours", "plain"), steps, strict=True)), rounds)
    ours, plain = (1e3 * statistics.median(values) for values in times.values())
    ratio = statistics.median(ratios(times["ours"], times["plain"]))
    memory = " | ".join(f"{size / MIB:.1f} MiB, {'-' if number is None else number}" for size, number in peaks)
    return (
        f"| `{name}` | {4 * subject.unit / MIB:.1f} MiB | {memory} | {peaks[0][0] / peaks[1][0]:.3f} | "
        f"{ours:.0f} ms | {plain:.0f} ms | {ratio:.3f} | {subject.note} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    print(
        f"torch {torch.__version__}, {device_name(device)}, batch {arguments.batch_size}, {arguments.rounds} rounds\n"
    )
    print(
        "| method | (B, H, L, L) | ours: peak, such tensors | plain: the same | ratio | ours | plain | ratio | note |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.methods:
        torch.manual_seed(0)
        subject = SUBJECTS[name](name, arguments.batch_size, device)
        print(measure(name, subject, arguments.rounds, device), flush=True)


if __name__ == "__main__":
    main()
