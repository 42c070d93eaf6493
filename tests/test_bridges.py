from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student, Teacher
from kdvit.losses import KD
from tests import tiny

RAW = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))  # pixels in 0..1
STUDENT = ((0.2, 0.3, 0.4), (0.1, 0.5, 0.9))
TEACHER = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Eye(nn.Module):
    """A teacher that remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        self.saw = images
        return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), (5, 1)).flatten(1) * self.weight


def normalised(raw: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def seen(student: Student, images: Tensor, **facts) -> tuple[Tensor, Distiller]:
    """What the teacher saw of the student's images, and the distiller."""
    distiller = Distiller(Teacher(Eye(), **facts), student, ["kd"])
    distiller(images, tiny.labels())
    in_step = distiller.teacher.model.saw
    distiller.teacher.predict(images)
    assert torch.equal(in_step, distiller.teacher.model.saw)
    return in_step, distiller


def facts(normalisation: tuple, **more) -> dict:
    return {"mean": normalisation[0], "std": normalisation[1], **more}


# Normalisation


def test_the_teacher_sees_its_own_normalisation_of_the_raw_image():
    student = Student(tiny.plain(), **facts(STUDENT), input_size=(3, 32, 32))
    saw, distiller = seen(student, normalised(RAW, *STUDENT), **facts(TEACHER))
    torch.testing.assert_close(saw, normalised(RAW, *TEACHER), rtol=1e-6, atol=1e-6)
    assert distiller.teacher.bridge.describe() == "change of normalisation"


def test_timm_models_state_their_normalisation():
    model = tiny.cnn(7)
    assert model.pretrained_cfg["mean"] == TEACHER[0]
    distiller = Distiller(model, tiny.vit(), ["kd"])
    assert distiller.student.normalisation == ((0.5,) * 3, (0.5,) * 3)
    out = distiller(normalised(RAW, (0.5,) * 3, (0.5,) * 3), tiny.labels())
    torch.testing.assert_close(out.losses["kd"], KD()(out.logits, model(normalised(RAW, *TEACHER))))


@pytest.mark.parametrize("known", ["same", "student", "teacher"])
def test_images_pass_untouched_where_both_are_equal_or_one_is_not_known(known):
    ours = facts(STUDENT) if known in ("same", "student") else {}
    theirs = facts(STUDENT) if known in ("same", "teacher") else {}
    saw, distiller = seen(Student(tiny.plain(), **ours, input_size=(3, 32, 32)), RAW, **theirs)
    assert torch.equal(saw, RAW)
    assert distiller.teacher.bridge.describe() == "none"


def test_the_bridge_moves_with_the_distiller():
    student = Student(tiny.plain(), **facts(STUDENT), input_size=(3, 32, 32))
    distiller = Distiller(Teacher(Eye(), **facts(TEACHER)), student, ["kd"])
    assert distiller.to("meta").teacher.bridge.scale.device.type == "meta"


# Size


@pytest.mark.parametrize("size", [48, 16])
def test_images_are_resized_to_the_one_size_that_the_teacher_takes(size):
    saw, distiller = seen(Student(tiny.vit()), RAW, input_size=(3, size, size))
    assert torch.equal(saw, F.interpolate(RAW, size=(size, size), mode="bicubic", antialias=True))
    assert distiller.teacher.bridge.describe() == f"resize to {size}x{size} where they differ"


def test_a_fixed_vit_teaches_a_student_of_another_size():
    teacher = tiny.vit(7, img_size=48)
    distiller = Distiller(teacher, tiny.vit(), ["kd"])
    expected = teacher(F.interpolate(RAW, size=(48, 48), mode="bicubic", antialias=True))
    torch.testing.assert_close(distiller.teacher.predict(RAW), expected)
    torch.testing.assert_close(distiller.teacher.predict(F.pad(RAW, (8, 8, 8, 8))), teacher(F.pad(RAW, (8, 8, 8, 8))))
    assert distiller(RAW, tiny.labels()).losses["kd"] > 0


def test_normalisation_and_size_together():
    student = Student(tiny.plain(), **facts(STUDENT), input_size=(3, 32, 32))
    saw, distiller = seen(student, normalised(RAW, *STUDENT), **facts(TEACHER), input_size=(3, 48, 48))
    expected = F.interpolate(normalised(RAW, *TEACHER), size=(48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(saw, expected, rtol=1e-5, atol=1e-5)
    assert distiller.teacher.bridge.describe() == "change of normalisation, resize to 48x48 where they differ"


def test_a_teacher_of_any_size_sees_the_students_size():
    teacher = tiny.cnn(7)
    distiller = Distiller(teacher, tiny.vit(img_size=64), ["kd"])
    assert distiller.teacher.bridge.size is None and distiller.teacher.input_size == (3, 64, 64)


def test_a_student_that_states_no_size_takes_the_teachers():
    distiller = Distiller(tiny.vit(7), tiny.plain(), ["kd"])
    assert distiller.student.input_size == (3, 32, 32)


@pytest.mark.parametrize(("student", "teacher"), [((32, 32), (32, 48)), ((32, 64), (64, 64)), ((48, 32), (32, 48))])
def test_sizes_of_different_shape_are_refused(student, teacher):
    (h, w), (th, tw) = student, teacher
    with pytest.raises(ValueError) as refused:
        Distiller(Teacher(Eye(), input_size=(3, th, tw)), Student(tiny.plain(), input_size=(3, h, w)), ["kd"])
    assert str(refused.value) == (
        f"Teacher: 'Eye' takes {th}x{tw} images and the student's are {h}x{w}: resizing would distort them; "
        "choose an input_size of one shape."
    )


def test_an_oblong_pair_of_one_shape_is_fine():
    student = Student(tiny.plain(), input_size=(3, 16, 32))
    saw, _ = seen(student, tiny.images(size=(16, 32)), input_size=(3, 32, 64))
    assert saw.shape == (4, 3, 32, 64)


# Colours


def test_grey_images_are_repeated_for_a_colour_teacher():
    grey = RAW[:, :1]
    student = Student(nn.Sequential(nn.Conv2d(1, 5, 32), nn.Flatten()), mean=(0.3,), std=(0.2,), input_size=(1, 32, 32))
    saw, distiller = seen(student, (grey - 0.3) / 0.2, **facts(TEACHER), input_size=(3, 32, 32))
    torch.testing.assert_close(saw, normalised(grey.expand(-1, 3, -1, -1), *TEACHER), rtol=1e-6, atol=1e-6)
    steps = "repeat to 3 channels, change of normalisation, resize to 32x32 where they differ"
    assert distiller.teacher.bridge.describe() == steps


@pytest.mark.parametrize("channels", [1, 3])
def test_timms_grey_student_is_normalised_by_the_mean_of_its_three_values(channels):
    """timm states three values for a model with in_chans=1 too."""
    student = Student(tiny.cnn(in_chans=1))
    mean, std = (sum(values) / 3 for values in TEACHER)
    assert student.normalisation == ((mean,), (std,))
    saw, _ = seen(
        Student(tiny.cnn(in_chans=1), input_size=(1, 32, 32)),
        (RAW[:, :1] - mean) / std,
        mean=(0.1,) * channels,
        std=(0.5,) * channels,
        input_size=(channels, 32, 32),
    )
    torch.testing.assert_close(saw, (RAW[:, :1].expand(-1, channels, -1, -1) - 0.1) / 0.5, rtol=1e-6, atol=1e-6)


def test_colours_are_not_invented():
    with pytest.raises(ValueError) as refused:
        Distiller(Teacher(Eye(), input_size=(4, 32, 32)), tiny.vit(), ["kd"])
    assert str(refused.value) == (
        "Teacher: 'Eye' takes 4 channels but student 'vit_tiny_patch16_224' gets 3; "
        "choose a teacher and a student with the same channels."
    )


# Outputs


class Answers(nn.Module):
    """A model whose output is wrapped."""

    def __init__(self, seed: int, wrap) -> None:
        super().__init__()
        self.model = tiny.plain(seed)
        self.wrap = wrap

    def forward(self, images: Tensor) -> object:
        return self.wrap(self.model(images))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: SimpleNamespace(logits=logits, hidden_states=None),
        lambda logits: {"logits": logits, "features": logits[:, :2]},
        lambda logits: (logits, logits[:, :2]),
        lambda logits: [logits],
        lambda logits: (logits + 1, logits - 1),
    ],
    ids=["object", "dict", "tuple", "list", "pair of heads"],
)
def test_logits_are_found_in_what_models_return(wrap):
    student = Student(Answers(0, wrap), input_size=(3, 32, 32))
    distiller = Distiller(Answers(7, wrap), student, ["kd"])
    ours, theirs = tiny.plain(0)(RAW), tiny.plain(7)(RAW)
    out = distiller(RAW, tiny.labels())
    torch.testing.assert_close(out.logits, ours)
    torch.testing.assert_close(distiller.teacher.predict(RAW), theirs)
    torch.testing.assert_close(out.losses["kd"], KD()(ours, theirs).detach())
    torch.testing.assert_close(out.losses["task"], F.cross_entropy(ours, tiny.labels()).detach())
