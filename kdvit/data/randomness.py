"""Random numbers as a function of (seed, epoch, sample): one hash, and the global generators left as they were."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch


def mixed_seeds(*values: int, count: int = 1) -> tuple[int, ...]:
    """Return `count` unrelated 64-bit seeds, a function of `values` (neighbouring values give unrelated seeds).

    Example:
        >>> mixed_seeds(0, 0, 1) == mixed_seeds(0, 0, 1), mixed_seeds(0, 0, 1) == mixed_seeds(0, 1, 0)
        (True, False)
    """
    packed = struct.pack(f"<{len(values)}q", *values)
    return struct.unpack(f"<{count}Q", hashlib.blake2b(packed, digest_size=8 * count).digest())


def check_seed(owner: str, seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{owner}: seed must be an int, got {type(seed).__name__}; pass a whole number such as 0.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{owner}: seed must be in [0, 2**63), got {seed}; pass a number such as 0.")
    return seed


@contextlib.contextmanager
def preserved_generators() -> Iterator[None]:
    """Give Python, NumPy and torch (CPU) their generator states back on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


def seed_generators(*values: int) -> None:
    """Seed the three global generators from `values`; each gets its own seed, or their streams would be related."""
    python_seed, numpy_seed, torch_seed = mixed_seeds(*values, count=3)
    random.seed(python_seed)
    np.random.seed(numpy_seed & 0xFFFFFFFF)
    # torch.manual_seed would also queue a seeding of every accelerator, for each sample.
    torch.default_generator.manual_seed(torch_seed)


def legacy_generator(*values: int) -> np.random.RandomState:
    """A private generator seeded from `values`. RandomState, because NumPy guarantees that its stream never changes."""
    return np.random.RandomState(mixed_seeds(*values)[0] & 0xFFFFFFFF)
