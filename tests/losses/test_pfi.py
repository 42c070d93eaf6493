from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import PFI
from kdvit.losses.projectors import Projector
from kdvit.signals import ModelInfo, SignalInfo


def example(student=(4, (3, 2)), teacher=(6, (3, 2)), logits=((3, 2), (3, 2))) -> list[Tensor]:
    """Dense logits of both, feature maps of both: (width, grid) of the maps, grids of the logits."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 5, *grid) for grid in logits] + [(2, dim, *grid) for dim, grid in (student, teacher)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def built(inputs: list[Tensor], **options) -> PFI:
    loss = PFI(**options)
    torch.manual_seed(0)
    loss.build(*(
        ModelInfo.of(dense_logits=SignalInfo.of("dense_logits", y), feature_map=SignalInfo.of("feature_map", x))
        for y, x in zip(inputs[:2], inputs[2:], strict=True)
    ))  # fmt: skip
    return loss.to(torch.float64)


def test_value_by_hand():
    # Two positions, two classes: probabilities (3/4, 1/4) and (1/2, 1/2), against halves at both: p = 1/16 and 0.
    y = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log().T.view(1, 2, 1, 2)
    x, target = torch.zeros(1, 3, 1, 2), torch.tensor([4.0, 5.0]).expand(1, 3, 1, 2)
    inputs = [y, torch.zeros_like(y), x, target]
    # f = 16 and 25; the second position, whose predictions agree, counts for nothing.
    assert built(inputs)(*inputs).item() == pytest.approx((16 / 16 + 0) / 2, rel=1e-6)
    # As logits: mean of ln(3)^2 and 0.
    expected = torch.tensor(3.0).log().item() ** 2 / 2 * 16 / 2
    assert built(inputs, predictions="logits")(*inputs).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("predictions", ["probabilities", "logits"])
def test_equals_a_plain_loop(predictions):
    inputs = example()
    loss = built(inputs, predictions=predictions)
    y, z, x, target = inputs
    weight, bias = loss.projector[0].weight[:, :, 0, 0], loss.projector[0].bias
    total = 0.0
    for b in range(2):
        for at in [(i, j) for i in range(3) for j in range(2)]:
            a, c = y[b, :, *at], z[b, :, *at]
            if predictions == "probabilities":
                a, c = a.softmax(0), c.softmax(0)
            total += ((a - c) ** 2).mean() * ((weight @ x[b, :, *at] + bias - target[b, :, *at]) ** 2).mean() / 12
    assert loss(*inputs).item() == pytest.approx(total.item(), rel=1e-12)


def test_only_positions_whose_predictions_differ_teach_features():
    """What defines the method: elsewhere the features may differ as they like."""
    y, z, x, target = example()
    z[:, :, 0], z[:, :, 1] = y[:, :, 0], y[:, :, 1]
    x.requires_grad_(), y.requires_grad_()
    built([y, z, x, target])(y, z, x, target).backward()
    assert (x.grad[:, :, :2] == 0).all() and (x.grad[:, :, 2] != 0).all()
    assert (y.grad[:, :, 2] != 0).all()  # through p, as in third-party code


def test_an_offset_of_the_logits_does_not_count_as_a_difference():
    y, z, x, target = example()
    loss = built([y, z, x, target])
    torch.testing.assert_close(loss(y + 3, z - 2, x, target), loss(y, z, x, target))
    logits = built([y, z, x, target], predictions="logits")
    assert not torch.allclose(logits(y + 3, z, x, target), logits(y, z, x, target))


def test_a_projector_only_where_widths_differ():
    same, other = example(teacher=(4, (3, 2))), example()
    assert len(built(same).projector) == 0 and isinstance(built(same).projector, Projector)
    assert built(other).projector[0].weight.shape == (6, 4, 1, 1)


def test_other_grids_are_pooled_or_interpolated():
    y, z, x, target = inputs = example((4, (6, 6)), (6, (3, 3)), ((2, 2), (4, 4)))
    for how in ("pool", "bilinear", "bicubic", "nearest"):
        loss = built(inputs, resize=how, predictions="logits")
        options = {} if how == "nearest" else {"align_corners": False}
        shrunk = F.adaptive_avg_pool2d(x, 3) if how == "pool" else F.interpolate(x, (3, 3), mode=how, **options)
        f = (loss.projector(shrunk) - target).square().mean(1)
        if how == "pool":
            p = (y - F.adaptive_avg_pool2d(z, 2)).square().mean(1, keepdim=True)
        else:
            p = (F.interpolate(y, (4, 4), mode=how, **options) - z).square().mean(1, keepdim=True)
        expected = (F.adaptive_avg_pool2d(p, 3)[:, 0] * f).mean()
        torch.testing.assert_close(loss(*inputs), expected)


def test_refuses_what_cannot_work():
    inputs = y, z, x, target = example()
    with pytest.raises(ValueError, match="PFI: predictions must be a known one, got 'scores'"):
        PFI(predictions="scores")
    with pytest.raises(ValueError, match="PFI: resize must be a known one, got 'area'"):
        PFI(resize="area")
    with pytest.raises(RuntimeError, match="PFI: build must be called before forward"):
        PFI()(*inputs)
    with pytest.raises(ValueError, match="PFI: teacher_dense_logits has C=4 but student_dense_logits has C=5; align"):
        built([y, z[:, :4], x, target])
    loss = built(inputs)
    with pytest.raises(ValueError, match="PFI: teacher_feature_map must have D=6 as in build, got D=5; build the loss"):
        loss(y, z, x, target[:, :5])
    with pytest.raises(ValueError, match=r"PFI: student_dense_logits must have shape \(B, C, h, w\), got \(2, 5\)"):
        loss(y.mean((2, 3)), z, x, target)
    with pytest.raises(
        ValueError, match="PFI: student_feature_map has B=1 but student_dense_logits has B=2; give both"
    ):
        loss(y, z, x[:1], target[:1])


def test_stages_are_where_it_reads():
    assert PFI(student_stage=2, teacher_stage="layer3").locations() == {
        "student_feature_map": 2,
        "teacher_feature_map": "layer3",
    }
