"""Gradients that are found in forward, to save memory: they have no graph, so there is no second derivative."""

from __future__ import annotations

import torch


def refuse_second_derivative(owner: str) -> None:
    """Called in such a ``backward``: with ``create_graph=True`` a second derivative would come out wrong, unsaid."""
    # Dynamo traces a backward with gradients on, whether or not they are asked for.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{owner}: create_graph must be False, got True; take differences of gradients, as kdvit.bilevel does."
        )
