"""A list of teachers: uniform weighting of losses of one teacher, and losses that read all of them."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from kdvit import Distiller, Student, Teacher
from kdvit.losses import KD, EachTeacher, Loss, make
from tests import tiny


class Agreement(Loss):
    """Reads a map of every teacher, of their own widths."""

    def locations(self):
        return {"teachers_feature_map": -1, "student_feature_map": -1}

    def build(self, student, teachers) -> None:
        self.projectors = nn.ModuleList(
            nn.Linear(student["feature_map"].dim, teacher["feature_map"].dim) for teacher in teachers
        )

    def forward(self, student_feature_map: Tensor, teachers_feature_map: tuple[Tensor, ...]) -> Tensor:
        pooled = student_feature_map.mean((2, 3))
        terms = [
            (projector(pooled) - x.mean((2, 3))).square().mean()
            for projector, x in zip(self.projectors, teachers_feature_map, strict=True)
        ]
        return torch.stack(terms).mean()


def teachers() -> list[nn.Module]:
    return [tiny.vit(7, embed_dim=32), tiny.cnn(8)]


def test_losses_of_one_teacher_are_averaged():
    pair = teachers()
    torch.manual_seed(0)
    distiller = Distiller(pair, tiny.vit(), ["kd", "fitnet"]).train()
    assert list(distiller.losses) == ["kd", "fitnet"] and len(distiller.teachers) == 2
    images, labels = tiny.images(), tiny.labels()
    out = distiller(images, labels)
    logits = distiller.student.model.eval()(images)
    expected = torch.stack([KD()(logits, teacher.predict(images)) for teacher in distiller.teachers]).mean()
    torch.testing.assert_close(out.losses["kd"], expected)
    out.loss.backward()
    # One projector for each teacher, of its width; both are trained.
    convs = [loss.conv for loss in distiller.losses["fitnet"].losses]
    assert [conv.out_channels for conv in convs] == [32, 32] and len({id(conv) for conv in convs}) == 2
    assert all(conv.weight.grad.abs().max() > 0 for conv in convs)
    assert all(p.grad is None for teacher in pair for p in teacher.parameters())


def test_weights_of_teachers():
    pair, images, labels = teachers(), tiny.images(), tiny.labels()
    logits = tiny.vit()(images)
    for weights, shares in (((3, 1), (0.75, 0.25)), ((0, 2.0), (0.0, 1.0))):
        distiller = Distiller(pair, tiny.vit(), [EachTeacher(make("kd"), weights=weights)]).eval()
        rows = [KD()(logits, teacher.predict(images)) for teacher in distiller.teachers]
        expected = shares[0] * rows[0] + shares[1] * rows[1]
        torch.testing.assert_close(distiller(images, labels).losses["kd"], expected)


def test_a_loss_of_several_teachers_reads_all_of_them():
    distiller = Distiller(teachers(), tiny.vit(), [Agreement(), (0.5, "kd")])
    assert [p.out_features for p in distiller.losses["agreement"].projectors] == [32, 32]
    out = distiller(tiny.images(), tiny.labels())
    assert out.losses["agreement"] > 0
    one = Distiller(tiny.cnn(8), tiny.vit(), [Agreement()])  # a single teacher is a list of one
    assert len(one.losses["agreement"].projectors) == 1
    assert one(tiny.images(), tiny.labels()).losses["agreement"] > 0


def test_standardised_logits_of_every_teacher():
    class Both(Loss):
        def forward(self, student_logits: Tensor, teachers_logits: tuple[Tensor, ...]) -> Tensor:
            return sum(x.std(dim=1).mean() for x in teachers_logits) + 0 * student_logits.sum()

    from kdvit.losses import Standardized

    distiller = Distiller(teachers(), tiny.vit(), [Standardized(Both())])
    torch.testing.assert_close(distiller(tiny.images(), tiny.labels()).losses["standardized_"], torch.tensor(2.0))


def test_each_teacher_has_its_own_bridge_and_moves_along():
    student = Student(tiny.vit(), mean=(0.5,) * 3, std=(0.5,) * 3)
    pair = [Teacher(tiny.vit(7), mean=(0.5,) * 3, std=(0.5,) * 3), Teacher(tiny.cnn(8))]
    distiller = Distiller(pair, student, ["kd"])
    assert [teacher.bridge.describe() for teacher in distiller.teachers] == ["none", "change of normalisation"]
    text = distiller.describe()
    assert text.count("image bridge, student to teacher 2 'resnet18': change of normalisation") == 1
    assert len(re.findall(r"^\s*teacher ", text, re.MULTILINE)) >= 2
    distiller.double()
    assert {p.dtype for teacher in distiller.teachers for p in teacher.parameters()} == {torch.float64}
    twin = copy.deepcopy(distiller)
    images = tiny.images().double()
    torch.testing.assert_close(twin(images, tiny.labels()).loss, distiller(images, tiny.labels()).loss)
    assert not any(key.startswith("teacher") for key in distiller.state_dict())


def test_second_views_of_every_teacher():
    class Second(Loss):
        def forward(self, second_student_logits: Tensor, second_teacher_logits: Tensor) -> Tensor:
            return (second_student_logits - second_teacher_logits).square().mean()

    pair, images, second = teachers(), tiny.images(), tiny.images(seed=4)
    distiller = Distiller(pair, tiny.vit(), [Second()]).eval()
    out = distiller(images, tiny.labels(), second_images=second)
    logits = tiny.vit()(second)
    expected = torch.stack(
        [(logits - teacher.predict(second)).square().mean() for teacher in distiller.teachers]
    ).mean()
    torch.testing.assert_close(out.losses["second"], expected)


MADE_TWICE = tiny.vit(7)
WRONG = {
    "none": (
        lambda: Distiller([], tiny.vit(), ["kd"]),
        "Distiller: the list of teachers must name different ones, got",
    ),
    "twice": (
        lambda: Distiller([MADE_TWICE, MADE_TWICE], tiny.vit(), ["kd"]),
        "Distiller: the list of teachers must name different ones, got one of them twice; name each once.",
    ),
    "weights": (
        lambda: Distiller(teachers(), tiny.vit(), [EachTeacher(KD(), weights=(1, 2, 3))]),
        "EachTeacher: weights must be one for each of the 2 teachers, got 3; write them in the order of the teachers.",
    ),
    "no weight": (lambda: EachTeacher(KD(), weights=(0, 0)), "EachTeacher: weights must not all be 0, got (0, 0)"),
    "no teacher": (
        lambda: EachTeacher(make("uskd")),
        "EachTeacher: loss must be one of a single teacher that can be repeated, got USKD, which reads no teacher;",
    ),
    "calibrated": (
        lambda: Distiller(teachers(), tiny.vit(), ["ptloss"]),
        "got PTLoss, which is fitted before training",
    ),
    "meta": (lambda: Distiller(teachers(), tiny.vit(), ["mkd"]), "got MKD, which has meta-parameters of its own;"),
    "several": (lambda: EachTeacher(Agreement()), "got Agreement, which reads all teachers already;"),
    "classes": (
        lambda: Distiller([tiny.vit(7), tiny.cnn(8, num_classes=9)], tiny.vit(), ["kd"]),
        "Distiller: teacher 'resnet18' teaches 9 classes but student",
    ),
    "shared": (
        lambda: Distiller([tiny.vit(7), MADE_TWICE], MADE_TWICE, ["kd"]),
        "Distiller: the teacher must be another model than the student",
    ),
}


@pytest.mark.parametrize("make_it, sentence", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(make_it, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_it()


def test_direct_calls_are_checked():
    loss = EachTeacher(KD())
    with pytest.raises(RuntimeError, match="EachTeacher: build must be called before forward"):
        loss(torch.zeros(2, 3), (torch.zeros(2, 3),))
    distiller = Distiller(teachers(), tiny.vit(), [loss])
    x = torch.zeros(2, 5)
    with pytest.raises(ValueError, match="teachers_logits must have one value for each of the 2 teachers, got 1"):
        distiller.losses["kd"](x, (x,))


def test_meta_parameters_that_build_makes_are_refused_too():
    class Late(Loss):
        def build(self, student, teacher) -> None:
            self.meta = nn.Parameter(torch.zeros(()), requires_grad=False)

        def meta_optimizer(self):
            return torch.optim.SGD([self.meta], lr=1.0) if hasattr(self, "meta") else None

        def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return (student_logits - teacher_logits - self.meta).square().mean()

    with pytest.raises(ValueError, match="got Late, which has meta-parameters of its own; choose another loss"):
        Distiller(teachers(), tiny.vit(), [Late()])


@pytest.mark.parametrize("weights", [0.5, {0: 1.0, 1: 2.0}, torch.ones(2)], ids=["number", "dict", "tensor"])
def test_weights_are_a_list(weights):
    with pytest.raises(TypeError, match="EachTeacher: weights must be a list of numbers, got .*; write one for each"):
        EachTeacher(KD(), weights=weights)


@pytest.mark.parametrize(
    "twice",
    [
        lambda model: [Teacher(model), Teacher(model)],
        lambda model: [model, Teacher(model, class_map=[0, 1, 2, 3, 4])],
        lambda model: ["".join(["fashion_mnist", "_cnn"]), "".join(["fashion_mnist_", "cnn"])],
    ],
    ids=["two wrappers", "wrapped and not", "equal names"],
)
def test_a_teacher_has_one_say(twice):
    with pytest.raises(ValueError, match="must name different ones, got one of them twice; name each once"):
        Distiller(twice(tiny.vit(7)), tiny.vit(), ["kd"])


def test_describe_numbers_the_teachers():
    page = Distiller([tiny.vit(7, embed_dim=32), tiny.vit(8)], tiny.vit(), ["kd"]).describe()
    rows = [line.split() for line in page.splitlines()]
    assert "teacher 1 logits output 5".split() in rows and "teacher 2 logits output 5".split() in rows
    assert [row[:3] for row in rows if row[:1] == ["teacher"]][:2] == [
        ["teacher", "1", "vit_tiny_patch16_224"],
        ["teacher", "2", "vit_tiny_patch16_224"],
    ]
    assert "image bridge, student to teacher 2 'vit_tiny_patch16_224': none" in page
