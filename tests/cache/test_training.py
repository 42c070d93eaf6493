"""A run with stored fp32 signals is the run with the live teacher, to the bit."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch

from kdvit import Distiller, Trainer
from kdvit.cache import StoredTeacher
from kdvit.data import FASHION_MNIST_TRANSFORM, EpochBatchSampler, make_loader, open_data
from kdvit.losses import make
from kdvit.training import compare
from tests.cache.conftest import distiller, settings, teacher
from tests.processes import run_two
from tests.training.conftest import same_weights

MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}
JOBS = {
    "plain": (["kd", "fitnet"], {}),
    "mixed": (["kd", "tinymim"], MIXING),
    "workers": (["kd"], {"num_workers": 2, **MIXING}),
    "accumulated": (["kd"], {"accumulation_steps": 2}),
    "deployed": ([make("simkd", feature="pooled")], {}),
}

SLOW = {"workers": pytest.mark.slow}


@pytest.fixture
def fit(data, tmp_path, no_curves):
    """fit(distiller, ...) -> the trained student's Distiller, and its trainer."""
    count = 0

    def run(subject: Distiller, *, before=None, folder=None, images=data, **changed) -> Trainer:
        nonlocal count
        count += 1
        trainer = Trainer(subject, images, settings(**changed), folder or tmp_path / f"run{count}", quiet=True)
        if before is not None:
            before(trainer)
        trainer.fit()
        return trainer

    return run


def metrics(trainer: Trainer) -> str:
    return trainer.folder.metrics_file.read_text()


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in JOBS])
def test_stored_is_live_to_the_bit(name, store, fit):
    losses, changed = JOBS[name]
    live = fit(distiller(teacher(), copy.deepcopy(losses)), **changed)
    stored = fit(distiller(store(copy.deepcopy(losses), form="fp32", **changed), copy.deepcopy(losses)), **changed)
    assert same_weights(stored.plain, live.plain)
    assert metrics(stored) == metrics(live)
    assert stored.teachers == live.teachers and stored.teachers[0] is not None
    assert live.step > 0


@pytest.mark.slow
def test_bilevel_steps_work_from_a_store(store, fit):
    """They read held-out images with the student alone; the images left for training are those that are stored."""
    images = open_data("fashion-mnist-sample").subset(60, 12)
    changed = {"epochs": 1, "held_out_ratio": 0.2, "images": images}
    losses = [make("mkd", meta_interval=2)]
    live = fit(distiller(teacher(), copy.deepcopy(losses)), **changed)
    kept = store(copy.deepcopy(losses), form="fp32", **changed)
    assert kept.manifest.num_samples < 60
    stored = fit(distiller(kept, copy.deepcopy(losses)), **changed)
    assert same_weights(stored.plain, live.plain)
    with pytest.raises(
        ValueError, match=r"but data\.num_images is 50 there and 40 here, .*held_out_ratio is 0.2 there"
    ):
        fit(distiller(kept, copy.deepcopy(losses)), **{**changed, "held_out_ratio": 0.4})


def test_replayed_epochs_are_replayed_in_everything(store, fit):
    """Order, augmentation and mixing of epoch 2 are those of epoch 0."""
    kept = store(["kd"], form="fp32", epochs=3, augmentation_epochs=2, **MIXING)
    assert kept.manifest.num_epochs == 2
    stored = fit(distiller(kept, ["kd"]), epochs=3, **MIXING)

    def replay(trainer: Trainer) -> None:
        trainer.order.augmentation_epochs = 2

    live = fit(distiller(teacher(), ["kd"]), epochs=3, before=replay, **MIXING)
    assert same_weights(stored.plain, live.plain)
    without = fit(distiller(teacher(), ["kd"]), epochs=3, **MIXING)
    assert not same_weights(stored.plain, without.plain)
    subject = distiller(kept, ["kd"])
    assert torch.equal(*(kept.rows(torch.arange(3), epoch)["logits:value"] for epoch in (0, 2)))
    assert subject.augmentation_epochs == 2 and distiller(teacher()).augmentation_epochs is None


def test_a_replayed_epoch_starts_at_its_own_beginning():
    """Also where a resumed run began the one before in its middle."""
    sampler = EpochBatchSampler(5, batch_size=2, shuffle=False, augmentation_epochs=1)
    sampler.set_epoch(3, start_batch=2)
    assert list(sampler) == [[(0, 4)]] and sampler.augmentation_epoch == 0
    sampler.set_epoch(4)
    assert list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    sampler = EpochBatchSampler(6, batch_size=6, augmentation_epochs=3)
    keys = []
    for epoch in range(7):
        sampler.set_epoch(epoch)
        keys += list(sampler)
    assert [batch[0][0] for batch in keys] == [0, 1, 2, 0, 1, 2, 0]
    assert keys[3:6] == keys[:3] and keys[0] != keys[1]
    with pytest.raises(ValueError, match=r"EpochBatchSampler: augmentation_epochs must be >= 1, got 0; set it to 1 or"):
        EpochBatchSampler(5, batch_size=2, augmentation_epochs=0)


def test_a_run_is_not_resumed_with_another_kind_of_teacher(store, fit, data, tmp_path):
    stored = store(["kd"])
    fit(distiller(stored, ["kd"]), folder=tmp_path / "run", epochs=1)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["teacher"] == "wide, stored: logits (fp16)"
    with pytest.raises(ValueError, match=r"teacher must be 'wide, stored: logits \(fp16\)' as in the run in"):
        Trainer(distiller(teacher(), ["kd"]), data, settings(epochs=1), tmp_path / "run", resume=True, quiet=True)


def test_a_run_is_not_resumed_with_other_epochs_to_replay(store, fit, data, tmp_path):
    """The same folder may be built again with another number of them."""
    folder = store(["kd"], augmentation_epochs=1, folder=tmp_path / "cache").folder
    fit(distiller(StoredTeacher(folder), ["kd"]), folder=tmp_path / "run", epochs=1)
    again = store(["kd"], augmentation_epochs=2, folder=folder)
    with pytest.raises(ValueError, match=r"1 epochs to replay' as in the run in .* 2 epochs to replay'"):
        Trainer(distiller(again, ["kd"]), data, settings(epochs=1), tmp_path / "run", resume=True, quiet=True)


def test_own_loaders_give_rows_beside_images(data):
    """Generic: kdvit.data knows nothing of what a row is."""
    asked = []

    def rows(keys):
        asked.extend(keys)
        return [{"double": torch.tensor(2 * index)} for _, index in keys]

    batch = next(iter(make_loader(data.train, FASHION_MNIST_TRANSFORM, batch_size=4, train=True, rows=rows)))
    assert torch.equal(batch["rows"]["double"], 2 * batch["sample_id"])
    assert asked == [(0, int(index)) for index in batch["sample_id"]]


@pytest.mark.slow
def test_two_processes_build_and_train_what_one_does(store, tmp_path: Path):
    first, second = run_two(["-m", "tests.cache.store_worker"], tmp_path)
    one = store(["kd", "fitnet"], form="fp32", folder=tmp_path / "one", **MIXING).folder
    two = tmp_path / "two"
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file()) and len(names) > 3
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert (
        first["built"] + second["built"] == sum("shard" in name for name in names)
        and min(first["built"], second["built"]) > 0
    )
    StoredTeacher(two, verify=True)
    for each in (first, second):  # statistics of the projector's BatchNorm are each process's own
        assert each["live"] and all(torch.equal(value, each["stored"][name]) for name, value in each["live"].items())
    assert first["steps"] == 2 * 2


def test_a_comparison_over_seeds_that_were_not_stored_is_refused_before_it_trains(data, store, tmp_path):
    stored = store()

    def make_distiller(seed: int, distilled: bool) -> Distiller:
        return distiller(StoredTeacher(stored.folder)) if distilled else distiller(None, [])

    sentence = (
        f"compare: a stored teacher must be made with the seed of its run, got '{stored.folder}' of seed 0 for seed 1; "
        "compare with that seed alone, or with a teacher that is not stored."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        compare(make_distiller, data, settings(), [0, 1], tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()
