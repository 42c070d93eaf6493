"""``manifest.json``: what a cache holds, what it was made of, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kdvit.cache.forms import Form, make_form
from kdvit.signals import SignalInfo

#: Changed when files of an earlier kdvit can no longer be read.
FORMAT = 1
NAME = "manifest.json"
#: What is kept beside the rows: the classifier, projection matrices.
CONSTANTS = "constants.safetensors"
#: Remedy of every damage.
REBUILD = "run its `kdvit cache build` command again: whole shards are kept, only these are made anew"


@dataclass(frozen=True)
class Stored:
    """One signal of the teacher.

    Args:
        key: its name in shards, see `kdvit.cache.teacher.key_of`.
        form: in which form.
        info: as the teacher gives it.
    """

    key: str
    form: str
    info: SignalInfo

    def make_form(self) -> Form:
        return make_form(self.form, self.info)


@dataclass(frozen=True)
class Shard:
    """One file of rows: ``epoch-00003/shard-00012.safetensors``."""

    epoch: int
    number: int
    num_rows: int
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return shard_name(self.epoch, self.number)


@dataclass
class Manifest:
    """What a cache holds.

    Args:
        teacher: facts that stand for the live one, see `kdvit.cache.teacher.StoredTeacher`.
        fingerprint: what the rows were made of. A job that differs in ``teacher``, ``images`` or ``job`` is refused; a
            building also in ``building``.
        signals: what is stored.
        num_samples: images of the training split.
        num_epochs: how many augmentation epochs.
        augmentation_epochs: training replays so many again and again; None where each epoch is to be stored.
        batch_size: of the teacher's passes.
        batches_per_shard: in a whole shard.
        accuracy: of the teacher on the test images; None where it has no such classes.
        shards: all of them, in training order.
        constants: checksum of `CONSTANTS`, "" where there is none.
        complete: whether every shard is there.
        data: name of the data, for people: a folder may have moved since.
        versions: libraries that it was made with; for people.
        format: of these files.
    """

    teacher: dict[str, Any]
    fingerprint: dict[str, Any]
    signals: list[Stored]
    num_samples: int
    num_epochs: int
    augmentation_epochs: int | None
    batch_size: int
    batches_per_shard: int
    accuracy: dict[str, float] | None = None
    shards: list[Shard] = field(default_factory=list)
    constants: str = ""
    complete: bool = False
    data: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        from kdvit.files import write_whole

        facts = asdict(self)
        write_whole(folder / NAME, json.dumps({**facts, "sha256": _digest(facts)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            ValueError: there is no cache, it was altered, or another kdvit made it.
        """
        try:
            facts = json.loads((folder / NAME).read_text())
        except FileNotFoundError as error:
            raise ValueError(
                f"cache '{folder}' must be a folder that `kdvit cache build` made, and has no {NAME}; check the path."
            ) from error
        except OSError as error:
            from kdvit.files import why

            raise ValueError(f"cache '{folder}': {NAME} cannot be read ({why(error)}); check the path.") from error
        except ValueError as error:  # no JSON, no text
            raise _damaged(folder) from error
        if not isinstance(facts, dict) or facts.pop("sha256", None) != _digest(facts):
            raise _damaged(folder)
        if facts["format"] != FORMAT:
            raise ValueError(
                f"cache '{folder}' must be of format {FORMAT}, got {facts['format']}; build it again with this kdvit."
            )
        facts["signals"] = [Stored(**{**entry, "info": _signal_info(entry["info"])}) for entry in facts["signals"]]
        facts["shards"] = [Shard(**entry) for entry in facts["shards"]]
        return cls(**facts)

    @property
    def files(self) -> dict[str, str]:
        """File -> checksum, of all but the manifest itself, which has its own inside."""
        constants = {CONSTANTS: self.constants} if self.constants else {}
        return {**constants, **{shard.name: shard.sha256 for shard in self.shards}}


def shard_name(epoch: int, number: int) -> str:
    return f"epoch-{epoch:05d}/shard-{number:05d}.safetensors"


def _signal_info(facts: dict[str, Any]) -> SignalInfo:
    """From JSON, which knows lists alone."""
    values = {item.name: facts[item.name] for item in fields(SignalInfo)}
    return SignalInfo(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _damaged(folder: Path) -> ValueError:
    return ValueError(
        f"cache '{folder}': {NAME} was altered or cut short; remove the folder and build it again, since nothing else "
        "says what its shards are."
    )
