"""Rows of a cache: read from its shards by memory map, and written shard by shard."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdvit.cache.manifest import REBUILD, Manifest, Shard, shard_name

#: The part of every shard that says whose rows these are.
SAMPLE_ID = "sample_id"
#: Shards that one process keeps mapped: rows lie in training order, so that few are read at a time.
NUM_OPEN = 8

Key = tuple[int, int]


class Rows:
    """Rows by (epoch, sample id), still encoded.

    Nothing is opened before the first row is asked for, and each process opens files for itself: it may be copied,
    pickled and forked.

    Args:
        folder: of the cache.
        manifest: of the cache.

    Raises:
        ValueError: a file is missing or has another size.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.num_samples, self.num_epochs = folder, manifest.num_samples, manifest.num_epochs
        self._shards: dict[int, list[Shard]] = {}
        for shard in manifest.shards:
            self._shards.setdefault(shard.epoch, []).append(shard)
        for shard in manifest.shards:
            wrong = size_fault(folder, shard)
            if wrong:
                raise ValueError(f"StoredTeacher: {wrong}; {REBUILD}.")
        self._forget()

    def _forget(self) -> None:
        self._indices: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._open: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def read(self, keys: Sequence[Key], parts: Sequence[str]) -> dict[str, Tensor]:
        """Some parts of the rows of a batch: {part: (B, ...)}, on the CPU.

        Raises:
            ValueError: a row is not stored.
            RuntimeError: a file was removed or damaged since the start.
        """
        places = self._places_of(keys)
        found: dict[str, Tensor] = {}
        for epoch, number in np.unique(places[:, :2], axis=0).tolist():
            mine = torch.from_numpy(np.flatnonzero((places[:, :2] == (epoch, number)).all(axis=1)))
            rows = torch.from_numpy(places[:, 2])[mine]
            tensors = self._tensors(shard_name(epoch, number))
            for part in parts:
                values = tensors[part][rows]  # reads the pages of these rows
                if len(mine) < len(keys):
                    values = found.setdefault(part, values.new_empty(len(keys), *values.shape[1:])).index_copy_(
                        0, mine, values
                    )
                found[part] = values
        return found

    def first(self, count: int, parts: Sequence[str]) -> dict[str, Tensor]:
        """Any rows, for a look at what there is."""
        tensors = self._tensors(self._shards[min(self._shards)][0].name)
        rows = torch.arange(count) % len(tensors[SAMPLE_ID])
        return {part: tensors[part][rows] for part in parts}

    def _places_of(self, keys: Sequence[Key]) -> np.ndarray:
        """(B, 3): epoch, number of the shard, row in it."""
        places = np.empty((len(keys), 3), np.int64)
        for place, (epoch, sample) in zip(places, keys, strict=True):
            shard_of, row_of = self._index(epoch)
            if not 0 <= sample < self.num_samples or shard_of[sample] < 0:
                raise ValueError(
                    f"StoredTeacher: '{self.folder}' must hold every sample that is asked for, and has no sample "
                    f"{sample} of epoch {epoch} (it has {self.num_samples} samples); build it again for these images."
                )
            place[:] = epoch, shard_of[sample], row_of[sample]
        return places

    def _index(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample the number of its shard, -1 for none, and its row in it."""
        if epoch not in self._indices:
            if epoch not in self._shards:
                raise ValueError(
                    f"StoredTeacher: '{self.folder}' must hold epoch {epoch}, and has {self.num_epochs} epochs; build "
                    "more of them, or replay those: kdvit cache build --augmentation-epochs K, and "
                    "make_loader(augmentation_epochs=K) in a loop of your own."
                )
            shard_of, row_of = (np.full(self.num_samples, -1, np.int32) for _ in range(2))
            for shard in self._shards[epoch]:
                samples = self._tensors(shard.name)[SAMPLE_ID].numpy()
                shard_of[samples], row_of[samples] = shard.number, np.arange(len(samples))
            self._indices[epoch] = shard_of, row_of
            if len(self._indices) > 2:
                self._indices.popitem(last=False)
        return self._indices[epoch]

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a shard, mapped into memory: only the pages of the rows that are read are loaded."""
        if name not in self._open:
            self._open[name] = open_shard(self.folder / name)
            if len(self._open) > NUM_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_indices", "_open")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def open_shard(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"StoredTeacher: '{path}' cannot be read ({error}); {REBUILD}.") from error


def write_shard(folder: Path, epoch: int, number: int, tensors: Mapping[str, Tensor]) -> Shard:
    """Write a whole shard, or none.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    from safetensors.torch import save_file

    from kdvit.files import sha256, whole_file

    path = folder / shard_name(epoch, number)
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        save_file(dict(tensors), temporary)
        digest = sha256(temporary)
    return Shard(epoch, number, len(tensors[SAMPLE_ID]), path.stat().st_size, digest)


def size_fault(folder: Path, shard: Shard) -> str:
    """What is wrong with a shard at first sight; "" for nothing. Altered bytes show in `faults` alone."""
    from kdvit.files import why

    try:
        size = (folder / shard.name).stat().st_size
    except FileNotFoundError:
        return f"'{folder / shard.name}' is missing"
    except OSError as error:
        return f"'{folder / shard.name}' cannot be read ({why(error)})"
    if size != shard.num_bytes:
        return f"'{folder / shard.name}' must have {shard.num_bytes} bytes, got {size}"
    return ""


def faults(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, what is wrong with it or "") of each file of a cache; all bytes are read."""
    for name, digest in manifest.files.items():
        yield name, file_fault(folder / name, digest)


def file_fault(path: Path, digest: str) -> str:
    """What is wrong with a file, whose checksum is known, or ""; all bytes are read."""
    from kdvit.files import sha256, why

    try:
        return "" if sha256(path) == digest else "was altered or cut short (its checksum differs)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({why(error)})"
