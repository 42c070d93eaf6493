"""The fault table of stored teachers: each is one sentence, before the first batch wherever it can be known."""

from __future__ import annotations

import copy
import dataclasses
import errno
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from kdvit import Trainer
from kdvit.cache import StoredTeacher, builder, shards
from kdvit.cache.manifest import Manifest
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageSplit, open_data
from tests.cache.conftest import distiller, settings, teacher
from tests.cache.test_building import damage
from tests.cache.test_stored_teacher import first_batch

SHARD = "epoch-00001/shard-00001.safetensors"


@pytest.mark.parametrize(("kind", "what"), [("missing", "is missing"), ("truncated", r"must have \d+ bytes, got \d+")])
def test_a_missing_or_truncated_shard_is_found_at_the_start(kind, what, store):
    folder = store(["fitnet"]).folder
    damage(folder / SHARD, kind)
    with pytest.raises(
        ValueError, match=rf"^StoredTeacher: '.*{SHARD}' {what}; run its `kdvit cache build` command aga"
    ):
        StoredTeacher(folder)


def test_flipped_bytes_are_found_by_verify(store):
    folder = store(["fitnet"]).folder
    damage(folder / SHARD, "altered")
    StoredTeacher(folder)
    with pytest.raises(ValueError, match=rf"^StoredTeacher: '.*{SHARD}' was altered or cut short \(its checksum diff"):
        StoredTeacher(folder, verify=True)


def test_a_damaged_classifier_is_found_at_the_start(store):
    """It is small, and a student may be deployed with it."""
    folder = store(["promptkd"]).folder
    for kind, what in (("altered", r"was altered or cut short \(its checksum differs\)"), ("missing", "is missing")):
        damage(folder / "constants.safetensors", kind)
        with pytest.raises(
            ValueError, match=rf"^StoredTeacher: '.*constants.safetensors' {what}; run its `kdvit cache "
        ):
            StoredTeacher(folder)


def test_faults_names_every_file(store):
    stored = store(["fitnet"], form="project8")
    names = {"constants.safetensors", *(shard.name for shard in stored.manifest.shards)}
    assert dict(shards.faults(stored.folder, stored.manifest)) == dict.fromkeys(names, "") and len(names) > 2
    shard = stored.manifest.shards[-1].name
    damage(stored.folder / shard, "altered")
    (stored.folder / "constants.safetensors").unlink()
    found = {name: wrong for name, wrong in shards.faults(stored.folder, stored.manifest) if wrong}
    assert found == {
        "constants.safetensors": "is missing",
        shard: "was altered or cut short (its checksum differs)",
    }


def test_a_shard_that_goes_during_training(store, data):
    subject = distiller(store(["fitnet"]), ["fitnet"])
    for path in subject.teacher.folder.glob("epoch-00000/*"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(
        RuntimeError, match=r"^StoredTeacher: '.*shard-00000.safetensors' cannot be read \(.+\); run its"
    ):
        first_batch(copy.deepcopy(subject), data)  # which has no file open


@pytest.mark.parametrize("kind", ["truncated", "altered", "not even a shard"])
def test_an_altered_manifest_is_not_believed(kind, store):
    folder = store(["kd"]).folder
    damage(folder / "manifest.json", kind)
    with pytest.raises(
        ValueError, match=r"^cache '.*': manifest.json was altered or cut short; remove the folder and bu"
    ):
        StoredTeacher(folder)


def test_a_manifest_that_was_edited_is_not_believed(store):
    """It is sound JSON, but what it says is not what was built."""
    path = store(["kd"]).folder / "manifest.json"
    path.write_text(path.read_text().replace('"num_epochs": 2', '"num_epochs": 3'))
    with pytest.raises(ValueError, match="manifest.json was altered or cut short"):
        StoredTeacher(path.parent)


def test_what_cannot_be_read_is_not_called_damaged(store, tmp_path):
    """Nobody should remove a cache because of a wrong path or a missing permission."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    for name, reason in (("file", "Not a directory"), ("folder", "Is a directory")):
        with pytest.raises(
            ValueError, match=rf"^cache '.*{name}': manifest.json cannot be read \({reason}\); check the path\.$"
        ):
            StoredTeacher(tmp_path / name)
    folder = store(["kd"]).folder
    shutil.rmtree(folder / "epoch-00001")
    (folder / "epoch-00001").write_text("")
    with pytest.raises(ValueError, match=r"shard-00000.safetensors' cannot be read \(Not a directory\); run its"):
        StoredTeacher(folder)


def test_no_cache_at_all(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be a folder that `kdvit cache build` made, and has no manifest.json; che"
    ):
        StoredTeacher(tmp_path / "nowhere")


def test_a_cache_of_another_format(store):
    folder = store(["kd"]).folder
    manifest = Manifest.read(folder)
    manifest.format = 2
    manifest.write(folder)
    with pytest.raises(ValueError, match=r"^cache '.*' must be of format 1, got 2; build it again with this kdvit"):
        StoredTeacher(folder)


def test_a_cache_of_another_teacher(store):
    stored = store(["kd"])
    stored.check_teacher(teacher())
    assert stored.is_of(teacher()) and not stored.is_of(teacher(8))
    message = (
        r"^StoredTeacher: '.*' must be used with what it was made of, but teacher_weights is [0-9a-f]{12}\.\.\. there "
        r"and [0-9a-f]{12}\.\.\. here; store this teacher: kdvit cache build, in another folder\.$"
    )
    with pytest.raises(ValueError, match=message):
        stored.check_teacher(teacher(8))


OTHERS = {
    "seed": ({"seed": 3}, {}, "seed is 0 there and 3 here"),
    "transform": (
        {},
        {"transform": FASHION_MNIST_TRANSFORM},
        r"transform\.crop_padding is 2 there and 0 here, transform\.crop_scale is \[0\.08, 1\.0\] there and "
        r"\[1\.0, 1\.0\] here, transform\.crop_aspect is .*",
    ),
    "images": (
        {},
        {"data": open_data("fashion-mnist-sample").subset(40, 12)},
        r"data\.num_images is 36 there and 40 here, data\.labels is .*",
    ),
    "mixing": ({"mixup_alpha": 0.2}, {}, "mixup_alpha is 0.0 there and 0.2 here, batch_size is None there and 8 here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_job_is_refused_before_the_first_batch(name, store, data, train):
    changed, more, message = OTHERS[name]
    subject = distiller(store(["kd"]), ["kd"])
    with pytest.raises(ValueError, match=rf"must be used with what it was made of, but {message}; train as it was bui"):
        train(subject, **changed, **more)


def test_other_pixels_of_the_same_labels_are_refused(store, data, train):
    last = int(data.train._rows[-1])

    class Darker:
        def read(self, row):
            image = data.train._reader.read(row)
            return image.point(lambda value: value // 2) if row == last else image

        def where(self, row):
            return data.train._reader.where(row)

    darker = ImageSplit(Darker(), data.train.labels, data.classes, "train", data.train._rows)
    subject = distiller(store(["kd"]), ["kd"])
    with pytest.raises(
        ValueError, match=r"but data\.pixels is [0-9a-f]{12}\.\.\. there and [0-9a-f]{12}\.\.\. here; train"
    ):
        train(subject, data=dataclasses.replace(data, train=darker))


def test_another_augmentation_by_the_same_settings_is_refused(store, train, monkeypatch):
    """As of another release of torchvision, which draws its crops in another way."""
    from torchvision import transforms

    stored = store(["kd"])
    train(distiller(stored, ["kd"]))
    draw = transforms.RandomCrop.get_params
    monkeypatch.setattr(transforms.RandomCrop, "get_params", staticmethod(lambda *size: draw(*size) and draw(*size)))
    with pytest.raises(
        ValueError, match=r"but augmentation is [0-9a-f]{12}\.\.\. there and [0-9a-f]{12}\.\.\. here; train as it was"
    ):
        train(distiller(stored, ["kd"]))


def test_more_epochs_than_stored_are_refused(store, train):
    subject = distiller(store(["kd"]), ["kd"])
    with pytest.raises(
        ValueError, match=r"must have the 3 epochs of this run, and has 2; build the others .*--augmentat"
    ):
        train(subject, epochs=3)
    train(distiller(store(["kd"]), ["kd"]), epochs=1)


@pytest.fixture
def train(data, tmp_path: Path, no_curves):
    """train(distiller, epochs=..., data=..., transform=...) -> a Trainer that has not begun."""

    def make(subject, *, data=data, transform=None, **changed):
        return Trainer(subject, data, settings(**changed), tmp_path / "run", transform=transform, quiet=True)

    return make


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_is_one_sentence_and_keeps_what_is_whole(error, store, tmp_path, monkeypatch):
    write, count = shards.write_shard, 0

    def filling(*arguments):
        nonlocal count
        count += 1
        if count > 2:
            raise error
        return write(*arguments)

    monkeypatch.setattr(builder, "write_shard", filling)
    with pytest.raises(RuntimeError) as caught:
        store(["fitnet"], folder=tmp_path / "a")
    assert str(caught.value) == (
        f"cache '{tmp_path / 'a'}' cannot be written (No space left on device): 2 of 6 shards are whole and kept; make "
        "room or give it write permission, then run the same command again."
    )
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("shard-*")}
    assert len(kept) == 2
    store(["fitnet"], folder=tmp_path / "a")
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
