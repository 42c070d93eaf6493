"""The images that training does not see, for the losses that need some."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from kdvit.bilevel import Bilevel
from kdvit.calibration import calibrate
from kdvit.data import ImageSplit, TransformSettings, make_loader
from kdvit.distiller import Distiller
from kdvit.training.settings import Training


class HeldOut:
    """Calibrates losses before training and does their bilevel steps; does nothing where no loss asks for it.

    Args:
        distiller: holds the losses; the plain one, not wrapped by DDP.
        split: the held-out images; None where no loss asks for them.
        settings: of the run.
        transform: as in training: a temperature suits a strength of augmentation.
        accelerator: shares the batches out.
    """

    def __init__(
        self,
        distiller: Distiller,
        split: ImageSplit | None,
        settings: Training,
        transform: TransformSettings,
        accelerator: Accelerator,
    ) -> None:
        self.distiller, self.bilevel = distiller, Bilevel(distiller)
        self.loader: DataLoader | None = None
        self._batches: Iterator[dict[str, Tensor]] = iter(())
        self._drawn = 0  # batches of the running epoch
        if split is None:
            return
        batch_size = min(settings.batch_size, max(1, len(split) // accelerator.num_processes))
        loader = make_loader(split, transform, batch_size=batch_size, seed=settings.seed, train=True)
        self._order, self.loader = loader.batch_sampler, accelerator.prepare(loader)
        self._num_batches, self._num_processes = len(self.loader), accelerator.num_processes

    def calibrate(self) -> None:
        """One pass over the held-out images, before training."""
        if self.loader is not None:
            self.loader.set_epoch(0)
            calibrate(self.distiller, ((batch["image"], batch["label"]) for batch in self.loader))
            self.loader.end()  # also where not all batches were asked for

    def start_epoch(self, epoch: int, num_steps: int) -> None:
        """Choose the held-out batches of an epoch of so many steps: a function of the epoch, so that runs resume."""
        if self.bilevel:
            self._batches = self._passes(epoch * -(-num_steps // self._num_batches), first=self._drawn)

    def end_epoch(self) -> None:
        """The next one starts with its own first batch."""
        self._drawn = 0

    def _passes(self, number: int, first: int) -> Iterator[dict[str, Tensor]]:
        """The batches of the passes from ``number`` on, from the ``first`` of them."""
        number, start = number + first // self._num_batches, first % self._num_batches
        while True:
            self._order.set_epoch(number, start * self._num_processes)
            self.loader.set_epoch(number)  # which keeps that start
            for batch in self.loader:
                # Accelerate asks the loader that began last whether an epoch ends, to close an accumulation: that
                # must go on being the training loader.
                self.loader.end()
                yield batch
            number, start = number + 1, 0

    def step(self, images: Tensor, labels: Tensor, lr: float, **context: Any) -> None:
        """The bilevel step of this training step, in full precision, where one is due."""
        if self.bilevel.is_due(context["progress"]):
            batch = next(self._batches)
            self._drawn += 1
            try:
                self.bilevel.step(images, labels, batch["image"], batch["label"], lr=lr, **context)
            except FloatingPointError as error:
                samples = context["sample_ids"].tolist()[:8]
                raise RuntimeError(
                    f"Trainer: step {context['progress'].step} (samples {samples} ...): {error}"
                ) from error

    def state_dict(self) -> dict[str, Any]:
        return {"bilevel": self.bilevel.state_dict(), "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bilevel.load_state_dict(state["bilevel"])
        self._drawn = state["drawn"]
