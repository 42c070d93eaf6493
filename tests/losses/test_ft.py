from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdvit
from kdvit import Distiller
from kdvit.losses import FT
from kdvit.signals import ModelInfo, SignalInfo
from tests import tiny
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_ft")
#: Between the official layers of the paraphraser there are empty ones.
LAYERS = {".0.": ".0.", ".3.": ".2.", ".6.": ".4."}
#: Convolutions of the translator, whose biases a BatchNorm takes away.
LEFT_OUT = tuple(f"encoder.{number}.bias" for number in (0, 3, 6))


def built(student: Tensor, teacher: Tensor, **options) -> FT:
    loss = FT(**{"paraphraser_steps": 3} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(*(ModelInfo.of(feature_map=SignalInfo.of("feature_map", x)) for x in (student, teacher)))
    return loss


def maps(*shapes: tuple[int, ...], batch: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64).float() for shape in shapes)


def official(case: GoldenCase) -> FT:
    options = case.options
    loss = built(
        case["in.student"],
        case["in.teacher"],
        factor_ratio=options["k"],
        activation_power=options["p1"],
        distance_power=options["p2"],
    )
    weights = {}
    for name, x in case.group("w").items():
        part, _, rest = name.partition(".")
        if part == "paraphraser":
            for theirs, our in LAYERS.items():
                if theirs in rest:
                    weights[f"paraphraser.{rest.replace(theirs, our)}"] = x
        elif rest not in LEFT_OUT:
            weights[f"translator.{rest.removeprefix('encoder.')}"] = x
    loss.load_state_dict(weights | {"calibrated.is_set": torch.tensor(True)})
    return loss


def test_the_case_was_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    loss = official(case)
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    assert_close(loss.paraphraser.encoder(teacher), case["out.factor_t"], 1e-5)
    assert_close(F.mse_loss(loss.paraphraser(teacher), teacher), case["out.rec_loss"], 1e-5)
    value = loss(student, teacher)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-4)
    grads = {f"encoder.{name}": p.grad for name, p in loss.translator.named_parameters()}
    expected = {name: x for name, x in case.group("wgrad").items() if name not in LEFT_OUT}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-4)
    # The biases that we leave out got nothing but rounding noise.
    largest = max(x.abs().max() for x in expected.values())
    assert all(case[f"wgrad.{name}"].abs().max() < 1e-5 * largest for name in LEFT_OUT)


def test_value_by_hand():
    (x,) = maps((2, 1, 2))
    loss = built(x, x)
    loss.translator, loss.paraphraser.encoder = nn.Identity(), nn.Identity()
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[-3.0, 4.0], [-3.0, 4.0]]).sqrt().nan_to_num().view(1, 2, 1, 2)
    assert loss(student, teacher).item() == pytest.approx((1 + 1) / 2)  # the left one, the right one
    teacher = torch.tensor([[3.0, -2.0], [3.0, 2.0]]).view(1, 2, 1, 2)
    loss.activation_power = 1
    by_hand = (1 - 3 / 13**0.5 + 2 / 13**0.5) / 2
    assert loss(student, teacher).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize(("q", "p"), [(2, 1), (1, 2), (3, 3)])
def test_equals_a_plain_loop(q, p):
    student, teacher = (x.double() for x in maps((3, 4, 4), (6, 2, 2)))
    loss = built(student, teacher, activation_power=q, distance_power=p).double().eval()

    def through(layers: nn.Sequential, x: Tensor) -> Tensor:
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                x = F.conv2d(x, layer.weight, layer.bias, padding=1)
            elif isinstance(layer, nn.LeakyReLU):
                x = torch.where(x > 0, x, 0.1 * x)
            else:
                x = x * (1 + 1e-5) ** -0.5
        return x

    ours = F.adaptive_avg_pool2d(through(loss.translator, student), 2)
    theirs = through(loss.paraphraser.encoder, teacher)
    assert ours.shape == theirs.shape == (4, 3, 2, 2)
    loop = 0.0
    for i in range(4):
        a, b = ([sum(abs(x[i, c, n // 2, n % 2]) ** q for c in range(3)) / 3 for n in range(4)] for x in (ours, theirs))
        lengths = [sum(v**2 for v in values) ** 0.5 for values in (a, b)]
        loop += sum(abs(v / lengths[0] - w / lengths[1]) ** p for v, w in zip(a, b, strict=True)) / 16
    torch.testing.assert_close(loss(student, teacher), loop)


def test_scale_and_order_of_the_factors_do_not_matter():
    student, teacher = maps((3, 4, 4), (6, 4, 4))
    loss = built(student, teacher)
    expected = loss(student, teacher)
    last = loss.paraphraser.encoder[4]
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter.copy_(3 * parameter[[2, 0, 1]])
    torch.testing.assert_close(loss(student, teacher), expected)


def error_of(loss: FT, teacher: Tensor) -> float:
    with torch.no_grad():
        return F.mse_loss(loss.paraphraser(teacher), teacher).item()


def test_calibrate_trains_the_paraphraser_and_freezes_it():
    # Maps that fewer channels can tell: two sources, mixed into eight channels, on a scale of 30.
    sources, mix = maps((2, 4, 4), batch=48)[0], torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    teacher = 30 * torch.einsum("ds,bshw->bdhw", mix, sources).relu()
    loss = built(teacher, teacher, paraphraser_steps=200, paraphraser_batch_size=16, paraphraser_lr=5e-3)
    before, translator = error_of(loss, teacher), copy.deepcopy(loss.translator.state_dict())
    with torch.no_grad():  # as kdvit.calibrate does
        loss.calibrate(teacher[:32])
    assert error_of(loss, teacher[32:]) < 0.5 * before
    assert not loss.needs_calibration() and loss.calibrated
    assert not any(p.requires_grad or p.grad is not None for p in loss.paraphraser.parameters())
    for name, x in loss.translator.state_dict().items():
        assert torch.equal(x, translator[name])
    frozen = copy.deepcopy(loss.paraphraser.state_dict())
    student = maps((8, 4, 4), batch=48)[0].requires_grad_()
    loss(student, teacher).backward()
    torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(x, frozen[name]) for name, x in loss.paraphraser.state_dict().items())


def test_calibration_is_a_matter_of_the_seed():
    (teacher,) = maps((4, 3, 3), batch=20)
    found = []
    for seed in (0, 0, 1):
        loss = built(teacher, teacher, paraphraser_seed=seed, paraphraser_batch_size=4)
        state = torch.get_rng_state()
        loss.calibrate(teacher)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(loss.paraphraser.encoder[0].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("option", ["paraphraser_steps", "paraphraser_batch_size", "paraphraser_lr"])
def test_options_change_the_calibration(option):
    (teacher,) = maps((4, 3, 3), batch=20)
    found = []
    for options in ({}, {option: 2}):
        loss = built(teacher, teacher, **options)
        loss.calibrate(teacher)
        found.append(loss.paraphraser.encoder[0].weight)
    assert (found[0] - found[1]).abs().max() > 1e-5


def test_a_resumed_run_has_what_was_trained():
    (teacher,) = maps((4, 3, 3))
    loss = built(teacher, teacher)
    loss.calibrate(teacher)
    resumed = FT(paraphraser_steps=3)
    info = ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher))
    resumed.build(info, info)
    assert resumed.needs_calibration()
    resumed.load_state_dict(loss.state_dict())
    assert not resumed.needs_calibration()
    assert torch.equal(resumed(teacher, teacher), loss(teacher, teacher))
    resumed.build(info, info)  # for another pair
    assert resumed.needs_calibration() and not resumed.calibrated


def test_through_a_distiller():
    distiller = Distiller(tiny.cnn(7), tiny.vit(), [(200, FT(paraphraser_steps=3, teacher_stage=-2))]).train()
    loss = distiller.losses["ft"]
    images, labels = tiny.images(), tiny.labels()
    with pytest.raises(RuntimeError, match="Distiller: loss 'ft' must be calibrated before training; call"):
        distiller(images, labels)
    kdvit.calibrate(distiller, [(images, labels), (tiny.images(seed=2), labels)])
    distiller(images, labels).loss.backward()
    assert all(p.grad.abs().max() > 0 if p.requires_grad else p.grad is None for p in loss.parameters())
    with pytest.raises(ValueError, match="FT: grids must have more than one position in common, got 4x4 and 1x1;"):
        Distiller(tiny.cnn(7), tiny.vit(), [FT()])


@pytest.mark.parametrize(
    "options",
    [{"factor_ratio": 0.25}, {"activation_power": 4}, {"distance_power": 2}, {"resize": "bilinear"}],
    ids=str,
)
def test_options_change_the_value(options):
    student, teacher = maps((3, 2, 2), (8, 4, 4))
    default, other = (built(student, teacher, **o)(student, teacher) for o in ({}, options))
    assert (default - other).abs() > 1e-4


def test_there_is_at_least_one_factor():
    (x,) = maps((3, 2, 2))
    assert built(x, x, factor_ratio=0.1).translator[-2].num_features == 1
    assert built(x, x, factor_ratio=4.0).translator[-2].num_features == 12
    assert FT(student_stage=0.5, teacher_stage="layer3").locations() == {
        "student_feature_map": 0.5,
        "teacher_feature_map": "layer3",
    }


@pytest.mark.parametrize("resize", ["pool", "bilinear"])
@pytest.mark.parametrize("grids", [((1, 1), (2, 2)), ((2, 2), (1, 1))], ids=str)
def test_refuses_maps_of_one_position(grids, resize):
    """Stretched, it is as constant."""
    with pytest.raises(ValueError) as caught:
        built(*maps(*((3, *grid) for grid in grids)), resize=resize)
    (height, width), (teacher_height, teacher_width) = grids
    assert str(caught.value) == (
        f"FT: grids must have more than one position in common, got {height}x{width} and "
        f"{teacher_height}x{teacher_width}; choose earlier stages or larger images."
    )


def test_refuses_what_does_not_fit():
    (x,) = maps((4, 3, 3))
    loss = built(x, x)
    with pytest.raises(ValueError, match="FT: teacher_feature_map has B=2 but student_feature_map has B=4; give both"):
        loss(x, x[:2])
    for wrong in (x[:0], x * torch.inf):
        with pytest.raises(ValueError, match="FT: teacher_feature_map must be finite and not empty; check the calib"):
            loss.calibrate(wrong)
    assert loss.needs_calibration()
    for call in (lambda: FT()(x, x), lambda: FT().calibrate(x)):
        with pytest.raises(RuntimeError, match="FT: build must be called before forward; put the loss into a kdvit"):
            call()


def test_errors():
    for options, error, sentence in (
        ({"factor_ratio": 0}, ValueError, "FT: factor_ratio must be > 0, got 0; the published value is 0.5."),
        ({"activation_power": 0}, ValueError, "FT: activation_power must be > 0, got 0; the published value is 2."),
        (
            {"distance_power": 1.5},
            TypeError,
            "FT: distance_power must be an integer > 0, got 1.5; the published value is 1.",
        ),
        (
            {"paraphraser_steps": 0},
            ValueError,
            "FT: paraphraser_steps must be > 0, got 0; it trains the autoencoder of the teacher's maps.",
        ),
        ({"paraphraser_seed": 0.5}, TypeError, "FT: paraphraser_seed must be an integer, got 0.5; 0 will do."),
        (
            {"resize": "no"},
            ValueError,
            "FT: resize must be a known one, got 'no'; Known: pool, bilinear, bicubic, nearest.",
        ),
    ):
        with pytest.raises(error) as caught:
            FT(**options)
        assert str(caught.value) == sentence
    with pytest.raises(ValueError, match="FT: paraphraser_batch_size must be > 0, got 0; it trains the autoencoder"):
        FT(paraphraser_batch_size=0)
    with pytest.raises(ValueError, match="FT: paraphraser_lr must be > 0, got 0; it trains the autoencoder"):
        FT(paraphraser_lr=0)
