"""Something that happens once: remembered in the checkpoint, and asked for without waiting for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Latch(nn.Module):
    """False until it is set; a part of its owner's state dict.

    Example:
        >>> done, resumed = Latch(), Latch()
        >>> done.set()
        >>> resumed.load_state_dict(done.state_dict())
        <All keys matched successfully>
        >>> bool(resumed)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("is_set", torch.tensor(False))
        self._is_set = False

    def set(self, value: bool = True) -> None:
        self.is_set.fill_(value)
        self._is_set = value

    def __bool__(self) -> bool:
        return self._is_set

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._is_set = bool(self.is_set)
