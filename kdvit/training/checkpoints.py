"""Resumable state on the disk: whole generations with checksums, of which the newest sound one is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdvit.files import WRITE_ERRORS, remove_folder, sha256, whole_folder, why

TENSORS, STRUCTURE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"


class Checkpoints:
    """Generations of state: ``step_00000120/`` holds ``tensors.safetensors``, ``state.json`` and ``SHA256SUMS``.

    A generation is there as a whole or not at all: it is written beside the others, flushed to the disk and then
    renamed. ``sha256sum -c SHA256SUMS`` checks one by hand. Nothing in it can execute code.

    Args:
        folder: made by the first `save`.
        keep: how many generations stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    @property
    def generations(self) -> list[Path]:
        """The folders of all generations, the newest first."""
        return sorted(self.folder.glob(f"step_{'[0-9]' * 8}"), reverse=True)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans, dtypes and None.

        Raises:
            RuntimeError: the disk is full or cannot be written; what was there is intact.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        structure = _pack(state, tensors, {})
        try:
            for left in self.folder.glob(".*step_*"):
                shutil.rmtree(left)  # by a process that was killed while it wrote, or removed
            with whole_folder(self.folder / f"step_{step:08d}") as folder:
                save_file(tensors, folder / TENSORS)
                (folder / STRUCTURE).write_text(json.dumps(structure))
                sums = [f"{sha256(folder / name)}  {name}\n" for name in (TENSORS, STRUCTURE)]
                (folder / SUMS).write_text("".join(sums))
            # A later step than this is of a generation that was damaged, so that the run went on from one before it.
            later = [folder for folder in self.generations if _step(folder) > step]
            for old in (*later, *self.generations[len(later) + self.keep :]):
                remove_folder(old)
        except WRITE_ERRORS as error:
            raise RuntimeError(
                f"state: '{self.folder}' could not be written at step {step} ({why(error)}); {self.kept()}: make room "
                "or give it write permission, then resume."
            ) from error

    def kept(self) -> str:
        """In words, what a run can be resumed from."""
        return f"the state of {_words(self.generations[0])} is intact" if self.generations else "there is no state yet"

    def load(self) -> tuple[dict[str, Any], str]:
        """(the newest sound state, a note that names what was damaged, or "").

        Raises:
            ValueError: no generation is sound.
        """
        damage = []
        for folder in self.generations:
            found = _damage(folder)
            if not found:
                note = f"{'; '.join(damage)}; the state of {_words(folder)} is used." if damage else ""
                return _read(folder), note
            damage.append(found)
        raise ValueError(
            f"state: '{self.folder}' must hold a sound state, but {'; '.join(damage) or 'it is empty'}; start the run "
            "again in another folder."
        )


def _words(generation: Path) -> str:
    """``step_00000120`` -> "step 120"."""
    return f"step {_step(generation)}"


def _step(generation: Path) -> int:
    return int(generation.name.removeprefix("step_"))


def _damage(generation: Path) -> str:
    """What is wrong with the files of a generation, naming the first; "" where nothing is."""
    try:
        lines = (generation / SUMS).read_text().splitlines()
        sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
        for name in (TENSORS, STRUCTURE):
            if name not in sums or sha256(generation / name) != sums[name]:
                return f"'{generation / name}' was altered or cut short (its checksum differs)"
    except UnicodeDecodeError:
        return f"'{generation / SUMS}' was altered"
    except OSError as error:
        return f"'{error.filename}' cannot be read ({why(error)})"
    return ""


def _read(generation: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return _unpack(json.loads((generation / STRUCTURE).read_text()), load_file(generation / TENSORS))


def _pack(value: Any, tensors: dict[str, Tensor], known: dict[Any, str]) -> Any:
    """What JSON can say of a nested value; the tensors go to ``tensors`` under the names that stand in their places."""
    if isinstance(value, Tensor):
        # Tied weights are the same tensor under several names, and written once.
        storage = value.untyped_storage().data_ptr()
        key = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or key not in known:
            name = str(len(tensors))
            tensors[name] = _apart(value.detach().cpu(), shares=storage in known)
            known[key] = known[storage] = name
        return {"tensor": known[key]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"dict": [[_pack(item, tensors, known) for item in pair] for pair in value.items()]}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_pack(item, tensors, known) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state: a value must be a tensor, number, string or None, or hold such, got {type(value)}.")


def _apart(tensor: Tensor, shares: bool) -> Tensor:
    """A tensor with a storage of its own, as safetensors asks."""
    owns = (
        not shares
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )
    return tensor if owns else tensor.clone(memory_format=torch.contiguous_format)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held].clone()  # which is a map of a file that will be removed
    if kind == "dtype":
        return getattr(torch, held)
    if kind == "dict":
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in held}
    items = [_unpack(item, tensors) for item in held]
    return tuple(items) if kind == "tuple" else items
