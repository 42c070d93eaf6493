from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import Manifold
from kdvit.signals import tokens_to_map
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_manifold")
#: The official code keeps the student's last N_t tokens; here the first token of a case is the class token.
GRIDS = {9: (3, 3), 64: (8, 8)}
LAST = {"student_stages": (-1,), "teacher_stages": (-1,)}


def maps(dim: int, grid: tuple[int, int] = (2, 3), num_stages: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_stages, 3, dim, *grid, generator=generator, dtype=torch.float64))


def noise_of(order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Numbers whose smallest are where a permutation begins."""
    return (order.argsort() / len(order)).view(shape)


def official(case: GoldenCase) -> tuple[Manifold, dict[str, Tensor], tuple]:
    options = case.options
    student_ids, teacher_ids = options["s_id"], options["t_id"]
    loss = Manifold(
        patch_weight=options["w_patch"],
        sample_weight=options["w_sample"],
        random_weight=options["w_rand"],
        num_random=options["K"],
        student_stages=student_ids,
        teacher_stages=teacher_ids,
    )
    students = {f"s{i}": case[f"in.s{i}"].requires_grad_() for i in student_ids}
    teachers = [case[f"in.t{i}"] for i in teacher_ids]
    batch, num_tokens, _ = teachers[0].shape
    prefix = next(iter(students.values())).shape[1] - num_tokens
    noise = tuple(noise_of(case[f"rng.perm{k}"], (batch, num_tokens)) for k in range(len(student_ids)))
    grid = GRIDS[num_tokens]
    inputs = (
        tuple(tokens_to_map(x[:, prefix:], grid) for x in students.values()),
        tuple(tokens_to_map(x, grid) for x in teachers),
        noise,
    )
    return loss, students, inputs


def test_cases_were_found():
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    loss, students, inputs = official(case)
    terms = loss(*inputs)
    for ours, theirs in (("patch", "patch"), ("sample", "sample"), ("random", "rand")):
        assert_close(terms[ours], case[f"out.loss_{theirs}"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    for name, x in students.items():
        assert_close(x.grad, case[f"grad.{name}"], 1e-5)


def test_value_by_hand():
    # Two images of one patch each. Student: (1, 0) and (0, 2), at a right angle; teacher: 5 and -1, opposite.
    student = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    teacher = torch.tensor([5.0, -1.0]).view(2, 1, 1, 1)
    terms = Manifold(patch_weight=1, sample_weight=3, random_weight=5, **LAST)((student,), (teacher,))
    assert {name: x.item() for name, x in terms.items()} == {"patch": 0.0, "sample": 1.5, "random": 2.5}


def cosine(x: Tensor, y: Tensor) -> float:
    return (sum(a * b for a, b in zip(x, y)) / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))).item()


def test_equals_a_plain_loop():
    (student,), (teacher,) = maps(4), maps(5, seed=1)
    noise = torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    sides = [[[x[i, :, n // 3, n % 3] for n in range(6)] for i in range(3)] for x in (student, teacher)]
    chosen = sorted(((i, n) for i in range(3) for n in range(6)), key=lambda at: noise[at].item())[:7]

    def mean(pairs: list) -> float:
        errors = [
            (cosine(*(sides[0][i][n] for i, n in pair)) - cosine(*(sides[1][i][n] for i, n in pair))) ** 2
            for pair in pairs
        ]
        return sum(errors) / len(errors)

    expected = {
        "patch": 4 * mean([((i, a), (i, b)) for i in range(3) for a in range(6) for b in range(6)]),
        "sample": 0.1 * mean([((i, n), (j, n)) for n in range(6) for i in range(3) for j in range(3)]),
        "random": 0.2 * mean([(a, b) for a in chosen for b in chosen]),
    }
    terms = Manifold(num_random=7, **LAST)((student,), (teacher,), noise=(noise,))
    assert {name: x.item() for name, x in terms.items()} == pytest.approx(expected, rel=1e-10)


def test_rotations_and_lengths_do_not_matter():
    """The manifold is what does not change when the channels turn."""
    student = maps(4, num_stages=4)
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=torch.float64)).Q  # into more channels
    lengths = 0.5 + torch.rand(3, 1, 2, 3, generator=generator)
    turned = tuple(torch.einsum("ed,bdhw->behw", rotation, x) * lengths for x in student)
    terms = Manifold(num_random=10)(student, turned, noise=(torch.rand(3, 6),) * 4)
    assert max(terms.values()).item() == pytest.approx(0.0, abs=1e-20)


def test_pairs_are_averaged():
    student, teacher = maps(4, num_stages=4), maps(5, num_stages=4, seed=1)
    alone = [Manifold(**LAST)((s,), (t,)) for s, t in zip(student, teacher, strict=True)]
    terms = Manifold()(student, teacher)
    for name, value in terms.items():
        torch.testing.assert_close(value, sum(x[name] for x in alone) / 4)


def test_options_change_the_value():
    student, teacher = maps(4, grid=(4, 4)), maps(5, grid=(2, 2), seed=1)
    noise = (torch.linspace(0, 1, 12).view(3, 4),)

    def value(**options) -> float:
        return sum(Manifold(**LAST | options)(student, teacher, noise=noise).values()).item()

    values = [value(), value(patch_weight=5), value(sample_weight=0), value(random_weight=1), value(num_random=5)]
    values += [value(resize="bicubic"), value(resize="nearest")]
    assert len({round(x, 6) for x in values}) == len(values)


def test_grids_may_differ():
    student, teacher = maps(4, grid=(4, 4)), maps(5, grid=(2, 2), seed=1)
    pooled = tuple(F.avg_pool2d(x, 2) for x in student)
    loss = Manifold(**LAST)
    torch.testing.assert_close(loss(student, teacher), loss(pooled, teacher))
    torch.testing.assert_close(loss(teacher, student), loss(teacher, pooled))


def test_stages_may_have_other_grids():
    student = (*maps(4, grid=(4, 4)), *maps(8, grid=(2, 2)))
    teacher = (*maps(5, grid=(4, 4), seed=1), *maps(6, grid=(3, 2), seed=1))
    terms = Manifold(num_random=5, student_stages=(0, 1), teacher_stages=(0, 1))(student, teacher)
    assert all(x.isfinite() and x > 0 for x in terms.values())


def test_generator_draws_the_patches():
    inputs = maps(4), maps(5, seed=1)
    loss = Manifold(num_random=4, **LAST)
    values = []
    for seed in (7, 7, 8):
        loss.generator = torch.Generator().manual_seed(seed)
        values.append(loss(*inputs)["random"].item())
    assert values[0] == values[1] != values[2]
    loss.generator = None
    assert len({loss(*inputs)["random"].item() for _ in range(4)}) > 1


def test_draws_under_torch_compile():
    torch._dynamo.reset()
    inputs = maps(4), maps(5, seed=1)
    loss = Manifold(num_random=4, **LAST)
    terms = torch.compile(loss, backend="eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(terms["patch"], loss(*inputs)["patch"])
    assert terms["random"].isfinite()


def test_all_patches_where_there_are_no_more():
    """18 patches: 18 of them are all, whatever the noise."""
    inputs = maps(4), maps(5, seed=1)
    noise = (torch.rand(3, 6),)
    everything = Manifold(**LAST)(*inputs)["random"]
    torch.testing.assert_close(Manifold(num_random=18, **LAST)(*inputs, noise=noise)["random"], everything)
    assert not torch.allclose(Manifold(num_random=17, **LAST)(*inputs, noise=noise)["random"], everything)


def test_stages_are_where_it_reads():
    loss = Manifold(student_stages=[0, 1, -1], teacher_stages=[0, 0.5, "blocks.23"])
    assert loss.locations() == {"student_feature_map": (0, 1, -1), "teacher_feature_map": (0, 0.5, "blocks.23")}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"patch_weight": -1}, ValueError, "Manifold: patch_weight must be >= 0, got -1; 0 switches it off."),
        (
            {"sample_weight": "1"},
            TypeError,
            "Manifold: sample_weight must be a number >= 0, got '1'; 0 switches it off.",
        ),
        ({"random_weight": math.inf}, ValueError, "Manifold: random_weight must be >= 0, got inf; 0 switches it off."),
        ({"num_random": 0}, ValueError, "Manifold: num_random must be > 0, got 0; the published value is 192."),
        ({"resize": "area"}, ValueError, "Manifold: resize must be a known one, got 'area'; "),
        ({"gather": 1}, TypeError, "Manifold: gather must be True or False, got 1; write one of them."),
        (
            {"student_stages": (0, 1)},
            ValueError,
            "Manifold: teacher_stages must be as many as student_stages, got 4 for 2; they are paired in order.",
        ),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        Manifold(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_other_inputs():
    student, teacher = maps(4), maps(5, seed=1)
    with pytest.raises(ValueError, match="Manifold: student_feature_map must be a tuple of 4 tensors, got 1; give one"):
        Manifold()(student, teacher)
    with pytest.raises(
        ValueError, match=r"Manifold: noise must have shape \(3, 6\), got \(3, 5\); give one number per"
    ):
        Manifold(**LAST)(student, teacher, noise=(torch.rand(3, 5),))
    with pytest.raises(ValueError, match="Manifold: noise must be a tuple of 1 tensors, got 2; give one for each loc"):
        Manifold(**LAST)(student, teacher, noise=(torch.rand(3, 6),) * 2)
    with pytest.raises(
        ValueError, match=r"Manifold: student_feature_map must have shape \(B, D, h, w\), got \(3, 4, 6\)"
    ):
        Manifold(**LAST)((student[0].flatten(2),), teacher)
