"""Write docs/methods.md from the registered losses: ``python tools/methods_page.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from kdvit import losses
from kdvit.losses.loss import Loss, Mismatch, needs, reads_teachers, split_input
from kdvit.signals import (
    ATTENTION_SIGNALS,
    CALLABLE_SIGNALS,
    CLASS_SIGNALS,
    MAP_SIGNALS,
    Location,
    ModelInfo,
    SignalInfo,
)

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
_HEAD = """# Methods

Made by `python tools/methods_page.py` from the code and its docstrings; a test keeps it current. Where "checked
against" names a repository, value and gradients are compared with what its code gives (`tests/golden/`); "the paper"
means that no official code was found: there a value by hand and a property that the paper claims are tested.
[compatibility.md](compatibility.md) has what works between which models.

`kdvit.losses.make(name, **options)` makes one; `make(name, standardize=True, ...)` z-scores its logits first (logit
standardisation) and works for every method whose logits are inputs (all but `psd`);
`make(name, temperature=Linear(8, 2))` lets an option that is a number follow a schedule. A weight around a loss may be
a schedule too: `losses=[(WarmUp(epochs=20), "dkd")]`. On the command line: `--loss 0.5*dkd:beta=2`.

Extra parameters are those that train beside the student and are not exported, for a ViT of width 192 taught by one of
width 384 (methods of several teachers: by two), all with 6 heads, 14x14 patches and 1,000 classes. Extra forwards are
passes of a model per training step beyond one of the student and, where the method has a teacher, one of the teacher.
"""
#: The pair that extra parameters are counted for.
_WIDTH, _NUM_HEADS, _GRID, _NUM_CLASSES = {"student": 192, "teacher": 384}, 6, (14, 14), 1000


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, _tables(), *map(_method, losses.names()), *map(_wrapper, _WRAPPERS.items())])


_WRAPPERS = {
    "standardize=True": (losses.Standardized, "`make(name, standardize=True, ...)`"),
    "schedules": (losses.Scheduled, "`make(name, option=schedule, ...)`"),
    "several teachers": (
        losses.EachTeacher,
        "`Distiller([teacher, other_teacher], ...)`, `EachTeacher(loss, weights=...)`",
    ),
}


def _kind(name: str) -> str:
    """Which of the tables a method is in."""
    loss = losses.get(name)()
    if reads_teachers(loss):
        return "Several teachers"
    signals = {split_input(i)[1] for i in loss.inputs() if i.startswith(("student_", "teacher_"))}
    return "From logits" if signals <= set(CLASS_SIGNALS) else "From features"


def _tables() -> str:
    kinds = {name: _kind(name) for name in losses.names()}
    titles = "From logits", "From features", "Several teachers"
    return "\n".join(_table(title, [name for name in kinds if kinds[name] == title]) for title in titles)


def _table(title: str, names: list[str]) -> str:
    rows = [f"## {title}", "",
            "| name | paper | in one line | reads | extra parameters | extra forwards | checked against |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in names:
        cls, loss = losses.get(name), losses.get(name)()
        cells = (
            f"[`{name}`](#{name})",
            _paper(cls),
            _summary(cls),
            _reads(loss),
            _extra_parameters(loss),
            _extra_forwards(loss),
        )
        rows.append(f"| {' | '.join(cells)} | {_checked(cls)} |")
    return "\n".join(rows) + "\n"


def _method(name: str) -> str:
    cls, loss = losses.get(name), losses.get(name)()
    options = ", ".join(f"{p.name}={p.default!r}" for p in inspect.signature(cls).parameters.values())
    facts = (
        f"Reads: {_reads(loss)}. Extra parameters: {_extra_parameters(loss)}. "
        f"Extra forwards: {_extra_forwards(loss)}. Checked against: {_checked(cls)}."
    )
    return _entry(name, cls, f"`{cls.__name__}({options})`", facts)


def _wrapper(item: tuple[str, tuple[type, str]]) -> str:
    title, (cls, call) = item
    return _entry(title, cls, call, "")


def _entry(title: str, cls: type, call: str, facts: str) -> str:
    doc = inspect.cleandoc(cls.__doc__ or "")
    formula = re.search(r"^(?:\w+: )?L = .*?(?=\n\n)", doc, re.DOTALL | re.MULTILINE)
    published = re.search(r"^Published: (.*?)(?=\n\n)", doc, re.DOTALL | re.MULTILINE)
    text = [f"## {title}\n", _summary(cls), "", call, "", "```", formula[0], "```", ""]
    text += [facts, ""] if facts else []
    text += [_differ(cls.mismatch), ""] if facts and cls.mismatch != Mismatch() else []
    text += ["Inputs:", "", *_bullets(_section(doc, "Inputs")), ""]
    text += ["Options, with published values:", "", *_bullets(_section(doc, "Args")), ""]
    text += [f"Published: {' '.join(published[1].split())}", ""]
    text += [f"Source: {' '.join(_section(doc, 'Source').split())}", ""]
    return "\n".join(text)


def _differ(mismatch: Mismatch) -> str:
    """The policies that play a part."""
    given = {name: text for name, text in vars(mismatch).items() if text}
    return f"Where the models differ: {'; '.join(f'{name}: {text}' for name, text in given.items())}."


def _section(doc: str, title: str) -> str:
    return re.search(rf"^{title}:\n(.*?)(?=\n\n\S|\n\n\w|\Z)", doc, re.DOTALL | re.MULTILINE)[1]


def _bullets(text: str) -> list[str]:
    """The entries of a docstring's section, one line each."""
    entries = re.split(r"\n(?=    \S)", text)
    return [f"- {' '.join(entry.split())}" for entry in entries if entry.strip()]


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").splitlines()[0]


def _reads(loss: Loss) -> str:
    return ", ".join(f"`{item}`" for item in loss.inputs())


def _paper(cls: type) -> str:
    """The year and address of the (first) paper; or of the code, where there is no paper."""
    source = " ".join(_section(inspect.cleandoc(cls.__doc__), "Source").split())
    url = re.search(r"https://[^\s,;]+\w", source)
    year = re.search(r"(19|20)[0-9]{2}", source[: url.start()])
    return f"[{year[0] if year else 'code'}]({url[0]})"


def _checked(cls: type) -> str:
    source = " ".join(_section(inspect.cleandoc(cls.__doc__), "Source").split())
    repositories = re.findall(r"([\w.-]+/[\w.-]+)@([0-9a-f]{7})", source)
    return ", ".join(f"[{name}](https://github.com/{name}) @{commit}" for name, commit in repositories) or "the paper"


#: Methods whose modules the user brings, and the words for them.
_BROUGHT = {"mekd": "0", "dino_heads": "two heads like the given ones"}


def _extra_parameters(loss: Loss) -> str:
    if loss.name in _BROUGHT:
        return _BROUGHT[loss.name]
    teacher = _model(loss, "teacher")
    loss.build(_model(loss, "student"), (teacher, teacher) if reads_teachers(loss) else teacher)
    count = sum(p.numel() for p in loss.parameters())
    return f"{count:,}"


def _extra_forwards(loss: Loss) -> str:
    forwards = {side: count for side, count in loss.extra_forwards().items() if count}
    text = ", ".join(f"{count:g} x {side}" for side, count in forwards.items()) or "0"
    return f"{text}, and once over held-out images" if loss.needs_calibration() else text


def _model(loss: Loss, side: str) -> ModelInfo:
    """What a loss would be told of one of the pair."""
    infos = {signal: _info(signal, side, location) for signal, location in needs(loss, side).items()}
    return ModelInfo(side, _NUM_CLASSES, infos, (3, 224, 224))


def _info(signal: str, side: str, location: Location | tuple[Location, ...] | None) -> SignalInfo | tuple:
    if isinstance(location, tuple):
        return tuple(_info(signal, side, one) for one in location)
    width, (height, columns) = _WIDTH[side], _GRID
    num_patches = height * columns
    shapes = {
        **dict.fromkeys(CLASS_SIGNALS, (_NUM_CLASSES,)),
        **dict.fromkeys(("tokens", "normed_tokens"), (1 + num_patches, width)),
        **dict.fromkeys(("patch_tokens", "normed_patch_tokens"), (num_patches, width)),
        **dict.fromkeys(("query", "key", "value"), (_NUM_HEADS, 1 + num_patches, width // _NUM_HEADS)),
        "attention": (_NUM_HEADS, 1 + num_patches, 1 + num_patches),
        "cls_attention": (_NUM_HEADS, 1 + num_patches),
        **dict.fromkeys(CALLABLE_SIGNALS, ()),
    }
    shape = shapes.get(signal, (width,))
    shape = (*shape, *_GRID) if signal in MAP_SIGNALS else shape
    has_prefix = signal in ("tokens", "normed_tokens", *ATTENTION_SIGNALS)
    has_grid = has_prefix or "patch" in signal or signal in MAP_SIGNALS
    return SignalInfo(signal, "", shape, int(has_prefix), _GRID if has_grid else None, side)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.name}")
