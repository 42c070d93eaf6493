"""Building: what is written, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from kdvit.cache import StoredTeacher, build, builder
from kdvit.cache.manifest import Manifest
from kdvit.data import EpochBatchSampler, ReplayableDataset, loading, make_loader
from kdvit.training import transform_for
from tests.cache.conftest import SHARD_MIB, distiller, settings, teacher
from tests.processes import REPOSITORY
from tests.training.conftest import vit


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("shard-*")}


def test_rows_lie_in_the_order_of_training(store, data):
    folder = store(["fitnet"]).folder
    manifest = Manifest.read(folder)
    names = sorted(path for path in files(folder) if "shard" in path)
    assert names == [shard.name for shard in manifest.shards] and len(names) == 6
    assert [path.name for path in folder.rglob(".*")] == [".lock"] and not list(folder.glob("*.jsonl"))
    sampler = EpochBatchSampler(len(data.train), 8, seed=0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [index for batch in sampler for _, index in batch]
        shards = [load_file(folder / shard.name) for shard in manifest.shards if shard.epoch == epoch]
        assert torch.cat([shard["sample_id"] for shard in shards]).tolist() == order and len(order) == 36
        assert [len(shard["sample_id"]) for shard in shards] == [16, 16, 4]


def test_every_sample_is_there_without_mixing(store, data):
    """Training leaves the last partial batch out, but one of another batch size leaves others out."""
    stored = store(["kd"])
    distiller(stored, ["kd"])
    for epoch in range(2):
        rows = stored.rows(torch.arange(36), epoch)
        assert rows["logits:value"].shape == (36, 10)
    with pytest.raises(
        ValueError, match=r"has no sample 36 of epoch 0 \(it has 36 samples\); build it again for these"
    ):
        stored.rows(torch.tensor([3, 36]), 0)
    with pytest.raises(ValueError, match=r"must hold epoch 2, and has 2 epochs; build more of them, or replay those"):
        stored.rows(torch.tensor([3]), 2)


def test_rows_of_several_shards_and_epochs_come_in_the_order_asked(store):
    stored = store(["fitnet"])
    distiller(stored, ["fitnet"])
    keys = [(1, 5), (0, 35), (0, 5), (1, 0), (1, 5)]
    together = stored.source.read(keys, stored.parts)["feature_map@1:value"]
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, stored.source.read([key], stored.parts)["feature_map@1:value"][0])
    assert torch.equal(together[0], together[4]) and not torch.equal(together[0], together[2])


def test_mixed_batches_are_those_of_training(store, data):
    """With mixing an image's row depends on its batch: the last partial one is never trained on."""
    mixing = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    manifest = store(["kd"], **mixing).manifest
    assert sum(shard.num_rows for shard in manifest.shards) == 2 * 32
    job = manifest.fingerprint["job"]
    assert (job["mixup_alpha"], job["cutmix_alpha"], job["batch_size"]) == (0.8, 1.0, 8)
    assert store(["kd"], label_smoothing=0.1).manifest.fingerprint["job"]["batch_size"] is None


def test_a_whole_cache_is_left_alone(store):
    folder = store(["fitnet"]).folder
    before, when = files(folder), times(folder)
    store(["fitnet"], folder=folder)
    assert files(folder) == before and times(folder) == when


def test_more_epochs_are_added_to_those_that_are_there(store):
    folder = store(["fitnet"]).folder
    when = times(folder)
    longer = store(["fitnet"], folder=folder, epochs=3)
    assert longer.manifest.num_epochs == 3 and len(longer.manifest.shards) == 9
    assert {name: time for name, time in times(folder).items() if name in when} == when
    assert store(["fitnet"], folder=folder, epochs=1).manifest.num_epochs == 3


@pytest.mark.parametrize("left", [".manifest.json.tmp", ".constants.safetensors.tmp", "constants.safetensors", ".lock"])
def test_a_building_that_is_killed_before_it_has_a_manifest_goes_on(left, store, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / left).write_text("{")
    folder = store(["fitnet"], form="project8", folder=tmp_path / "a").folder
    assert StoredTeacher(folder, verify=True).manifest.complete


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [0, 1, 4])
def test_a_killed_building_goes_on(stopped_after, store, tmp_path):
    """SIGKILL at a random place after so many shards: whole shards are kept, and the end is the same to the byte."""
    expected = files(store(["fitnet"], folder=tmp_path / "whole").folder)
    folder = tmp_path / "killed"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cache.builder_worker", str(folder), "0.15"],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while len(times(folder)) < stopped_after or not (folder / "manifest.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    when = times(folder)
    assert stopped_after <= len(when) < 6
    with pytest.raises(
        ValueError, match=r"must be a whole cache, and its building was stopped; run the same `kdvit cac"
    ):
        StoredTeacher(folder)
    store(["fitnet"], folder=folder)
    assert files(folder) == expected
    noted = {name: time for name, time in when.items() if times(folder)[name] == time}
    assert len(noted) >= len(when) - 1  # one may have been written and not yet noted


def test_two_commands_do_not_build_one_folder(store):
    folder = store(["kd"]).folder
    before = files(folder)
    hold = f"from kdvit.files import *; held = lock(Path({str(folder / '.lock')!r})); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"\n"
        with pytest.raises(
            ValueError, match=r"must be built by one command at a time, and another one is at work; wait"
        ):
            store(["kd"], folder=folder, epochs=3)
        assert files(folder) == before
    finally:
        other.communicate(b"\n")
    assert store(["kd"], folder=folder, epochs=3).manifest.num_epochs == 3


def test_shards_that_no_process_noted_are_missed(store, tmp_path, monkeypatch):
    """As where the machines of a job see different folders."""
    keep = builder.Builder._keep
    monkeypatch.setattr(builder.Builder, "_keep", lambda self, unit, rows: unit[0] and keep(self, unit, rows))
    with pytest.raises(
        RuntimeError, match=r"a' must be seen by all processes, and 3 of 6 shards are nowhere; choose a folder that all"
    ):
        store(["fitnet"], folder=tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="must be a whole cache, and its building was stopped"):
        StoredTeacher(tmp_path / "a")
    assert store(["fitnet"], folder=tmp_path / "a").manifest.complete


def test_shards_of_small_rows_have_an_end(data, tmp_path, monkeypatch):
    """Or an epoch of top-10 logits would be one file: of one process, and lost when it is killed."""
    monkeypatch.setattr(builder, "MAX_ROWS", 16)
    (folder,) = build(tmp_path / "a", distiller(teacher()), data, settings(epochs=1), quiet=True)
    assert [shard.num_rows for shard in Manifest.read(folder).shards] == [16, 16, 4]


def test_an_order_is_drawn_once_for_all_shards_of_an_epoch(monkeypatch):
    """Of a million images that takes as long as the teacher takes for a batch, and there may be a thousand shards."""
    drawn, draw = [], loading.legacy_generator
    monkeypatch.setattr(loading, "legacy_generator", lambda *values: drawn.append(values) or draw(*values))
    sampler = EpochBatchSampler(36, 8)
    batches = list(builder._Batches(sampler, [(0, 0), (0, 1), (0, 2), (1, 0)], 2))
    assert drawn == [(0, 0), (0, 1)] and len(batches) == 7
    assert sorted(index for batch in batches[:5] for _, index in batch) == list(range(36))


def test_a_torn_note_is_not_believed(store):
    folder = store(["fitnet"]).folder
    manifest = Manifest.read(folder)
    expected = files(folder)
    last, manifest.shards, manifest.complete = manifest.shards[-1], manifest.shards[:-1], False
    manifest.write(folder)
    (folder / "building-0.jsonl").write_text(json.dumps({"epoch": last.epoch, "number": last.number})[:-5])
    store(["fitnet"], folder=folder)
    assert files(folder) == expected


@pytest.mark.parametrize("kind", ["missing", "truncated", "altered", "not even a shard"])
def test_building_again_repairs_what_is_damaged(kind, store):
    folder = store(["fitnet"]).folder
    expected, when = files(folder), times(folder)
    path = folder / "epoch-00001/shard-00001.safetensors"
    damage(path, kind)
    store(["fitnet"], folder=folder)
    assert files(folder) == expected
    assert [name for name, time in times(folder).items() if time != when[name]] == [
        "epoch-00001/shard-00001.safetensors"
    ]


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[:-100])
    elif kind == "altered":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    else:
        path.write_bytes(b"x" * len(content))


def test_constants_are_repaired_too(store):
    stored = store(["fitnet"], form="project8")
    expected = files(stored.folder)
    (stored.folder / "constants.safetensors").unlink()
    store(["fitnet"], form="project8", folder=stored.folder)
    assert files(stored.folder) == expected
    manifest = Manifest.read(stored.folder)
    manifest.constants = "0" * 64
    manifest.write(stored.folder)
    with pytest.raises(
        ValueError, match=r"'constants.safetensors' was altered, and what is made anew is not what the r"
    ):
        store(["fitnet"], form="project8", folder=stored.folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"form": "fp32"}, "feature_map@1 is 'fp16' there and 'fp32' here"),
        ({"live": teacher(9)}, r"teacher_weights is [0-9a-f]{12}... there and [0-9a-f]{12}... here"),
        ({"mixup_alpha": 0.8}, "mixup_alpha is 0.0 there and 0.8 here, batch_size is None there and 8 here"),
        ({"mixed_precision": "bf16"}, "mixed_precision is 'no' there and 'bf16' here"),
    ],
)
def test_another_job_does_not_go_on_with_it(changed, message, store):
    folder = store(["fitnet"]).folder
    before = files(folder)
    with pytest.raises(ValueError, match=rf"must be gone on with as it was begun, but {message}; repeat its command"):
        store(["fitnet"], folder=folder, **changed)
    assert files(folder) == before


def test_the_batch_size_may_change_where_nothing_is_mixed(store):
    folder = store(["fitnet"]).folder
    (folder / "epoch-00000/shard-00000.safetensors").unlink()
    expected = Manifest.read(folder).shards
    store(["fitnet"], folder=folder, batch_size=5)
    assert Manifest.read(folder).shards == expected


def test_epochs_of_a_run_that_is_counted_in_steps(store):
    assert store(["kd"], epochs=None, steps=9).manifest.num_epochs == 3  # of 4 batches
    assert store(["kd"], epochs=None, steps=4, accumulation_steps=2).manifest.num_epochs == 2
    assert store(["kd"], epochs=5, augmentation_epochs=2).manifest.num_epochs == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"augmentation_epochs": 3},
            "augmentation_epochs must be in 1..2, the epochs of the training, got 3; leave it",
        ),
        ({"augmentation_epochs": 0}, "augmentation_epochs must be in 1..2"),
        ({"form": "fp8"}, "form must be one of fp16, fp32, int8, top<k>"),
        ({"losses": ["psd"]}, "there must be a live teacher that some loss reads, got none"),
    ],
)
def test_what_cannot_be_built(changed, message, store, tmp_path):
    with pytest.raises(ValueError, match=message):
        store(folder=tmp_path / "a", **changed)
    assert not (tmp_path / "a").exists()


def test_other_settings_that_cannot_be(data, tmp_path, store):
    for shard_mib in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"shard_mib must be > 0 and finite, got {shard_mib}; the default is 256"):
            build(tmp_path / "a", distiller(teacher()), data, settings(), shard_mib=shard_mib, quiet=True)
    with pytest.raises(ValueError, match="batch_size must be at most the 36 training images over 1 process"):
        store(batch_size=37, mixup_alpha=0.8, folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"b' must be empty or a cache, and holds other files; choose another"):
        store(folder=tmp_path / "b")
    stored = store()
    with pytest.raises(ValueError, match="there must be a live teacher that some loss reads, got none"):
        store(live=stored)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache '.*' cannot be made \(Not a directory\); choose another folder"):
        store(folder=tmp_path / "file" / "a")


def test_it_is_refused_where_the_disk_is_too_small(store, tmp_path, monkeypatch):
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda path: builder.shutil._ntuple_diskusage(10**6, 10**6, 5000))
    message = r"cache '.*a': 6\.92e-05 GiB must fit onto the disk, which has 4\.66e-06 GiB free; choose a smaller form"
    with pytest.raises(ValueError, match=message):
        store(["fitnet"], folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_all_teachers_must_fit_onto_the_disk(store, tmp_path, monkeypatch):
    """Each of two does: 2 epochs of 36 rows of 28 bytes."""
    monkeypatch.setattr(builder.shutil, "disk_usage", lambda path: builder.shutil._ntuple_diskusage(10**6, 10**6, 3000))
    with pytest.raises(ValueError, match=r"cache '.*a': 3\.76e-06 GiB must fit onto the disk, which has 2\.79e-06 GiB"):
        store(["kd"], live=[teacher(), teacher(8)], folder=tmp_path / "a")
    assert not (tmp_path / "a").exists()
    store(["kd"], folder=tmp_path / "a")


def test_the_estimate_is_what_is_written(store, data, tmp_path):
    plan = builder.plan(
        tmp_path / "a", distiller(teacher(), ["fitnet", "kd"]), data, settings(),
        builder.make_accelerator(settings(), tmp_path), form=("int8", "top3"), shard_mib=1,
    )  # fmt: skip
    assert len(plan) == 1 and not (tmp_path / "a").exists()
    # 16 positions of 32 channels and a scale each; 3 logits and classes and the rest; the sample's number.
    assert plan[0].row_bytes == 16 * (32 + 4) + 3 * (2 + 2) + 4 + 8
    assert plan[0].total_bytes == 2 * 36 * plan[0].row_bytes
    plan[0].run(show=False)
    shards = Manifest.read(tmp_path / "a").shards
    overhead = sum(shard.num_bytes for shard in shards) - plan[0].total_bytes
    assert 0 < overhead < 1024 * len(shards)  # safetensors' names


def test_a_teacher_that_gives_nan_is_named(store):
    live = teacher()
    with torch.no_grad():
        live.model.head.bias[3] = torch.inf
    with pytest.raises(RuntimeError) as caught:
        store(live=live)
    samples = EpochBatchSampler(36, 8, seed=0)
    first = [index for _, index in next(iter(samples))]
    assert str(caught.value) == (
        f"cache: logits of 'wide' must be finite, got NaN or infinity for samples {first}; check the teacher, or use "
        "mixed_precision='no'."
    )


def test_values_too_large_for_fp16_are_refused(store):
    live = teacher()
    with torch.no_grad():
        live.model.head.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"logits of 'wide' at 'output' must be within 65504 .* --form logits=fp32"):
        store(live=live)
    assert store(live=live, form="fp32").manifest.complete


@pytest.mark.slow
def test_worker_processes_store_the_same(store):
    one, two = store(["fitnet"]), store(["fitnet"], num_workers=2)
    assert files(one.folder) == files(two.folder)


def test_the_loader_of_building_is_that_of_training(data):
    """What a row is made of: the dataset of `make_loader`, in its order."""
    subject = distiller(teacher())
    transform = transform_for(subject.student)
    sampler = EpochBatchSampler(36, 8, seed=0)
    batches = builder._Batches(sampler, [(1, 0), (0, 1)], 2)
    found = list(DataLoader(ReplayableDataset(data.train, transform.training(), 0), batch_sampler=batches))
    loader = make_loader(data.train, transform, batch_size=8, train=True)
    expected = []
    for epoch, places in ((1, (0, 1)), (0, (2, 3))):
        loader.batch_sampler.set_epoch(epoch)
        expected += [batch for place, batch in enumerate(loader) if place in places]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["sample_id"], theirs["sample_id"])


def test_accuracy_is_asked_for_once(store, monkeypatch):
    folder = store().folder
    monkeypatch.setattr(builder, "evaluate", lambda *arguments: pytest.fail("evaluated again"))
    assert store(folder=folder).accuracy is not None


def test_a_backbone_without_classifier_has_no_accuracy(store):
    assert store(["rkd"], live=vit(7, num_classes=0)).accuracy is None


def test_shards_have_the_size_that_is_asked_for(store):
    sizes = {shard.num_bytes for shard in store(["fitnet"]).manifest.shards if shard.num_rows == 16}
    assert len(sizes) == 1 and sizes.pop() <= SHARD_MIB * 2**20 * 1.05
