"""Replay: pixels and order are a function of (seed, epoch, sample index), and of nothing else."""

import pickle
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches

from kdvit.data import EpochBatchSampler, ReplayableDataset, TransformSettings, make_loader
from kdvit.data.randomness import mixed_seeds, seed_generators

SETTINGS = TransformSettings(  # draws from all three global generators
    image_size=24,
    num_channels=1,
    mean=(0.5,),
    std=(0.5,),
    crop_padding=2,
    auto_augment="rand-m9-mstd0.5-inc1",
    erasing_probability=0.5,
    erasing_mode="pixel",
)


def by_sample(batches):
    return {
        int(sample_id): image
        for batch in batches
        for sample_id, image in zip(batch["sample_id"], batch["image"], strict=True)
    }


def assert_same_samples(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[sample_id], second[sample_id]) for sample_id in first)


def train_loader(split, num_workers=0, seed=3, **options):
    return make_loader(split, SETTINGS, batch_size=8, seed=seed, train=True, num_workers=num_workers, **options)


def run_epoch(loader, epoch):
    loader.batch_sampler.set_epoch(epoch)
    return list(loader)


@pytest.fixture
def reference(noise_split):
    return run_epoch(train_loader(noise_split), 2)


def test_a_batch_is_a_dict_of_stacked_tensors(reference, noise_split):
    assert len(reference) == 5 and set(reference[0]) == {"image", "label", "sample_id"}
    for batch in reference:
        assert batch["image"].shape == (8, 1, 24, 24)
        assert batch["label"].dtype == torch.int64
        assert batch["label"].tolist() == noise_split.labels[batch["sample_id"].numpy()].tolist()
    assert sorted(by_sample(reference)) == list(range(40))


def test_two_workers_give_the_same_batches(reference, noise_split):
    batches = run_epoch(train_loader(noise_split, num_workers=2), 2)
    for batch, expected in zip(batches, reference, strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("split_batches", [False, True])
def test_two_processes_share_out_the_same_samples(reference, noise_split, split_batches):
    shards = []
    for process_index in range(2):
        loader = prepare_data_loader(
            train_loader(noise_split), num_processes=2, process_index=process_index, split_batches=split_batches
        )
        loader.set_epoch(2)
        shards.append(list(loader))
    if not split_batches:
        assert [len(shard) for shard in shards] == [2, 2]  # the fifth batch has no partner
        reference = reference[:4]
    assert not by_sample(shards[0]).keys() & by_sample(shards[1]).keys()
    assert_same_samples(by_sample(shards[0]) | by_sample(shards[1]), by_sample(reference))


def test_prepared_loader_counts_epochs_by_itself(reference, noise_split):
    loader = prepare_data_loader(train_loader(noise_split), num_processes=1, process_index=0)
    epochs = [list(loader) for _ in range(3)]
    assert_same_samples(by_sample(epochs[2]), by_sample(reference))
    assert epochs[0][0]["sample_id"].tolist() != epochs[1][0]["sample_id"].tolist()


def test_the_same_key_is_bit_equal_and_another_is_not(noise_split):
    dataset = ReplayableDataset(noise_split, SETTINGS.training(), seed=0)
    again = ReplayableDataset(noise_split, SETTINGS.training(), seed=0, cache_mib=0)
    other_seed = ReplayableDataset(noise_split, SETTINGS.training(), seed=1)
    for index in range(5):
        image = dataset[4, index]["image"]
        assert torch.equal(image, dataset[4, index]["image"])
        assert torch.equal(image, again.__getitems__([(0, 1), (4, index)])[1]["image"])
        assert not torch.equal(image, dataset[5, index]["image"])
        assert not torch.equal(image, other_seed[4, index]["image"])


def test_neighbouring_seeds_are_unrelated():
    seeds = {mixed_seeds(seed, epoch, index)[0] for seed in range(5) for epoch in range(20) for index in range(50)}
    assert len(seeds) == 5000
    bits = np.unpackbits(np.array(sorted(seeds), dtype=np.uint64).view(np.uint8)).reshape(5000, 64).mean(0)
    assert abs(bits - 0.5).max() < 0.03  # 4 standard deviations


def test_the_three_generators_get_unrelated_streams():
    draws = []
    for index in range(200):
        seed_generators(0, 0, index)
        # The three are Mersenne twisters: these draws show the same low bits for the same seed.
        draws.append((random.getrandbits(16), np.random.randint(2**16), torch.randint(2**16, (1,)).item()))
    correlation = np.corrcoef(np.array(draws).T) - np.eye(3)
    assert abs(correlation).max() < 0.25


def test_global_generators_are_left_alone(noise_split, global_draws):
    draw, expected = global_draws
    dataset = ReplayableDataset(noise_split, SETTINGS.training())
    dataset[0, 0]
    run_epoch(train_loader(noise_split), 1)
    assert draw() == expected


def test_global_generators_are_left_alone_by_an_error(noise_split, global_draws):
    draw, expected = global_draws

    def fail(image):
        raise RuntimeError("no transform")

    with pytest.raises(RuntimeError, match="no transform"):
        ReplayableDataset(noise_split, fail)[0, 0]
    assert draw() == expected


def test_small_data_is_decoded_once_and_large_data_is_not_kept(noise_split, monkeypatch):
    decoded = []
    original = type(noise_split).image
    monkeypatch.setattr(type(noise_split), "image", lambda self, index: decoded.append(index) or original(self, index))
    for cache_mib, expected in ((64, [0, 1]), (0.001, [0, 1, 0, 1])):
        decoded.clear()
        dataset = ReplayableDataset(noise_split, SETTINGS.training(), cache_mib=cache_mib)
        dataset.__getitems__([(0, 0), (0, 1), (1, 0), (1, 1)])
        assert decoded == expected


def test_evaluation_is_in_order_complete_and_fixed(noise_split):
    loader = make_loader(noise_split.subset(21), SETTINGS, batch_size=8, train=False)
    first, second = run_epoch(loader, 0), run_epoch(loader, 1)
    assert [len(batch["label"]) for batch in first] == [8, 8, 5]
    assert torch.cat([batch["sample_id"] for batch in first]).tolist() == list(range(21))
    assert_same_samples(by_sample(first), by_sample(second))


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = EpochBatchSampler(10, 4, seed=seed)
        sampler.set_epoch(epoch)
        return [index for batch in sampler for _, index in batch]

    assert sorted(order(0, 0)) == list(range(10))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert order(0, 0) == [0, 1, 9, 6, 2, 7, 4, 5, 8, 3]  # pinned: no release of ours or NumPy's may change it


@pytest.mark.parametrize("num_samples, drop_last, count", [(40, True, 5), (41, True, 5), (41, False, 6), (5, False, 1)])
def test_number_of_batches(num_samples, drop_last, count):
    sampler = EpochBatchSampler(num_samples, 8, drop_last=drop_last)
    assert len(sampler) == len(list(sampler)) == count


def test_an_epoch_can_start_at_a_batch(noise_split, reference):
    loader = train_loader(noise_split)
    loader.batch_sampler.set_epoch(2, start_batch=3)
    assert len(loader) == 2 and loader.batch_sampler.batches_per_epoch == 5
    for batch, expected in zip(loader, reference[3:], strict=True):
        assert torch.equal(batch["image"], expected["image"])
    loader.batch_sampler.set_epoch(3)
    assert len(loader) == 5


def test_a_sharded_epoch_can_start_at_a_batch(noise_split):
    """Batch 2 of all = batch 1 of each of two processes; both ways of accelerate give what was left."""
    for process_index in range(2):
        sharding = dict(num_processes=2, process_index=process_index)
        loader, resumed = (prepare_data_loader(train_loader(noise_split), **sharding) for _ in range(2))
        loader.set_epoch(6)
        whole = list(loader)
        resumed.batch_sampler.batch_sampler.set_epoch(6, start_batch=2)
        resumed.set_epoch(6)
        rest = list(resumed)
        assert_same_samples(by_sample(rest), by_sample(whole[1:]))
        assert len(list(resumed)) == 2  # the next epoch is whole again
        loader.set_epoch(6)
        skipped = skip_first_batches(loader, 1)
        skipped.set_epoch(6)
        assert_same_samples(by_sample(skipped), by_sample(whole[1:]))


def test_a_dataset_travels_to_worker_processes(noise_split):
    dataset = ReplayableDataset(noise_split, SETTINGS.training(), seed=9)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[1, 2]["image"], dataset[1, 2]["image"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named_while_loading(make_folder, num_workers):
    from kdvit.data import open_data

    folder = make_folder({"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1})
    (folder / "train/dog/02.png").write_text("no image")
    with pytest.raises(ValueError, match=f"data: {folder}/train/dog/02.png must be a readable image"):
        list(train_loader(open_data(folder).train, num_workers=num_workers))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(num_samples=0, batch_size=1), "num_samples must be >= 1, got 0"),
        (dict(num_samples=4, batch_size=0), "batch_size must be >= 1, got 0"),
        (dict(num_samples=4, batch_size=5, drop_last=True), r"batch_size must be <= 4 .* with drop_last, got 5; use"),
        (dict(num_samples=4, batch_size=2, start_batch=3), r"start_batch must be in \[0, 2\], got 3"),
        (dict(num_samples=4, batch_size=2, seed=-1), r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=f"^EpochBatchSampler: {sentence}"):
        EpochBatchSampler(**options)
