"""``kdvit list losses|models|data [WORD]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from kdvit.cli.parser import Parser


def main(argv: Sequence[str]) -> None:
    parser = Parser("kdvit list", description="What there is.")
    parser.add_argument("what", choices=("losses", "models", "data"))
    parser.add_argument("word", nargs="?", default="", help="only names that contain this word")
    arguments = parser.parse_args(argv)
    rows = [row for row in _ROWS[arguments.what]() if arguments.word.lower() in row[0].lower()]
    if not rows:
        raise ValueError(f"list: no {arguments.what} have '{arguments.word}' in their name; leave the word out.")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False)


def _losses() -> Iterable[tuple[str, str]]:
    from kdvit.losses import get, names

    for name in names():
        yield name, (get(name).__doc__ or "").strip().splitlines()[0]


def _models() -> Iterable[tuple[str, str]]:
    import timm

    from kdvit.models import SHIPPED

    yield from SHIPPED.items()
    pretrained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}  # without their tags
    for name in timm.list_models():
        yield name, "timm, with published weights" if name in pretrained else "timm"


def _data() -> Iterable[tuple[str, str]]:
    from kdvit.data import names

    yield from names().items()
    yield "FOLDER", "an image folder (train/ and val/ or one folder a class), or a folder of parquet files"
    yield "org/name[:config]", "any image classification data set of the Hugging Face hub"


_ROWS = {"losses": _losses, "models": _models, "data": _data}
