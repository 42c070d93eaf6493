"""The registry and the contract's own errors."""

from __future__ import annotations

import pytest
from torch import Tensor

import kdvit.losses.loss as contract
from kdvit.losses import KD, FitNet, Loss, Standardized, TinyMIM, get, make, names, register
from kdvit.schedules import Linear


@pytest.fixture
def registry(monkeypatch):
    """Registrations of a test stay in the test."""
    monkeypatch.setattr(contract, "_registry", dict(contract._registry))


def test_names_are_sorted_and_known():
    assert names() == sorted(names())
    assert {"deit", "dkd", "fitnet", "kd", "normkd", "tinymim", "vitkd"} <= set(names())
    assert all(get(name).name == name for name in names())


def test_make_gives_the_options():
    assert repr(make("kd", temperature=2)) == "KD(temperature=2.0)"
    assert make("dkd", standardize=True, beta=3).loss.beta == 3.0
    assert repr(make("kd", temperature=Linear(8.0, 2.0))) == (
        "Scheduled(KD(temperature=8.0), temperature=Linear(start=8.0, end=2.0))"
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: make("dkdd"), "unknown loss 'dkdd'; did you mean 'dkd'? `kdvit list losses` shows all "),
        (lambda: make("zzzzzz"), "unknown loss 'zzzzzz'; `kdvit list losses` shows all "),
        (lambda: make("kd", temprature=1.0), "kd: unknown option 'temprature'; did you mean 'temperature'? Known: "),
        (lambda: make("tinymim", standardize=True), "Standardized: loss must read logits, got TinyMIM which reads "),
        (lambda: register("KD"), "register: name must be a lower-case identifier, got 'KD'."),
        (lambda: register("my loss"), "register: name must be a lower-case identifier, got 'my loss'."),
        (lambda: register("kd"), "register: name 'kd' is taken by KD; choose another."),
    ],
    ids=["nearest", "far", "option", "standardize", "upper", "space", "taken"],
)
def test_wrong_names_are_refused(call, sentence):
    class Mine(Loss):
        def forward(self, student_logits: Tensor) -> Tensor:
            return student_logits.sum()

    with pytest.raises(ValueError) as caught:
        call()(Mine)
    assert str(caught.value).startswith(sentence)
    assert "mine" not in names()


def test_a_class_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"register\('mine'\): the class must be a subclass of kdvit.losses.Loss"):
        register("mine")(dict)


def test_an_unknown_input_is_refused():
    class Mine(Loss):
        def forward(self, student_logit: Tensor) -> Tensor:
            return student_logit.sum()

    with pytest.raises(TypeError, match="Mine: forward has an unknown input 'student_logit'; did you mean 'student_l"):
        register("mine")(Mine)
    assert "mine" not in names()


def test_a_new_loss_is_made_by_its_name(registry):
    @register("mine")
    class Mine(Loss):
        def __init__(self, power: float = 2.0) -> None:
            super().__init__()
            self.power = power

        def forward(self, student_logits: Tensor, teacher_logits: Tensor, shift: float = 0.0) -> Tensor:
            return ((student_logits - teacher_logits.detach() + shift).abs() ** self.power).mean()

    assert repr(make("mine", power=3.0)) == "Mine(power=3.0)"
    assert make("mine").inputs() == ("student_logits", "teacher_logits")  # an input with a default is not filled


def test_needs_says_what_is_read_where():
    assert contract.needs(KD(), "student") == {"logits": None}
    assert contract.needs(FitNet(student_stage=2), "student") == {"feature_map": 2}
    assert contract.needs(TinyMIM(teacher_block=17, relations=("qq",)), "teacher") == {"query": 17}
    assert contract.needs(Standardized(KD()), "teacher") == {"logits": None}
    assert contract.reads_teacher(KD())


def test_locations_must_fit_the_inputs():
    class Unlocated(Loss):
        def forward(self, student_tokens: Tensor) -> Tensor:
            return student_tokens.sum()

    class Stray(Loss):
        def locations(self) -> dict[str, int]:
            return {"student_tokens": 3}

        def forward(self, student_logits: Tensor) -> Tensor:
            return student_logits.sum()

    with pytest.raises(TypeError, match=r"Unlocated: locations\(\) must say where 'student_tokens' is read."):
        contract.needs(Unlocated(), "student")
    with pytest.raises(TypeError, match=r"Stray: locations\(\) names \['student_tokens'\], which forward"):
        contract.needs(Stray(), "student")
