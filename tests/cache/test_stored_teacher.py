"""A stored teacher says what the live one says, to the rounding of its form."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from kdvit import Distiller, Progress, Student, Teacher
from kdvit.cache import StoredTeacher, build
from kdvit.data import make_loader
from kdvit.losses import Loss, make
from kdvit.taps.reader import Request
from kdvit.training import transform_for
from tests.cache.conftest import distiller, settings, teacher
from tests.training.conftest import MEAN, STD, vit

LOSSES = {
    "kd": lambda: ["kd"],
    "dkd": lambda: ["dkd"],
    "vitkd": lambda: ["vitkd"],
    "fitnet": lambda: ["fitnet"],
    "tinymim and minilm": lambda: ["tinymim", "minilm"],
    "rkd": lambda: ["rkd"],
    "simkd": lambda: [make("simkd", feature="pooled")],
    "promptkd": lambda: ["promptkd"],
}


def loader_for(subject: Distiller, data, num_workers: int = 0, **options):
    facts = {"batch_size": 8, "seed": 0, "train": True, "num_workers": num_workers, "rows": subject.stored_rows}
    return make_loader(data.train, transform_for(subject.student), **{**facts, **options})


def first_batch(subject: Distiller, data, epoch: int = 0) -> dict:
    loader = loader_for(subject, data)
    loader.batch_sampler.set_epoch(epoch)
    return next(iter(loader))


def losses_of(subject: Distiller, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # of masks
    stored = {"stored": batch["rows"]} if subject.stored_rows is not None else {}
    return subject.eval()(batch["image"], batch["label"], **stored).losses


class Perturbed:
    """A live teacher whose signals are changed by a function."""

    def __init__(self, live: Teacher, change) -> None:
        self.live, self.change, self.forward = live, change, live.forward

    def __enter__(self) -> None:
        def forward(images):
            signals = self.forward(images)
            return {r: self.change(x) if isinstance(x, torch.Tensor) else x for r, x in signals.items()}

        self.live.forward = forward

    def __exit__(self, *error) -> None:
        del self.live.forward


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_live_ones_to_fp16_rounding(name, store, data):
    live = distiller(teacher(), LOSSES[name]())
    stored = distiller(store(LOSSES[name](), epochs=1), LOSSES[name]())
    batch = first_batch(stored, data)
    ours, theirs = losses_of(stored, batch), losses_of(live, batch)
    # Exactly: what is stored is the live signal, rounded to fp16.
    with Perturbed(live.teacher, lambda x: x.half().float()):
        rounded = losses_of(live, batch)
    assert ours == rounded and len(ours) > 1
    # And what that rounding does is what any relative errors of 2^-11 do: twelve draws say how much that is. Rounding
    # errors are smaller than that in the mean, so six standard deviations are out of reach for chance alone. 1e-6 is
    # for the draws' own float32.
    generator, draws = torch.Generator().manual_seed(0), []
    with Perturbed(live.teacher, lambda x: x * (1 + 2**-11 * torch.randn(x.shape, generator=generator))):
        draws = [losses_of(live, batch) for _ in range(12)]
    for part, value in theirs.items():
        spread = torch.stack([draw[part] - value for draw in draws]).square().mean().sqrt()
        assert (ours[part] - value).abs() <= 6 * spread + 1e-6 * value.abs(), part
    assert any(ours[part] != value for part, value in theirs.items() if part != "task")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_fp32_is_exact_with_any_number_of_workers(num_workers, store, data):
    names = ["kd", "tinymim", "fitnet"]
    live, stored = distiller(teacher(), names), distiller(store(names, form="fp32"), names)
    loader = loader_for(stored, data, num_workers)
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == 4
        for batch in batches:
            assert losses_of(stored, batch) == losses_of(live, batch)


def test_rows_are_read_in_the_step_where_the_loader_gives_none(store, data):
    stored = distiller(store(), ["kd"])
    batch = first_batch(stored, data, epoch=1)
    loaded = stored(batch["image"], batch["label"], stored=batch["rows"])
    progress = Progress(step=7, epoch=1.75, total_steps=8, total_epochs=2.0)
    read = stored(batch["image"], batch["label"], sample_ids=batch["sample_id"], progress=progress)
    assert torch.equal(loaded.loss, read.loss)
    other = stored(batch["image"], batch["label"], sample_ids=batch["sample_id"], progress=Progress(epoch=0.75))
    assert not torch.equal(other.loss, read.loss)  # another augmentation


def test_one_sentence_where_rows_are_not_given(store, data):
    stored = distiller(store(), ["kd"])
    batch = first_batch(stored, data)
    for given in ({}, {"sample_ids": batch["sample_id"]}, {"progress": Progress()}):
        with pytest.raises(
            ValueError, match=r'^Distiller: a stored teacher .* stored=batch\["rows"\]\), or give sampl'
        ):
            stored(batch["image"], batch["label"], **given)
    with pytest.raises(
        ValueError, match=r"^StoredTeacher: rows must have 'logits:value' for the 8 images of the batch"
    ):
        stored(batch["image"], batch["label"], stored={"0": {}})
    with pytest.raises(ValueError, match=r"for the 3 images of the batch; take them from a loader for this Distiller"):
        stored(batch["image"][:3], batch["label"][:3], stored=batch["rows"])


def test_signals_look_like_the_live_ones(store):
    names = ["kd", "tinymim", "vitkd", "rkd"]
    live, stored = distiller(teacher(), names), distiller(store(names), names)
    assert live.signals["teacher"] == stored.signals["teacher"]
    assert live.parameters_without_gradient == stored.parameters_without_gradient
    ours, theirs = (dict(each.losses.state_dict()) for each in (live, stored))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_blocks_may_be_named_in_another_way(store):
    """From the end, from the front, as a share of the depth."""
    stored = store([make("fitnet", teacher_stage=-1)])
    for stage in (-1, 1, 1.0):
        distiller(stored, [make("fitnet", teacher_stage=stage)])
    for loss, what in (("kd", "logits"), (make("fitnet", teacher_stage=0), "feature_map at 0")):
        name = getattr(loss, "name", loss)
        with pytest.raises(ValueError) as caught:
            distiller(stored, [loss])
        assert str(caught.value) == (
            f"Distiller: loss '{name}' reads {what} of teacher 'wide', and '{stored.folder}' stores feature_map@1 "
            f"(fp16); build a cache for this loss (kdvit cache build --loss {name} with its options), or use the live "
            "teacher."
        )
    with pytest.raises(ValueError, match=r"wide: block must be in 0..1 \(or -2..-1 from the end\), got 5"):
        distiller(stored, [make("fitnet", teacher_stage=5)])


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda: make("mlld"), "reads a second view"),
        (lambda: make("crosskd"), "reads the tail (the rest of the model, as a function)"),
        (lambda: make("ptloss"), "must be calibrated with signals for held-out images"),
    ],
)
def test_losses_that_need_the_live_teacher(loss, what, store):
    """Before the first batch: of a Distiller, and of a building."""
    stored = store(["kd", "fitnet"])
    name = loss().name
    with pytest.raises(ValueError) as caught:
        distiller(stored, [loss()])
    assert str(caught.value) == (
        f"Distiller: loss '{name}' {what} of teacher 'wide', and '{stored.folder}' stores logits (fp16), "
        "feature_map@1 (fp16); use the live teacher."
    )
    with pytest.raises(ValueError) as caught:
        store([loss()])
    assert str(caught.value) == (
        f"cache: loss '{name}' must need no more of a teacher than can be stored, and it {what}; train it with the "
        "live teacher."
    )


def test_classifier_is_stored_for_the_losses_that_use_it(store):
    live = teacher()
    stored = store([make("simkd", feature="pooled")], live=live)
    x = torch.randn(3, 32)
    torch.testing.assert_close(stored.classifier()(x), live.model.head(x))
    assert not any(p.requires_grad for p in stored.classifier().parameters())
    deployed = distiller(stored, [make("simkd", feature="pooled")]).deployable
    torch.testing.assert_close(deployed.loss.head(x), live.model.head(x))
    without = store(["rkd"])
    with pytest.raises(ValueError, match=r"must store the teacher's classifier, and stores pooled \(fp16\); build it"):
        without.classifier()
    with pytest.raises(ValueError, match=r"loss 'simkd' needs the classifier of teacher 'wide'"):
        distiller(without, [make("simkd", feature="pooled")])
    with pytest.raises(ValueError, match=r"loss 'asks' reads head of teacher 'wide', and .* stores pooled \(fp16\); b"):
        distiller(without, [AsksTheClassifier()])


def test_projected_features_are_a_narrower_teacher(store, data):
    stored = store(["fitnet", "rkd"], form="project16")
    subject = distiller(stored, ["fitnet", "rkd"])
    infos = subject.signals["teacher"][0]
    assert {request.signal: info.dim for request, info in infos.items()} == {"feature_map": 16, "pooled": 16}
    batch = first_batch(subject, data)
    assert all(value.isfinite() for value in losses_of(subject, batch).values())
    # The very matrix is in the cache, and what was stored is the live signal through it.
    from safetensors.torch import load_file

    matrix = load_file(stored.folder / "constants.safetensors")["projection.32.16"]
    live = distiller(teacher(), ["rkd"]).teacher(batch["image"])[Request("pooled")]
    torch.testing.assert_close(batch["rows"]["0"]["pooled:value"].float(), live @ matrix, rtol=2**-10, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^cache: form project<k> must not be used where a loss applies the teacher's"
    ):
        store(["promptkd"], form="project16")


def test_top_k_teaches_nearly_what_the_logits_do(store, data):
    live, stored = distiller(teacher(), ["kd"]), distiller(store(form="top5"), ["kd"])
    batch = first_batch(stored, data)
    theirs = live.teacher(batch["image"])[Request("logits")]
    ours = stored.teacher(batch["image"], batch["rows"]["0"])[Request("logits")]
    top = theirs.topk(5, dim=1).indices
    torch.testing.assert_close(ours.gather(1, top), theirs.gather(1, top), rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(
        ours.softmax(1).gather(1, top).sum(1), theirs.softmax(1).gather(1, top).sum(1), rtol=1e-2, atol=1e-3
    )
    assert F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="batchmean") < 0.05


def test_several_teachers_may_be_stored_and_live(store, data):
    first, second = teacher(), teacher(8)
    folder = store(["kd"], live=[first, second]).folder.parent
    assert sorted(path.name for path in folder.iterdir()) == ["teacher-1", "teacher-2"]
    kept = [StoredTeacher(folder / f"teacher-{number}") for number in (1, 2)]
    live, mixed, both = (distiller(list(each), ["kd"]) for each in ([first, second], [first, kept[1]], kept))
    batch = first_batch(both, data)
    value = losses_of(live, batch)["kd"]
    for subject in (mixed, both):
        torch.testing.assert_close(losses_of(subject, batch)["kd"], value, rtol=1e-3, atol=0)
    swapped = losses_of(distiller(kept[::-1], ["kd"]), batch)["kd"]
    torch.testing.assert_close(swapped, value, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"the list of teachers must name different ones, got one of them twice"):
        distiller([kept[0], StoredTeacher(kept[0].folder)], ["kd"])


def test_one_folder_may_serve_several_distillers(store, data):
    stored = store(["kd", "rkd"])
    first, second = distiller(stored, ["kd"]), distiller(stored, ["rkd"])
    assert first.teacher is stored and second.teacher is not stored
    batch, other = first_batch(first, data), first_batch(second, data)
    assert list(batch["rows"]["0"]) == ["logits:value"] and list(other["rows"]["0"]) == ["pooled:value"]
    assert losses_of(first, batch)["kd"].isfinite() and losses_of(second, other)["rkd.angle"].isfinite()


def test_it_moves_copies_and_pickles(store, data):
    subject = distiller(store(["promptkd"]), ["promptkd"])
    batch = first_batch(subject, data)  # files are open now
    value = losses_of(subject, batch)
    for other in (copy.deepcopy(subject), pickle.loads(pickle.dumps(subject))):
        assert losses_of(other, batch) == value
        assert losses_of(other, first_batch(other, data)) == value
    keys = [(0, int(sample)) for sample in batch["sample_id"]]
    rows = pickle.loads(pickle.dumps(subject.stored_rows))(keys)  # as a spawned worker process has it
    assert torch.equal(rows[3]["0"]["logits:value"], batch["rows"]["0"]["logits:value"][3])
    twice = copy.deepcopy(subject).double()
    batch["image"] = batch["image"].double()
    assert losses_of(twice, batch)["promptkd"].item() == pytest.approx(value["promptkd"].item(), rel=1e-5)
    assert not subject.teacher.training and not subject.train().teacher.training
    assert not [name for name in subject.state_dict() if "teacher" in name.split(".")[0]]


@pytest.mark.slow
def test_a_compiled_step_is_the_same(store, data):
    subject = distiller(store(["kd", "tinymim"]), ["kd", "tinymim"]).eval()
    batch = first_batch(subject, data)
    compiled = torch.compile(subject, fullgraph=True, backend="eager")
    out = compiled(batch["image"], batch["label"], stored=batch["rows"])
    torch.testing.assert_close(out.loss, subject(batch["image"], batch["label"], stored=batch["rows"]).loss)


def test_description_and_facts(store):
    live = teacher()
    stored = store(["kd"], live=live)
    text = distiller(stored, ["kd"]).describe()
    assert (
        re.search(r"teacher +wide +1x28x28 +28k +stored +0.5 / 0.5", text)
        and "image bridge, student to teacher: change of norm" in text
    )
    assert stored.num_parameters == sum(p.numel() for p in live.model.parameters()) and stored.num_macs > 0
    assert stored.accuracy["num_images"] == 12 and 0 <= stored.accuracy["top1"] <= 100
    with pytest.raises(RuntimeError, match=r"^StoredTeacher: 'wide' is stored, and there is no model .* live teacher"):
        stored.predict(torch.zeros(1, 1, 28, 28))
    assert StoredTeacher(stored.folder, name="other").name == "other"


def test_class_map_and_dtype_are_the_live_ones(store, data):
    live = Teacher(
        vit(7, embed_dim=32, num_classes=13), class_map=[12, *range(1, 10)], dtype=torch.bfloat16, name="wide"
    )
    stored = store(["kd"], live=live)
    assert stored.class_map.tolist() == [12, *range(1, 10)] and stored.accuracy["num_images"] == 12
    subject = distiller(stored, ["kd"])
    batch = first_batch(subject, data)
    live_losses = losses_of(distiller(live, ["kd"]), batch)
    torch.testing.assert_close(losses_of(subject, batch)["kd"], live_losses["kd"], rtol=1e-3, atol=0)


def test_a_teacher_of_other_classes_has_no_accuracy(store):
    assert store(["rkd"], live=Teacher(vit(7, num_classes=4))).accuracy is None


class AsksTheClassifier(Loss):
    """What the teacher's classifier thinks of its own features."""

    name = "asks"

    def forward(self, student_logits, teacher_pooled, teacher_head):
        return F.mse_loss(student_logits, teacher_head(teacher_pooled))


class ClassAndDistillation(Loss):
    """Reads both heads of a distilled teacher."""

    name = "both_heads"

    def forward(self, student_logits, teacher_logits, teacher_dist_logits):
        return F.mse_loss(student_logits, teacher_logits) + F.mse_loss(student_logits, teacher_dist_logits)


def test_logits_of_one_head_are_not_those_of_both(store):
    """Beside the distillation head's, ``logits`` are the class head's alone."""
    sizes = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 24, "depth": 2}
    live = Teacher(timm.create_model("deit_tiny_distilled_patch16_224", num_heads=2, **sizes), name="wide")
    stored = store([ClassAndDistillation()], live=live)
    distiller(stored, [ClassAndDistillation()])
    distiller(stored, [ClassAndDistillation(), "kd"])
    with pytest.raises(
        ValueError, match=r"loss 'kd' reads logits of .* stores logits of the class head \(fp16\), dist_"
    ):
        distiller(stored, ["kd"])


def test_a_plain_teacher_is_read_by_path(store, data):
    plain = nn.Sequential(
        nn.Conv2d(1, 6, 7, stride=7), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
    )
    live = Teacher(plain, input_size=(1, 28, 28), name="wide")
    loss = lambda: make("fitnet", teacher_stage="1")  # noqa: E731
    subject = distiller(store([loss()], live=live), [loss()])
    batch = first_batch(subject, data)
    torch.testing.assert_close(
        losses_of(subject, batch)["fitnet"], losses_of(distiller(live, [loss()]), batch)["fitnet"], rtol=1e-3, atol=0
    )


def test_teachers_that_replay_differently_are_refused(store):
    first, second = store(["kd"], augmentation_epochs=1), store(["kd"], live=teacher(8))
    with pytest.raises(
        ValueError, match=r"^Distiller: stored teachers must replay equally many epochs, got \['1', 'No"
    ):
        distiller([first, second], ["kd"])


def test_images_of_another_kind_are_refused(store):
    """What the teacher was shown depends on the student's size and normalisation."""
    stored = store(["kd"])
    with pytest.raises(ValueError) as caught:
        Distiller(stored, Student(vit(), mean=(0.5,), std=(0.5,)), ["kd"])
    assert "must be used with the images that it was made from" in str(caught.value)
    assert "normalisation_scale is [0.70" in str(caught.value) and "there and None here" in str(caught.value)


def test_students_of_any_size_and_of_one_size_share_a_cache(data, tmp_path):
    """A CNN takes any size and a ViT its own: of one input size, their teacher was shown the same."""

    def cnn():
        model = timm.create_model("resnet18", in_chans=1, num_classes=10, channels=(8, 8, 8, 8))
        return Student(model, input_size=(1, 28, 28), mean=MEAN, std=STD)

    for number, (first, second) in enumerate(((vit, cnn), (cnn, vit))):
        made = {vit: lambda taught_by: distiller(taught_by), cnn: lambda taught_by: Distiller(taught_by, cnn(), ["kd"])}
        (folder,) = build(tmp_path / str(number), made[first](teacher()), data, settings(epochs=1), quiet=True)
        subject = made[second](StoredTeacher(folder))
        rows = first_batch(subject, data)
        assert losses_of(subject, rows)["kd"] > 0
    smaller = Student(vit(img_size=14), mean=MEAN, std=STD)
    with pytest.raises(
        ValueError, match=r"image_size is \[28, 28\] there and \[14, 14\] here; give the student the same"
    ):
        Distiller(StoredTeacher(folder), smaller, ["kd"])
