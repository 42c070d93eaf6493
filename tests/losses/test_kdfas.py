from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import KDFAS

LAST = {"student_stages": (-1,), "teacher_stages": (-1,)}


def maps(dim: int, grid: tuple[int, int] = (2, 3), num_stages: int = 4, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_stages, 3, dim, *grid, generator=generator, dtype=torch.float64))


def test_value_by_hand():
    # Patches (1, 3) and (5, 3), centred (-1, 1) and (1, -1): C = [[2, -2], [-2, 2]] / (2 - 1). The teacher's (0, 6) and
    # (4, 4): (-3, 3) and (0, 0): [[18, 0], [0, 0]].
    student = torch.tensor([[1.0, 5.0], [3.0, 3.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[0.0, 4.0], [6.0, 4.0]]).view(1, 2, 1, 2)
    assert KDFAS(**LAST)((student,), (teacher,)).item() == pytest.approx((16**2 + 3 * 2**2) / 4)
    # Over the patches the means are (3, 3) and (2, 5): (-2, 0), (2, 0) and (-2, 1), (2, -1): +-4 and +-5.
    assert KDFAS(center="tokens", **LAST)((student,), (teacher,)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("center", ["channels", "tokens"])
def test_equals_a_plain_loop(center):
    student, teacher = maps(5, num_stages=2), maps(8, num_stages=2, seed=1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for i in range(3):
            covariances = []
            for x in (s[i].flatten(1).T, t[i].flatten(1).T):  # (N, D)
                n, d = x.shape
                if center == "channels":
                    rows = [[x[a, c] - sum(x[a]) / d for c in range(d)] for a in range(n)]
                else:
                    rows = [[x[a, c] - sum(x[:, c]) / n for c in range(d)] for a in range(n)]
                covariances.append(
                    [[sum(p * q for p, q in zip(rows[a], rows[b])) / (d - 1) for b in range(n)] for a in range(n)]
                )
            ours, theirs = covariances
            n = len(ours)
            expected += sum((ours[a][b] - theirs[a][b]) ** 2 for a in range(n) for b in range(n)) / n**2 / 3
    loss = KDFAS(center=center, student_stages=(0, 1), teacher_stages=(0, 1))
    assert loss(student, teacher).item() == pytest.approx(float(expected), rel=1e-10)


def test_channels_are_the_observations_of_a_covariance():
    (student,), (teacher,) = maps(5, num_stages=1), maps(8, num_stages=1, seed=1)
    expected = torch.stack(
        [(torch.cov(s.flatten(1).T) - torch.cov(t.flatten(1).T)).square().mean() for s, t in zip(student, teacher)]
    ).mean()
    torch.testing.assert_close(KDFAS(**LAST)((student,), (teacher,)), expected)


def test_order_of_channels_and_offsets_do_not_matter():
    student, teacher = maps(5), maps(5, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    for center, offset in (("channels", torch.rand(1, 1, 2, 3)), ("tokens", torch.rand(1, 5, 1, 1))):
        loss = KDFAS(center=center)
        torch.testing.assert_close(loss(tuple(x[:, order] for x in student), teacher), loss(student, teacher))
        torch.testing.assert_close(loss(tuple(x + offset for x in student), teacher), loss(student, teacher))
        assert loss(tuple(x + offset for x in student), student).item() == pytest.approx(0.0, abs=1e-20)
        assert loss(tuple(1.5 * x for x in student), student).item() > 0.1  # the scale is kept


def test_stages_are_added():
    student, teacher = maps(5), maps(8, seed=1)
    alone = [KDFAS(**LAST)((s,), (t,)) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(KDFAS()(student, teacher), sum(alone))


def test_grids_may_differ():
    student, teacher = maps(5, (4, 4)), maps(8, (2, 2), seed=1)
    pooled = tuple(torch.nn.functional.avg_pool2d(x, 2) for x in student)
    torch.testing.assert_close(KDFAS()(student, teacher), KDFAS()(pooled, teacher))
    torch.testing.assert_close(KDFAS()(teacher, student), KDFAS()(teacher, pooled))
    assert not torch.allclose(KDFAS(resize="nearest")(student, teacher), KDFAS()(student, teacher))


def test_single_channels_are_finite():
    x = torch.rand(1, 1, 2, 2, requires_grad=True)
    value = KDFAS(**LAST)((x,), (x.detach(),))
    value.backward()
    assert value.item() == 0.0 and x.grad.abs().max() == 0


def test_stages_are_where_it_reads():
    loss = KDFAS(student_stages=[2, 5, 8, 11], teacher_stages=[5, 11, 17, "layers.3"])
    assert loss.locations() == {
        "student_feature_map": (2, 5, 8, 11),
        "teacher_feature_map": (5, 11, 17, "layers.3"),
    }


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"center": "token"}, ValueError, "KDFAS: center must be a known one, got 'token'; did you mean 'tokens'? "),
        ({"resize": "area"}, ValueError, "KDFAS: resize must be a known one, got 'area'; "),
        (
            {"student_stages": (0, 1)},
            ValueError,
            "KDFAS: teacher_stages must be as many as student_stages, got 4 for 2; they are paired in order.",
        ),
        ({"student_stages": -1}, TypeError, "KDFAS: student_stages must be a sequence, got -1; write (-1,) for one."),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        KDFAS(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_other_inputs():
    with pytest.raises(
        ValueError, match="KDFAS: student_feature_map must be a tuple of 4 tensors, got 3; give one for"
    ):
        KDFAS()(maps(5)[:3], maps(8))
    with pytest.raises(ValueError, match=r"KDFAS: teacher_feature_map must have shape \(B, D, h, w\), got \(3, 8, 6\)"):
        KDFAS()(maps(5), tuple(x.flatten(2) for x in maps(8)))
