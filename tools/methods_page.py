"""Write docs/methods.md from the docstrings of the registered losses: ``python tools/methods_page.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kdvit import losses

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
_HEAD = """# Methods

Made by `python tools/methods_page.py` from the docstrings; a test keeps it current. Every method is checked, value and
gradients, against what its line "source" names; the cases are in `tests/golden/`.

`kdvit.losses.make(name, **options)` makes one; `make(name, standardize=True, ...)` z-scores its logits first (logit
standardisation) and works for every method that reads logits. On the command line: `--loss 0.5*dkd:beta=2`.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, _table(), *(_method(name) for name in losses.names()), _standardized()])


def _table() -> str:
    rows = ["| name | in one line | reads |", "|---|---|---|"]
    for name in losses.names():
        reads = ", ".join(f"`{item}`" for item in losses.get(name)().inputs())
        rows.append(f"| [`{name}`](#{name}) | {_summary(losses.get(name))} | {reads} |")
    return "\n".join(rows) + "\n"


def _method(name: str) -> str:
    cls = losses.get(name)
    options = ", ".join(f"{p.name}={p.default!r}" for p in inspect.signature(cls).parameters.values())
    return _entry(name, cls, f"`{cls.__name__}({options})`")


def _standardized() -> str:
    return _entry("standardize=True", losses.Standardized, "`make(name, standardize=True, ...)`")


def _entry(title: str, cls: type, call: str) -> str:
    doc = inspect.cleandoc(cls.__doc__ or "")
    formula = re.search(r"^L = .*?(?=\n\n)", doc, re.DOTALL | re.MULTILINE)
    source = re.search(r"^Source:\n(.*?)(?=\n\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    text = [f"## {title}\n", _summary(cls), "", call, ""]
    text += ["```", formula[0], "```", ""] if formula else []
    text += [f"Source: {' '.join(source[1].split())}", ""] if source else []
    return "\n".join(text)


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
