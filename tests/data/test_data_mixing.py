import numpy as np
import pytest
import torch
from timm.data import Mixup

from kdvit.data import BatchMixer
from kdvit.data.randomness import mixed_seeds


def batch(size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, 3, 16, 12, generator=generator),
        torch.randint(5, (size,), generator=generator),
        torch.arange(size) + 100,
    )


OPTIONS = [
    dict(mixup_alpha=0.8),
    dict(cutmix_alpha=1.0, label_smoothing=0.1),
    dict(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.7, switch_probability=0.4, label_smoothing=0.1),
]
KINDS = [{"mixup"}, {"cutmix"}, {"mixup", "cutmix", "nothing"}]


@pytest.mark.parametrize("options, expected_kinds", list(zip(OPTIONS, KINDS, strict=True)), ids=str)
def test_equal_to_timm_for_the_same_generator(options, expected_kinds):
    mixer = BatchMixer(num_classes=5, seed=4, **options)
    timm_mixer = Mixup(
        mixup_alpha=mixer.mixup_alpha,
        cutmix_alpha=mixer.cutmix_alpha,
        prob=mixer.probability,
        switch_prob=mixer.switch_probability,
        label_smoothing=mixer.label_smoothing,
        num_classes=5,
    )
    images, labels, sample_ids = batch()
    state, kinds = np.random.get_state(), set()
    for epoch in range(30):
        np.random.seed(mixed_seeds(4, epoch, *sample_ids.tolist())[0] & 0xFFFFFFFF)
        expected_images, expected_labels = timm_mixer(images.clone(), labels)
        mixed, soft = mixer(images, labels, sample_ids, epoch)
        torch.testing.assert_close(mixed, expected_images, rtol=0, atol=1e-6)
        torch.testing.assert_close(soft, expected_labels, rtol=0, atol=1e-6)
        new_values = not torch.isin(mixed, images).all()
        kinds.add("mixup" if new_values else "nothing" if torch.equal(mixed, images) else "cutmix")
    np.random.set_state(state)
    assert kinds == expected_kinds


def test_draws_depend_on_seed_epoch_and_samples_alone(global_draws):
    draw, expected = global_draws
    images, labels, sample_ids = batch()
    kept = images.clone(), labels.clone()

    def mixed(seed=0, epoch=0, shift=0):
        mixer = BatchMixer(0.8, 1.0, num_classes=5, seed=seed)
        return mixer(images, labels, sample_ids + shift, epoch)[0]

    assert torch.equal(mixed(), mixed())
    assert all(not torch.equal(mixed(), mixed(**other)) for other in ({"seed": 1}, {"epoch": 1}, {"shift": 1}))
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])
    assert draw() == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 7])
def test_odd_batches_keep_the_sum_of_the_labels(options, size):
    images, labels, sample_ids = batch(size)
    mixed, soft = BatchMixer(num_classes=5, **options)(images, labels, sample_ids, epoch=1)
    assert mixed.shape == images.shape
    torch.testing.assert_close(soft.sum(1), torch.ones(size))
    middle = size // 2  # its own mirror image
    torch.testing.assert_close(mixed[middle], images[middle])


def test_cutmix_labels_are_the_shares_of_the_area():
    images = torch.zeros(2, 1, 10, 10)
    images[1] = 1.0
    mixer = BatchMixer(cutmix_alpha=1.0, num_classes=2)
    shares = []
    for epoch in range(20):
        mixed, soft = mixer(images, torch.tensor([0, 1]), torch.tensor([3, 8]), epoch)
        torch.testing.assert_close(soft[0, 1], mixed[0].mean())
        torch.testing.assert_close(soft[1, 0], 1 - mixed[1].mean())
        shares.append(soft[0, 1].item())
    assert max(shares) > 0.3 > min(shares)  # boxes of many sizes


@pytest.mark.parametrize("options", [{}, dict(mixup_alpha=0.8, probability=0.0)], ids=str)
def test_without_mixing_only_labels_are_smoothed(options):
    images, labels, sample_ids = batch()
    mixed, soft = BatchMixer(num_classes=5, label_smoothing=0.1, **options)(images, labels, sample_ids, epoch=0)
    assert torch.equal(mixed, images)
    torch.testing.assert_close(soft, 0.9 * torch.eye(5)[labels] + 0.02)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(mixup_alpha=-1, num_classes=5), "mixup_alpha must be >= 0, got -1"),
        (dict(cutmix_alpha=-1, num_classes=5), "cutmix_alpha must be >= 0, got -1"),
        (dict(num_classes=1), "num_classes must be >= 2, got 1"),
        (dict(num_classes=5, label_smoothing=1), r"label_smoothing must be in \[0, 1\), got 1"),
        (dict(num_classes=5, probability=1.1), r"probability must be in \[0, 1\], got 1.1"),
        (dict(num_classes=5, switch_probability=-0.1), r"switch_probability must be in \[0, 1\], got -0.1"),
        (dict(num_classes=5, seed=-1), r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_wrong_options(options, sentence):
    with pytest.raises(ValueError, match=f"^BatchMixer: {sentence}"):
        BatchMixer(**options)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x, y, ids: (x[0], y, ids), r"images must be \(B, C, H, W\) of a floating-point type, got"),
        (lambda x, y, ids: (x.byte(), y, ids), "images must be .*, got .* of torch.uint8; normalise and stack"),
        (lambda x, y, ids: (x, y[:2], ids), r"labels and sample_ids must be \(6,\) whole.*, got \(2,\) of torch"),
        (lambda x, y, ids: (x, y.float(), ids), r"labels and sample_ids must be \(6,\) whole.*, got .* of torch.float"),
        (lambda x, y, ids: (x, y, ids[:1]), r"got \(6,\) of torch.int64 and \(1,\); pass the loader's batch as it is"),
    ],
)
def test_wrong_batches(change, sentence):
    with pytest.raises(ValueError, match=f"^BatchMixer: .*{sentence}"):
        BatchMixer(0.8, num_classes=5)(*change(*batch()), epoch=0)
