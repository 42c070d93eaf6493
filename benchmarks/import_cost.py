"""What `import kdvit.losses` costs on top of `import torch`: median of 5 fresh interpreters each, interleaved.

python benchmarks/import_cost.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

REPEATS = 5
STATEMENTS = ("import torch", "import torch, kdvit.losses")


def seconds(statement: str) -> float:
    """Of one statement in an interpreter of its own, without the interpreter's own start."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    repository = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=repository)
    return float(done.stdout)


def main() -> None:
    for statement in STATEMENTS:
        seconds(statement)  # the first import reads files from the disk and writes bytecode
    runs: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for _ in range(REPEATS):  # in turns, so that a busy machine slows both alike
        for statement in STATEMENTS:
            runs[statement].append(seconds(statement))
    medians = [median(runs[statement]) for statement in STATEMENTS]
    for statement, middle in zip(STATEMENTS, medians, strict=True):
        each = " ".join(f"{value:.3f}" for value in runs[statement])
        print(f"{statement:28s} median {middle:.3f} s   ({each})")
    print(f"difference                   {medians[1] - medians[0]:.3f} s   {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
