import pickle

import numpy as np
import pytest

from kdvit.data import open_data


def test_labels_need_no_decoding_and_cannot_be_changed(make_folder):
    folder = make_folder({"cat": 4, "dog": 4})
    for path in folder.rglob("*.png"):
        path.write_text("no image")
    split = open_data(folder).train
    assert split.labels.dtype == np.int64 and len(split.labels) == len(split) == 6
    with pytest.raises(ValueError, match="read-only"):
        split.labels[0] = 1


def test_subset_by_number_is_balanced(noise_split):
    subset = noise_split.subset(10)
    assert np.bincount(subset.labels).tolist() == [3, 3, 2, 2]
    assert subset.classes == noise_split.classes
    assert len(noise_split.subset(40)) == 40


def test_subset_by_indices_and_of_a_subset(noise_split):
    subset = noise_split.subset([7, 3, 30]).subset(np.array([2, 0]))
    assert subset.labels.tolist() == [2, 3]
    for position, index in enumerate((30, 7)):
        assert subset.image(position).tobytes() == noise_split.image(index).tobytes()
        assert subset.where(position) == f"row {index} of noise"


@pytest.mark.parametrize(
    "selection, sentence",
    [
        (0, r"n must be in \[1, 40\], got 0; noise has 40 images"),
        (41, r"n must be in \[1, 40\], got 41"),
        ([0, 40], r"indices must be in \[0, 39\], got \[0, 40\]"),
        ([-1], r"indices must be in \[0, 39\], got \[-1, -1\]"),
    ],
)
def test_wrong_subset(noise_split, selection, sentence):
    with pytest.raises(ValueError, match=sentence):
        noise_split.subset(selection)


def test_index_past_the_end(noise_split):
    with pytest.raises(IndexError):
        noise_split.image(40)


def test_splits_travel_to_worker_processes():
    split = open_data().test.subset(20)
    copy = pickle.loads(pickle.dumps(split))
    assert copy.image(7).tobytes() == split.image(7).tobytes() and copy.where(7) == split.where(7)
