"""Every kind of source, and every wrong source with its sentence."""

import gzip
import hashlib
import io
import re
import shutil
import struct

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from kdvit.data import check_labels, names, open_data, sources, tables


def png_bytes(value):
    buffer = io.BytesIO()
    Image.new("L", (5, 4), value).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def image_table(labels, label_feature=None, image_name="image", label_name="label"):
    rows = {image_name: [png_bytes(i) for i in range(len(labels))], label_name: labels}
    features = {image_name: datasets.Image(), label_name: label_feature or datasets.Value("int64")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def write_table(table, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.data.table, path)
    return path


def write_idx(folder, num_train=6, num_test=4, suffix=".gz", num_classes=3):
    folder.mkdir(exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
        labels = (np.arange(count) % num_classes).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
            content = gzip.compress(content) if suffix else content
            (folder / f"{prefix}-{kind}-ubyte{suffix}").write_bytes(content)
    return folder


# ---------------------------------------------------------------- the embedded sample


def test_sample_has_its_sizes_balance_and_no_image_twice():
    data = open_data()
    assert data.name == "fashion-mnist-sample" and data.classes[0] == "T-shirt/top" and len(data.classes) == 10
    assert np.bincount(data.train.labels).tolist() == [800] * 10
    assert np.bincount(data.test.labels).tolist() == [200] * 10
    assert data.train.image(0).size == (28, 28) and data.train.image(0).mode == "L"
    hashes = [
        {hashlib.sha256(split.image(index).tobytes()).digest() for index in range(len(split))}
        for split in (data.train, data.test)
    ]
    assert [len(found) for found in hashes] == [8000, 2000]
    assert not hashes[0] & hashes[1]


def test_sample_is_what_datasets_reads_and_carries_its_licence():
    folder = sources._SAMPLE_FOLDER
    table = datasets.Dataset(pyarrow.parquet.read_table(folder / "test.parquet"))
    assert isinstance(table.features["image"], datasets.Image)
    assert tuple(table.features["label"].names) == open_data().classes
    assert "Copyright 2017 Zalando SE" in (folder / "LICENSE-fashion-mnist").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6e6


def test_names_describe_the_built_in_sources():
    assert "fashion-mnist-sample" in names() and all("\n" not in line for line in names().values())


# ---------------------------------------------------------------- local sources


@pytest.mark.parametrize("test_name", ["val", "valid", "validation", "test"])
def test_image_folder_with_a_test_folder(make_folder, test_name):
    folder = make_folder({"train/cat": 3, "train/dog": 2, f"{test_name}/cat": 1, f"{test_name}/dog": 1})
    data = open_data(folder)
    assert (len(data.train), len(data.test), data.classes) == (5, 2, ("cat", "dog"))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.train.where(3) == str(folder / "train/dog/00.png")
    assert data.train.image(2).getpixel((0, 0)) == (2, 253, 7)
    assert data.check(num_images=None) is data


def test_class_folders_are_split_alike_for_a_seed_and_stratified(make_folder):
    folder = make_folder({"cat": 20, "dog": 10, "emu/wild": 2})
    first, again = open_data(folder, held_out_ratio=0.2), open_data(str(folder), held_out_ratio=0.2)
    other = open_data(folder, held_out_ratio=0.2, seed=1)

    def files(split):
        return [split.where(index) for index in range(len(split))]

    assert np.bincount(first.test.labels).tolist() == [4, 2, 1]  # 20 %, at least one
    assert np.bincount(first.train.labels).tolist() == [16, 8, 1]
    assert not set(files(first.train)) & set(files(first.test))
    assert files(first.test) == files(again.test) != files(other.test)


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_folder(tmp_path, suffix):
    folder = write_idx(tmp_path / "idx", suffix=suffix)
    data = open_data(folder)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, ("0", "1", "2"))
    assert np.asarray(data.train.image(1)).tolist() == np.arange(12, 24).reshape(3, 4).tolist()
    assert open_data(f"fashion-mnist:{folder}").classes[9] == "Ankle boot"


LABEL_KINDS = [
    ([1, 0, 2, 1], datasets.ClassLabel(names=["x", "y", "z"]), "label", ("x", "y", "z"), [1, 0, 2, 1]),
    ([1, 0, 2, 1], datasets.Value("uint8"), "fine_label", ("0", "1", "2"), [1, 0, 2, 1]),
    (["b", "a", "c", "b"], datasets.Value("string"), "labels", ("a", "b", "c"), [1, 0, 2, 1]),
    ([1, 0, 1, 1], datasets.ClassLabel(names=["n", "y"]), "whatever", ("n", "y"), [1, 0, 1, 1]),
    ([True, False, True, True], datasets.Value("bool"), "label", ("0", "1"), [1, 0, 1, 1]),
]


@pytest.mark.parametrize("labels, feature, label_name, classes, ids", LABEL_KINDS)
@pytest.mark.parametrize("in_memory_mib", [512, -1])
def test_parquet_columns_and_labels(tmp_path, monkeypatch, labels, feature, label_name, classes, ids, in_memory_mib):
    if in_memory_mib < 0:
        monkeypatch.setattr(tables, "IN_MEMORY_MIB", in_memory_mib)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = image_table(labels, feature, "picture", label_name)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_table(table, tmp_path / f"p/data/{name}.parquet")
    data = open_data(tmp_path / "p")
    assert (len(data.train), len(data.test), data.classes) == (8, 4, classes)
    assert data.train.labels.tolist() == ids * 2 and data.train.labels.dtype == np.int64
    assert data.train.image(6).getpixel((0, 0)) == 2
    assert data.train.where(6) == f"row 2 of {tmp_path}/p/data/train-00001-of-00002.parquet"


def test_a_single_parquet_file_of_plain_columns_is_split(tmp_path):
    column = pyarrow.array([png_bytes(i)["bytes"] for i in range(8)])
    table = pyarrow.table({"img": column, "label": pyarrow.array([0, 1] * 4)})  # no types of `datasets`
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    data = open_data(tmp_path / "all.parquet", held_out_ratio=0.25)
    assert (len(data.train), len(data.test)) == (6, 2)
    assert data.check(None).test.image(0).size == (5, 4)


def test_hub_name_with_config(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        table = image_table([0, 1, 2, 2], datasets.ClassLabel(names=["a", "b", "c"]), "img", "fine_label")
        return datasets.DatasetDict(test=table, train=table)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = open_data("org/some-name:small")
    assert asked == [("org/some-name", "small")]
    assert (len(data.train), len(data.test), data.classes) == (4, 4, ("a", "b", "c"))
    assert data.test.where(1) == "row 1 of split 'test' of org/some-name"
    open_data("fashion-mnist")
    assert asked[-1] == ("zalando-datasets/fashion_mnist", None)


# ---------------------------------------------------------------- wrong sources


def missing(make, tmp):
    return tmp / "none"


def not_readable(make, tmp):
    (tmp / "note.txt").write_text("no data")
    return tmp / "note.txt"


def empty(make, tmp):
    (tmp / "empty").mkdir()
    return tmp / "empty"


def flat(make, tmp):
    return make({".": 3})


def empty_class(make, tmp):
    return make({"train/cat": 2, "train/dog": 0, "val/cat": 1, "val/dog": 1})


def other_classes(make, tmp):
    return make({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/emu": 1})


def one_class(make, tmp):
    return make({"cat": 4})


def one_image(make, tmp):
    return make({"cat": 4, "dog": 1})


def missing_idx(make, tmp):
    folder = write_idx(tmp / "idx")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    return folder


def damaged_idx(make, tmp):
    folder = write_idx(tmp / "idx", suffix="")
    path = folder / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    return folder


def damaged_gzip(make, tmp):
    folder = write_idx(tmp / "idx")
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return folder


def uneven_idx(make, tmp):
    folder, other = write_idx(tmp / "idx"), write_idx(tmp / "other", num_train=5)
    shutil.copy(other / "train-labels-idx1-ubyte.gz", folder)
    return folder


def damaged_parquet(make, tmp):
    path = write_table(image_table([0, 1]), tmp / "a.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    return path


def no_label_column(make, tmp):
    return write_table(image_table([0, 1], label_name="price"), tmp / "a.parquet")


def no_image_column(make, tmp):
    return write_table(image_table([0, 1]).remove_columns("image"), tmp / "a.parquet")


def numbers_for_images(make, tmp):
    return write_table(datasets.Dataset.from_dict({"image": [1, 2], "label": [0, 1]}), tmp / "a.parquet")


def float_labels(make, tmp):
    return write_table(image_table([0.5, 1.0], datasets.Value("float64")), tmp / "a.parquet")


def missing_labels(make, tmp):
    return write_table(image_table([0, None, 1]), tmp / "a.parquet")


def unlabelled_test(make, tmp):
    feature = datasets.ClassLabel(names=["a", "b"])
    write_table(image_table([0, 1], feature), tmp / "p/train.parquet")
    write_table(image_table([-1, -1], feature), tmp / "p/test.parquet")
    return tmp / "p"


def other_class_names(make, tmp):
    for name, classes in (("train", ["a", "b"]), ("test", ["b", "a"])):
        write_table(image_table([0, 1], datasets.ClassLabel(names=classes)), tmp / f"p/{name}.parquet")
    return tmp / "p"


def mixed_label_kinds(make, tmp):
    write_table(image_table([0, 1]), tmp / "p/train.parquet")
    write_table(image_table(["a", "b"], datasets.Value("string")), tmp / "p/test.parquet")
    return tmp / "p"


def no_rows(make, tmp):
    write_table(image_table([0, 1]), tmp / "p/train.parquet")
    write_table(image_table([0, 1]).select([]), tmp / "p/test.parquet")
    return tmp / "p"


WRONG_SOURCES = [
    ("fashion-mnst", "unknown data source 'fashion-mnst'; did you mean 'fashion-mnist'\\? Known: fashion-mnist, "
     "fashion-mnist-sample, fashion-mnist:FOLDER; or give a folder of images, parquet or tar shards, a .parquet"),
    ("zzz", "unknown data source 'zzz'; Known: fashion-mnist, "),
    ("fashion-mnist:no-folder", "data: folder 'no-folder' must exist, got none; give the folder that holds the"),
    ("org/name", r"data: 'org/name' must be a folder here or a data set that the Hugging Face hub can give, got .*; "
     "there is no network or the name is wrong: check both, or give a local folder of images or parquet"),
    ("fashion-mnist", r"data: 'zalando-datasets/fashion_mnist' must be .*or give fashion-mnist:FOLDER \(the four idx"),
    (missing, "data: '.*/none' must exist, got no such file or folder; check the path"),
    (not_readable, "data: '.*/note.txt' must be a folder or a .parquet file, got another file; give"),
    (empty, "data: folder '.*/empty' must hold one folder a class .*, got none; put the images of each class into"),
    (flat, "data: folder '.*/images' must hold one folder a class .*, got none; put"),
    (empty_class, r"data: class folder '.*/train/dog' must hold images \(.png .*\), got none; add images or remove"),
    (other_classes, "class names of train and test must be equal, got only in train: 'dog'; only in test: 'emu'"),
    (one_class, "train must hold images of 2 classes or more, got only class 'cat'; add images of another class"),
    (one_image, "class 'dog' must have 2 images or more to hold some out, got 1; add images"),
    (missing_idx, "must hold t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz, got neither; all four"),
    (damaged_idx, "'.*/train-images-idx3-ubyte' must be a complete idx file of uint8 values with 3 axes, got 83 bytes"),
    (damaged_gzip, "'.*/train-images-idx3-ubyte.gz' must be a readable file, got .*; fetch it again"),
    (uneven_idx, "and its labels must be of equal length, got 6 images and 5 labels; fetch both again"),
    (damaged_parquet, "'.*/a.parquet' must be readable parquet of one schema, got .*; make it again"),
    (no_label_column, "a.parquet must have one label column, got columns image, price; name it 'label' or give it the"),
    (no_image_column, "a.parquet must have one image column, got columns label; name it 'image' or give it the"),
    (numbers_for_images, "column 'image' of .*a.parquet must hold images, got Value.*; store encoded image bytes"),
    (float_labels, "column 'label' of .*a.parquet must hold whole numbers or strings, got float; fill or convert"),
    (missing_labels, "column 'label' of .*a.parquet must hold whole numbers or strings, got NoneType and int; fill"),
    (unlabelled_test, r"labels of test must be in \[0, 1\], got -1 for row 0 of .*test.parquet \(2 such labels\)"),
    (other_class_names, "class names of train and test must be equal, got another order; rename"),
    (mixed_label_kinds, "labels of train and test must be of one kind, got ids and text; store both in the same way"),
    (no_rows, "test must hold images, got none; check the source"),
]  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("source, sentence", WRONG_SOURCES, ids=lambda value: getattr(value, "__name__", None))
def test_wrong_source_gives_one_sentence(offline, make_folder, tmp_path, source, sentence):
    if callable(source):
        source = source(make_folder, tmp_path)
    with pytest.raises(ValueError, match=sentence) as caught:
        open_data(source)
    assert "\n" not in str(caught.value)


def test_unreadable_folder_is_named(make_folder, monkeypatch):
    folder = make_folder({"cat": 2, "dog": 2})

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ValueError, match=f"folder '{folder}' must be readable, got 'Permission denied'; check its"):
        open_data(folder)


@pytest.mark.parametrize(
    "options, kind, sentence",
    [
        ({"source": 3}, TypeError, "open_data: source must be a str or a path, got int"),
        ({"held_out_ratio": 1.0}, ValueError, r"open_data: held_out_ratio must be in \(0, 1\), got 1.0"),
        ({"seed": -1}, ValueError, r"open_data: seed must be in \[0, 2\*\*63\), got -1"),
        ({"seed": 0.5}, TypeError, "open_data: seed must be an int, got float"),
    ],
)
def test_wrong_options(options, kind, sentence):
    with pytest.raises(kind, match=sentence):
        open_data(**options)


def test_corrupt_image_is_named_by_path(make_folder):
    folder = make_folder({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    wrong, cut = folder / "train/dog/01.png", folder / "val/cat/00.png"
    data = open_data(folder)
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.raises(ValueError, match=f"data: {re.escape(str(cut))} must be a readable image, got .*; replace"):
        data.check()
    wrong.write_text("not an image")
    with pytest.raises(ValueError, match=f"{re.escape(str(wrong))} must be .*, got bytes that are no known image"):
        data.train.image(3)
    wrong.unlink()
    with pytest.raises(ValueError, match=f"{re.escape(str(wrong))} must be .*No such file"):
        data.check()


def test_corrupt_image_is_named_by_row(tmp_path):
    table = image_table([0, 1, 0, 1])
    rows = table.to_dict()
    rows["image"][2] = {"bytes": b"\x89PNG nothing", "path": None}
    rows["image"][3] = None
    path = write_table(datasets.Dataset.from_dict(rows, features=table.features), tmp_path / "p/train.parquet")
    write_table(table, tmp_path / "p/test.parquet")
    data = open_data(tmp_path / "p")
    with pytest.raises(ValueError, match=f"data: row 2 of {re.escape(str(path))} must be a readable image, got bytes"):
        data.check(num_images=None)
    with pytest.raises(ValueError, match="row 3 of .* must be a readable image, got an empty cell; replace"):
        data.train.image(3)


def test_check_labels_names_the_first_wrong_label(noise_split):
    assert check_labels(noise_split, 4) is None
    sentence = r"labels of noise must be in \[0, 2\], got 3 for row 3 of noise \(10 such labels\)"
    with pytest.raises(ValueError, match=sentence):
        check_labels(noise_split, 3)
