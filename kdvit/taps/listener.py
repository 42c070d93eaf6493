"""A model whose signals are read, and whose copies read their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from kdvit.signals import Grid, SignalInfo
from kdvit.taps.family import Family
from kdvit.taps.probing import probe
from kdvit.taps.reader import Reader, Request, family_of


class Listener(nn.Module):
    """Taps a model for signals and reads them while it runs.

    Args:
        model: any nn.Module.
        name: how errors call it.
        input_size: (channels, height, width) of its images.
        num_prefix_tokens: class, distillation and register tokens in tokens that are read by module path.
        grid: (h, w) of the patch tokens that are read by module path.
    """

    #: Whether the model's forward ends behind the last tap, where nothing needs its output.
    stops_early: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        name: str,
        *,
        input_size: tuple[int, int, int] | None = None,
        num_prefix_tokens: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name, self.input_size = model, name, input_size
        self.geometry = {"num_prefix_tokens": num_prefix_tokens, "grid": grid}
        self._requests: tuple[Request, ...] = ()
        self._reader: Reader | None = None

    def family(self) -> Family:
        """How this model is read."""
        return family_of(self.model, self.name, **self.geometry)

    def listen(self, requests: Sequence[Request]) -> dict[Request, SignalInfo]:
        """Tap the model for these signals and look at them once, on a blank image.

        Raises:
            ValueError: the model cannot give one of them.
        """
        self.deafen()
        self._requests = tuple(requests)
        self._reader = self._make_reader()
        try:
            _, signals = probe(self._reader.read, self.model, self.input_size)
        except Exception:
            self.deafen()
            raise
        return self._reader.describe(signals)

    def read(self, images: Tensor) -> tuple[Any, dict[Request, Any]]:
        """Run the model once: (its output, the signals)."""
        return self._reader.read(images) if self._reader is not None else (self.model(images), {})

    def tap_paths(self) -> tuple[str, ...]:
        """The module paths of the model that are tapped."""
        return tuple(point.path for point in self._reader.taps.points) if self._reader is not None else ()

    def deafen(self) -> None:
        """Take the taps off; the model is as it was."""
        if self._reader is not None:
            self._reader.remove()
        self._reader, self._requests = None, ()

    def _make_reader(self) -> Reader:
        return Reader(self.family(), self._requests, self.input_size, stop_early=self.stops_early)

    # A copied model carries inert taps only: a copy of the listener listens anew, for itself.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._requests:
            self._reader = self._make_reader()
