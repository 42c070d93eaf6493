from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdvit.losses import SRRL
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_srrl")
#: SimKD's repository holds the form on pooled features.
POOLED_CASES = {name: case for name, case in golden("feature_simkd").items() if name.startswith("srrl")}


def built(student: Tensor, teacher_pooled: Tensor, **options) -> SRRL:
    feature = "feature_map" if student.ndim == 4 else "pooled"
    loss = SRRL(feature=feature, **options)
    pooled = SignalInfo.of("pooled", teacher_pooled)
    loss.build(ModelInfo.of(**{feature: SignalInfo.of(feature, student)}), ModelInfo.of(pooled=pooled))
    return loss.to(student.dtype)


def call(loss: SRRL, student: Tensor, teacher_pooled: Tensor, head) -> dict[str, Tensor]:
    return loss(**{f"student_{loss.feature}": student}, teacher_pooled=teacher_pooled, teacher_head=head)


def head_of(case: GoldenCase) -> nn.Linear:
    weights = case.group("w")
    head = nn.Linear(*reversed(weights["head.weight"].shape)).requires_grad_(False)
    head.load_state_dict({"weight": weights["head.weight"], "bias": weights["head.bias"]})
    return head


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_cases_were_found():
    assert len(CASES) == 1 and len(POOLED_CASES) == 1


@pytest.mark.parametrize("case", [*CASES.values(), *POOLED_CASES.values()], ids=[*CASES, *POOLED_CASES])
def test_equals_the_official_loss(case):
    official = "connector.Connectors." if "map" in case.name else "transfer."
    student, teacher = case["in.student"].requires_grad_(), case["in.teacher"]
    pooled = teacher.mean(dim=(2, 3)) if teacher.ndim == 4 else teacher
    loss = built(student, pooled)
    weights = {name.removeprefix(official): x for name, x in case.group("w").items() if name.startswith(official)}
    loss.projector.load_state_dict(weights)
    head = head_of(case)
    terms = call(loss, student, pooled, head)
    if "map" in case.name:
        assert_close(terms["feature"], case["out.loss_stat"], 1e-5)
        assert_close(terms["logits"], case["out.loss_mse"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)
    for name, grad in case.group("wgrad").items():
        name = name.removeprefix("Connectors.").removeprefix("transfer.")
        assert_close(loss.projector.get_parameter(name).grad, grad, 1e-5)
    assert all(p.grad is None for p in head.parameters())


def test_value_by_hand():
    student = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    loss = built(student, torch.zeros(2, 1))
    loss.projector[0].weight.data.fill_(3.0)
    # (-3, 3) is normalised to (-1, 1) (but for eps) and rectified to (0, 1); the classifier doubles.
    terms = call(loss, student, torch.tensor([[2.0], [2.0]]), lambda x: 2 * x)
    assert terms["feature"].item() == pytest.approx((4 + 1) / 2, abs=1e-4)
    assert terms["logits"].item() == pytest.approx((16 + 4) / 2, abs=1e-4)


def test_equals_a_plain_loop():
    student, teacher = drawn(3, 2, 2, 3, dtype=torch.float64), drawn(3, 4, seed=1, dtype=torch.float64)
    loss, head = built(student, teacher, alpha=0.5, beta=2.0), nn.Linear(4, 5).double().requires_grad_(False)
    weight = loss.projector[0].weight[:, :, 0, 0]
    feature = torch.zeros(3, 4, dtype=torch.float64)
    for c in range(4):
        x = weight[c, 0] * student[:, 0] + weight[c, 1] * student[:, 1]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        for i in range(3):
            feature[i, c] = sum(max(v, 0.0) for v in x[i].flatten().tolist()) / 6
    squares = sum((feature[i, c] - teacher[i, c]) ** 2 for i in range(3) for c in range(4))
    logits = 0.0
    for i in range(3):
        for k in range(5):
            logits += (head.weight[k] @ feature[i] - head.weight[k] @ teacher[i]) ** 2  # the bias cancels
    terms = call(loss, student, teacher, head)
    torch.testing.assert_close(terms["feature"], 0.5 * squares / 12)
    torch.testing.assert_close(terms["logits"], 2.0 * logits / 15)


def test_gradient_of_the_logit_term_flows_through_the_classifier():
    student, teacher = drawn(5, 6).requires_grad_(), drawn(5, 4, seed=1)
    loss, head = built(student, teacher, alpha=0.0, relu=False), nn.Linear(4, 3).requires_grad_(False)
    call(loss, student, teacher, head)["logits"].backward()
    full = loss.projector[0].weight.grad.clone()
    loss.projector[0].weight.grad = None
    # A classifier that sees the first channel alone leaves the other rows of the projector without a gradient.
    head.weight.data[:, 1:] = 0
    call(loss, student, teacher, head)["logits"].backward()
    rows = loss.projector[0].weight.grad.flatten(1).abs().amax(dim=1)
    assert rows[0] > 0 and rows[1:].max() == 0 and full.flatten(1).abs().amax(dim=1).min() > 0
    assert head.weight.grad is None and head.bias.grad is None


def test_order_of_positions_and_scale_of_the_student_do_not_matter():
    student, teacher = drawn(4, 3, 2, 2), drawn(4, 5, seed=1)
    loss, head = built(student, teacher), nn.Linear(5, 3).requires_grad_(False)
    expected = call(loss, student, teacher, head)
    permuted = student.flatten(2)[:, :, [2, 0, 3, 1]].view_as(student)
    torch.testing.assert_close(call(loss, permuted, teacher, head), expected)
    # BatchNorm takes it away, but for its eps.
    torch.testing.assert_close(call(loss, 100 * student, teacher, head), expected, rtol=1e-3, atol=1e-4)


def test_student_may_have_another_grid_in_every_batch():
    student, teacher = drawn(4, 3, 2, 2), drawn(4, 5, seed=1)
    loss, head = built(student, teacher), nn.Linear(5, 3).requires_grad_(False)
    assert sum(call(loss, drawn(4, 3, 7, 5), teacher, head).values()).isfinite()


def test_without_relu_a_projected_feature_has_both_signs():
    student, teacher = drawn(16, 6), drawn(16, 4, seed=1)
    torch.manual_seed(0)
    loss = built(student, teacher, relu=False)
    assert loss.projector(student[:, :, None, None]).min() < 0
    assert built(student, teacher).projector(student[:, :, None, None]).min() == 0


def value(student: Tensor | None = None, **options) -> float:
    student, teacher = drawn(4, 3, 2, 2) if student is None else student, drawn(4, 5, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss, head = built(student, teacher, **options), nn.Linear(5, 3).requires_grad_(False)
    return sum(call(loss, student, teacher, head).values()).item()


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"beta": 2.0}, {"relu": False}], ids=str)
def test_options_change_the_value(options):
    assert abs(value(**options) - value()) > 1e-3


def test_pooled_is_another_value_than_the_map():
    student = drawn(4, 3, 2, 2)
    assert abs(value(student.mean(dim=(2, 3))) - value(student)) > 1e-3


def test_reads_what_feature_says():
    loss = SRRL(student_stage=2)
    assert loss.inputs() == ("student_feature_map", "teacher_pooled", "teacher_head")
    assert loss.locations() == {"student_feature_map": 2}
    assert SRRL.mismatch.depth == "one stage, and what the classifier sees"
    loss = SRRL(feature="pooled", student_stage=2)
    assert loss.inputs() == ("student_pooled", "teacher_pooled", "teacher_head") and loss.locations() == {}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"alpha": -1}, ValueError, "SRRL: alpha must be >= 0, got -1; 0 switches the feature term off."),
        ({"beta": -1}, ValueError, "SRRL: beta must be >= 0, got -1; 0 switches the logit term off."),
        ({"relu": "no"}, TypeError, "SRRL: relu must be True or False, got 'no'; write one of them."),
        (
            {"feature": "pool"},
            ValueError,
            "SRRL: feature must be a known one, got 'pool'; did you mean 'pooled'? Known: feature_map, pooled.",
        ),
    ],
    ids=["alpha", "beta", "relu", "feature"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        SRRL(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (
            drawn(4, 3, 2, 2),
            drawn(4, 6),
            "SRRL: teacher_pooled must have D=5 as in build, got D=6; build the loss for these models.",
        ),
        (
            drawn(4, 3, 2, 2),
            drawn(3, 5),
            "SRRL: teacher_pooled has B=3 but student_feature_map has B=4; give both the same batch.",
        ),
        (
            drawn(4, 3, 2, 2),
            drawn(4, 5, 2, 2),
            "SRRL: teacher_pooled must have shape (B, D), got (4, 5, 2, 2); give the signal of that name.",
        ),
    ],
    ids=["width", "batch", "map"],
)
def test_refuses_other_features(student, teacher, sentence):
    loss = built(student, drawn(4, 5))
    with pytest.raises(ValueError) as caught:
        call(loss, student, teacher, nn.Identity())
    assert str(caught.value) == sentence


def test_must_be_given_the_feature():
    loss = built(drawn(4, 3), drawn(4, 5))
    with pytest.raises(TypeError, match="SRRL: student_pooled must be given where feature says so, got none; pass it"):
        loss(student_feature_map=drawn(4, 3, 2, 2), teacher_pooled=drawn(4, 5), teacher_head=nn.Identity())


def test_must_be_built():
    with pytest.raises(RuntimeError, match="SRRL: build must be called before forward; put the loss into a kdvit"):
        call(SRRL(), drawn(4, 3, 2, 2), drawn(4, 5), nn.Identity())
