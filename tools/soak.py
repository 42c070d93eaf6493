"""Kill `kdvit distill` with SIGKILL again and again, start the same command again, and compare the final files.

Command     python tools/soak.py --kills 100
            python tools/soak.py --kills 20 --processes 2 --workers 2
What        a run that is left alone; then the same command in other folders, killed at random moments (some of them as
            soon as a state is being written) until there were enough kills, each followed to its end
Result      every file of every run equals that of the run that was left alone, byte by byte, but what the clock is in
            (timing.jsonl, parts of run.json); else the exit code is 1 and the files are named
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = (
    "--data fashion-mnist-sample --teacher fashion_mnist_vit --student vit_tiny_patch16_224 --loss 0.5*kd --loss vitkd "
    "--student-options img_size=28,patch_size=7,in_chans=1,embed_dim=64,depth=3,num_heads=4 --batch-size 64 "
    "--steps 150 --ema-decay 0.99 --mixup-alpha 0.2 --save-steps 5 --log-steps 7 --resume"
)


def command(output: Path, processes: int, workers: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "kdvit", "distill", *JOB.split(), "--num-workers", str(workers),
            "--output", str(output)]  # fmt: skip


def start(output: Path, processes: int, workers: int) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command(output, processes, workers), env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def descendants(process: int) -> list[int]:
    """All processes that a process started, and so on."""
    children = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True).stdout.split()
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"a run broke with exit code {process.returncode}:\n{errors}")


def kill(process: subprocess.Popen, output: Path, delay: float | None) -> str | None:
    """Kill after a delay, or (None) when a state is being written; returns how, or None where the run ended first."""
    deadline = time.monotonic() + (delay or 600)
    while time.monotonic() < deadline and not (delay is None and list(output.glob("state/.step_*.tmp/*"))):
        if process.poll() is not None:
            finish(process)
            return None
        time.sleep(1e-3)
    # All together, as by a power cut: a launcher's processes are in sessions of their own, and would train on.
    for each in (*descendants(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    process.wait()
    return "while a state was written" if list(output.glob("state/.step_*.tmp/*")) else "between writes"


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves, byte by byte, but what the clock and the folder's name are in."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("timing.jsonl", "run.json")
    }
    summary = json.loads((folder / "run.json").read_text())
    for name in ("written", "command"):
        del summary[name]
    for name in ("seconds", "folder"):
        del summary["result"][name]
    return {**found, "run.json": json.dumps(summary).encode()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp(prefix="kdvit-soak-"))
    options = arguments.processes, arguments.workers
    started = time.monotonic()
    finish(start(folder / "whole", *options))
    seconds = time.monotonic() - started
    expected = files(folder / "whole")
    print(f"left alone: {seconds:.0f} s, {len(expected)} files", flush=True)
    kills: list[str] = []
    runs = wrong = 0
    while len(kills) < arguments.kills:
        run = folder / f"run{runs}"
        for _ in range(10):  # after ten kills a run may end, so that many ends are compared
            delay = None if draw.random() < 0.3 else draw.uniform(0.1, 0.9) * seconds
            how = kill(start(run, *options), run, delay)
            if how is None or len(kills) == arguments.kills:
                break
            kills.append(how)
        finish(start(run, *options))
        found = files(run)
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        wrong += bool(different)
        print(f"{run.name}: {len(kills)} kills so far, {', '.join(different) or 'all files equal'}", flush=True)
        runs += 1
    writes = kills.count("while a state was written")
    print(f"{len(kills)} kills ({writes} while a state was written), {runs} runs, {wrong} different")
    shutil.rmtree(folder)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
