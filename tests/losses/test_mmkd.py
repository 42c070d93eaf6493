from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student
from kdvit.bilevel import Bilevel
from kdvit.losses import KD, MMKD
from kdvit.signals import ModelInfo, Progress, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_mmkd")
PATHS = {
    "logits_weight.": "logit_weights.",
    "feature_weight.": "feature_weights.",
    "match_feature.regressor": "projectors.",
    ".layer.": ".0.",
    ".all_act.": ".2.",
    ".transfer.": ".",
}
#: Biases of the convolutions in front of a BatchNorm.
LEFT_OUT = ".transfer.0.bias"
META = ("logit_weights.", "feature_weights.")


def model(logits: Tensor, feature_map: Tensor) -> ModelInfo:
    infos = {"logits": logits, "feature_map": feature_map}
    return ModelInfo.of(**{signal: SignalInfo.of(signal, x) for signal, x in infos.items()})


def built(student_logits: Tensor, teachers_logits: tuple, student: Tensor, teachers: tuple, **options) -> MMKD:
    loss = MMKD(**{"batch_size": len(student)} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(model(student_logits, student), tuple(map(model, teachers_logits, teachers)))
    return loss


def learned(loss: MMKD) -> MMKD:
    """As if bilevel steps had moved the weights away from equal ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for net in (loss.logit_weights, loss.feature_weights):
            net[2].weight.copy_(0.3 * torch.randn(net[2].weight.shape, generator=generator))
    return loss


def inputs(grids: tuple[int, ...] = (4, 4, 4), batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    """(student_logits, teachers_logits, student_feature_map, teachers_feature_map)."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    student, *teachers = grids
    return (
        noise(5),
        tuple(noise(5) for _ in teachers),
        noise(4, student, student),
        tuple(noise(6 + i, grid, grid) for i, grid in enumerate(teachers)),
    )


def ours(name: str) -> str:
    for theirs, our in PATHS.items():
        name = name.replace(theirs, our)
    return name


def official(case: GoldenCase) -> tuple[MMKD, list]:
    student_logits, student = (case[f"in.{name}_s"].requires_grad_() for name in ("logit", "feat"))
    logits, teachers = (tuple(case[f"in.{name}_t{t}"] for t in range(2)) for name in ("logit", "feat"))
    given = [student_logits, logits, student, teachers]
    loss = built(*given, beta=1.0, temperature=case.options["kd_T"], batch_size=case.options["batch_size"])
    loss.load_state_dict({ours(name): x for name, x in case.group("w").items() if not name.endswith(LEFT_OUT)})
    return loss, given


def test_the_case_was_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    loss, given = official(case)
    weights = {}
    for name in ("logit_weights", "feature_weights"):
        net = getattr(loss, name).requires_grad_(True)  # as in a bilevel step
        net.register_forward_hook(lambda _, call, out, name=name: weights.__setitem__(name, out))
    terms = loss(*given)
    assert_close(weights["logit_weights"], case["out.weight_logits"], 1e-5)
    assert_close(weights["feature_weights"], case["out.weight_feature"], 1e-5)
    assert_close(terms["logits"], case["out.loss_logit"], 1e-5)
    assert_close(terms["features"], case["out.loss_feat"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(given[0].grad, case["grad.logit_s"], 1e-5)
    assert_close(given[2].grad, case["grad.feat_s"], 1e-4)
    grads = {name: p.grad for name, p in loss.named_parameters()}
    expected = {ours(name): x for name, x in case.group("wgrad").items() if not name.endswith(LEFT_OUT)}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-4)
    # The biases that we leave out got nothing but rounding noise.
    noise = [x.abs().max() for name, x in case.group("wgrad").items() if name.endswith(LEFT_OUT)]
    assert len(noise) == 2 and max(noise) < 1e-5 * max(x.abs().max() for x in expected.values())


def test_value_by_hand():
    logits, zeros = torch.zeros(1, 2), torch.zeros(1, 2, 2, 2)
    sure = torch.tensor([[3.0, 1.0]]).log()
    given = logits, (logits, sure), zeros, (zeros + 1, zeros + 2)
    loss = built(*given, alpha=2.0, beta=3.0, temperature=1.0)
    with torch.no_grad():
        loss.logit_weights[2].bias.copy_(torch.tensor([1.0, 3.0]).log())  # 1/4 and 3/4
        loss.feature_weights[2].bias.copy_(torch.tensor([4.0, 1.0]).log())  # 4/5 and 1/5
    terms = loss(*given)
    assert terms["logits"].item() == pytest.approx(2 * 0.75 * 0.130812, rel=1e-5)  # 3/4 ln 3/2 + 1/4 ln 1/2
    assert terms["features"].item() == pytest.approx(3 * (0.8 * 1 + 0.2 * 4), rel=1e-6)


def test_equals_a_plain_loop():
    """Other grids, three teachers, and a batch that is smaller than the one the second network was made for."""
    given = inputs((4, 2, 8, 4), dtype=torch.float64)
    student_logits, teachers_logits, student, teachers = given
    options = {"alpha": 0.7, "beta": 2.0, "temperature": 3.0, "batch_size": 4}
    loss = learned(built(*given, **options)).double().eval()

    def weights(net: nn.Sequential, x: Tensor) -> Tensor:
        hidden = (net[0].weight @ x + net[0].bias).clamp_min(0)
        return (net[2].weight @ hidden + net[2].bias).softmax(0)

    logits = features = 0.0
    for i in range(3):
        v = weights(loss.logit_weights, torch.cat([z[i] for z in (*teachers_logits, student_logits)]))
        row = []
        for x in (*teachers, student):
            row += [(x[i] * x[j]).sum() for j in range(3)] + [x.new_zeros(())]
        w = weights(loss.feature_weights, torch.stack(row))
        for t in range(3):
            p, q = (teachers_logits[t][i] / 3).softmax(0), (student_logits[i] / 3).softmax(0)
            logits += 0.7 * v[t] * 9 * (p * (p / q).log()).sum() / 3
            small = min(4, teachers[t].shape[2])
            mine = torch.einsum(
                "ds,shw->dhw", loss.projectors[t][0].weight[:, :, 0, 0], F.adaptive_avg_pool2d(student[i], small)
            )
            mine = (mine * (1 + 1e-5) ** -0.5).clamp_min(0)
            features += 2.0 * w[t] * (mine - F.adaptive_avg_pool2d(teachers[t][i], small)).square().mean() / 3
    terms = loss(*given)
    torch.testing.assert_close(terms["logits"], logits)
    torch.testing.assert_close(terms["features"], features)


def test_it_begins_with_equal_weights():
    given = inputs()
    student, teachers = given[:2]
    alone = [KD(temperature=4.0)(student, teacher) for teacher in teachers]
    assert built(*given)(*given)["logits"].item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)


def test_the_weights_give_the_student_no_gradient():
    given = list(inputs())
    given[0], given[2] = given[0].requires_grad_(), given[2].requires_grad_()
    loss = learned(built(*given))
    weights = []
    for net in (loss.logit_weights, loss.feature_weights):
        net.register_forward_hook(lambda _, call, out: weights.append(out))
    loss(*given)
    assert [w.requires_grad for w in weights] == [False, False]
    assert all((w - 1 / 2).abs().max() > 1e-2 for w in weights)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 2.0}, {"beta": 2.0}, {"temperature": 2.0}, {"resize": "bilinear"}, {"batch_size": 5}],
    ids=str,
)
def test_options_change_the_value(options):
    given = inputs((4, 2, 8))
    default, other = (sum(learned(built(*given, **o))(*given).values()) for o in ({}, options))
    assert (default - other).abs() > 1e-4


def test_meta_parameters_belong_to_the_meta_optimizer_alone():
    assert MMKD().meta_optimizer() is None
    loss = built(*inputs(), meta_lr=0.5, meta_weight_decay=0.25, meta_interval=4)
    meta = {name for name, p in loss.named_parameters() if not p.requires_grad}
    assert meta == {f"{net}{layer}" for net in META for layer in ("0.weight", "0.bias", "2.weight", "2.bias")}
    (group,) = loss.meta_optimizer().param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert {id(p) for p in group["params"]} == {id(loss.get_parameter(name)) for name in meta}
    assert loss.meta_interval == 4 and loss.extra_forwards() == {"student": 1.0, "teacher": 0.75}
    assert MMKD(student_stage=0.5, teacher_stage="layer3").locations() == {
        "student_feature_map": 0.5,
        "teachers_feature_map": "layer3",
    }


def net(seed: int, scale: float = 1.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 8, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    with torch.no_grad():
        layers[3].weight.mul_(scale)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("good", [0, 1])
def test_bilevel_steps_find_the_teacher_that_helps(good):
    """The paper's claim: labels come from one of the teachers, and the weights learn which."""
    teachers = [net(1, scale=10.0), net(2, scale=10.0)]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(256, 3, 4, 4, generator=generator)
    with torch.no_grad():
        labels = teachers[good](images).argmax(1)
    loss = MMKD(batch_size=32, beta=1.0, student_stage="1", teacher_stage="1", meta_lr=0.01, meta_interval=1)
    student = Student(net(3), input_size=(3, 4, 4))
    torch.manual_seed(0)
    distiller = Distiller(teachers, student, [loss], task_loss=None).train()
    bilevel = Bilevel(distiller)
    found = []
    loss.logit_weights.register_forward_hook(lambda _, call, out: found.append(out[:, good].mean().item()))
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    for number in range(30):
        batch = torch.randint(128, (32,), generator=generator)
        held_out = 128 + torch.randint(128, (32,), generator=generator)
        bilevel.step(
            images[batch], labels[batch], images[held_out], labels[held_out], lr=0.1, progress=Progress(step=number)
        )
        optimizer.zero_grad()
        distiller(images[batch], labels[batch]).loss.backward()
        optimizer.step()
    assert found[0] == pytest.approx(0.5)
    assert found[-1] > 0.8
    assert not any(p.requires_grad for p in bilevel._meta("mmkd"))


def test_refuses_what_does_not_fit():
    given = list(inputs())
    infos = model(given[0], given[2]), tuple(map(model, given[1], given[3]))
    with pytest.raises(
        ValueError, match="MMKD: teachers must be at least 2, got 1; pass a list of teachers, or choose"
    ):
        MMKD().build(infos[0], infos[1][:1])
    with pytest.raises(ValueError, match="MMKD: teachers_logits has C=4 but student_logits has C=5; align the heads"):
        MMKD().build(infos[0], (infos[1][0], model(given[1][1][:, :4], given[3][1])))
    loss = built(*given)
    with pytest.raises(ValueError) as caught:
        built(*given, batch_size=2)(*given)
    assert str(caught.value) == (
        "MMKD: batch_size must be at least that of the batches, got 2 for B=3; pass batch_size=3."
    )
    for number, value, sentence in (
        (1, given[1][:1], "MMKD: teachers_logits must be a tuple of 2 tensors, got 1; give one for each"),
        (1, (given[1][0], given[1][1][:, :4]), "MMKD: teachers_logits has C=4 but student_logits has C=5; align"),
        (3, given[3][:1], "MMKD: teachers_feature_map must be a tuple of 2 tensors, got 1; give one for each"),
        (3, given[3][::-1], "MMKD: teachers_feature_map must have D=6 as in build, got D=7; build the loss for these"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss(*given[:number], value, *given[number + 1 :])
    fewer = (given[0][:, :4], tuple(z[:, :4] for z in given[1]), *given[2:])
    with pytest.raises(ValueError, match="MMKD: student_logits must have C=5 as in build, got C=4; build the loss for"):
        loss(*fewer)


def test_errors():
    for options, sentence in (
        ({"batch_size": 0}, "MMKD: batch_size must be > 0, got 0; give that of one process."),
        ({"alpha": -1}, "MMKD: alpha must be >= 0, got -1; 0 switches the logits off."),
        ({"beta": -1}, "MMKD: beta must be >= 0, got -1; 0 switches the features off."),
        ({"temperature": 0}, "MMKD: temperature must be > 0, got 0; 1.0 leaves the logits as they are."),
        ({"meta_lr": 0}, "MMKD: meta_lr must be > 0, got 0; the published value is 0.001."),
        ({"meta_weight_decay": -1}, "MMKD: meta_weight_decay must be >= 0, got -1; 0 switches it off."),
        ({"meta_interval": 0}, "MMKD: meta_interval must be > 0, got 0; 1 takes a bilevel step in every step."),
        ({"resize": "no"}, "MMKD: resize must be a known one, got 'no'; Known: pool, bilinear, bicubic, nearest."),
    ):
        with pytest.raises(ValueError) as caught:
            MMKD(**options)
        assert str(caught.value) == sentence
    with pytest.raises(RuntimeError, match="MMKD: build must be called before forward; put the loss into a kdvit"):
        MMKD()(*inputs())
