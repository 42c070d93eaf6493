from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses import KD, PromptKD
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_promptkd")


def built(student_dim: int = 3, teacher_dim: int = 5, dtype: torch.dtype = torch.float32, **options) -> PromptKD:
    loss = PromptKD(**options)
    student, teacher = (SignalInfo("pooled", "head", (dim,)) for dim in (student_dim, teacher_dim))
    loss.build(ModelInfo.of(pooled=student), ModelInfo.of(pooled=teacher))
    return loss.to(dtype)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classifier(dim: int = 5, num_classes: int = 4, dtype: torch.dtype = torch.float32) -> nn.Linear:
    head = nn.Linear(dim, num_classes).requires_grad_(False)
    head.load_state_dict({"weight": drawn(num_classes, dim, seed=5), "bias": drawn(num_classes, seed=6)})
    return head.to(dtype)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    student, text, weight = case["in.image_feat"].requires_grad_(), case["in.tea_text"], case.options["kd_weight"]
    scale = case["in.logit_scale"].item()
    loss = built(student.shape[1], text.shape[1], temperature=case.options["temperature"], normalize=True,
                 logit_scale=scale)  # fmt: skip
    # The bias in front of BatchNorm, which we leave out, is taken away by it.
    weights = {k.removeprefix("conv1."): x for k, x in case.group("w").items() if k != "conv1.0.bias"}
    loss.projector.load_state_dict({k: x.flatten(1) if x.ndim == 4 else x for k, x in weights.items()})
    head = nn.Linear(text.shape[1], len(text), bias=False).requires_grad_(False)
    head.load_state_dict({"weight": text})
    value = weight * loss(student, case["in.tea_logits"], torch.zeros(len(student), text.shape[1]), head)
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.image_feat"], 1e-5)
    grads = {k.removeprefix("conv1."): x for k, x in case.group("wgrad").items()}
    noise = grads.pop("0.bias")
    assert noise.abs().max() < 1e-5 * grads["0.weight"].abs().max()
    assert grads.keys() == {name for name, _ in loss.projector.named_parameters()}
    for name, grad in grads.items():
        assert_close(loss.projector.get_parameter(name).grad, grad.flatten(1) if grad.ndim == 4 else grad, 1e-5)
    assert head.weight.grad is None


def by_loop(loss: PromptKD, student: Tensor, teacher_logits: Tensor, head: nn.Linear) -> Tensor:
    first, norm, _, last = loss.projector
    hidden = torch.stack([first.weight @ x for x in student])
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    total, t = 0.0, loss.temperature
    for x, target in zip(hidden, teacher_logits, strict=True):
        feature = last.weight @ x.clamp_min(0) + last.bias
        if loss.normalize:
            feature = feature / (feature**2).sum().sqrt()
        z = loss.logit_scale * (head.weight @ feature + head.bias)
        q, p = ((y / t).exp() / (y / t).exp().sum() for y in (z, target))
        total = total + sum(p[c] * (p[c] / q[c]).log() for c in range(len(p)))
    return t**2 * total / teacher_logits.numel()


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "logit_scale": 7.0}, {"temperature": 3.0, "logit_scale": 0.5}], ids=str
)
def test_equals_a_plain_loop(options):
    f64 = torch.float64
    student, logits, head = drawn(6, 3, dtype=f64), drawn(6, 4, seed=1, dtype=f64), classifier(dtype=f64)
    loss = built(dtype=f64, **options)
    torch.testing.assert_close(loss(student, logits, drawn(6, 5), head), by_loop(loss, student, logits, head))


def test_value_by_hand():
    loss = built(1, 1)
    for parameter in loss.projector.parameters():
        parameter.data.fill_(1.0)
    loss.projector[1].bias.data.zero_()
    loss.projector[3].bias.data.zero_()
    # (-3, 3) is normalised to (-1, 1) (but for eps), rectified to (0, 1), and scored (0, 0) and (ln 3, 0).
    head = nn.Linear(1, 2).requires_grad_(False)
    head.load_state_dict({"weight": torch.tensor([[3.0], [1.0]]).log(), "bias": torch.zeros(2)})
    value = loss(torch.tensor([[-3.0], [3.0]]), torch.zeros(2, 2), torch.zeros(2, 1), head)
    # Equal logits of the teacher: KL 0, and ln(1/2) - 1/2 ln(3/4) - 1/2 ln(1/4) = 0.1438; mean over 2 x 2.
    assert value.item() == pytest.approx(0.1438 / 4, abs=1e-4)


def test_mean_is_over_classes_too():
    student, logits, head = drawn(6, 3), drawn(6, 4, seed=1), classifier()
    loss = built(temperature=2.0)
    z = head(loss.projector(student))
    expected = KD(temperature=2.0)(z, logits) / 4
    torch.testing.assert_close(loss(student, logits, drawn(6, 5), head), expected)


def test_normalised_the_length_of_a_feature_does_not_matter():
    student, logits, head = drawn(6, 3), drawn(6, 4, seed=1), classifier()
    loss = built(normalize=True, logit_scale=5.0)
    expected = loss(student, logits, drawn(6, 5), head)
    for name in ("weight", "bias"):
        getattr(loss.projector[3], name).data *= 10
    torch.testing.assert_close(loss(student, logits, drawn(6, 5), head), expected)


def test_gradient_flows_through_the_classifier_into_the_student():
    student, head = drawn(6, 3).requires_grad_(), classifier()
    loss = built()
    loss(student, drawn(6, 4, seed=1), drawn(6, 5), head).backward()
    assert student.grad.abs().max() > 0 and head.weight.grad is None and head.bias.grad is None
    student.grad = None
    head.weight.data.zero_()  # a classifier that ignores its input has nothing to say to the student
    loss(student, drawn(6, 4, seed=1), drawn(6, 5), head).backward()
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"normalize": True, "logit_scale": 10.0}], ids=str)
def test_deployed_student_says_what_was_trained(options):
    student, head = drawn(6, 3), classifier()
    loss = built(**options).eval()
    loss.adopt_head(head)
    prediction = loss.predict(student)
    assert loss(student, prediction, drawn(6, 5), head).item() == pytest.approx(0, abs=1e-7)
    feature = loss.projector(student)
    feature = F.normalize(feature, dim=1) if loss.normalize else feature
    torch.testing.assert_close(prediction, loss.logit_scale * head(feature))
    assert loss.predict(student.bfloat16()).dtype == torch.float32


def value(**options) -> float:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = built(**options)
    return loss(drawn(6, 3), drawn(6, 4, seed=1), drawn(6, 5), classifier()).item()


@pytest.mark.parametrize("options", [{"temperature": 2.0}, {"normalize": True}, {"logit_scale": 3.0}], ids=str)
def test_options_change_the_value(options):
    assert abs(value(**options) - value()) > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"temperature": 0},
            ValueError,
            "PromptKD: temperature must be > 0, got 0; 1.0 leaves the logits as they are.",
        ),
        (
            {"logit_scale": "100"},
            TypeError,
            "PromptKD: logit_scale must be a number > 0, got '100'; 1.0 leaves the logits as they are.",
        ),
        ({"normalize": 1}, TypeError, "PromptKD: normalize must be True or False, got 1; write one of them."),
    ],
    ids=["temperature", "logit_scale", "normalize"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        PromptKD(**options)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("logits", "pooled", "sentence"),
    [
        (
            drawn(6, 4),
            drawn(6, 7),
            "PromptKD: teacher_pooled must have D=5 as in build, got D=7; build the loss for these models.",
        ),
        (drawn(6, 4), drawn(5, 5), "PromptKD: teacher_pooled has B=5 but student_pooled has B=6; give both the same "
                                   "batch."),
        (drawn(5, 4), drawn(6, 5), "PromptKD: teacher_logits has B=5 but student_logits has B=6; give both the same "
                                   "batch."),
        (
            drawn(6, 3),
            drawn(6, 5),
            "PromptKD: teacher_logits has C=3 but student_logits has C=4; align the heads or pass class_map.",
        ),
        (
            drawn(6, 4),
            drawn(6, 5, 2),
            "PromptKD: teacher_pooled must have shape (B, D), got (6, 5, 2); give the signal of that name.",
        ),
    ],
    ids=["width", "batch", "batch of logits", "classes", "axes"],
)  # fmt: skip
def test_refuses_other_inputs(logits, pooled, sentence):
    with pytest.raises(ValueError) as caught:
        built()(drawn(6, 3), logits, pooled, classifier())
    assert str(caught.value) == sentence


def test_must_be_built_and_have_a_classifier():
    with pytest.raises(RuntimeError, match="PromptKD: build must be called before forward; put the loss into a kdvit"):
        PromptKD()(drawn(6, 3), drawn(6, 4), drawn(6, 5), classifier())
    with pytest.raises(RuntimeError, match="PromptKD: build must be called before forward; put the loss into a kdvit"):
        PromptKD().predict(drawn(6, 3))
    with pytest.raises(RuntimeError, match="PromptKD: adopt_head must be called before predict; put the loss into a k"):
        built().predict(drawn(6, 3))
