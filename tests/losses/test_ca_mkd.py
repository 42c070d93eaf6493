from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from kdvit import Distiller
from kdvit.losses import CAMKD, KD
from kdvit.losses.ca_mkd import confidence_weights
from kdvit.losses.teacher_distances import project
from kdvit.signals import ModelInfo, SignalInfo
from tests import tiny
from tests.losses.golden import assert_close, golden

CASES = golden("feature_camkd")
LABELS = torch.tensor([0, 1, 2])


def model(feature_map: Tensor, pooled_dim: int | None = None, name: str = "model") -> ModelInfo:
    pooled = torch.zeros(1, pooled_dim or feature_map.shape[1])
    infos = {"feature_map": feature_map, "pooled": pooled}
    return ModelInfo.of(name, **{signal: SignalInfo.of(signal, x) for signal, x in infos.items()})


def built(student: Tensor, teachers: tuple[Tensor, ...], **options) -> CAMKD:
    loss = CAMKD(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(model(student), tuple(map(model, teachers)))
    return loss


def inputs(grids: tuple[int, ...] = (4, 4, 4), dtype: torch.dtype = torch.float32) -> tuple:
    """(student_logits, teachers_logits, student_feature_map, teachers_feature_map, labels), two teachers or more."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)

    student, *teachers = grids
    return (
        noise(5),
        tuple(noise(5) for _ in teachers),
        noise(4, student, student),
        tuple(noise(6 + i, grid, grid) for i, grid in enumerate(teachers)),
        LABELS,
    )


class Given(nn.Module):
    """In a projector's place: what the official code was given, projected already."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x


def test_the_case_was_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    projected, teachers, logits = (
        tuple(case[f"in.{name}{t}"] for t in range(2)) for name in ("trans_s", "feat_t", "logit_t")
    )
    labels = case["in.target"]
    cross_entropies = [nn.functional.cross_entropy(z, labels, reduction="none") for z in logits]
    assert_close(confidence_weights(torch.stack(cross_entropies, dim=1)).T, case["out.weight"], 1e-5)
    loss = built(projected[0], teachers, beta=1.0)
    loss.projectors = nn.ModuleList(Given(x.requires_grad_()) for x in projected)
    value = loss(logits[0], logits, projected[0].detach(), teachers, labels)["features"]
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    for t, x in enumerate(projected):
        assert_close(x.grad, case[f"grad.trans_s{t}"], 1e-5)


def test_value_by_hand():
    # Probabilities of the label: teachers 1/2, 1/4, 1/4; softmax of ln 2, ln 4, ln 4: 1/5, 2/5, 2/5.
    half, quarter = torch.tensor([[3.0, 1, 1, 1]]).log(), torch.zeros(1, 4)
    maps = torch.zeros(1, 2, 2, 2)
    loss = built(maps, (maps,) * 3, alpha=2.0, beta=3.0, temperature=1.0)
    teachers_maps = (maps + 1, maps, maps + 2)
    terms = loss(quarter, (half, quarter, quarter), maps, teachers_maps, torch.tensor([0]))
    weights = [(1 - 1 / 5) / 2, (1 - 2 / 5) / 2, (1 - 2 / 5) / 2]
    divergence = 0.5 * math.log(2) + 3 * 1 / 6 * math.log(4 / 6)
    assert terms["features"].item() == pytest.approx(3.0 / 3 * (weights[0] * 1 + weights[2] * 4), rel=1e-5)
    assert terms["logits"].item() == pytest.approx(2.0 / 3 * weights[0] * divergence, rel=1e-5)


@pytest.mark.parametrize("confidence", ["teacher", "student"])
def test_equals_a_plain_loop(confidence):
    student_logits, teachers_logits, student, teachers, labels = given = inputs((4, 2, 8), torch.float64)
    loss = built(student, teachers, alpha=0.7, beta=2.0, temperature=3.0, confidence=confidence).double().eval()
    heads = tuple(nn.Linear(x.shape[1], 5).double() for x in teachers)
    extra = (heads, tuple(x.mean((2, 3)) for x in teachers)) if confidence == "student" else ()
    logits = features = 0.0
    for i in range(3):
        divergences, distances, by_teacher, by_student = [], [], [], []
        for t in range(2):
            small = min(4, teachers[t].shape[2])
            ours = nn.functional.adaptive_avg_pool2d(student[i], small)
            ours = torch.einsum("ds,shw->dhw", loss.projectors[t][0].weight[:, :, 0, 0], ours) * (1 + 1e-5) ** -0.5
            ours = ours.clamp_min(0)
            distances.append((ours - nn.functional.adaptive_avg_pool2d(teachers[t][i], small)).square().mean())
            p, q = (teachers_logits[t][i] / 3).softmax(0), (student_logits[i] / 3).softmax(0)
            divergences.append(9 * (p * (p / q).log()).sum())
            by_teacher.append(-teachers_logits[t][i].log_softmax(0)[labels[i]])
            by_student.append(-heads[t](ours.mean((1, 2))).log_softmax(0)[labels[i]])
        asked = by_student if confidence == "student" else by_teacher
        # Of two teachers each gets the other's share.
        for t in range(2):
            logits += 0.7 * torch.stack(by_teacher).softmax(0)[1 - t] * divergences[t] / 6
            features += 2.0 * torch.stack(asked).softmax(0)[1 - t] * distances[t] / 6
    terms = loss(*given, *extra)
    torch.testing.assert_close(terms["logits"], logits)
    torch.testing.assert_close(terms["features"], features)


def test_a_teacher_that_knows_the_label_weighs_more():
    """The paper's claim, image by image: who is wrong and sure of it is hardly listened to."""
    right = 20 * nn.functional.one_hot(LABELS, 5).float()
    wrong = right.roll(1, dims=1)
    student, _, maps, teachers, labels = inputs()
    for first, second, listened in ((right, wrong, 0), (wrong, right, 1)):
        loss = built(maps, teachers, alpha=2.0, temperature=1.0)
        value = loss(student, (first, second), maps, teachers, labels)["logits"]
        alone = KD(temperature=1.0)(student, (first, second)[listened])
        assert value.item() == pytest.approx(alone.item(), rel=1e-5)


def test_equal_teachers_weigh_alike():
    student, (teacher, _), maps, teachers, labels = inputs()
    value = built(maps, teachers, alpha=2.0)(student, (teacher, teacher), maps, teachers, labels)["logits"]
    assert value.item() == pytest.approx(KD(temperature=4.0)(student, teacher).item(), rel=1e-5)
    weights = confidence_weights(torch.rand(4, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert weights.max() <= 1 / 2


@pytest.mark.parametrize(
    "options", [{"alpha": 2.0}, {"beta": 2.0}, {"temperature": 2.0}, {"resize": "bilinear"}], ids=str
)
def test_options_change_the_value(options):
    given = inputs((4, 2, 8))
    default, other = (sum(built(given[2], given[3], **o)(*given).values()) for o in ({}, options))
    assert (default - other).abs() > 1e-3


def test_interpolated_the_teachers_keep_their_grids():
    _, _, student, teachers, _ = inputs((4, 2, 8))
    loss = built(student, teachers)
    for resize, sides in (("pool", [2, 4]), ("bilinear", [2, 8])):
        pairs = project(loss, student, teachers, loss.projectors, resize)
        assert [ours.shape[2] for ours, _ in pairs] == [theirs.shape[2] for _, theirs in pairs] == sides


@pytest.mark.parametrize("confidence", ["teacher", "student"])
def test_through_a_distiller(confidence):
    teachers = [tiny.cnn(7), tiny.vit(8, "vit_tiny_patch16_224", reg_tokens=4)]
    distiller = Distiller(teachers, tiny.vit(embed_dim=16), [CAMKD(confidence=confidence)]).train()
    out = distiller(tiny.images(), tiny.labels())
    out.loss.backward()
    assert out.losses.keys() == {"task", "ca_mkd.logits", "ca_mkd.features"}
    assert all(p.grad.abs().max() > 0 for p in distiller.losses.parameters())
    assert all(p.grad is None for teacher in distiller.teachers for p in teacher.model.parameters())


def test_stages_and_inputs():
    assert CAMKD(student_stage=0.5, teacher_stage="layer3").locations() == {
        "student_feature_map": 0.5,
        "teachers_feature_map": "layer3",
    }
    more = set(CAMKD(confidence="student").inputs()) - set(CAMKD().inputs())
    assert more == {"teachers_head", "teachers_pooled"}


def test_gradient_flows_through_the_students_confidence():
    student, logits, maps, teachers, labels = inputs()
    heads = tuple(nn.Linear(x.shape[1], 5).requires_grad_(False) for x in teachers)
    loss = built(maps, teachers, confidence="student")
    projected = [x.requires_grad_() for x in (teachers[0] + 1, teachers[1] + 2)]
    loss.projectors = nn.ModuleList(map(Given, projected))
    terms = loss(student, logits, maps, teachers, labels, heads, tuple(x.mean((2, 3)) for x in teachers))
    terms["features"].backward()
    # Were the weights constant, every entry would be pulled alike: all differences are 1 and 2.
    assert (projected[0].grad[0] - projected[0].grad[0].mean()).abs().max() > 1e-6
    assert all(head.weight.grad is None for head in heads)


def test_refuses_what_does_not_fit():
    given = list(inputs())
    student, teachers = given[2], given[3]
    with pytest.raises(ValueError, match="CAMKD: teachers must be at least 2, got 1; pass a list of teachers, or ch"):
        CAMKD().build(model(student), (model(teachers[0]),))
    with pytest.raises(ValueError) as caught:
        CAMKD(confidence="student").build(model(student), (model(teachers[0]), model(teachers[1], 9, "cnn")))
    assert str(caught.value) == (
        "CAMKD: the classifier of 'cnn' must see D=7 like its feature map, got D=9; choose its last stage, or "
        "confidence='teacher'."
    )
    loss = built(student, teachers)
    for number, value, sentence in (
        (1, given[1][:1], "CAMKD: teachers_logits must be a tuple of 2 tensors, got 1; give one for each"),
        (1, (given[1][0], given[1][1][:, :4]), "CAMKD: teachers_logits has C=4 but student_logits has C=5; align"),
        (3, teachers[:1], "CAMKD: teachers_feature_map must be a tuple of 2 tensors, got 1; give one for each"),
        (3, teachers[::-1], "CAMKD: teachers_feature_map must have D=6 as in build, got D=7; build the loss for these"),
        (3, (teachers[0], teachers[1][:2]), "CAMKD: teachers_feature_map has B=2 but student_feature_map has B=3;"),
        (4, LABELS[:2], r"CAMKD: labels must have shape \(3,\) or \(3, 5\) like the logits, got \(2,\); pass"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss(*given[:number], value, *given[number + 1 :])
    with pytest.raises(ValueError, match="CAMKD: teachers_head must be a tuple of 2 tensors, got NoneType; give"):
        built(student, teachers, confidence="student")(*given)


def test_errors():
    for options, sentence in (
        ({"alpha": -1}, "CAMKD: alpha must be >= 0, got -1; 0 switches the logits off."),
        ({"beta": -1}, "CAMKD: beta must be >= 0, got -1; 0 switches the features off."),
        ({"temperature": 0}, "CAMKD: temperature must be > 0, got 0; 1.0 leaves the logits as they are."),
        ({"confidence": "pupil"}, "CAMKD: confidence must be a known one, got 'pupil'; Known: teacher, student."),
        ({"resize": "no"}, "CAMKD: resize must be a known one, got 'no'; Known: pool, bilinear, bicubic, nearest."),
    ):
        with pytest.raises(ValueError) as caught:
            CAMKD(**options)
        assert str(caught.value) == sentence
    with pytest.raises(RuntimeError, match="CAMKD: build must be called before forward; put the loss into a kdvit"):
        CAMKD()(*inputs())
