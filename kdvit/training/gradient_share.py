"""Which loss moves the student: the share of every term in the length of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Average = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class GradientShare:
    """How hard, and which way, each weighted term pulls at the student.

    Args:
        share: name -> ||g_i|| / sum_j ||g_j||, in [0, 1]; they sum to 1, or are all 0 where no term pulls.
        cosine: name -> cos(g_i, g_task) in [-1, 1], for the terms beside ``task`` whose gradient is not 0: below 0 a
            term works against the labels. Empty where there is no task loss.
    """

    share: dict[str, float]
    cosine: dict[str, float]


def gradient_share(
    weighted: Mapping[str, Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    scale: float = 1.0,
    average: Average | None = None,
) -> GradientShare | None:
    """Measure the gradient of every term, between the forward pass and ``loss.backward()``.

    It changes nothing of the training: ``.grad`` is not written, no hook of a gradient's accumulation fires (DDP
    counts them), no random number is drawn, and the graph stays for the backward pass. It costs one backward pass per
    term, and memory for two gradients. Under several processes every process must call it, as it must call
    ``backward()``: a loss that gathers the batch communicates in its backward pass too.

    Args:
        weighted: ``DistillerOutput.weighted``; a compiled Distiller gives none. A term without a graph has the share 0.
        parameters: of the student; those that require no gradient are left out.
        scale: of the loss under fp16 (``accelerator.scaler.get_scale()``), so that small gradients do not vanish here
            where they do not in training; ratios do not depend on it.
        average: averages a list of tensors over processes, ``partial(accelerator.reduce, reduction="mean")``; the share
            is then that of the whole batch. None: of this process's images.

    Returns:
        The shares; None where a gradient is not finite, as in the first steps under fp16.

    Raises:
        ValueError: there is no term, there is no trainable parameter, or the parameters are sharded (FSDP2).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> gradient_share({"task": 3 * w[0], "kd": w[1], "l1": -w[0] / 2}, [w])
        GradientShare(share={'task': 0.666667, 'kd': 0.222222, 'l1': 0.111111}, cosine={'kd': 0.0, 'l1': -1.0})
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    _check(weighted, parameters)
    names = sorted(weighted, key=lambda name: name != "task")  # what the others are compared with comes first
    norms, dots, task = [], [], None
    for name in names:
        gradient = _gradient(weighted[name], parameters, scale, average)
        task = gradient if task is None else task
        norms.append(torch.nn.utils.get_total_norm(gradient))
        dots.append(torch.stack([(ours * theirs).sum() for ours, theirs in zip(gradient, task, strict=True)]).sum())
    values = torch.stack([*norms, *dots])  # read at once: each reading would stall a GPU
    if not values.isfinite().all():
        return None
    lengths = dict(zip(names, values[: len(names)].tolist(), strict=True))
    products = dict(zip(names, values[len(names) :].tolist(), strict=True))
    total, length_task = sum(lengths.values()), lengths.get("task", 0.0)
    return GradientShare(
        share={name: round(lengths[name] / total, 6) if total else 0.0 for name in weighted},
        cosine={
            name: round(max(-1.0, min(1.0, products[name] / lengths[name] / length_task)), 6)
            for name in weighted
            if name != "task" and lengths[name] and length_task
        },
    )


def _check(weighted: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
    if not weighted:
        raise ValueError(
            "gradient_share: weighted must hold a term, got none; pass DistillerOutput.weighted of a step that is not "
            "compiled."
        )
    if not parameters:
        raise ValueError(
            "gradient_share: parameters must hold one that requires a gradient, got none; pass the student's."
        )
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError(
                "gradient_share: parameters must be whole in every process, got sharded ones (FSDP); leave "
                "gradient_share_steps out there."
            )


def _gradient(term: Tensor, parameters: Sequence[nn.Parameter], scale: float, average: Average | None) -> list[Tensor]:
    """The term's gradient in float32, one tensor a parameter; zeros where it does not reach."""
    if not term.requires_grad:
        return [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    found = torch.autograd.grad(
        term, parameters, torch.full_like(term, scale), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    found = [gradient.float() for gradient in found]
    return found if average is None else list(average(found))
