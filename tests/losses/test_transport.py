from __future__ import annotations

import doctest
import math

import pytest
import torch

import kdvit.losses.transport
from kdvit.losses.transport import feature_transport
from tests.losses.golden import assert_close, golden

CASES = {name: case for name, case in golden("feature_takt").items() if name.startswith("ot")}


def features(batch: int = 3, dims: tuple[int, int] = (5, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, dim, generator=generator, dtype=torch.float64) for dim in dims)


def test_cases_were_found():
    assert len(CASES) == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_transport(case):
    source = case["in.source"].requires_grad_()
    options = {"regularization": case.options["ot_reg"], "mass_penalty": case.options["ot_tau"]}
    distance, plan = feature_transport(source, case["in.target"], **options)
    assert_close(distance.sum(), case["out.loss"], 1e-5)
    assert_close(plan[0].T[None, None], case["out.flow"], 1e-5)  # there, the target comes first
    (grad,) = torch.autograd.grad(distance.sum(), source)
    assert_close(grad, case["grad.source"], 1e-5)


def test_equals_a_plain_loop():
    source, target = features()
    distance, plan = feature_transport(source, target, regularization=0.3, mass_penalty=0.8, num_iterations=50)
    for b in range(3):
        x, y = (z[b] - z[b].min() for z in (source, target))
        cost = [[(float(i) - float(j)) ** 2 for j in y] for i in x]
        largest = max(map(max, cost))
        kernel = [[math.exp(-c / largest / 0.3) / 20 for c in row] for row in cost]
        u, v, power = [1.0] * 5, [1.0] * 4, 0.8 / 1.1
        for _ in range(50):
            u = [(1 / 5 / sum(k * w for k, w in zip(row, v, strict=True))) ** power for row in kernel]
            v = [(1 / 4 / sum(kernel[i][j] * u[i] for i in range(5))) ** power for j in range(4)]
        loop = torch.tensor([[u[i] * kernel[i][j] * v[j] for j in range(4)] for i in range(5)], dtype=torch.float64)
        torch.testing.assert_close(plan[b], loop)
        assert distance[b].item() == pytest.approx((loop * torch.tensor(cost)).sum().item(), rel=1e-6)


def test_a_hard_penalty_moves_all_of_the_mass_in_order():
    """Nearly balanced and unregularised, the smallest goes to the smallest: 1-D optimal transport sorts."""
    source, target = features(dims=(6, 6))
    distance, plan = feature_transport(source, target, regularization=1e-3, mass_penalty=1e2, num_iterations=3000)
    torch.testing.assert_close(plan.sum(dim=2), torch.full((3, 6), 1 / 6, dtype=torch.float64), rtol=1e-2, atol=0)
    x, y = (z.sort(dim=1).values - z.amin(dim=1, keepdim=True) for z in (source, target))
    torch.testing.assert_close(distance, (x - y).square().mean(dim=1), rtol=2e-2, atol=0)


def test_an_offset_and_the_order_of_channels_do_not_matter():
    source, target = features()
    distance, _ = feature_transport(source, target)
    torch.testing.assert_close(feature_transport(source + 7, target.flip(1) - 3)[0], distance)
    torch.testing.assert_close(feature_transport(target, source)[0], distance)  # converged, it is symmetric


def test_images_are_apart_and_options_count():
    source, target = features()
    distance, _ = feature_transport(source, target)
    for b in range(3):
        torch.testing.assert_close(feature_transport(source[b : b + 1], target[b : b + 1])[0], distance[b : b + 1])
    for option in ({"regularization": 0.5}, {"mass_penalty": 2.0}, {"num_iterations": 1}):
        assert not torch.allclose(feature_transport(source, target, **option)[0], distance)


def test_the_plan_is_a_constant():
    source, target = features()
    source.requires_grad_()
    distance, plan = feature_transport(source, target)
    assert not plan.requires_grad
    (grad,) = torch.autograd.grad(distance.sum(), source)
    shift = (source - source.amin(dim=1, keepdim=True))[:, :, None] - (target - target.amin(1, True))[:, None]
    (expected,) = torch.autograd.grad((plan * shift**2).sum(), source)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("scale", [0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_constant_and_huge_features_are_finite(scale, dtype):
    source, target = ((scale * x).clamp(-6e4, 6e4).to(dtype).requires_grad_() for x in features())
    distance, plan = feature_transport(source, target, regularization=1e-3)
    distance.sum().backward()
    assert distance.dtype == torch.float32 and distance.isfinite().all() and plan.isfinite().all()
    if dtype == torch.float32:
        assert source.grad.isfinite().all() and target.grad.isfinite().all()


def test_refuses_what_cannot_work():
    source, target = features()
    with pytest.raises(
        ValueError, match=r"feature_transport: source and target must be \(B, D\) with one B, got \(3, 5"
    ):
        feature_transport(source, target[:2])
    for name in ("regularization", "mass_penalty", "num_iterations"):
        with pytest.raises(ValueError, match=f"feature_transport: {name} must be > 0, got 0; leave it out"):
            feature_transport(source, target, **{name: 0})


def test_the_example_runs():
    import torch as torch_

    tests = doctest.DocTestFinder().find(feature_transport, globs={"torch": torch_, **vars(kdvit.losses.transport)})
    assert doctest.DocTestRunner().run(tests[0]).failed == 0 and len(tests[0].examples) == 2
