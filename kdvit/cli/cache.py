"""``kdvit cache build|verify|show FOLDER``: stored teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from kdvit.cache.fingerprint import leaves
from kdvit.cache.forms import KINDS, Form, make_form
from kdvit.cache.manifest import REBUILD, Manifest
from kdvit.cache.shards import faults
from kdvit.cli.job import Job, add_job_arguments
from kdvit.cli.parser import Parser

if TYPE_CHECKING:
    from kdvit.cache.builder import Builder

_HEAD = """Store what a teacher says of every image, in every epoch of a training, and train without running it.

  kdvit cache build FOLDER ...    the options of `kdvit distill`: stores what those losses read of the teacher
  kdvit cache verify FOLDER       compare the checksums of all files
  kdvit cache show FOLDER         what is in it, and what it was made of

kdvit cache build --help   the options of building
"""
_EXAMPLE = """example:
  kdvit cache build caches/a --data ./images --teacher vit_base_patch16_224 --student deit_tiny_patch16_224 \\
      --loss vitkd --epochs 100 --form fp16
  kdvit distill --data ./images --teacher vit_base_patch16_224 --student deit_tiny_patch16_224 \\
      --loss vitkd --epochs 100 --stored-teacher caches/a
"""
#: Forms whose sizes are shown beside the chosen one.
_COMPARED = ("fp32", "fp16", "int8", "top10", "project64")


def main(argv: Sequence[str]) -> None:
    command = argv[0] if argv else None
    if command == "build":
        return _build(argv[1:])
    parser = Parser("kdvit cache", description=_HEAD)
    parser.add_argument("command", choices=("build", "verify", "show"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    return _verify(arguments.folder) if arguments.command == "verify" else _show(arguments.folder)


def _build(argv: Sequence[str]) -> None:
    from kdvit.cache.builder import check_space, plan
    from kdvit.training.preparation import make_accelerator

    parser = Parser("kdvit cache build", description="Store what a teacher says.", epilog=_EXAMPLE)
    parser.add_argument("folder", type=Path, help="made if missing; a building that was stopped goes on")
    group = parser.add_argument_group("store").add_argument
    group("--form", action="append", metavar="[SIGNAL=]FORM", help=f"of all signals that it suits, or of one: {KINDS} "
          "[fp16]; repeatable")  # fmt: skip
    group("--augmentation-epochs", type=int, metavar="K", help="store K epochs, which training replays [all epochs]")
    group("--shard-mib", type=float, default=256, help="size of a file [%(default)s]")
    group("--estimate", action="store_true", help="show what it would take, build nothing")
    add_job_arguments(parser)
    arguments = parser.parse_args(argv)
    job = Job(arguments)
    settings = replace(job.settings, trackers=())
    accelerator = make_accelerator(settings, arguments.folder)
    builders = plan(
        arguments.folder, job.distiller(), job.data, settings, accelerator, form=arguments.form or "fp16",
        augmentation_epochs=arguments.augmentation_epochs, shard_mib=arguments.shard_mib,
    )  # fmt: skip
    shows = accelerator.is_main_process
    for builder in builders if shows else ():
        _print_estimate(builder)
    if arguments.estimate:
        return
    check_space(arguments.folder, builders)
    for builder in builders:
        try:
            builder.run(show=shows)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt("stopped; whole shards are kept, and the same command goes on.") from stop
        if shows:
            print(f"whole: {_count(len(builder.units), 'shard')}; train with --stored-teacher {builder.folder}")


def _print_estimate(builder: Builder) -> None:
    table = _table(f"teacher '{builder.teacher.name}', bytes for each image", "signal", "form", "bytes", *_COMPARED)
    for key, form in builder.forms.items():
        table.add_row(key, form.text, str(form.num_bytes), *(_bytes_as(text, form) for text in _COMPARED))
    console = Console()
    console.print(table, highlight=False)
    epochs, total = builder.manifest.num_epochs, builder.total_bytes
    console.print(
        f"{builder.num_rows} images x {_count(epochs, 'epoch')} x {builder.row_bytes} bytes = {_size(total)}, "
        f"{_size(builder.free_bytes)} free",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _bytes_as(text: str, form: Form) -> str:
    try:
        return str(make_form(text, form.source).num_bytes)
    except ValueError:  # it does not suit this signal
        return "-"


def _verify(folder: Path) -> None:
    manifest = Manifest.read(folder)
    found = list(faults(folder, manifest))
    bad = [(name, wrong) for name, wrong in found if wrong]
    for name, wrong in bad:
        print(f"{folder / name} {wrong}")
    if bad:
        raise ValueError(f"cache '{folder}': {len(bad)} of {len(found)} files are damaged; {REBUILD}.")
    if not manifest.complete:
        raise ValueError(f"cache '{folder}' is not whole, its building was stopped; run its command again.")
    print(f"{folder}: whole, {_count(len(found), 'file')}, {_size(sum(shard.num_bytes for shard in manifest.shards))}")


def _show(folder: Path) -> None:
    manifest = Manifest.read(folder)
    console, teacher = Console(), manifest.teacher
    table = _table(f"teacher '{teacher['name']}'", "signal", "read at", "shape", "form", "bytes for each image")
    for entry in manifest.signals:
        form = entry.make_form()
        table.add_row(
            entry.key, entry.info.location, "x".join(map(str, form.info.shape)), entry.form, str(form.num_bytes)
        )
    console.print(table, highlight=False)
    replays = manifest.augmentation_epochs
    replayed = f", of which training replays {replays} again and again" if replays is not None else ""
    size = _size(sum(shard.num_bytes for shard in manifest.shards))
    lines = [
        f"{manifest.num_samples} images of {manifest.data}, {_count(manifest.num_epochs, 'epoch')}{replayed}: "
        f"{_count(len(manifest.shards), 'shard')}, {size}",
        "whole" if manifest.complete else "not whole: its building was stopped",
    ]
    if manifest.accuracy is not None:
        lines.append(f"accuracy of the teacher: {manifest.accuracy['top1']:.2f} % top-1")
    lines.append("made of:")
    lines += [f"  {name}: {value}" for facts in manifest.fingerprint.values() for name, value in leaves(facts)]
    lines.append("versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *headers: str) -> Table:
    """As that of `Distiller.describe`."""
    table = Table(title=title, title_justify="left", box=box.HORIZONTALS, collapse_padding=True, pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"
