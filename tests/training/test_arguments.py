"""Options from a dataclass."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields

import pytest

from kdvit import Training
from kdvit.training.arguments import add_arguments, parse


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Args:
        data: where the images are; 100 % of them
            are used.
        lr: peak learning rate.
        clip_norm: None for no clipping.
        blocks: which are read.
        sizes: height and width.
        resume: go on.

    Example:
        not: an entry.
    """

    data: str = "sample"
    lr: float = 0.1
    clip_norm: float | None = None
    blocks: tuple[int, ...] = (1, 2)
    sizes: tuple[int, int] = (28, 28)
    resume: bool = False
    undocumented: int = field(default_factory=lambda: 7)


def test_defaults_are_those_of_the_class():
    assert parse(Settings, argv=[]) == Settings()


def test_every_field_is_an_option():
    argv = "--data d --lr 1e-3 --clip-norm 2 --blocks 3 4 5 --sizes 8 9 --resume --undocumented 1".split()
    parsed = parse(Settings, argv=argv)
    assert parsed == Settings("d", 1e-3, 2.0, (3, 4, 5), (8, 9), True, 1)
    assert [type(getattr(parsed, item.name)) for item in fields(parsed)] == [str, float, float, tuple, tuple, bool, int]
    assert parse(Settings, argv=["--no-resume"]).resume is False


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, "What this does.\n\nAt length.", argv=["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "What this does.\n\nAt length." in text  # as it was written
    text = " ".join(text.split())
    assert "--data STR where the images are; 100 % of them are used. [sample]" in text
    assert "--blocks INT [INT ...] which are read. [(1, 2)]" in text and "--sizes INT INT height" in text
    assert "--clip-norm FLOAT None for no clipping. [None]" in text and "--resume, --no-resume go on. [False]" in text
    assert "--undocumented INT [7]" in text and "not: an entry" not in text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--sizes", "8"], "argument --sizes: expected 2 arguments"),
        (["--blocks"], "argument --blocks: expected at least one argument"),
        (["--rate", "1"], "unrecognized arguments: --rate 1"),
    ],
)
def test_wrong_options_are_refused(capsys, argv, sentence):
    with pytest.raises(SystemExit) as caught:
        parse(Settings, argv=argv)
    assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_training_is_all_documented_and_all_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser, Training, skip=("seed",))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(actions) == {item.name for item in fields(Training)} - {"seed"}
    assert all(not action.help.startswith("[") for action in actions.values())
    assert Training(**vars(parser.parse_args([]))) == Training()
