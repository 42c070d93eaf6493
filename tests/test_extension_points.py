"""What losses may ask for beyond one forward pass of each model, at the Distiller and in the Trainer's data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kdvit
from kdvit import Distiller, Progress, Student
from kdvit.losses import KD, Loss, Scheduled, Standardized, get, make
from kdvit.losses.frozen import Frozen
from kdvit.losses.standardized import standardize
from kdvit.schedules import Cosine, Linear, Steps, WarmUp
from tests import tiny


class TwoViews(Loss):
    """Reads logits of both views, and one block of the second."""

    def locations(self):
        return {"student_tokens": 0}

    def forward(self, student_logits, second_student_logits, second_teacher_logits, second_student_tokens) -> dict:
        return {
            "first": student_logits.square().mean(),
            "second": (second_student_logits - second_teacher_logits).square().mean(),
            "tokens": second_student_tokens.square().mean(),
        }


class Reruns(Loss):
    """The student once more, on darker images."""

    def locations(self):
        return {"student_cls_token": (0, -1)}

    def forward(self, student_logits, student_cls_token, images, rerun_student) -> Tensor:
        again = rerun_student(images / 2)
        assert set(again) == {"student_logits", "student_cls_token"} and len(again["student_cls_token"]) == 2
        return (again["student_logits"] - student_logits.detach()).square().mean()


class Fitted(Loss):
    """Shifts the logits by what a calibration found."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))
        self.is_fitted, self.seen = False, []

    def needs_calibration(self) -> bool:
        return not self.is_fitted

    def calibrate(self, teacher_logits: Tensor, labels: Tensor) -> None:
        self.seen.append((teacher_logits, labels))
        self.shift.fill_(teacher_logits.mean())
        self.is_fitted = True

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return (student_logits - teacher_logits - self.shift).square().mean()


def pair(*losses, **options) -> Distiller:
    return Distiller(tiny.vit(7), tiny.vit(), list(losses), **options)


def test_a_second_view_goes_through_both_models():
    distiller = pair(TwoViews(), task_loss=None)
    images, second = tiny.images(), tiny.images(seed=2)
    out = distiller(images, second_images=second)
    student, teacher = distiller.student.model, distiller.teacher.model
    assert out.losses["twoviews.first"] == pytest.approx(student(images).square().mean().item(), rel=1e-5)
    expected = (student(second) - teacher(second)).square().mean().item()
    assert out.losses["twoviews.second"] == pytest.approx(expected, rel=1e-5)
    assert distiller.reads_second_view and not pair("kd").reads_second_view
    torch.testing.assert_close(out.logits, student(images))


def test_the_gradient_flows_through_both_views():
    distiller = pair(TwoViews(), task_loss=None)
    images = tiny.images()
    distiller(images, second_images=tiny.images(seed=2)).loss.backward()
    both = distiller.student.model.head.weight.grad.clone()
    distiller.zero_grad()
    distiller(images, second_images=tiny.images(seed=3)).loss.backward()
    assert (both - distiller.student.model.head.weight.grad).abs().max() > 1e-4


def test_a_missing_or_unfitting_second_view_is_refused():
    distiller = pair(TwoViews(), task_loss=None)
    with pytest.raises(ValueError) as error:
        distiller(tiny.images())
    assert str(error.value) == (
        "Distiller: loss 'twoviews' reads a second view, got none; call distiller(..., second_images=...) with another "
        "augmentation of the same images."
    )
    with pytest.raises(ValueError, match=r"second_images must have the shape of images, \(4, 3, 32, 32\), got \(2, 3"):
        distiller(tiny.images(), second_images=tiny.images(2))


def test_a_loss_may_run_the_student_again():
    distiller = pair(Reruns(), task_loss=None)
    images = tiny.images()
    out = distiller(images)
    student = distiller.student.model
    expected = (student(images / 2) - student(images)).square().mean()
    assert out.losses["reruns"] == pytest.approx(expected.item(), rel=1e-4)
    out.loss.backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_calibration_sees_all_batches_and_comes_before_training():
    distiller = pair(Fitted(), KD())
    images, labels = tiny.images(6), tiny.labels(6)
    distiller.eval()(images, labels)  # evaluating needs none
    with pytest.raises(RuntimeError) as error:
        distiller.train()(images, labels)
    assert str(error.value) == (
        "Distiller: loss 'fitted' must be calibrated before training; call kdvit.calibrate(distiller, batches) with "
        "batches of held-out images and labels."
    )
    kdvit.calibrate(distiller, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    ((logits, seen_labels),) = distiller.losses["fitted"].seen
    torch.testing.assert_close(logits, distiller.teacher.model(images))
    assert torch.equal(seen_labels, labels) and not logits.requires_grad
    assert distiller.train()(images, labels).loss.isfinite()
    kdvit.calibrate(distiller, [])  # nobody asks any more
    with pytest.raises(ValueError, match="calibrate: batches must hold at least one, got none"):
        kdvit.calibrate(pair(Fitted()), [])


def test_calibration_takes_as_many_batches_as_fit(monkeypatch):
    class Mapped(Fitted):
        def locations(self) -> dict:
            return {"teacher_feature_map": -1}

        def calibrate(self, teacher_feature_map: Tensor) -> None:
            self.seen.append(teacher_feature_map)
            self.is_fitted = True

        def forward(self, student_logits: Tensor, teacher_feature_map: Tensor) -> Tensor:
            return student_logits.mean()

    drawn = []

    def batches():
        for seed in range(4):
            drawn.append(seed)
            yield tiny.images(2, seed=seed), tiny.labels(2)

    map_bytes = 4 * 2 * pair().teacher.model.embed_dim * 4 * 4  # of two images
    logit_bytes = 4 * 2 * tiny.NUM_CLASSES + 8 * 2  # and their labels
    for room, num_maps, num_drawn in (
        (map_bytes - 1, 2, 4),  # one batch in any case; the logits of all fit
        (3 * map_bytes - 1, 4, 4),
        (4 * map_bytes, 8, 4),
        (logit_bytes, 2, 1),  # and nothing is loaded that nobody takes
    ):
        monkeypatch.setattr("kdvit.calibration.MAX_BYTES", room)
        drawn.clear()
        distiller = pair(Mapped(), Fitted())
        kdvit.calibrate(distiller, batches())
        (maps,), ((logits, labels),) = (loss.seen for loss in distiller.losses.values())
        assert (len(maps), len(logits), len(drawn)) == (num_maps, 2 * num_drawn, num_drawn)
        assert len(labels) == len(logits)


def test_calibration_is_asked_for_whenever_it_is_missing():
    loss = make("ptloss")
    distiller = pair(loss)
    batch = (tiny.images(20), tiny.labels(20))
    before = distiller.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    kdvit.calibrate(distiller, [batch])
    distiller.train()(*batch)
    distiller.load_state_dict(before)
    with pytest.raises(RuntimeError, match="loss 'ptloss' must be calibrated before training"):
        distiller(*batch)


def test_what_calibrate_cannot_be_given_is_refused():
    class Wrong(Fitted):
        def calibrate(self, student_logits: Tensor) -> None: ...

    class Missing(Loss):
        def needs_calibration(self) -> bool:
            return True

        def forward(self, student_logits: Tensor) -> Tensor:
            return student_logits.mean()

    with pytest.raises(
        TypeError, match="Wrong: calibrate has an unknown input 'student_logits'; known here: labels, te"
    ):
        pair(Wrong())
    with pytest.raises(TypeError, match="Missing: a loss that needs calibration must have a method calibrate"):
        pair(Missing())


def test_one_loss_object_twice_is_refused():
    loss = KD()
    with pytest.raises(
        ValueError, match=r"Distiller: losses must be objects of their own, got one KD\(temperature=4.0\) tw"
    ):
        pair(loss, (0.5, loss))


def test_a_wrapped_loss_is_calibrated_with_what_it_will_see():
    distiller = pair(Standardized(Fitted()))
    kdvit.calibrate(distiller, [(tiny.images(), tiny.labels())])
    ((logits, labels),) = distiller.losses["standardized_"].loss.seen
    assert torch.equal(labels, tiny.labels())
    torch.testing.assert_close(logits, standardize(distiller.teacher.model(tiny.images()), 1e-7))


def test_parts_on_the_teachers_side_train_and_stay_behind():
    class Simplified(Loss):
        def build(self, student, teacher) -> None:
            self.simplifier = nn.Linear(teacher["logits"].dim, student["logits"].dim)

        def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return (student_logits - self.simplifier(teacher_logits)).square().mean()

    distiller = pair(Simplified())
    distiller(tiny.images(), tiny.labels()).loss.backward()
    assert distiller.losses["simplified"].simplifier.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    assert distiller.student_state_dict().keys() == tiny.vit().state_dict().keys()


def test_frozen_modules_pass_the_gradient_and_move():
    class Generated(Loss):
        def __init__(self) -> None:
            super().__init__()
            self.generator = Frozen(nn.Sequential(nn.Linear(tiny.NUM_CLASSES, 6), nn.BatchNorm1d(6)))

        def forward(self, student_logits: Tensor) -> Tensor:
            return self.generator(student_logits).square().mean()

    loss = Generated()
    distiller = Distiller(None, tiny.vit(), [loss], task_loss=None).train()
    before = loss.generator.module[1].running_mean.clone()
    distiller(tiny.images()).loss.backward()
    assert distiller.student.model.head.weight.grad.abs().max() > 0
    assert not list(loss.parameters()) and not loss.state_dict() and not loss.generator.module.training
    assert torch.equal(before, loss.generator.module[1].running_mean)
    loss.generator.module.train()
    distiller(tiny.images())
    assert not loss.generator.module.training
    distiller.double()
    assert loss.generator.module[0].weight.dtype == torch.float64


# Schedules


def test_schedules_by_hand():
    def at(schedule, epoch):
        return schedule(Progress(epoch=epoch, total_epochs=100))

    assert [at(WarmUp(2.0, epochs=4), e) for e in (0, 0.99, 1, 3, 50)] == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert [at(Steps({0: 0.9, 60: 0.5, 80: 0.1}), e) for e in (0, 59.9, 60, 80, 99)] == [0.9, 0.9, 0.5, 0.1, 0.1]
    assert [at(Linear(4.0, 2.0), e) for e in (0, 25, 50, 100)] == [4.0, 3.5, 3.0, 2.0]
    assert [at(Cosine(2.0, 0.0), e) for e in (0, 50, 100)] == pytest.approx([2.0, 1.0, 0.0])
    assert repr(WarmUp(epochs=5)) == "WarmUp(value=1.0, epochs=5)"


def test_wrong_schedules_are_refused():
    with pytest.raises(ValueError, match="WarmUp: epochs must be > 0, got 0; for none, use a plain number."):
        WarmUp(epochs=0)
    with pytest.raises(ValueError, match="Steps: values must say what holds from epoch 0, got {5: 1.0}; add 0: value."):
        Steps({5: 1.0})


def test_an_option_of_any_loss_follows_a_schedule():
    loss = make("kd", temperature=Steps({0: 4.0, 1: 1.0}))
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    for epoch, temperature in ((0.5, 4.0), (1.0, 1.0), (0.0, 4.0)):
        value = loss(student, teacher, progress=Progress(epoch=epoch))
        torch.testing.assert_close(value, KD(temperature)(student, teacher))
    assert isinstance(loss, Scheduled) and loss.inputs() == ("student_logits", "teacher_logits", "progress")
    distiller = pair((WarmUp(epochs=2), make("kd", standardize=True, temperature=Linear(4.0, 2.0))))
    out = distiller(tiny.images(), tiny.labels(), progress=Progress(epoch=0.0, total_epochs=10))
    assert out.losses.keys() == {"task", "standardized_kd"}
    torch.testing.assert_close(out.loss, out.losses["task"] + 0.5 * out.losses["standardized_kd"])
    with pytest.raises(ValueError, match="loss 'kd' needs progress; call"):
        pair(loss)(tiny.images(), tiny.labels())


def test_a_scheduled_loss_says_what_it_was_made_with():
    loss = Scheduled(KD(), temperature=lambda progress: 4.0 - progress.epoch / 1000)
    assert repr(loss) == "Scheduled(KD(temperature=4.0), temperature=function)"  # no address: runs are resumed by it
    loss(torch.zeros(1, 2), torch.zeros(1, 2), progress=Progress(epoch=1.0))
    assert repr(make("normkd", alpha=Linear(4.0, 1.0), beta=5.0)).startswith("Scheduled(NormKD(temperature_norm=2.0, ")


@pytest.mark.parametrize("name, option", [("mkd", "meta_lr"), ("ptloss", "max_coefficient")])
def test_options_that_are_read_once_follow_no_schedule(name, option):
    with pytest.raises(ValueError, match=f"Scheduled: options must be numbers of {get(name).__name__}, got '{option}'"):
        make(name, **{option: Linear(1.0, 2.0)})


def test_a_schedule_may_not_come_to_what_the_loss_refuses():
    with pytest.raises(ValueError, match="KD: temperature must be > 0, got 0.0"):
        make("kd", temperature=Linear(8.0, 0.0))
    with pytest.raises(ValueError, match="PSD: mask_ratio must be < 1"):
        make("psd", mask_ratio=Linear(0.2, 0.6))


def test_wrong_scheduled_options_are_refused():
    with pytest.raises(ValueError, match="Scheduled: options must be numbers of KD, got 'temprature'; did you mean"):
        Scheduled(KD(), temprature=Linear(4.0, 1.0))
    with pytest.raises(TypeError, match="Scheduled: temperature must be a function of Progress, got 2.0; use one of"):
        Scheduled(KD(), temperature=2.0)
    with pytest.raises(ValueError, match="Scheduled: options must name what changes, got none"):
        Scheduled(KD())
    with pytest.raises(TypeError, match="Scheduled: loss must be a kdvit.losses.Loss, got 'kd'"):
        Scheduled("kd", temperature=Linear(4.0, 1.0))


def test_student_alone_needs_no_teacher_for_a_teacher_free_loss():
    class Confident(Loss):
        def forward(self, student_logits: Tensor) -> Tensor:
            return -student_logits.log_softmax(1).amax(1).mean()

    out = Distiller(None, Student(tiny.vit()), [Confident()])(tiny.images(), tiny.labels())
    assert out.losses.keys() == {"task", "confident"}
