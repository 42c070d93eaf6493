"""Two halves of a batch give the gradients of the whole batch: for every loss but those that say why not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdvit import Distiller
from kdvit.losses import Loss, names
from tests import tiny
from tests.losses.cases import CASES, Case, built, example
from tests.losses.test_contract import change, trained

BATCH_SIZE = 8
HALVES = (slice(0, BATCH_SIZE // 2), slice(BATCH_SIZE // 2, BATCH_SIZE))
#: Losses that compare the images of a batch with each other: what an image is compared with is then another.
COUPLED = {
    "cc": "similarities of all pairs of images",
    "cfd-entropies": "the entropy of the batch's mean prediction (gamma > 0)",
    "cls_dense": "a queue, with the batch in front",
    "cls_queue": "a queue, with the batch in front",
    "crd": "the normaliser is the batch's mean, and each batch changes the memories",
    "crosskd": "each channel is standardised over the batch",
    "dino_heads": "Sinkhorn makes the batch use all prototypes alike; the Gram matrix is that of all images' patches",
    "dist": "correlation over the batch, of each class",
    "manifold": "similarities of patches of different images",
    "mlld": "similarities of images and of classes over the batch",
    "pkd": "each channel is standardised over the batch",
    "pkt": "each image's similarities to the others are its probabilities",
    "rkd": "distances and angles between images, in units of the mean distance",
    "sp": "similarities of all pairs of images",
    "uskd": "the targets' soft labels are centred over the batch",
}


def reason(name: str) -> str | None:
    """Why a case is coupled: a loss with all its options, or this one alone."""
    return COUPLED.get(name) or COUPLED.get(name.partition("-")[0])


def of_rows(x: Any, rows: slice) -> Any:
    if isinstance(x, tuple):
        return tuple(of_rows(item, rows) for item in x)
    return x[rows] if isinstance(x, Tensor) else x


def gradients(loss: Loss, case: Case, parts: tuple[slice, ...]) -> list[Tensor]:
    """What the student and the loss's own parameters get, accumulated over parts of one batch of 8, in float64."""
    inputs = change(example(loss, batch=BATCH_SIZE, dtype=torch.float64).inputs, lambda x: x.double().requires_grad_())
    extras = case.extras(BATCH_SIZE)
    leaves = trained(loss, inputs, case)
    for rows in parts:
        given = {name: of_rows(x, rows) for name, x in inputs.items()}
        noise = {name: x[rows].double() if x.is_floating_point() else x[rows] for name, x in extras.items()}
        value = loss(**given, **noise)
        ((sum(value.values()) if isinstance(value, dict) else value) / len(parts)).backward()
    return [leaf.grad for leaf in leaves]


def difference(case: Case, *, statistics: bool) -> float:
    """Largest difference of a gradient, relative to the largest gradient; with BatchNorm in training mode or not."""
    found = []
    for parts in ((slice(None),), HALVES):
        loss = built(case, dtype=torch.float64)
        for module in loss.modules():
            if not statistics and isinstance(module, (_BatchNorm, nn.Dropout)):
                module.eval()
        torch.manual_seed(0)
        found.append(gradients(loss, case, parts))
    whole, accumulated = found
    assert all(gradient is not None for gradient in (*whole, *accumulated))
    scale = max(gradient.abs().max() for gradient in whole)
    return max(float((a - b).abs().max() / scale) for a, b in zip(whole, accumulated, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_two_halves_give_the_gradients_of_the_batch(name):
    found = difference(CASES[name], statistics=False)
    assert found > 1e-4 if reason(name) else found < 1e-12, f"{reason(name)}: {found}"


@pytest.mark.parametrize("name", [name for name in CASES if not reason(name)])
def test_the_rest_differs_by_batchnorm_in_the_loss_alone(name):
    """A projector with BatchNorm sees the statistics of the forward pass that it is in, as in any network."""
    found = difference(CASES[name], statistics=True)
    with_statistics = any(isinstance(module, _BatchNorm) for module in built(CASES[name]).modules())
    assert found > 1e-6 if with_statistics else found < 1e-12


def test_the_declared_losses_exist():
    assert set(COUPLED) - set(CASES) == set() and len({name.partition("-")[0] for name in CASES}) == len(names())


@pytest.mark.parametrize("loss", ["dkd", "vitkd", "tinymim"])
def test_through_the_distiller(loss, monkeypatch):
    """Teacher, taps, task loss and weights included; the student's layers see each image alone."""
    found = []
    for parts in ((slice(None),), HALVES):
        torch.manual_seed(0)
        distiller = Distiller(tiny.vit(7, embed_dim=32), tiny.vit(), [(0.5, loss)]).double().eval()
        noise = torch.rand(BATCH_SIZE, 16, generator=torch.Generator().manual_seed(0))
        for rows in parts:
            if loss == "vitkd":  # its masks are drawn: these are the images' own
                vitkd = distiller.losses["vitkd"]
                monkeypatch.setattr(vitkd, "forward", partial(type(vitkd).forward, vitkd, noise=noise[rows]))
            images, labels = tiny.images(BATCH_SIZE).double()[rows], tiny.labels(BATCH_SIZE)[rows]
            (distiller(images, labels).loss / len(parts)).backward()
        found.append({key: p.grad for key, p in distiller.named_parameters() if p.grad is not None})
    whole, accumulated = found
    assert whole.keys() == accumulated.keys() and len(whole) > 20
    for key, gradient in whole.items():
        torch.testing.assert_close(accumulated[key], gradient, rtol=1e-10, atol=1e-14, msg=key)
