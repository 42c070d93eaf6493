from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import ClsQueue
from kdvit.losses.cls_queue import TeacherQueue, queue_kl
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_lightly_distill").items() if name.startswith("v1_")}


def built(student_dim: int = 3, teacher_dim: int = 4, signal: str = "pooled", **options) -> ClsQueue:
    loss = ClsQueue(**{"queue_size": 6} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loss.build(
            ModelInfo.of(pooled=SignalInfo("pooled", "output", (student_dim,))),
            ModelInfo.of(**{signal: SignalInfo(signal, "output", (teacher_dim,))}),
        )
    return loss


def features(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, dim, generator=generator) for dim in (3, 4))


def test_cases_were_found():
    assert len(CASES) == 2


def test_equals_the_official_loss():
    """The golden batch is compared with a queue that it is not in: nothing else was put in front of it."""
    case = CASES["v1_0"]
    student = case["in.student"].clone().requires_grad_()
    value = queue_kl(student, case["in.teacher"], case["in.queue"], case.options["temperature"])
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(student.grad, case["grad.student"], 1e-5)


def test_the_whole_loss_is_the_official_one_for_its_queue():
    """With an identity as the head, and the batch in front of the queue, as the official training step does."""
    case = CASES["v1_0"]
    loss = built(16, 16, queue_size=17)
    loss.head[0].load_state_dict({"weight": torch.eye(16), "bias": torch.zeros(16)})
    loss.queue.rows[:12] = case["in.queue"]
    queue = torch.cat([case["in.teacher"], case["in.queue"]])
    value = loss(3 * case["in.student"], 5 * case["in.teacher"])  # unit vectors there
    assert_close(value, queue_kl(case["in.student"], case["in.teacher"], queue, 0.07), 1e-5)
    assert_close(loss.queue.rows, queue, 1e-6)


def test_the_queue_moves_as_the_official_one():
    case = CASES["v1_queue_0"]
    queue = TeacherQueue(7, 16)
    queue.rows.copy_(case["in.queue"])
    assert torch.equal(queue(case["in.teacher"], remember=False), case["out.queue"])
    assert torch.equal(queue.rows, case["in.queue"])
    assert torch.equal(queue(case["in.teacher"], remember=True), case["out.queue"])
    assert torch.equal(queue.rows, case["out.queue"])


def test_a_batch_longer_than_the_queue_fills_it():
    queue, x = TeacherQueue(3, 2), torch.rand(5, 2)
    assert torch.equal(queue(x, remember=True), x[:3]) and torch.equal(queue.rows, x[:3])


@pytest.mark.parametrize(
    ("images", "size"),
    [(20, 16), (49, 16), (50, 32), (9_999, 2048), (10_000, 4096), (19_999, 4096), (20_000, 8192), (1_281_167, 8192)],
    ids=str,
)
def test_the_queue_is_as_long_as_the_data_ask_for(images, size):
    """As released: a bucket is for data sets smaller than its limit."""
    loss = built(queue_size=None)
    assert len(loss.queue.rows) == 8192
    loss.allocate(images)
    assert loss.queue.rows.shape == (size, 4) and "queue_size=None" in repr(loss)
    given = built(queue_size=6)
    given.allocate(images)
    assert len(given.queue.rows) == 6


def test_equals_a_plain_loop():
    loss = built().double()
    loss.requires_grad_(False)
    past = torch.nn.functional.normalize(torch.randn(4, 4, dtype=torch.float64), dim=1)
    loss.queue.rows[:4] = past
    student, teacher = (x.double() for x in features())
    embedded = [loss.head[0].weight @ x + loss.head[0].bias for x in student]
    s = [x / x.norm() for x in embedded]
    t = [x / x.norm() for x in teacher]
    queue = [*t, *past]
    value = 0.0
    for i in range(2):
        a = [math.exp(s[i] @ q / 0.07) for q in queue]
        b = [math.exp(t[i] @ q / 0.07) for q in queue]
        value += sum(y / sum(b) * math.log(y / sum(b) / (x / sum(a))) for x, y in zip(a, b, strict=True)) / 2
    assert loss(student, teacher).item() == pytest.approx(value, rel=1e-9)


def test_length_does_not_matter_and_direction_does():
    loss = built().eval()
    torch.nn.init.zeros_(loss.head[0].bias)
    student, teacher = features()
    value = loss(student, teacher)
    torch.testing.assert_close(loss(3 * student, teacher), value)
    torch.testing.assert_close(loss(student, 3 * teacher), value)
    assert (loss(-student, teacher) - value).abs() > 1e-3


def test_a_rotation_of_the_teachers_space_does_not_matter():
    """It is similarities that are compared: rotate teacher, queue and head together."""
    loss = built().eval()
    loss.queue.rows.copy_(torch.nn.functional.normalize(torch.randn(6, 4), dim=1))
    student, teacher = features()
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    value = loss(student, teacher)
    with torch.no_grad():
        loss.queue.rows.copy_(loss.queue.rows @ rotation.T)
        loss.head[0].weight.copy_(rotation @ loss.head[0].weight)
        loss.head[0].bias.copy_(rotation @ loss.head[0].bias)
    torch.testing.assert_close(loss(student, teacher @ rotation.T), value)


def test_nothing_is_remembered_in_eval_mode():
    loss = built()
    loss(*features())
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(*features(seed=1))
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    eval_value = loss(*features(seed=1))
    assert torch.equal(loss.train()(*features(seed=1)), eval_value)  # the same value, then remembered
    assert not torch.equal(loss.queue.rows, before["queue.rows"])


def test_two_batches_backward_one_after_the_other():
    """The queue moves on between forward and backward."""
    loss = built()
    first, second = loss(*features()), loss(*features(seed=1))
    (first + second).backward()
    assert loss.head[0].weight.grad.isfinite().all()


def test_the_class_token_is_read_on_demand():
    student, teacher = features()
    loss = built(signal="normed_cls_token", normed_teacher=True)
    assert loss.inputs() == ("student_pooled", "teacher_normed_cls_token")
    assert ClsQueue().inputs() == ("student_pooled", "teacher_pooled")
    torch.testing.assert_close(loss(student, teacher_normed_cls_token=teacher), built()(student, teacher))
    with pytest.raises(TypeError) as caught:
        loss(student, teacher)
    assert str(caught.value) == (
        "ClsQueue: teacher_normed_cls_token must be given for normed_teacher=True; pass it by name."
    )


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"queue_size": 3}], ids=str)
def test_options_change_the_value(options):
    def value(**options) -> float:
        loss = built(**options)
        loss(*features(seed=1))
        return loss(*features()).item()

    assert abs(value(**options) - value()) > 1e-3


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"temperature": 0}, ValueError, "ClsQueue: temperature must be > 0, got 0; the published value is 0.07."),
        ({"queue_size": 0}, ValueError,
         "ClsQueue: queue_size must be > 0, got 0; None follows the number of training images."),
        ({"normed_teacher": "no"}, TypeError,
         "ClsQueue: normed_teacher must be True or False, got 'no'; write one of them."),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        ClsQueue(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    with pytest.raises(ValueError) as caught:
        built()(torch.rand(2, 3), torch.rand(2, 5))
    assert str(caught.value) == (
        "ClsQueue: teacher_pooled must have D=4 as in build, got D=5; build the loss for these models."
    )
    with pytest.raises(ValueError, match="ClsQueue: teacher_pooled has B=3 but student_pooled has B=2; give both"):
        built()(torch.rand(2, 3), torch.rand(3, 4))


def test_must_be_built():
    for call in (lambda: ClsQueue()(*features()), lambda: ClsQueue().allocate(5)):
        with pytest.raises(RuntimeError, match="ClsQueue: build must be called before forward; put the loss into a"):
            call()
