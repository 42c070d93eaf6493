"""Batches whose every random choice is a function of (seed, epoch, sample index).

The epoch travels with the index: the sampler yields (epoch, index) pairs, so a worker process needs no state, and the
same sample has the same pixels whatever the number of workers or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset

from kdvit.data.randomness import check_seed, legacy_generator, preserved_generators, seed_generators
from kdvit.data.splits import ImageSplit
from kdvit.data.transforms import TransformSettings


class ReplayableDataset(Dataset):
    """Transformed samples of a split, indexed by (epoch, index).

    Args:
        split: the images.
        transform: PIL image -> tensor; it may draw from the global generators of Python, NumPy and torch (CPU), which
            are seeded for each sample and given back as they were.
        seed: of the augmentation.
        cache_mib: decoded images are kept where all of them fit into so much memory.
        second_transform: of a second view of every image, drawn independently of the first; None for none.
        rows: more that belongs to each sample: (epoch, index) keys of a batch -> one entry for each, of tensors or
            nested dicts of tensors. It is called in the worker processes, and must be picklable.
    Returns:
        `dataset[epoch, index]` = {"image": tensor, "label": int, "sample_id": int}; sample_id is the index in `split`;
        with a second transform also "second_image", with rows also "rows".
    """

    def __init__(
        self,
        split: ImageSplit,
        transform: Callable[[Image.Image], Any],
        seed: int = 0,
        cache_mib: float = 64,
        second_transform: Callable[[Image.Image], Any] | None = None,
        rows: Callable[[Sequence[tuple[int, int]]], Sequence[Any]] | None = None,
    ):
        self.split, self.transform, self.cache_mib = split, transform, cache_mib
        self.second_transform, self.rows = second_transform, rows
        self.seed = check_seed("ReplayableDataset", seed)
        self._cache: dict[int, Image.Image] | None = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        # The DataLoader asks for a batch at once: the generators are saved and restored once, not for each sample.
        with preserved_generators():
            samples = [self._sample(epoch, index) for epoch, index in keys]
        if self.rows is not None:
            for sample, row in zip(samples, self.rows(keys), strict=True):
                sample["rows"] = row
        return samples

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        image = self._image(index)
        seed_generators(self.seed, epoch, index)
        sample = {"image": self.transform(image), "label": int(self.split.labels[index]), "sample_id": index}
        if self.second_transform is not None:
            seed_generators(self.seed, epoch, index, 1)
            sample["second_image"] = self.second_transform(image)
        return sample

    def _image(self, index: int) -> Image.Image:
        if self._cache and index in self._cache:
            return self._cache[index]
        image = self.split.image(index)
        if self._cache is None and _num_bytes(image) * len(self) <= self.cache_mib * 2**20:
            self._cache = {}
        if self._cache is not None:
            self._cache[index] = image
        return image


class EpochBatchSampler(BatchSampler):
    """Batches of (epoch, index); the order is a function of (seed, epoch).

    Under `accelerate` the processes share out these batches, and `set_epoch` of the prepared loader arrives here.

    Args:
        num_samples: size of the split.
        batch_size: of one process.
        seed: of the order.
        shuffle: a new permutation each epoch, or 0, 1, 2, ...
        drop_last: leave out the last batch where it is not full.
        start_batch: how many batches (of all processes together) of the first epoch are already done.
        augmentation_epochs: epoch e has the order and the keys of epoch e % augmentation_epochs; None for its own.

    Example:
        >>> sampler = EpochBatchSampler(5, batch_size=2, shuffle=False)
        >>> sampler.set_epoch(7)
        >>> list(sampler)
        [[(7, 0), (7, 1)], [(7, 2), (7, 3)], [(7, 4)]]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        start_batch: int = 0,
        augmentation_epochs: int | None = None,
    ):
        counts = {"num_samples": num_samples, "batch_size": batch_size, "augmentation_epochs": augmentation_epochs}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"EpochBatchSampler: {name} must be >= 1, got {value}; set it to 1 or more.")
        if drop_last and batch_size > num_samples:
            raise ValueError(
                f"EpochBatchSampler: batch_size must be <= {num_samples} (the number of samples) with drop_last, "
                f"got {batch_size}; use smaller batches or drop_last=False."
            )
        self.num_samples, self.batch_size, self.shuffle, self.drop_last = num_samples, batch_size, shuffle, drop_last
        self.seed, self.augmentation_epochs = check_seed("EpochBatchSampler", seed), augmentation_epochs
        self._drawn: tuple[int, np.ndarray] | None = None
        self.set_epoch(0, start_batch)

    @property
    def sampler(self) -> EpochBatchSampler:
        """Itself: accelerate calls `set_epoch` on the `sampler` of a batch sampler that it has sharded."""
        return self

    @property
    def augmentation_epoch(self) -> int:
        """The epoch that order, augmentation and mixing of the present one are drawn for."""
        return self.epoch if self.augmentation_epochs is None else self.epoch % self.augmentation_epochs

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a whole epoch, also in an epoch that starts later."""
        return self.num_samples // self.batch_size if self.drop_last else -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int, start_batch: int | None = None) -> None:
        """Choose the epoch. It starts at its first batch, or at `start_batch`; choosing it again keeps its start."""
        if start_batch is None:
            start_batch = self.start_batch if epoch == self.epoch else 0
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(
                f"EpochBatchSampler: start_batch must be in [0, {self.batches_per_epoch}], got {start_batch}; "
                f"an epoch has {self.batches_per_epoch} batches."
            )
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self.batches_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.augmentation_epoch, self._order()
        for batch in range(self.start_batch, self.batches_per_epoch):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, index) for index in indices.tolist()]

    def _order(self) -> np.ndarray:
        """Of the epoch's samples; kept, since building a cache begins an epoch at each of its shards."""
        epoch = self.augmentation_epoch
        if not self.shuffle:
            return np.arange(self.num_samples)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, legacy_generator(self.seed, epoch).permutation(self.num_samples)
        return self._drawn[1]


def make_loader(
    split: ImageSplit,
    transform: TransformSettings | Callable[[Image.Image], Any],
    *,
    batch_size: int,
    seed: int = 0,
    train: bool,
    num_workers: int = 0,
    drop_last: bool | None = None,
    second_transform: TransformSettings | None = None,
    rows: Callable[[Sequence[tuple[int, int]]], Sequence[Any]] | None = None,
    augmentation_epochs: int | None = None,
) -> DataLoader:
    """Return a loader of {"image": (B, ...), "label": (B,), "sample_id": (B,)}, and "second_image", "rows" where asked.

    Args:
        split: the images.
        transform: settings (their training or evaluation transform is taken), or a callable.
        batch_size: of one process.
        seed: of order and augmentation.
        train: shuffled, random and without a last partial batch; or in order, fixed and complete.
        num_workers: worker processes; the result does not depend on it.
        drop_last: by default as `train`.
        second_transform: settings of a second random view of every image.
        rows: what else belongs to each sample, see `ReplayableDataset`.
        augmentation_epochs: replay so many epochs again and again, see `EpochBatchSampler`.

    Before each epoch: `loader.batch_sampler.set_epoch(epoch)`; after `accelerator.prepare`, `loader.set_epoch(epoch)`.
    """
    if isinstance(transform, TransformSettings):
        transform = transform.training() if train else transform.evaluation()
    sampler = EpochBatchSampler(
        len(split),
        batch_size,
        seed=seed,
        shuffle=train,
        drop_last=train if drop_last is None else drop_last,
        augmentation_epochs=augmentation_epochs,
    )
    second = second_transform and second_transform.training()
    return DataLoader(
        ReplayableDataset(split, transform, seed, second_transform=second, rows=rows),
        batch_sampler=sampler,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: a loader draws a number each epoch, from the global one by default
    )


def _num_bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())
