"""The pass before training, for losses that are fitted on images which training does not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import calibration_inputs, split_input
from kdvit.taps.reader import pick

if TYPE_CHECKING:
    from kdvit.distiller import Distiller


@torch.no_grad()
def calibrate(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit the losses of a Distiller that ask for it, such as PTLoss; does nothing where none asks.

    Each ``Loss.calibrate`` is called once, with the values of its parameters for all batches together: ``labels``, and
    signals of the teacher that its ``forward`` reads too. With several processes, for the batches of all of them.

    Args:
        distiller: holds the losses.
        batches: (images, labels) on the models' device; hold them out of training.

    Raises:
        ValueError: there is no batch.
    """
    asking = {name: loss for name, loss in distiller.losses.items() if loss.needs_calibration()}
    if not asking:
        return
    found = {name: {wanted: [] for wanted in calibration_inputs(loss)} for name, loss in asking.items()}
    for images, labels in batches:
        signals = distiller.teacher(images) if distiller.teacher is not None else {}  # no loss of several is calibrated
        for name, values in found.items():
            locations = distiller.needs["teacher"][name]
            for wanted, rows in values.items():
                signal = split_input(wanted)[1]
                rows.append(labels if wanted == "labels" else pick(signal, locations[signal], signals))
    for name, values in found.items():
        if not all(values.values()):
            raise ValueError("calibrate: batches must hold at least one, got none; hold some images out of training.")
        asking[name].calibrate(**{wanted: _joined(rows) for wanted, rows in values.items()})


def _joined(rows: list[Tensor] | list[tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    """All batches of all processes as one; of a signal that is read at several locations, a tuple of them."""
    if isinstance(rows[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*rows, strict=True))
    return gather_batch(torch.cat(rows))
