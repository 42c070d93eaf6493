"""Reference data of the official implementations (tests/golden, made by tools/copy_golden.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """One run of an official implementation: its options, and tensors by ``group.name`` (in, out, grad, w, wgrad)."""

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def group(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, by name."""
        prefix = f"{group}."
        return {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}


def golden(name: str) -> dict[str, GoldenCase]:
    """All cases of a file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        options = json.loads(file.metadata()["golden"])["cases"]
        tensors: dict[str, dict[str, Tensor]] = {case: {} for case in options}
        for key in file.keys():
            case, _, rest = key.partition("/")
            tensors[case][rest] = file.get_tensor(key)
    return {case: GoldenCase(case, options[case], tensors[case]) for case in options}


def assert_close(actual: Tensor, expected: Tensor, relative: float) -> None:
    """The largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= relative * size, f"differs by {difference / size:.1e} of the largest entry"


def tolerance(x: Tensor) -> float:
    """What a logit loss must reach: 1e-5 in float32, 1e-9 in float64."""
    return {torch.float32: 1e-5, torch.float64: 1e-9}[x.dtype]


def assert_matches(case: GoldenCase, loss: Any, student: str = "student_logits", labels: str | None = None) -> None:
    """Value and gradient of a logit loss equal the official ones."""
    logits = case[f"in.{student}"].requires_grad_()
    extra = (case[f"in.{labels}"],) if labels else ()
    value = loss(logits, case["in.teacher_logits"], *extra)
    value = sum(value.values()) if isinstance(value, dict) else value
    assert_close(value, case["out.loss"], tolerance(logits))
    (grad,) = torch.autograd.grad(value, logits)
    assert_close(grad, case[f"grad.{student}"], tolerance(logits))
