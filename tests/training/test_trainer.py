"""What the Trainer does with its settings."""

from __future__ import annotations

import math
import multiprocessing

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student, Teacher
from kdvit.data import TransformSettings, make_loader
from kdvit.losses import KD, FitNet, Loss, TinyMIM, ViTKD
from kdvit.training import transform_for
from tests.training.conftest import MEAN, STD, distiller, metrics, vit


class Listener(Loss):
    """Keeps the labels that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Tensor] = []

    def forward(self, student_logits: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.heard.append(labels.clone())
        return 0 * student_logits.sum()


def test_the_losses_go_down(make_trainer):
    trainer = make_trainer(distiller([KD(), ViTKD(alpha=1e-3, beta=1e-3)]), epochs=12, lr=3e-3, weight_decay=0.0)
    steps = metrics(trainer.fit(), "step")
    assert [step["step"] for step in steps] == list(range(1, 49))
    for name in ("task", "vitkd.mimic", "vitkd.generate"):
        first, last = (sum(step["losses"][name] for step in part) / 4 for part in (steps[:4], steps[-4:]))
        assert last < 0.9 * first, name


def test_epochs_and_steps_are_two_ways_to_say_it(make_trainer):
    by_epochs, by_steps = make_trainer(distiller(), epochs=2), make_trainer(distiller(), steps=6)
    assert (by_epochs.total_steps, by_epochs.num_epochs) == (8, 2)
    assert (by_steps.total_steps, by_steps.num_epochs) == (6, 2)
    assert (by_epochs.fit().num_steps, by_steps.fit().num_steps) == (8, 6)
    assert [(r["step"], r["epoch"]) for r in metrics(by_steps.folder.path, "evaluation")] == [(4, 1), (6, 2)]


def test_evaluation_every_so_many_epochs_and_at_the_end(make_trainer):
    result = make_trainer(distiller(), epochs=3, evaluate_epochs=2).fit()
    assert [record["epoch"] for record in metrics(result, "evaluation")] == [2, 3]


def test_metrics_are_means_since_the_line_before(make_trainer):
    every = metrics(make_trainer(distiller(), epochs=1).fit(), "step")
    paired = metrics(make_trainer(distiller(), epochs=1, log_steps=2).fit(), "step")
    assert [record["step"] for record in paired] == [2, 4]
    for name in ("task", "kd"):
        expected = (every[0]["losses"][name] + every[1]["losses"][name]) / 2
        assert paired[0]["losses"][name] == pytest.approx(expected, rel=1e-6)
    assert all(record["loss"] == pytest.approx(sum(record["losses"].values()), rel=1e-6) for record in paired)


def test_learning_rate_warms_up_and_follows_a_cosine(make_trainer):
    options = dict(lr=1e-2, warmup_epochs=1.0, warmup_lr=1e-4, min_lr=1e-5)
    rates = [r["lr"] for r in metrics(make_trainer(distiller(), epochs=4, **options).fit(), "step")]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[2] == pytest.approx(1e-4 + (1e-2 - 1e-4) * 2 / 4)
    assert rates[4] == max(rates) == pytest.approx(1e-2)
    assert rates[10] == pytest.approx(1e-5 + (1e-2 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 6 / 11)))
    assert rates[15] == min(rates) == pytest.approx(1e-5)


def test_trainers_of_one_process_keep_their_own_settings(make_trainer):
    first = make_trainer(distiller(), mixed_precision="bf16", accumulation_steps=2)
    second = make_trainer(distiller(), mixed_precision="no", accumulation_steps=1)
    for trainer, precision, count in ((first, "bf16", 2), (second, "no", 1)):
        assert trainer.accelerator.mixed_precision == precision
        assert trainer.accelerator.gradient_accumulation_steps == count
        assert trainer.fit().num_steps == 4 // count
        assert trainer.epoch == 1


def test_learning_rate_without_warm_up_starts_at_its_peak(make_trainer):
    rates = [r["lr"] for r in metrics(make_trainer(distiller(), steps=2, warmup_epochs=0, min_lr=0.0).fit(), "step")]
    assert rates == pytest.approx([1e-3, 0.0], abs=1e-12)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_two_halves_accumulated_are_one_whole(make_trainer, clip_norm):
    options = dict(epochs=2, optimizer="momentum", lr=0.1, warmup_epochs=0, clip_norm=clip_norm)
    whole = make_trainer(distiller(), batch_size=32, **options)
    halves = make_trainer(distiller(), batch_size=16, accumulation_steps=2, **options)
    assert whole.fit().num_steps == halves.fit().num_steps == 4
    assert [r["lr"] for r in metrics(whole.folder.path, "step")] == [
        r["lr"] for r in metrics(halves.folder.path, "step")
    ]
    start = vit().state_dict()
    for (name, ours), theirs in zip(whole.student.named_parameters(), halves.student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(ours, start[name]), name


def test_clipping_bounds_the_step(make_trainer):
    moved = {}
    for clip_norm in (None, 0.01):
        trainer = make_trainer(
            distiller(), steps=1, optimizer="momentum", lr=1.0, weight_decay=0.0, warmup_epochs=0, clip_norm=clip_norm
        )
        trainer.fit()
        pairs = zip(trainer.student.parameters(), vit().parameters(), strict=True)
        moved[clip_norm] = math.sqrt(sum(float((ours - start).detach().square().sum()) for ours, start in pairs))
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3)
    assert moved[None] > 0.1


@pytest.mark.parametrize(
    ("options", "largest", "smallest"),
    [
        ({"label_smoothing": 0.1}, 0.91, 0.01),
        ({"mixup_alpha": 0.8}, 1.0, 0.0),
        ({"cutmix_alpha": 1.0}, 1.0, 0.0),
        ({"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1}, 0.91, 0.01),
    ],
)
def test_mixing_reaches_every_loss_as_soft_labels(make_trainer, options, largest, smallest):
    listener = Listener()
    make_trainer(distiller([listener, KD(), "dkd"]), **options).fit()
    heard = torch.cat(listener.heard)
    assert heard.shape == (64, 10) and heard.dtype == torch.float32
    torch.testing.assert_close(heard.sum(1), torch.ones(64))
    assert float(heard.max()) <= largest + 1e-6 and float(heard.min()) == pytest.approx(smallest, abs=1e-6)
    mixed = heard.max(1).values < largest - 1e-3
    assert bool(mixed.any()) == ("mixup_alpha" in options or "cutmix_alpha" in options)


def test_labels_are_class_ids_where_nothing_mixes(make_trainer, tiny_data):
    listener = Listener()
    make_trainer(distiller([listener])).fit()
    heard = torch.cat(listener.heard)
    assert sorted(heard.tolist()) == sorted(tiny_data.train.labels.tolist())


def test_the_average_of_the_weights_is_evaluated_and_saved(make_trainer, tiny_data):
    trainer = make_trainer(distiller(), epochs=2, lr=1e-2, ema_decay=0.7)
    seen, update = [], trainer.ema.update
    trainer.ema.update = lambda model, step: (
        seen.append([p.detach().clone() for p in model.parameters()]),
        update(model, step),
    )
    result = trainer.fit()
    average = [p.detach().clone() for p in vit().parameters()]
    for step, weights in enumerate(seen, start=1):
        decay = trainer.ema.get_decay(step)
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    assert len(seen) == 8 and 0 < decay <= 0.7
    loaded = timm.create_model(f"local-dir:{result.folder}/student", pretrained=True)
    for saved, expected, last in zip(loaded.parameters(), average, seen[-1], strict=True):
        torch.testing.assert_close(saved, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved, last)
    images, labels = whole(tiny_data, trainer.transform)
    with torch.no_grad():
        assert result.top1 == 100 * float((loaded.eval()(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "radam", "lookahead_adamw"])
def test_optimizers_of_timm_train(make_trainer, optimizer):
    trainer = make_trainer(distiller(), optimizer=optimizer, betas=(0.8, 0.95), momentum=0.5, lr=1e-3)
    trainer.fit()
    group = trainer.optimizer.param_groups[0]
    assert (group["momentum"] == 0.5) if optimizer == "sgd" else (tuple(group["betas"]) == (0.8, 0.95))
    assert not torch.equal(trainer.student.head.weight, vit().head.weight)


def test_weight_decay_spares_biases_norms_and_what_the_model_excludes(make_trainer):
    trainer = make_trainer(distiller([ViTKD()]), weight_decay=0.3)
    names = {id(p): name for name, p in trainer.plain.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert len(decays) == len(names)
    assert decays["student.model.blocks.0.attn.qkv.weight"] == 0.3
    for name in ("blocks.0.attn.qkv.bias", "norm.weight", "pos_embed", "cls_token"):
        assert decays[f"student.model.{name}"] == 0.0, name
    assert any(name.startswith("losses.vitkd.") for name in decays)


def test_the_losses_train_their_projectors(make_trainer):
    trainer = make_trainer(distiller([FitNet(student_stage=-1, teacher_stage=-1)]))
    before = {name: p.detach().clone() for name, p in trainer.plain.losses.named_parameters()}
    trainer.fit()
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in trainer.plain.losses.named_parameters())


def test_the_teacher_stays_as_it_was(make_trainer):
    teacher = timm.create_model("resnet18", in_chans=1, num_classes=10, channels=(8, 16, 24, 32), layers=(1, 1, 1, 1))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    make_trainer(distiller(teacher=Teacher(teacher, input_size=(1, 28, 28)))).fit()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_precision_may_differ_between_runs_of_one_process(make_trainer, precision):
    seen = []

    class Seer(Loss):
        def forward(self, student_normed_tokens: Tensor, student_logits: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return 0 * student_logits.float().sum()

    trainer = make_trainer(distiller([Seer(), KD(), TinyMIM()]), mixed_precision=precision)
    result = trainer.fit()
    assert all(math.isfinite(record["loss"]) for record in metrics(result, "step"))
    assert seen[-1] == (precision == "bf16")
    assert all(p.dtype == torch.float32 for p in trainer.student.parameters())


def test_a_feature_only_run_evaluates_nothing_and_saves(make_trainer):
    trainer = make_trainer(distiller([TinyMIM(num_relation_heads=2)], task_loss=None), lr=1e-2)
    head = trainer.student.head.weight.detach().clone()
    result = trainer.fit()
    assert (result.top1, result.top5, result.best_top1, result.best_epoch) == (None, None, None, None)
    assert metrics(result, "evaluation") == [] and not (result.folder / "best").exists()
    assert set(metrics(result, "step")[0]["losses"]) == {"tinymim.qk", "tinymim.vv"}
    loaded = timm.create_model(f"local-dir:{result.folder}/student", pretrained=True)
    assert torch.equal(loaded.head.weight, head)  # not even weight decay touches what no loss reaches
    assert not torch.equal(loaded.blocks[0].attn.qkv.weight, vit().blocks[0].attn.qkv.weight)


def test_plain_training_needs_no_teacher(make_trainer):
    result = make_trainer(Distiller(None, Student(vit(), mean=MEAN, std=STD), losses=[])).fit()
    assert result.teacher_top1 is None and result.top1 is not None
    assert set(metrics(result, "step")[0]["losses"]) == {"task"}


def test_the_teacher_is_evaluated_through_its_bridge(make_trainer, tiny_data):
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=12
    ).eval()
    class_map = [11, 3, 0, 1, 2, 4, 5, 6, 7, 8]
    subject = distiller(teacher=Teacher(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), class_map=class_map))
    result = make_trainer(subject).fit()
    pixels, labels = whole(
        tiny_data, TransformSettings(image_size=28, num_channels=1, mean=(0.0,), std=(1.0,), crop_padding=2)
    )
    images = F.interpolate((pixels.expand(-1, 3, -1, -1) - 0.5) / 0.5, size=(32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        right = model(images)[:, class_map].argmax(1) == labels
    assert result.teacher_top1 == 100 * float(right.float().mean())


def test_a_teacher_of_other_classes_is_not_evaluated(make_trainer):
    teacher = vit(7, num_classes=7)
    assert make_trainer(distiller(["vitkd"], teacher=teacher)).fit().teacher_top1 is None
    headless = vit(7, num_classes=0, global_pool="")
    assert make_trainer(distiller(["vitkd"], teacher=headless)).fit().teacher_top1 is None


def test_a_weight_may_change_with_progress(make_trainer):
    seen = []

    def weight(progress):
        seen.append((progress.step, round(progress.epoch, 3), progress.total_steps, progress.total_epochs))
        return 0.0 if progress.step < 2 else 1.0

    result = make_trainer(distiller([(weight, KD())]), steps=4, batch_size=32).fit()
    assert seen[-4:] == [(0, 0.0, 4, 2.0), (1, 0.5, 4, 2.0), (2, 1.0, 4, 2.0), (3, 1.5, 4, 2.0)]
    steps = metrics(result, "step")
    assert steps[1]["loss"] == pytest.approx(steps[1]["losses"]["task"])
    assert steps[2]["loss"] == pytest.approx(steps[2]["losses"]["task"] + steps[2]["losses"]["kd"])


@pytest.mark.parametrize(
    ("size", "normalisation", "expected"),
    [
        ((1, 28, 28), (MEAN, STD), dict(image_size=28, num_channels=1, mean=MEAN, std=STD, crop_padding=2)),
        ((3, 32, 32), None, dict(image_size=32, num_channels=3, crop_padding=4)),
        ((1, 28, 28), None, dict(mean=(0.5,), std=(0.5,))),
        ((3, 224, 224), None, dict(image_size=224, crop_padding=0, crop_scale=(0.08, 1.0))),
    ],
)
def test_the_transform_fits_the_student(size, normalisation, expected):
    mean, std = normalisation or (None, None)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * size[0], 10))
    settings = transform_for(Student(model, input_size=size, mean=mean, std=std))
    assert {name: getattr(settings, name) for name in expected} == expected


def test_images_that_are_not_square_are_refused():
    student = Student(nn.Flatten(), input_size=(3, 32, 48), name="wide")
    with pytest.raises(ValueError, match="Trainer: 'wide' takes 32x48 images, and the built-in transforms are square"):
        transform_for(student)


def whole(data, transform: TransformSettings) -> tuple[Tensor, Tensor]:
    batch = next(iter(make_loader(data.test, transform, batch_size=len(data.test), train=False)))
    return batch["image"], batch["label"]


def test_no_loader_process_outlives_its_run(make_trainer):
    before = set(multiprocessing.active_children())
    trainer = make_trainer(distiller(), num_workers=1)
    trainer.fit()
    assert set(multiprocessing.active_children()) == before
