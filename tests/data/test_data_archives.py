"""Tar shards of pictures and labels, read where they lie."""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdvit.data import TransformSettings, make_loader, open_data
from kdvit.data.archives import TarImages


def picture(value: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 255 - value, 7)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def shard(first: int, count: int, label=lambda n: b"%d\n" % (n % 3), suffix: str = "cls") -> dict[str, bytes]:
    """Members of webdataset: picture n has the red value n, and a label."""
    members = {}
    for n in range(first, first + count):
        members[f"{n:06d}.png"] = picture(n)
        members[f"{n:06d}.{suffix}"] = label(n)
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards/train-0.tar", shard(0, 12))
    write(tmp_path / "shards/train-1.tar", shard(12, 9))
    write(tmp_path / "shards/val-0.tar", shard(100, 6))
    return tmp_path / "shards"


def test_shards_of_train_and_test(shards):
    data = open_data(shards)
    assert (len(data.train), len(data.test), data.classes) == (21, 6, ("0", "1", "2"))
    assert data.train.labels.tolist() == [n % 3 for n in range(21)]
    assert [data.train.image(n).getpixel((0, 0))[0] for n in (20, 0, 13)] == [20, 0, 13]
    assert data.test.image(2).size == (9, 7) and data.test.image(2).getpixel((0, 0))[0] == 102
    assert re.fullmatch(r"the member at byte \d+ of .*/train-1\.tar", data.train.where(12))
    assert data.check(num_images=None) is data


def test_names_of_numbered_classes(shards):
    (shards / "classes.txt").write_text("cat\ndog\n\nemu\n")
    assert open_data(shards).classes == ("cat", "dog", "emu")
    (shards / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"labels of train must be in \[0, 1\], got 2"):
        open_data(shards)


@pytest.mark.parametrize("key", ["label", "cls", "class", "target"])
def test_labels_in_json(tmp_path, key):
    write(tmp_path / "s/a.tar", shard(0, 9, lambda n: json.dumps({"x": 1, key: n % 3}).encode(), "json"))
    assert np.bincount(open_data(tmp_path / "s").train.labels).tolist() == [2, 2, 2]  # and one of each held out


def test_labels_that_are_names_and_names_in_folders(tmp_path):
    members = shard(0, 9, lambda n: ("cat", "dog", "emu")[n % 3].encode())
    write(tmp_path / "s/a.tar", {f"./part/{name}": content for name, content in members.items()})
    data = open_data(tmp_path / "s", held_out_ratio=0.4)
    assert data.classes == ("cat", "dog", "emu") and (len(data.train), len(data.test)) == (6, 3)


def test_other_members_and_kinds_of_pictures(tmp_path):
    members = {"README": b"text", ".hidden.jpg": b"", "a.txt": b"a caption"}
    for n, kind in enumerate(("jpg", "jpeg", "webp", "JPG")):
        members |= {f"{n}.{kind}": picture(50 * n, "WEBP" if kind == "webp" else "JPEG"), f"{n}.cls": b"%d" % (n % 2)}
    write(tmp_path / "s/a.tar", members)
    data = open_data(tmp_path / "s")
    assert len(data.train) + len(data.test) == 4 and data.check(num_images=None)


def test_loading_is_the_same_for_any_number_of_workers(shards):
    settings = TransformSettings(image_size=8, num_channels=3)
    found = []
    for num_workers in (0, 2):
        loader = make_loader(
            open_data(shards).train, settings, batch_size=4, seed=3, train=True, num_workers=num_workers
        )
        loader.batch_sampler.set_epoch(1)
        found.append([(batch["image"], batch["sample_id"]) for batch in loader])
    assert len(found[0]) == 5
    for (ours, ids), (theirs, other_ids) in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and torch.equal(ids, other_ids)
    assert sorted(torch.cat([ids for _, ids in found[0]]).tolist()) != torch.cat([ids for _, ids in found[0]]).tolist()


def test_a_reader_can_be_pickled(shards):
    reader = open_data(shards).train._reader
    assert isinstance(reader, TarImages)
    reader.read(3)
    twin = pickle.loads(pickle.dumps(reader))
    assert twin.read(14).getpixel((0, 0))[0] == 14


def test_pictures_are_not_read_before_they_are_asked_for(tmp_path):
    """Only headers and labels: a picture that is no picture is found when it is decoded, and named."""
    members = shard(0, 6)
    members["000003.png"] = b"not a picture"
    write(tmp_path / "s/train.tar", members)
    write(tmp_path / "s/test.tar", shard(0, 3))
    data = open_data(tmp_path / "s")
    with pytest.raises(ValueError) as caught:
        data.train.image(3)
    assert str(caught.value) == (
        f"data: {data.train.where(3)} must be a readable image, got bytes that are no known image format; replace or "
        "remove it."
    )


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def compressed(path: Path) -> None:
    write(path, shard(0, 6), "w:gz")


def unlabelled(path: Path) -> None:
    members = shard(0, 6)
    del members["000002.cls"]
    write(path, members)


def empty_label(path: Path) -> None:
    write(path, shard(0, 6, lambda n: b" "))


def wrong_json(path: Path) -> None:
    write(path, shard(0, 6, lambda n: b'{"text": "a cat"}', "json"))


def mixed(path: Path) -> None:
    write(path, shard(0, 6, lambda n: b"0" if n else b"cat"))


def twice(path: Path) -> None:
    write(path, {"0.png": picture(0), "0.jpg": picture(0, "JPEG"), "0.cls": b"0"})


REFUSED = {
    damaged: r"data: '.*/a\.tar' must be a whole tar archive, not compressed, got unexpected end of data; make it "
    r"again\.",
    compressed: r"data: '.*/a\.tar' must be a whole tar archive, not compressed, got .+; make it again\.",
    unlabelled: r"data: '000002' in '.*/a\.tar' must have a label beside it, got none; add 000002\.cls \(a class id or "
    r"name\) or 000002\.json with one of label, cls, class, target\.",
    empty_label: r"data: '000000\.cls' in '.*/a\.tar' must hold a label, a class id or name, got b' '; for JSON, an "
    r"object with one of label, cls, class, target\.",
    wrong_json: r"data: '000000\.json' in '.*/a\.tar' must hold a label, .* got b'\{\"text\": \"a cat\"\}'; .*",
    mixed: r"data: labels of '.*' must be of one kind, got whole numbers and names; write them all in one way\.",
    twice: r"data: '.*/a\.tar' must hold one picture a name, got two for '0'; remove one\.",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_wrong_archives_are_refused_in_one_sentence(tmp_path, spoil):
    path = write(tmp_path / "s/a.tar", shard(0, 6))
    spoil(path)
    with pytest.raises(ValueError) as caught:
        open_data(tmp_path / "s")
    assert re.fullmatch(REFUSED[spoil], str(caught.value)), str(caught.value)


def test_a_shard_that_is_cut_later_is_named(shards):
    data = open_data(shards)
    damaged(shards / "train-1.tar")
    with pytest.raises(
        ValueError, match=r"data: the member at byte \d+ of .*train-1.tar must be a readable image, got \d+ of"
    ):
        data.train.image(20)
