"""The README's figure: `kdvit quickstart` over several seeds, mean and spread.

Command   python benchmarks/quickstart_seeds.py [--seeds 0 1 2] [--output runs/quickstart_seeds]

Writes docs/benchmarks/quickstart.md (the table that the README quotes) and docs/benchmarks/quickstart.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

import torch

from kdvit.cli.quickstart import KD_WEIGHT, STUDENT, TASK_WEIGHT, TEACHER, TEMPERATURE, TRAINING, compare
from kdvit.cost import device_name, human

DOCS = Path(__file__).parent.parent / "docs" / "benchmarks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", default="runs/quickstart_seeds")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    shutil.rmtree(output, ignore_errors=True)
    runs = {seed: compare(output / str(seed), seed=seed) for seed in arguments.seeds}
    DOCS.mkdir(parents=True, exist_ok=True)
    page = report(runs)
    (DOCS / "quickstart.md").write_text(page)
    draw(output, arguments.seeds)
    print(page)


def report(runs: dict[int, list]) -> str:
    first = next(iter(runs.values()))
    lines = [
        "# Quickstart over seeds",
        "",
        f"Made by `python benchmarks/quickstart_seeds.py --seeds {' '.join(map(str, runs))}` on "
        f"{device_name(torch.device('cpu'))} (torch {torch.__version__}). Accuracy of the last epoch on the 2,000 test "
        "images of the embedded sample; the same student, images, epochs and seed with and without the teacher.",
        "",
        f"Teacher `{TEACHER}` ({first[0].top1:.2f} %, trained on all 60,000 images); student ViT "
        f"{json.dumps(STUDENT)}; {TRAINING.epochs} epochs of 8,000 images, batch {TRAINING.batch_size}, AdamW "
        f"lr {TRAINING.lr:g}, weight decay {TRAINING.weight_decay:g}, images flipped at random. Alone: cross-entropy; "
        f"distilled: {TASK_WEIGHT:g} cross-entropy + {KD_WEIGHT:g} KD at temperature {TEMPERATURE:g}.",
        "",
        "| seed | student alone | student distilled | difference | alone, s | distilled, s |",
        "|---|---|---|---|---|---|",
    ]
    for seed, (_, alone, distilled) in runs.items():
        lines.append(
            f"| {seed} | {alone.top1:.2f} % | {distilled.top1:.2f} % | {distilled.top1 - alone.top1:+.2f} | "
            f"{alone.seconds:.0f} | {distilled.seconds:.0f} |"
        )
    columns = [[rows[i].top1 for rows in runs.values()] for i in (1, 2)]
    columns.append([b - a for a, b in zip(*columns, strict=True)])
    cells = [f"{statistics.mean(c):.2f} +- {statistics.stdev(c) if len(c) > 1 else 0:.2f}" for c in columns]
    lines.append(f"| mean +- standard deviation | {cells[0]} % | {cells[1]} % | {cells[2]} | | |")
    teacher, student = first[0], first[1]
    lines += [
        "",
        f"Teacher: {human(teacher.num_parameters)} parameters, {human(teacher.num_macs)} MACs an image. Student: "
        f"{human(student.num_parameters)} parameters, {human(student.num_macs)} MACs an image.",
        "",
    ]
    return "\n".join(lines)


def draw(output: Path, seeds: list[int]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, color in (("alone", "tab:grey"), ("distilled", "tab:blue")):
        for seed in seeds:
            lines = (output / str(seed) / name / "metrics.jsonl").read_text().splitlines()
            points = [record for record in map(json.loads, lines) if record["kind"] == "evaluation"]
            label = f"student, {name}" if seed == seeds[0] else None
            axis.plot([p["epoch"] for p in points], [p["top1"] for p in points], color=color, label=label, alpha=0.85)
    teacher = json.loads((output / str(seeds[0]) / "distilled" / "run.json").read_text())["result"]["teacher_top1"]
    axis.axhline(teacher, color="black", linestyle="--", linewidth=1, label="teacher")
    axis.set(xlabel="epoch", ylabel="top-1 on 2,000 test images (%)", title="The same ViT, alone and distilled")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(DOCS / "quickstart.png", dpi=130)


if __name__ == "__main__":
    main()
