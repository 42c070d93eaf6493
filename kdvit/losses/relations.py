"""Relations between tokens, and how far those of two models are apart, in little memory."""

from __future__ import annotations

import torch
from torch import Tensor


def relation_kl(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Mean over B, heads and rows of KL(softmax(c d^T) || softmax(a b^T)) over columns.

    Args:
        a, b: of the student, (B, H, L, d_s), one of them scaled.
        c, d: of the teacher, (B, H, L, d_t), without a graph.

    Returns:
        Scalar >= 0 in nats.
    """
    return _RelationKL.apply(a, b, c, d)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Cut the concatenated heads anew, as MiniLM-v2 does: (B, H, L, d) -> (B, A, L, H * d / A)."""
    # (B, L, H * d) -> (B, L, A, H * d / A)
    return x.transpose(1, 2).flatten(2).unflatten(2, (num_heads, -1)).transpose(1, 2)


class _RelationKL(torch.autograd.Function):
    """mean over B, H and rows of KL(softmax(c d^T) || softmax(a b^T)); a, b the student's, c, d the teacher's.

    The gradient of the scores is (student - teacher) / rows: it is the one attention-sized tensor kept for backward.
    """

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        with torch.autocast(a.device.type, enabled=False):
            student = (a @ b.transpose(-2, -1)).log_softmax(-1)
            teacher = (c @ d.transpose(-2, -1)).log_softmax(-1)
        probabilities = teacher.exp()
        num_rows = student.numel() // student.shape[-1]
        loss = teacher.sub_(student).mul_(probabilities).sum() / num_rows
        ctx.save_for_backward(a, b, student.exp_().sub_(probabilities).div_(num_rows))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b, scores_grad = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            return grad * (scores_grad @ b), grad * (scores_grad.transpose(-2, -1) @ a), None, None
