from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdvit.losses import ViTKD
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_vitkd")
#: Names of the official weights (shallow, deep, generation).
OFFICIAL = {"align2.": "shallow_projectors", "align.": "deep_projector"}


def info(side: str, dim: int, grid: tuple[int, int] | None, num_blocks: int = 2, deep_grid=None) -> ModelInfo:
    tokens = SignalInfo("patch_tokens", "blocks.0", (16, dim), grid=grid)
    normed = SignalInfo("normed_patch_tokens", "norm", (16, dim), grid=deep_grid or grid)
    return ModelInfo.of(side, patch_tokens=(tokens,) * num_blocks, normed_patch_tokens=normed)


def tokens(num_blocks: int = 2, dim: int = 3, grid: tuple[int, int] = (2, 2), seed: int = 0) -> tuple:
    """(student, teacher, student_normed, teacher_normed) tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, num_blocks + 1, 2, grid[0] * grid[1], dim, generator=generator)
    return tuple(x[0, :-1]), tuple(x[1, :-1]), x[0, -1], x[1, -1]


def ours(name: str) -> str:
    for theirs, our in OFFICIAL.items():
        if name.startswith(theirs):
            layer, _, parameter = name.removeprefix(theirs).rpartition(".")
            return ".".join(filter(None, (our, layer, "0", parameter)))
    return name


def official(case: GoldenCase) -> tuple[ViTKD, list[Tensor]]:
    """The loss with the official weights, and [low_s, high_s] that require a gradient."""
    options = case.options
    loss = ViTKD(options["alpha"], options["beta"], options["mask_ratio"])
    grid = (int(case["in.high_s"].shape[1] ** 0.5),) * 2
    loss.build(info("student", options["student_dim"], grid), info("teacher", options["teacher_dim"], grid))
    loss.load_state_dict({ours(name): x for name, x in case.group("w").items()})
    return loss, [case[f"in.{name}"].requires_grad_() for name in ("low_s", "high_s")]


def test_cases_were_found():
    assert len(CASES) == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_official_loss(case):
    loss, (low, high) = official(case)
    terms = loss(low.unbind(1), case["in.low_t"].unbind(1), high, case["in.high_t"], noise=case["rng.noise"])
    assert_close(terms["mimic"], case["out.loss_mimic"], 1e-5)
    assert_close(terms["generate"], case["out.loss_gen"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    value.backward()
    assert_close(low.grad, case["grad.low_s"], 1e-4)
    assert_close(high.grad, case["grad.high_s"], 1e-4)
    grads = {name: p.grad for name, p in loss.named_parameters()}
    expected = {ours(name): x for name, x in case.group("wgrad").items()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], 1e-4)


def test_projectors_exist_only_where_widths_differ():
    loss = ViTKD()
    loss.build(info("student", 8, (4, 4)), info("teacher", 8, (4, 4)))
    assert {name.partition(".")[0] for name, _ in loss.named_parameters()} == {"mask_token", "generation"}
    assert loss.mask_token.abs().max() == 0


@pytest.mark.parametrize(
    ("mask_ratio", "masked"), [(0.5, [{1, 3, 5}, {0, 1, 2}]), (0.3, [{1, 3}, {0, 1}])], ids=["half", "third"]
)
def test_equals_a_plain_loop(mask_ratio, masked):
    """Masked are the largest entries of each row of the noise, the ratio rounded up."""
    grid = (2, 3)
    loss = ViTKD(alpha=2.0, beta=3.0, mask_ratio=mask_ratio)
    loss.build(info("student", 3, grid), info("teacher", 3, grid))
    torch.nn.init.normal_(loss.mask_token)
    student, teacher, student_deep, teacher_deep = tokens(grid=grid)
    noise = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.7], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    mimic = generate = 0.0
    for i in range(2):
        for s, t in zip(student, teacher, strict=True):
            mimic += 2.0 * sum((s[i, n, d] - t[i, n, d]) ** 2 for n in range(6) for d in range(3)) / 2
        image = torch.zeros(3, *grid)
        for n in range(6):
            image[:, n // 3, n % 3] = loss.mask_token[0, 0] if n in masked[i] else student_deep[i, n]
        made = loss.generation(image[None])[0]
        for n in masked[i]:
            generate += 3.0 * ((made[:, n // 3, n % 3] - teacher_deep[i, n]) ** 2).sum() / (mask_ratio * 2)
    terms = loss(student, teacher, student_deep, teacher_deep, noise=noise)
    torch.testing.assert_close(terms["mimic"], mimic)
    torch.testing.assert_close(terms["generate"], generate)


def value(noise: Tensor | None = None, num_blocks: int = 2, **options) -> float:
    loss = ViTKD(**{"alpha": 1.0, "beta": 1.0} | options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss.build(info("student", 3, (2, 2), num_blocks), info("teacher", 3, (2, 2), num_blocks))
    return sum(loss(*tokens(num_blocks), noise=torch.linspace(0, 1, 8).view(2, 4) if noise is None else noise).values())


@pytest.mark.parametrize("options", [{"alpha": 2.0}, {"beta": 2.0}, {"mask_ratio": 0.25}], ids=str)
def test_options_change_the_value(options):
    assert abs(value(**options) - value()) > 1e-3


def test_noise_and_blocks_change_the_value():
    assert abs(value(noise=torch.linspace(1, 0, 8).view(2, 4)) - value()) > 1e-3
    three = value(num_blocks=3, student_blocks=(0, 1, 2), teacher_blocks=(0, 1, 5))
    assert three > value()
    locations = ViTKD(student_blocks=[0, -1], teacher_blocks=["blocks.0", 23]).locations()
    assert locations == {"student_patch_tokens": (0, -1), "teacher_patch_tokens": ("blocks.0", 23)}


def test_generator_draws_the_mask():
    loss = ViTKD(beta=1.0)
    loss.build(info("student", 3, (4, 4)), info("teacher", 3, (4, 4)))
    inputs = tokens(grid=(4, 4))
    values = []
    for seed in (7, 7, 8):
        loss.generator = torch.Generator().manual_seed(seed)
        values.append(loss(*inputs)["generate"].item())
    assert values[0] == values[1] != values[2]
    torch.manual_seed(1)
    loss.generator = None
    assert loss(*inputs)["generate"] != loss(*inputs)["generate"]


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (
            info("student", 8, (8, 8)),
            info("teacher", 8, (14, 14)),
            "ViTKD: student grid must equal teacher grid, got 8x8 and 14x14; "
            "choose image and patch sizes that give both the same.",
        ),
        (
            info("student", 8, (8, 8)),
            info("cnn", 8, None, deep_grid=(8, 8)),
            "ViTKD: teacher must have a patch grid, got none for patch_tokens of 'cnn' at 'blocks.0'; "
            "choose a model of patch tokens, or pass grid=.",
        ),
        (
            info("student", 8, (8, 8)),
            info("teacher", 8, (8, 8), deep_grid=(4, 4)),
            "ViTKD: student grid must equal teacher grid, got 8x8 and 4x4; "
            "choose image and patch sizes that give both the same.",
        ),
    ],
    ids=["other grid", "no grid", "other last grid"],
)
def test_refuses_other_grids(student, teacher, sentence):
    with pytest.raises(ValueError) as caught:
        ViTKD().build(student, teacher)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"alpha": -1}, ValueError, "ViTKD: alpha must be >= 0, got -1; 0 switches the mimicking term off."),
        ({"mask_ratio": 1.0}, ValueError, "ViTKD: mask_ratio must be in (0, 1), got 1.0; the published value is 0.5."),
        (
            {"student_blocks": (0, 1, 2)},
            ValueError,
            "ViTKD: teacher_blocks must be as many as student_blocks, got 2 for 3; they are paired in order.",
        ),
        (
            {"student_blocks": "blocks.0"},
            TypeError,
            "ViTKD: student_blocks must be a sequence, got 'blocks.0'; write ('blocks.0',) for one.",
        ),
    ],
    ids=["alpha", "mask_ratio", "pairs", "path"],
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        ViTKD(**options)
    assert str(caught.value) == sentence


def test_refuses_another_number_of_blocks():
    loss = ViTKD()
    loss.build(info("student", 3, (2, 2)), info("teacher", 3, (2, 2)))
    with pytest.raises(ValueError, match="patch tokens must be a tuple of 2 blocks for both models, got 3 and 3; give"):
        loss(*tokens(num_blocks=3))


def test_must_be_built():
    with pytest.raises(RuntimeError, match="ViTKD: build must be called before forward; put the loss into a kdvit"):
        ViTKD()(*tokens())
