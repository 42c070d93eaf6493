"""The same distillation job in kdvit, in torchdistill and with timm's distillation task: time of a step, and memory.

Command   python benchmarks/peers.py time [--sizes small deit] [--rounds 9] [--steps 5]
          python benchmarks/peers.py memory [--sizes small deit]
          python benchmarks/peers.py page

One job: the same initial weights, batches in the same order from the same loader (kdvit's, one for each tool), AdamW
without weight decay at a constant rate, and 0.1 * cross-entropy + 0.9 * T^2 * KL(teacher || student) at T = 4, mean
over the batch. In every tool that loss can be had by its options alone:

  kdvit         Distiller(losses=[(0.9, KD(4.0))], task_weight=0.1), in an own loop and through Trainer.fit
  torchdistill  KDLoss(temperature=4, alpha=0.1, beta=0.9), in the config of its sample
                configs/sample/ilsvrc2012/kd/resnet18_from_resnet34.yaml; each step is forward_process and
                post_forward_process, as in its examples/torchvision/image_classification.py. It leaves the teacher in
                the mode that it is given in; here that is eval mode.
  timm          timm.task.LogitDistillationTask(distill_loss_weight=0.9, task_loss_weight=0.1, temperature=4)
  by hand       the loop that one writes without a library; ratios are to it

The first step is a check: loss and gradient of every parameter of the student must be those of the loop by hand (1e-5),
of the Trainer too. Then all take their steps in turn, in one process, a few at a time; who is first changes from round
to round (but for the Trainer, which drives: the others run between two steps of its `fit`). A step is loading, forward,
backward, the optimizer, and reading the loss; "loading alone" is the first of these. The loss after all steps is on the
page. `memory` runs each tool alone, in processes of its own.

`page` writes docs/benchmarks/peers.md and peers.json from both. torchdistill is no dependency of kdvit: where it is not
installed, it is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from measuring import PeakMemory, Step, facts, made_by, one_round, ratios, spread, synchronize
from peer_tools import HAND, NAMES, SIZES, TOOLS, TRAINER, Job, Loop, Size, TrainerRun, device

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"
LOADING = "loading alone"
PACKAGES = ("torch", "timm", "accelerate", "torchdistill")
TOLERANCE = 1e-5
MIB = 2**20


def race(
    driver: Loop | TrainerRun, others: Mapping[str, Step], lengths: Sequence[int], check: Callable[[], None]
) -> dict[str, list[float]]:
    """Mean seconds of a step, by round; the driver's under "". Round i has ``lengths[i]`` steps of each.

    Args:
        driver: takes its steps, and lets the others take theirs between them.
        others: by name.
        lengths: of the rounds.
        check: called after the first round.
    """
    found: dict[str, list[float]] = {name: [] for name in ("", *others)}
    started = time.perf_counter()

    def between(number: int) -> None:
        nonlocal started
        synchronize()
        found[""].append((time.perf_counter() - started) / lengths[number])
        for name, seconds in one_round(others, number, lengths[number]).items():
            found[name].append(seconds)
        if number == 0:
            check()
        started = time.perf_counter()

    driver.run(lengths, between)
    return found


# time


def measure(size: Size, names: Sequence[str], rounds: int, count: int) -> dict[str, Any]:
    """Times by round and tool, and how far the tools were apart."""
    lengths = [1, count, *[count] * rounds]  # the check, a round to warm up, and what counts
    job = Job(size, sum(lengths))
    loops = {name: Loop(job, tool) for name, tool in TOOLS.items() if name in names}
    hand, batches = loops[HAND], job.batches()
    differences: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = TrainerRun(job, Path(folder) / "run") if TRAINER in names else None
        runs = {**({TRAINER: trainer} if trainer else {}), **loops}
        driver = next(iter(runs))
        steps: dict[str, Step] = {name: loop.step for name, loop in loops.items() if name != driver}
        steps[LOADING] = lambda: next(batches)

        def check() -> None:
            for name, run in runs.items():
                differences[name] = {"gradient": run.watch.difference(hand.watch)}
                if name in loops:
                    differences[name]["loss"] = abs(loops[name].losses[0] / hand.losses[0] - 1)
            refuse_other_jobs(differences)

        times = race(runs[driver], steps, lengths, check)
    times[driver] = times.pop("")
    return {
        "batch_size": size.batch_size,
        "text": size.text,
        "seconds": {name: times[name][2:] for name in (*runs, LOADING)},
        "first_step_differences": differences,
        "last_loss": {name: job.last_loss(run.student) for name, run in runs.items()},
    }


def refuse_other_jobs(differences: Mapping[str, Mapping[str, float]]) -> None:
    """Stop where a tool minimises something else than the loop by hand."""
    for name, found in differences.items():
        for what, difference in found.items():
            if not difference <= TOLERANCE:
                raise SystemExit(
                    f"peers: the first {what} of '{name}' is {difference:.1e} from that of the loop by hand"
                )


# memory


def memory(size_name: str, names: Sequence[str], repeats: int) -> dict[str, Any]:
    """MiB, by tool; each runs in processes of its own."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "alone", "--sizes", size_name, "--only", name]
        done = [subprocess.run(command, capture_output=True, text=True) for _ in range(repeats)]
        for process in done:
            if process.returncode:
                raise SystemExit(f"peers: '{name}' alone failed:\n{process.stderr}")
        runs = [json.loads(process.stdout.splitlines()[-1]) for process in done]
        found[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(f"{size_name}, {name}: {found[name]}", flush=True)
    return found


def alone(size: Size, name: str) -> dict[str, float]:
    """MiB of one tool in this process: the peak of the process up to the second step, and of torch within the third."""
    job, peak, resident = Job(size, 3), PeakMemory(device()), 0.0

    def between(number: int) -> None:
        nonlocal resident
        if number == 1:  # the optimizer has its state since the first step; the recording below takes memory itself
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            run.student.zero_grad()  # the Trainer is interrupted before it does so: all are to start without gradients
            peak.start()
        if number == 2:
            peak.stop()

    with tempfile.TemporaryDirectory() as folder:
        run = TrainerRun(job, Path(folder) / "run") if name == TRAINER else Loop(job, TOOLS[name])
        run.run([1, 1, 1], between)
    return {"process": resident, "step": peak.num_bytes / MIB}


# page


def page(timed: Mapping[str, Any], held: Mapping[str, Any]) -> str:
    """docs/benchmarks/peers.md."""
    job = __doc__.split("One job: ")[1].split("In every tool")[0]
    lines = ["# The same job in other tools", "", f"Times: {made_by(timed['facts'])}", ""]
    if held:
        lines += [f"Memory: {made_by(held['facts'])}", ""]
    lines += [f"One job: {' '.join(job.split())}", ""]
    lines += [
        f"Times: medians of {timed['facts']['rounds']} rounds of {timed['facts']['steps']} steps, in turn in one "
        "process; ratios are taken round by round, median (lowest..highest). A step is loading, forward, backward, "
        "optimizer and reading the loss; the Trainer's has its checks and its log in it too. Loss and gradients of "
        f"the first step were the same to {TOLERANCE:g}. Memory: MiB of a process that runs this tool alone, with the "
        "imports of kdvit in all; and the most that torch holds in a step beyond what it held before (for the Trainer "
        "without the batch, which Accelerate has loaded one step ahead).",
    ]
    for name, record in timed["sizes"].items():
        lines += [
            "",
            f"## {record['text']}, batch {record['batch_size']}",
            "",
            *table(record, held.get("sizes", {}).get(name, {})),
        ]
    return "\n".join([*lines, ""])


def table(record: Mapping[str, Any], held: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One row a tool; without memory where it is not measured."""
    seconds = record["seconds"]
    head = [
        "tool",
        "a step, ms",
        "to the loop by hand",
        "loss after the last step",
        "process, MiB",
        "torch in a step, MiB",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, values in seconds.items():
        cells = [name, f"{1e3 * statistics.median(values):.1f}", spread(ratios(values, seconds[HAND]))]
        cells.append(f"{record['last_loss'][name]:.6f}" if name in record["last_loss"] else "-")
        cells += [f"{held[name][key]:.0f}" if name in held else "-" for key in ("process", "step")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def installed(names: Sequence[str]) -> list[str]:
    """The tools that are here; says how to get the others."""
    homes = {"torchdistill": ("torchdistill", "pip install torchdistill"),
             "timm": ("timm.task", "pip install --upgrade timm")}  # fmt: skip
    missing = [name for name in names if name in homes and importlib.util.find_spec(homes[name][0]) is None]
    for name in missing:
        print(f"{name}: left out, it is not installed; to compare with it: {homes[name][1]}", flush=True)
    return [name for name in names if name not in missing]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "memory", "alone", "page"))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--only", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of each tool in a round")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each tool, for memory")
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile, for the page")
    parser.add_argument("--output", type=Path, default=Path("runs") / "peers")
    arguments = parser.parse_args(argv)
    if arguments.what == "alone":
        print(json.dumps(alone(SIZES[arguments.sizes[0]], arguments.only[0])))
    elif arguments.what == "page":
        files = {name: arguments.output / f"{name}.json" for name in ("time", "memory")}
        found = {name: json.loads(file.read_text()) if file.is_file() else {} for name, file in files.items()}
        text = page(found["time"], found["memory"])
        (DOCS / "peers.md").write_text(text)
        (DOCS / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
        print(text)
    else:
        names = installed(arguments.only)
        sizes = {}
        for name in arguments.sizes:
            if arguments.what == "time":
                sizes[name] = measure(SIZES[name], [HAND, *names], arguments.rounds, arguments.steps)
                print("\n".join([f"{name}: {sizes[name]['text']}", *table(sizes[name], {})]), flush=True)
            else:
                sizes[name] = memory(name, names, arguments.repeats)
        arguments.output.mkdir(parents=True, exist_ok=True)
        counts = {"rounds": arguments.rounds, "steps": arguments.steps}
        if arguments.what == "memory":
            counts = {"repeats": arguments.repeats}
        record = {"facts": facts(device(), PACKAGES, arguments.beside, **counts), "sizes": sizes}
        (arguments.output / f"{arguments.what}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
