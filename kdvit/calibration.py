"""The pass before training, for losses that are fitted on images which training does not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import calibration_inputs, split_input
from kdvit.taps.reader import pick

if TYPE_CHECKING:
    from kdvit.distiller import Distiller

#: What the values for one loss may take, in all processes together: feature maps of many images would not fit.
MAX_BYTES = 2**31


@torch.no_grad()
def calibrate(distiller: Distiller, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Fit the losses of a Distiller that ask for it, such as PTLoss; does nothing where none asks.

    Each ``Loss.calibrate`` is called once, with the values of its parameters for all batches together: ``labels``, and
    signals of the teacher that its ``forward`` reads too. With several processes, for the batches of all of them. For
    each loss batches are taken while their values stay below 2 GiB: all of them for logits, hundreds or thousands of
    images for feature maps.

    Args:
        distiller: holds the losses.
        batches: (images, labels) on the models' device, in random order; hold them out of training.

    Raises:
        ValueError: there is no batch.
    """
    asking = {name: loss for name, loss in distiller.losses.items() if loss.needs_calibration()}
    if not asking:
        return
    found = {name: {wanted: [] for wanted in calibration_inputs(loss)} for name, loss in asking.items()}
    room = dict.fromkeys(found, MAX_BYTES // _num_processes())
    for images, labels in batches:
        signals = distiller.teacher(images) if distiller.teacher is not None else {}  # no loss of several is calibrated
        for name in room:
            locations, batch = distiller.needs["teacher"][name], {}
            for wanted in found[name]:
                signal = split_input(wanted)[1]
                batch[wanted] = labels if wanted == "labels" else pick(signal, locations[signal], signals)
            room[name] -= sum(map(_num_bytes, batch.values()))
            if room[name] >= 0 or not all(found[name].values()):  # one batch in any case
                for wanted, value in batch.items():
                    found[name][wanted].append(value)
        room = {name: left for name, left in room.items() if left > 0}
        if not room:
            break
    for name, values in found.items():
        if not all(values.values()):
            raise ValueError("calibrate: batches must hold at least one, got none; hold some images out of training.")
        asking[name].calibrate(**{wanted: _joined(rows) for wanted, rows in values.items()})


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _num_bytes(value: Tensor | tuple[Tensor, ...]) -> int:
    return sum(map(_num_bytes, value)) if isinstance(value, tuple) else value.numel() * value.element_size()


def _joined(rows: list[Tensor] | list[tuple[Tensor, ...]]) -> Tensor | tuple[Tensor, ...]:
    """All batches of all processes as one; of a signal that is read at several locations, a tuple of them."""
    if isinstance(rows[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*rows, strict=True))
    return gather_batch(torch.cat(rows))
