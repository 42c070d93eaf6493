"""Unbalanced optimal transport between the channels of two feature vectors, as TAKT aligns its teacher's features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdvit.losses.precision import at_least_float32


def feature_transport(
    source: Tensor,
    target: Tensor,
    *,
    regularization: float = 0.1,
    mass_penalty: float = 0.5,
    num_iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """How far the numbers in one feature vector must be moved to become those in another.

    distance = sum_ij plan_ij * (a_i - b_j)^2,  a = source - min(source), b = target - min(target)

    plan is the unbalanced Sinkhorn plan for this cost over its largest entry, with uniform masses of 1 in total and
    the Kullback-Leibler divergence for what is not moved. It is a constant for the gradient. TAKT trains its teacher
    with task loss + coefficient * distance between the features of an image and those of the image with parts of
    the target domain ("target-aware feature alignment"). Holds some tensors of B * D_s * D_t numbers.

    Args:
        source: (B, D_s).
        target: (B, D_t), usually as wide.
        regularization: > 0, of the entropy. 0.1.
        mass_penalty: > 0: the larger, the nearer to balanced transport. 0.5.
        num_iterations: each brings the plan nearer by (mass_penalty / (mass_penalty + regularization))^2, 0.69 here.

    Returns:
        distance (B,) >= 0, in squared feature units, and plan (B, D_s, D_t).

    Raises:
        ValueError: the shapes are not those above; a number is not positive.

    Source:
        Xiong et al., TAKT: Target-Aware Knowledge Transfer for Whole Slide Image Classification, MICCAI 2024,
        https://arxiv.org/abs/2303.05780. Checked against BearCleverProud/TAKT@dcfe1c1; differs in: batches, logarithms
        in the iterations, which cannot underflow, and a fixed number of them.

    Example:
        >>> distance, plan = feature_transport(torch.tensor([[5.0]]), torch.tensor([[7.0]]))
        >>> distance.item()  # a single number is its own smallest: nothing has to move
        0.0
    """
    if source.ndim != 2 or target.ndim != 2 or len(source) != len(target):
        raise ValueError(
            "feature_transport: source and target must be (B, D) with one B, got "
            f"{tuple(source.shape)} and {tuple(target.shape)}; pool tokens or positions first."
        )
    for name, value in (
        ("regularization", regularization),
        ("mass_penalty", mass_penalty),
        ("num_iterations", num_iterations),
    ):
        if not value > 0:
            raise ValueError(f"feature_transport: {name} must be > 0, got {value}; leave it out for the published one.")
    source, target = (at_least_float32(x) - at_least_float32(x).amin(dim=1, keepdim=True) for x in (source, target))
    cost = (source[:, :, None] - target[:, None, :]).square()
    with torch.no_grad():
        plan = _plan(cost, regularization, mass_penalty, num_iterations)
    return (plan * cost).sum(dim=(1, 2)), plan


def _plan(cost: Tensor, regularization: float, mass_penalty: float, num_iterations: int) -> Tensor:
    """The plan exp(u_i + k_ij + v_j); u and v are logarithms of Sinkhorn's scalings."""
    largest = cost.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(cost.dtype).tiny)
    _, rows, columns = cost.shape
    # The plan's divergence from the product of the masses is what is regularised, as in newer releases of POT.
    kernel = -cost / largest / regularization - math.log(rows * columns)
    damping = mass_penalty / (mass_penalty + regularization)
    u, v = kernel.new_zeros(len(cost), rows, 1), kernel.new_zeros(len(cost), 1, columns)
    for _ in range(num_iterations):
        u = -damping * (math.log(rows) + (kernel + v).logsumexp(dim=2, keepdim=True))
        v = -damping * (math.log(columns) + (kernel + u).logsumexp(dim=1, keepdim=True))
    return (u + kernel + v).exp()
