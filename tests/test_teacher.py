from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student, Teacher
from kdvit.losses import KD, FitNet, Loss, TinyMIM, ViTKD
from tests import tiny


class ReadsFeatures(Loss):
    """Keeps what it is given, to look at."""

    def __init__(self, **teacher_signals: int | None) -> None:
        super().__init__()
        self.teacher_signals = {f"teacher_{signal}": block for signal, block in teacher_signals.items()}

    def inputs(self) -> tuple[str, ...]:
        return ("student_logits", *self.teacher_signals)

    def locations(self) -> dict[str, int]:
        return {name: block for name, block in self.teacher_signals.items() if block is not None}

    def forward(self, student_logits: Tensor, **given: Tensor) -> Tensor:
        self.given = given
        return student_logits.square().mean()


def read(teacher: Teacher | nn.Module, student: nn.Module | Student | None = None, **signals: int | None) -> dict:
    """What a loss is given of the teacher for `tiny.images()`."""
    loss = ReadsFeatures(**signals)
    Distiller(teacher, student or tiny.vit(), [loss], task_loss=None)(tiny.images())
    return loss.given


# Frozen


def test_the_teacher_stays_in_eval_mode():
    distiller = Distiller(tiny.vit(7, drop_rate=0.9, proj_drop_rate=0.9), tiny.vit(), ["kd"])
    teacher = distiller.teacher
    expected = teacher.predict(tiny.images())
    distiller.train()
    assert distiller.student.training and not any(module.training for module in teacher.model.modules())
    teacher.train()
    assert not any(module.training for module in teacher.model.modules())
    for use in (teacher.predict, lambda images: distiller(images, tiny.labels())):
        teacher.model.train()  # behind our back
        use(tiny.images())
        assert not any(module.training for module in teacher.model.modules())
    teacher.model.train()
    assert torch.equal(teacher.predict(tiny.images()), expected)


def test_a_model_in_train_mode_is_put_into_eval_mode():
    model = tiny.cnn(7).train()
    assert not any(module.training for module in Teacher(model).modules())


@pytest.mark.parametrize("losses", [["kd"], [FitNet(2, 2)], ["kd", FitNet()]], ids=["kd", "fitnet", "both"])
def test_nothing_of_the_teacher_moves_in_training(losses):
    model = tiny.cnn(7)
    before = copy.deepcopy(model.state_dict())
    assert any("running_mean" in key for key in before)
    distiller = Distiller(model, tiny.cnn(), losses).train()
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        model.train()
        distiller(tiny.images(seed=step), tiny.labels()).loss.backward()
        optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_signals_carry_no_graph_even_of_a_model_that_was_thawed():
    teacher = Teacher(tiny.vit(7))
    teacher.model.requires_grad_(True)
    given = read(teacher, logits=None, patch_tokens=0, attention=-1, normed_cls_token=None)
    assert len(given) == 4
    assert not any(value.requires_grad for value in given.values())
    assert not teacher.predict(tiny.images()).requires_grad


class ThroughTheHead(Loss):
    """Classifies the student's class token with the teacher's head."""

    def forward(self, student_normed_cls_token: Tensor, teacher_head: object, labels: Tensor) -> Tensor:
        return F.cross_entropy(teacher_head(student_normed_cls_token), labels)


@pytest.mark.parametrize("facts", [{}, {"dtype": torch.bfloat16}, {"class_map": [4, 3, 2, 1, 0]}], ids=str)
def test_a_gradient_flows_through_the_teachers_head_to_the_student_alone(facts):
    model = tiny.vit(7)
    expected = copy.deepcopy(model.head)
    distiller = Distiller(Teacher(model, **facts), tiny.vit(), [ThroughTheHead()], task_loss=None)
    out = distiller(tiny.images(), tiny.labels())
    out.loss.backward()
    logits = expected(distiller.student.model.forward_features(tiny.images())[:, 0])
    labels = 4 - tiny.labels() if "class_map" in facts else tiny.labels()
    tolerance = dict(rtol=0.05, atol=0.05) if "dtype" in facts else {}
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, labels), **tolerance)
    assert distiller.student.model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


# It stops early


def count_calls(model: nn.Module) -> list[int]:
    """How often each block ran, counted from now on."""
    calls = [0] * len(model.blocks)
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


@pytest.fixture
def deep() -> nn.Module:
    return tiny.vit(7, depth=24, mlp_ratio=1.0)


def test_blocks_behind_the_last_one_read_never_run(deep):
    calls = count_calls(deep)
    distiller = Distiller(deep, tiny.vit(), [TinyMIM(teacher_block=17)], task_loss=None)
    constructed = list(calls)
    assert min(constructed[:18]) > 0 and constructed[18:] == [0] * 6  # 17 is the 18th
    for _ in range(3):
        distiller(tiny.images())
    assert [after - before for after, before in zip(calls, constructed)] == [3] * 18 + [0] * 6


def test_the_deepest_read_decides_and_the_output_needs_all(deep):
    losses = [TinyMIM(teacher_block=3), ViTKD(teacher_blocks=(0, 1))]
    calls = count_calls(deep)
    Distiller(deep, tiny.vit(), losses[:1], task_loss=None)
    assert max(calls[4:]) == 0
    Distiller(deep, tiny.vit(), losses, task_loss=None)  # ViTKD reads the final norm
    assert min(calls) > 0


def test_a_stopped_teacher_still_predicts(deep):
    expected = deep(tiny.images())
    distiller = Distiller(deep, tiny.vit(), [TinyMIM(teacher_block=0)])
    torch.testing.assert_close(distiller.teacher.predict(tiny.images()), expected)
    torch.testing.assert_close(deep(tiny.images()), expected)  # and works for anybody else


def test_a_teacher_that_no_loss_reads_does_not_run(deep):
    distiller = Distiller(deep, tiny.vit(), [])
    calls = count_calls(deep)
    distiller(tiny.images(), tiny.labels())
    assert max(calls) == 0
    distiller.teacher.predict(tiny.images())
    assert min(calls) == 1


# Precision


def test_bfloat16_teacher_gives_float32_signals():
    expected = read(tiny.vit(7), logits=None, patch_tokens=0, query=1, attention=1, normed_tokens=None)
    teacher = Teacher(tiny.vit(7), dtype=torch.bfloat16)
    given = read(teacher, logits=None, patch_tokens=0, query=1, attention=1, normed_tokens=None)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert len(given) == 5
    for name, value in given.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, expected[name])
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item())
    assert teacher.predict(tiny.images()).dtype == torch.float32


def test_teacher_keeps_its_precision_when_the_distiller_is_moved():
    distiller = Distiller(Teacher(tiny.vit(7), dtype=torch.bfloat16), tiny.vit(), ["kd"]).double()
    assert {p.dtype for p in distiller.teacher.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(distiller(tiny.images().double(), tiny.labels()).loss)


# Classes


@pytest.mark.parametrize("class_map", [[8, 0, 3, 3, 5], torch.tensor([4, 3, 2, 1, 0]), range(5)], ids=str)
def test_class_map_picks_and_orders_the_teachers_classes(class_map):
    model = tiny.vit(7, num_classes=9)
    expected = model(tiny.images())[:, list(class_map)]
    teacher = Teacher(model, class_map=class_map)
    assert torch.equal(teacher.predict(tiny.images()), expected)
    assert torch.equal(read(teacher, logits=None)["teacher_logits"], expected)
    distiller = Distiller(teacher, tiny.vit(), ["kd"])
    out = distiller(tiny.images(), tiny.labels())
    torch.testing.assert_close(out.losses["kd"], KD()(out.logits, expected))


def test_predict_gives_the_models_own_logits():
    model = tiny.cnn(7)
    teacher = Teacher(model)
    expected = model(tiny.images())
    assert torch.equal(teacher.predict(tiny.images()), expected)
    Distiller(teacher, tiny.vit(), [FitNet(teacher_stage=3)], task_loss=None)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in teacher.normalisation)
    renormalised = (tiny.images() * 0.5 + 0.5 - mean) / std  # the student's images are normalised by 0.5 / 0.5
    torch.testing.assert_close(teacher.predict(tiny.images()), model(renormalised))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision_runs_in_it(dtype):
    teacher = Teacher(tiny.vit(7).to(dtype))
    out = Distiller(teacher, tiny.vit(), ["kd", "fitnet"])(tiny.images(), tiny.labels())
    assert teacher.dtype == dtype and out.loss.isfinite()
    assert {p.dtype for p in teacher.model.parameters()} == {dtype}
    mixed = tiny.vit(7)
    mixed.head.to(dtype)  # somebody's own choice, which stays
    assert Teacher(mixed).dtype is None and Teacher(tiny.vit(7)).dtype is None
