"""Relations between tokens, and how far those of two models are apart, in little memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kdvit.losses.checks import choice, same_batch, same_grid
from kdvit.losses.first_order import refuse_second_derivative
from kdvit.losses.loss import Loss
from kdvit.losses.precision import at_least_float32
from kdvit.signals import ModelInfo

#: What relations there are inside an attention block: the products of two of query, key and value.
RELATIONS = ("qk", "vv", "qq", "kk")
_SIGNALS = {"q": "query", "k": "key", "v": "value"}


def relation_kl(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mean over B, heads and rows of KL(softmax(c d^T) || softmax(a b^T)) over columns.

    Args:
        a, b: of the student, (B, H, L, d_s), one of them scaled.
        c, d: of the teacher, (B, H, L, d_t), without a graph.

    Returns:
        Scalar >= 0 in nats.
    """
    return _RelationKL.apply(a, b, c, d)


def gram_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all entries of (x x^T - y y^T)^2 for x (..., L, d_s), y (..., L, d_t)."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ x.transpose(-2, -1) - y @ y.transpose(-2, -1)).square().mean()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the concatenated heads anew, as MiniLM-v2 does: (B, H, L, d) -> (B, A, L, H * d / A)."""
    # (B, L, H * d) -> (B, L, A, H * d / A)
    return x.transpose(1, 2).flatten(2).unflatten(2, (num_heads, -1)).transpose(1, 2)


def known_relations(owner: Loss, relations: Iterable[str]) -> tuple[str, ...]:
    """The relations as a tuple of one or more different known ones."""
    relations = (relations,) if isinstance(relations, str) else tuple(relations)
    for relation in relations:
        choice(owner, "relations", relation, RELATIONS)
    if not relations or len(set(relations)) < len(relations):
        raise ValueError(
            f"{type(owner).__name__}: relations must be one or more different ones, got {relations}; list each once."
        )
    return relations


def relation_inputs(relations: Iterable[str]) -> tuple[str, ...]:
    """What these relations need of both models: ``("student_query", ..., "teacher_query", ...)``."""
    signals = dict.fromkeys(_SIGNALS[letter] for relation in relations for letter in relation)
    return tuple(f"{side}_{signal}" for side in ("student", "teacher") for signal in signals)


def dropped_prefix(owner: Loss, student: ModelInfo, teacher: ModelInfo) -> dict[str, int]:
    """Prefix tokens that relations leave out on each side: none where both models have as many, else all.

    Refuses models whose patch grids differ.
    """
    dropped = {"student": 0, "teacher": 0}
    for signal, s in student.signals.items():
        t = teacher[signal]
        same_grid(owner, s, t)
        if s.num_prefix_tokens != t.num_prefix_tokens:
            dropped = {"student": s.num_prefix_tokens, "teacher": t.num_prefix_tokens}
    return dropped


def check_relations(
    owner: Loss, student: Sequence[int], teacher: Sequence[int], num_heads: int | None, dropped: Mapping[str, int]
) -> None:
    """Refuse two shapes (H, L, d) whose relations cannot be compared; num_heads as in `relation_operands`."""
    if num_heads is None and student[0] != teacher[0]:
        raise ValueError(
            f"{type(owner).__name__}: student must have as many heads as the teacher, got {student[0]} and "
            f"{teacher[0]}; pass num_relation_heads to re-split both."
        )
    dims = student[0] * student[2], teacher[0] * teacher[2]
    if num_heads is not None and any(dim % num_heads for dim in dims):
        raise ValueError(
            f"{type(owner).__name__}: num_relation_heads must divide both widths {dims[0]} and {dims[1]}, got "
            f"{num_heads}; their greatest common divisor is {math.gcd(*dims)}."
        )
    num_tokens = student[1] - dropped["student"], teacher[1] - dropped["teacher"]
    if num_tokens[0] != num_tokens[1]:
        raise ValueError(
            f"{type(owner).__name__}: student must have as many tokens as the teacher, got {num_tokens[0]} and "
            f"{num_tokens[1]}; choose image and patch sizes that give the same grid, and call build where prefix "
            "tokens differ."
        )


def check_given(owner: Loss, given: Mapping[str, Tensor | None], relations: Sequence[str]) -> None:
    """Refuse a call that lacks an input of the relations."""
    for name in relation_inputs(relations):
        if given[name] is None:
            raise TypeError(
                f"{type(owner).__name__}: {name} must be given for relations {tuple(relations)}; pass it by name."
            )


def relation_operands(
    owner: Loss, relation: str, given: Mapping[str, Tensor], num_heads: int | None, dropped: Mapping[str, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `relation_kl` compares: both sides of a relation's scores, the student's, then the teacher's.

    Args:
        given: inputs by name, (B, H, P+N, d) each.
        num_heads: re-split into so many heads; None keeps the models' heads.
        dropped: leading tokens left out on each side.
    """

    def pick(side: str) -> list[Tensor]:
        return [given[f"{side}_{_SIGNALS[letter]}"] for letter in relation]

    def operands(side: str) -> tuple[Tensor, Tensor]:
        x, y = (at_least_float32(z[:, :, dropped[side] :]) for z in pick(side))
        if num_heads is not None:
            x, y = split_heads(x, num_heads), split_heads(y, num_heads)
        return x * x.shape[-1] ** -0.5, y

    student, teacher = pick("student")[0], pick("teacher")[0]
    same_batch(owner, "student", student, "teacher", teacher)
    check_relations(owner, student.shape[1:], teacher.shape[1:], num_heads, dropped)
    return (*operands("student"), *(x.detach() for x in operands("teacher")))


class _RelationKL(torch.autograd.Function):
    """mean over B, H and rows of KL(softmax(c d^T) || softmax(a b^T)); a, b the student's, c, d the teacher's.

    The gradient of the scores is (student - teacher) / rows. What it gives a and b is computed at once, so that
    nothing as large as the attention is kept for backward, however many relations and heads there are.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            student = (a @ b.transpose(-2, -1)).log_softmax(-1)
            teacher = (c @ d.transpose(-2, -1)).log_softmax(-1)
            probabilities = teacher.exp()
            num_rows = student.numel() // student.shape[-1]
            loss = teacher.sub_(student).mul_(probabilities).sum() / num_rows
            if any(ctx.needs_input_grad):
                scores_grad = student.exp_().sub_(probabilities).div_(num_rows)
                ctx.save_for_backward(scores_grad @ b, scores_grad.transpose(-2, -1) @ a)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        refuse_second_derivative("Relations between tokens")
        a_grad, b_grad = ctx.saved_tensors
        return grad * a_grad, grad * b_grad, None, None
