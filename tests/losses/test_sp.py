from __future__ import annotations

import pytest
import torch

from kdvit.losses import SP
from tests.losses.golden import assert_close, golden

CASES = golden("feature_sp")


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    total = 0
    for i in range(2):
        student, teacher = case[f"in.s{i}"].requires_grad_(), case[f"in.t{i}"]
        # The second pair are vectors: maps of one position.
        as_maps = [x.view(*x.shape[:2], *(x.shape[2:] or (1, 1))) for x in (student, teacher)]
        loss = SP()(*as_maps)
        assert_close(loss.view(1), case[f"out.loss{i}"], 1e-5)
        loss.backward()
        assert_close(student.grad, case[f"grad.s{i}"], 1e-5)
        total = total + loss
    assert_close(total, case["out.loss"], 1e-5)


def test_value_by_hand():
    student = torch.tensor([[3.0, 4.0], [0.0, 5.0]]).view(2, 2, 1, 1)  # G = ((25, 20), (20, 25))
    teacher = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)  # G = ((1, 0), (0, 0)): the second image has no row
    large, small = 5 / 41**0.5, 4 / 41**0.5
    assert SP()(student, teacher).item() == pytest.approx(((1 - large) ** 2 + 2 * small**2 + large**2) / 4, rel=1e-6)


def test_equals_a_plain_loop():
    student, teacher = maps(4, 3, 2, 2), maps(4, 5, 3, 1, seed=1)
    rows = []
    for x in (student, teacher):
        gram = [[(a * b).sum().item() for b in x] for a in x]
        rows.append([[g / sum(h**2 for h in row) ** 0.5 for g in row] for row in gram])
    loop = sum((rows[0][i][j] - rows[1][i][j]) ** 2 for i in range(4) for j in range(4)) / 16
    assert SP()(student, teacher).item() == pytest.approx(loop, rel=1e-9)


def test_features_may_be_rotated_and_scaled_as_a_whole():
    teacher = maps(5, 6, 2, 2)
    rotation = torch.linalg.qr(maps(24, 24, seed=1)).Q
    student = 3 * (teacher.flatten(1) @ rotation).view(5, 24, 1, 1)
    assert SP()(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert SP()(student + 1, teacher).item() > 1e-4


def test_one_image_has_nothing_to_be_compared_with():
    student = maps(1, 3, 2, 2).requires_grad_()
    loss = SP()(student, maps(1, 5, 2, 2, seed=1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and student.grad.abs().max() < 1e-12


def test_stages_are_where_it_reads():
    loss = SP(student_stage=0.5, teacher_stage="layer3")
    assert loss.locations() == {"student_feature_map": 0.5, "teacher_feature_map": "layer3"}


def test_errors():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match="SP: gather must be True or False, got 'no'; write one of them."):
        SP(gather="no")
    with pytest.raises(ValueError, match=r"SP: student_feature_map must have shape \(B, D, h, w\), got \(2, 3, 4\); "):
        SP()(x[..., 0], x)
    with pytest.raises(ValueError, match="SP: teacher_feature_map has B=1 but student_feature_map has B=2; give both"):
        SP()(x, x[:1])
