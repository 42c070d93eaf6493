from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("timm", "torchvision", "accelerate", "datasets", "transformers", "rich", "safetensors", "matplotlib", "PIL")


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy packages are loaded after a statement, in a fresh interpreter."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); {statement}; "
    code += f"print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import kdvit.losses; kdvit.losses.make('vitkd')",
        "import torch, kdvit, kdvit.models; kdvit.Distiller; kdvit.Student(torch.nn.Flatten(), input_size=(1, 2, 2))",
    ],
)
def test_losses_and_distiller_need_torch_alone(statement):
    assert loaded_by(statement) == []


def test_the_check_sees_what_is_loaded():
    assert loaded_by("import rich") == ["rich"]


def test_kdvit_itself_loads_not_even_torch():
    assert loaded_by("import kdvit; assert 'torch' not in sys.modules; assert 'Distiller' in dir(kdvit)") == []
