from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from kdvit.losses import ClsDense, ClsQueue
from kdvit.losses.relations import relation_kl
from kdvit.signals import ModelInfo, SignalInfo, tokens_to_map
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_lightly_distill").items() if name.startswith("v3_")}


def built(student_map: Tensor, teacher_map: Tensor, dims: tuple[int, int] = (3, 4), **options) -> ClsDense:
    loss = ClsDense(**{"queue_size": 6} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        loss.build(
            *(
                ModelInfo.of(pooled=SignalInfo("pooled", "output", (dim,)), feature_map=SignalInfo.of("feature_map", x))
                for dim, x in zip(dims, (student_map, teacher_map), strict=True)
            )
        )
    return loss


def inputs(grids=((2, 2), (2, 2)), batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (3, *grids[0]), (4,), (4, *grids[1])]
    return tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def make(grids=((2, 2), (2, 2)), **options) -> ClsDense:
    _, student_map, _, teacher_map = inputs(grids)
    return built(student_map, teacher_map, **options)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    """The official loss is given projected vectors, and a queue that its batch is not put in front of."""
    maps = [tokens_to_map(case[f"in.{side}_local"], (3, 3)) for side in ("student", "teacher")]
    options = case.options
    loss = built(*maps, (16, 16), queue_size=10, temperature_global=options["temperature_global"],
                 temperature_local=options["temperature_local"], local_weight=options["loss_local_weight"])  # fmt: skip
    for head in (loss.global_head, loss.local_head):
        head[0].load_state_dict({"weight": torch.eye(16), "bias": torch.zeros(16)})
    loss.queue.forward = lambda embeddings, remember: case["in.queue"]
    local, pooled = (case[f"in.student_{name}"].clone().requires_grad_() for name in ("local", "global"))
    terms = loss(pooled, tokens_to_map(local, (3, 3)), case["in.teacher_global"], maps[1])
    assert_close(terms["global"], case["out.loss_global"], 1e-5)
    assert_close(terms["local"], case["out.loss_local"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    # The golden gradient is that behind the normalisation: ours has no part along a unit vector.
    for name, x in (("student_global", pooled), ("student_local", local)):
        grad, unit = case[f"grad.{name}"], x.detach()
        assert_close(x.grad, grad - (grad * unit).sum(-1, keepdim=True) * unit, 1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_local_formula_has_the_official_gradient(case):
    x, y = case["in.student_local"].clone().requires_grad_(), case["in.teacher_local"]
    value = relation_kl(x[:, None] / 0.07, x[:, None], y[:, None] / 0.07, y[:, None])
    assert_close(value, case["out.loss_local"], 1e-5)
    value.backward()
    assert_close(x.grad, case["grad.student_local"], 1e-4)


def test_the_global_term_is_that_of_cls_queue():
    loss, given = make(), inputs()
    alone = ClsQueue(queue_size=6)
    alone.build(*(ModelInfo.of(pooled=SignalInfo("pooled", "output", (dim,))) for dim in (3, 4)))
    alone.head.load_state_dict(loss.global_head.state_dict())
    for seed in (0, 1):
        given = inputs(seed=seed)
        torch.testing.assert_close(loss(*given)["global"], alone(given[0], given[2]))
    assert torch.equal(loss.queue.rows, alone.queue.rows)


def test_the_local_term_equals_a_plain_loop():
    loss = make(local_weight=3.0, temperature_local=0.2).double()
    loss.requires_grad_(False)
    pooled, student, teacher_pooled, teacher = (x.double() for x in inputs())
    value = 0.0
    for i in range(2):
        s = [loss.local_head[0].weight @ x + loss.local_head[0].bias for x in student[i].flatten(1).T]
        s, t = [x / x.norm() for x in s], [x / x.norm() for x in teacher[i].flatten(1).T]
        for n in range(4):
            a = [math.exp(s[n] @ x / 0.2) for x in s]  # the patch itself among them
            b = [math.exp(t[n] @ x / 0.2) for x in t]
            kl = sum(y / sum(b) * math.log(y / sum(b) / (x / sum(a))) for x, y in zip(a, b, strict=True))
            value += 3.0 * kl / (2 * 4)
    assert loss(pooled, student, teacher_pooled, teacher)["local"].item() == pytest.approx(value, rel=1e-9)


def test_a_rotation_of_all_channels_and_the_length_do_not_matter():
    loss, (pooled, student, teacher_pooled, teacher) = make().eval(), inputs()
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    rotated = torch.einsum("dc,bchw->bdhw", rotation, teacher)
    value = loss(pooled, student, teacher_pooled, teacher)["local"]
    torch.testing.assert_close(loss(pooled, student, teacher_pooled, 5 * rotated)["local"], value)


def test_the_students_map_comes_to_the_teachers_grid():
    loss, (pooled, student, teacher_pooled, teacher) = make(((2, 2), (3, 4))).eval(), inputs(((2, 2), (3, 4)))
    finer = torch.nn.functional.interpolate(student, size=(3, 4), mode="bilinear", align_corners=False)
    value = loss(pooled, student, teacher_pooled, teacher)["local"]
    torch.testing.assert_close(loss(pooled, finer, teacher_pooled, teacher)["local"], value)


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_the_teachers_normed_tokens(num_prefix):
    pooled, student, teacher_pooled, teacher = inputs()
    loss = ClsDense(queue_size=6, normed_teacher=True)
    loss.build(
        ModelInfo.of(pooled=SignalInfo("pooled", "output", (3,)), feature_map=SignalInfo.of("feature_map", student)),
        ModelInfo.of(
            normed_cls_token=SignalInfo("normed_cls_token", "norm", (4,)),
            normed_patch_tokens=SignalInfo(
                "normed_patch_tokens", "norm", (4, 4), num_prefix_tokens=num_prefix, grid=(2, 2)
            ),
        ),
    )
    twin = make()
    twin.load_state_dict(loss.state_dict())
    assert loss.inputs()[2:] == ("teacher_normed_cls_token", "teacher_normed_patch_tokens")
    assert loss.locations() == {"student_feature_map": -1}
    tokens = teacher.flatten(2).transpose(1, 2)
    found = loss(pooled, student, teacher_normed_cls_token=teacher_pooled, teacher_normed_patch_tokens=tokens)
    torch.testing.assert_close(found, twin(pooled, student, teacher_pooled, teacher))


def test_nothing_is_remembered_in_eval_mode():
    loss = make()
    loss(*inputs())
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(*inputs(seed=1))
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    loss.train()(*inputs(seed=1))
    assert not torch.equal(loss.queue.rows, before["queue.rows"])


def test_the_queue_follows_the_data():
    loss = make(queue_size=None)
    loss.allocate(60)
    assert loss.queue.rows.shape == (32, 4)


@pytest.mark.parametrize(
    ("term", "options"),
    [
        ("global", {"temperature_global": 0.5}),
        ("local", {"temperature_local": 0.5}),
        ("local", {"local_weight": 2.0}),
        ("local", {"resize": "nearest"}),
    ],
    ids=str,
)
def test_options_change_their_term(term, options):
    grids = ((2, 2), (3, 3))
    values = [make(grids, **x)(*inputs(grids)) for x in ({}, options)]
    differs = {name: abs(values[0][name] - values[1][name]).item() > 1e-4 for name in values[0]}
    assert differs == {"global": term == "global", "local": term == "local"}


def test_stages_are_where_it_reads():
    locations = ClsDense(student_stage=0.5, teacher_stage="layer3").locations()
    assert locations == {"student_feature_map": 0.5, "teacher_feature_map": "layer3"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature_global": 0}, "ClsDense: temperature_global must be > 0, got 0; the published value is 0.07."),
        ({"temperature_local": -1}, "ClsDense: temperature_local must be > 0, got -1; the published value is 0.07."),
        ({"local_weight": -1}, "ClsDense: local_weight must be >= 0, got -1; 0 switches the local term off."),
        ({"queue_size": -3},
         "ClsDense: queue_size must be > 0, got -3; None follows the number of training images."),
        ({"resize": "pol"},
         "ClsDense: resize must be a known one, got 'pol'; did you mean 'pool'? Known: pool, bilinear, bicubic, "
         "nearest."),
    ],
    ids=str,
)  # fmt: skip
def test_refuses_other_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        ClsDense(**options)
    assert str(caught.value) == sentence


def test_refuses_other_inputs():
    loss, (pooled, student, teacher_pooled, teacher) = make(), inputs()
    for given, sentence in (
        ((pooled, student, teacher_pooled[:, :2], teacher), "ClsDense: teacher_pooled must have D=4 as in build, got"),
        ((pooled, student, teacher_pooled, teacher[:, :2]), "ClsDense: teacher_feature_map must have D=4 as in build"),
        ((pooled, student, teacher_pooled, teacher[:1]), "ClsDense: teacher_feature_map has B=1 but student_feature"),
        ((pooled, student, teacher_pooled[:1], teacher), "ClsDense: teacher_pooled has B=1 but student_pooled has B=2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss(*given)
    with pytest.raises(TypeError) as caught:
        loss(pooled, student, teacher_pooled)
    assert str(caught.value) == (
        "ClsDense: teacher_feature_map must be given for normed_teacher=False; pass it by name."
    )
    with pytest.raises(TypeError, match="ClsDense: normed_teacher must be True or False, got 1; write one of them"):
        ClsDense(normed_teacher=1)


@pytest.mark.parametrize(
    ("grids", "options"),
    [(((2, 2), (1, 1)), {}), (((1, 1), (2, 2)), {"resize": "pool"}), (((1, 1), (2, 2)), {})],
    ids=["teacher", "pooled", "interpolated"],
)
def test_refuses_a_single_patch(grids, options):
    """Interpolated, it becomes patches that are all alike: nothing of the local term would reach the student."""
    with pytest.raises(ValueError) as caught:
        make(grids, **options)
    assert str(caught.value) == (
        "ClsDense: grid must have at least 2 patches to compare, got 1x1; choose earlier stages or larger images, or "
        "pass local_weight=0."
    )
    assert make(grids, local_weight=0.0, **options)(*inputs(grids))["local"] == 0


def test_must_be_built():
    for call in (lambda: ClsDense()(*inputs()), lambda: ClsDense().allocate(5)):
        with pytest.raises(RuntimeError, match="ClsDense: build must be called before forward; put the loss into a"):
            call()
