from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses import MiniLM, TinyMIM
from kdvit.losses.relations import RELATIONS
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import GoldenCase, assert_close, golden

CASES = golden("feature_minilm")
SIGNALS = {"q": "query", "k": "key", "v": "value"}
#: The official numbers of query, key and value.
OFFICIAL = {"1": "q", "2": "k", "3": "v"}


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, D) -> (B, H, L, d)."""
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def signals(student=(2, 12), teacher=(3, 24), num_tokens=(5, 5), batch: int = 2) -> dict[str, Tensor]:
    """All inputs, for (heads, width) of each model."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for side, (num_heads, dim), length in (("student", student, num_tokens[0]), ("teacher", teacher, num_tokens[1])):
        for signal in SIGNALS.values():
            x = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)
            given[f"{side}_{signal}"] = heads(x, num_heads)
    return given


def info(side: str, num_heads: int, head_dim: int, num_prefix: int = 1, grid=(2, 2)) -> ModelInfo:
    shape = (num_heads, num_prefix + grid[0] * grid[1], head_dim)
    return ModelInfo.of(side, **{s: SignalInfo(s, "blocks.3.attn", shape, num_prefix, grid) for s in SIGNALS.values()})


def loop(given: dict[str, Tensor], relation: str, num_heads: int, rows: list[list[int]] | None = None) -> float:
    """KL(teacher || student), row by row, in relation heads; ``rows`` are the tokens that count of every image."""

    def flat(side: str, letter: str) -> Tensor:
        return given[f"{side}_{SIGNALS[letter]}"].transpose(1, 2).flatten(2)

    images = []
    for b in range(len(flat("student", "q"))):
        tokens = rows[b] if rows else range(flat("student", "q").shape[1])
        kl = []
        for h in range(num_heads):
            for i in tokens:
                row = []
                for side in ("student", "teacher"):
                    x, y = (flat(side, letter)[b] for letter in relation)
                    d = x.shape[1] // num_heads
                    x, y = x[:, h * d : (h + 1) * d], y[:, h * d : (h + 1) * d]
                    row.append(torch.stack([x[i] @ y[j] / math.sqrt(d) for j in tokens]).softmax(0))
                kl.append((row[1] * (row[1] / row[0]).log()).sum().item())
        images.append(sum(kl) / len(kl))
    return sum(images) / len(images)


def test_cases_were_found():
    assert len(CASES) == 2


def projected(case: GoldenCase, side: str, hidden: Tensor, num_heads: int) -> dict[str, Tensor]:
    weights = case.group(f"w.{side}")
    return {
        f"{side}_{name}": heads(F.linear(hidden, weights[f"{name}.weight"], weights[f"{name}.bias"]), num_heads)
        for name in SIGNALS.values()
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("model_heads", [1, 2])
def test_equals_the_reference(case, model_heads):
    relations = ["".join(OFFICIAL[i] for i in pair) for pair in case.options["relations"]]
    loss = MiniLM(
        relations=relations,
        weights=list(case.options["relations"].values()),
        num_relation_heads=case.options["relation_heads"],
    )
    hidden = case["in.hidden_s"].requires_grad_()
    given = projected(case, "student", hidden, model_heads) | projected(case, "teacher", case["in.hidden_t"], 4)
    assert case["in.mask"].sum(1).tolist() == case.options["lengths"]
    whole = bool(case["in.mask"].all())
    value = sum(loss(**given, mask=case["in.mask"]).values())
    assert_close(value, case["out.loss"], 1e-5)
    (grad,) = torch.autograd.grad(value, hidden, retain_graph=True)
    assert_close(grad, case["grad.hidden_s"], 1e-5)
    unmasked = sum(loss(**given).values())
    assert torch.allclose(unmasked, value, rtol=1e-5) == whole
    if whole:
        (grad,) = torch.autograd.grad(unmasked, hidden)
        assert_close(grad, case["grad.hidden_s"], 1e-5)


def test_published_weights_are_the_default_for_three_relations():
    case = CASES["v2_qq_kk_vv"]
    given = projected(case, "student", case["in.hidden_s"], 2) | projected(case, "teacher", case["in.hidden_t"], 4)
    terms = MiniLM(num_relation_heads=case.options["relation_heads"])(**given)
    assert list(terms) == ["qq", "kk", "vv"]
    assert_close(sum(terms.values()), case["out.loss"], 1e-5)


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_a_plain_loop(relation, num_heads):
    given = signals()
    loss = MiniLM(relations=(relation,), weights=(0.5,), num_relation_heads=num_heads)
    assert loss(**given)[relation].item() == pytest.approx(0.5 * loop(given, relation, num_heads), rel=1e-10)


def test_masked_images_are_averaged_over_their_own_tokens():
    given = signals()
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 0]])
    value = MiniLM(relations=("qk",), num_relation_heads=2)(**given, mask=mask)["qk"]
    assert value.item() == pytest.approx(loop(given, "qk", 2, rows=[[0, 1, 2, 3], [1, 3]]), rel=1e-10)
    everything = MiniLM()(**given, mask=torch.ones(2, 5))
    torch.testing.assert_close(everything, MiniLM()(**given))


def test_value_by_hand():
    # One head of width 4, two tokens: scores of row 0 are (4 * 1 / sqrt(4), 0) = (2, 0), of row 1 (0, 0); and with two
    # heads of width 2: (2 / sqrt(2), 0) in both.
    teacher = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])[None, None]
    student = torch.zeros(1, 1, 2, 4)
    for num_heads, score in ((1, 2.0), (2, math.sqrt(2))):
        p = 1 / (1 + math.exp(-score))
        by_hand = 0.5 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
        loss = MiniLM(relations="vv", weights=(3,), num_relation_heads=num_heads)
        assert loss(student_value=student, teacher_value=teacher)["vv"].item() == pytest.approx(3 * by_hand, rel=1e-5)


def test_version_one_is_tinymim():
    """Attention distribution and relation of the values, in the models' heads."""
    given = signals(student=(3, 12), teacher=(3, 24))
    v1 = MiniLM(relations=("qk", "vv"), weights=(1, 1), num_relation_heads="model")
    torch.testing.assert_close(v1(**given), TinyMIM()(**given), rtol=0, atol=0)


def test_a_rotation_within_a_relation_head_changes_nothing():
    given = signals(student=(2, 12), teacher=(3, 24))
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()).Q
    turned = torch.block_diag(*[rotation] * 4)
    changed = {
        name: heads(x.transpose(1, 2).flatten(2) @ turned, 2) if name.startswith("student") else x
        for name, x in given.items()
    }
    loss = MiniLM(num_relation_heads=4)
    torch.testing.assert_close(loss(**changed), loss(**given))
    other = MiniLM(num_relation_heads=6)
    assert not torch.allclose(sum(other(**changed).values()), sum(other(**given).values()))


@pytest.mark.parametrize(
    ("student", "teacher", "num_heads"),
    [(384, 768, 48), (192, 768, 24), (64, 192, 8), (24, 32, 2), (12, 35, 1), (96, 80, 8)],
)
def test_heads_are_found_that_fit_both(student, teacher, num_heads):
    given = signals(student=(1, student), teacher=(1, teacher), num_tokens=(3, 3))
    auto = MiniLM()(**given)
    torch.testing.assert_close(auto, MiniLM(num_relation_heads=num_heads)(**given), rtol=0, atol=0)


def test_options_change_the_value():
    given = signals(student=(3, 12), teacher=(3, 24))
    options = (
        {},
        {"num_relation_heads": 6},
        {"num_relation_heads": "model"},
        {"weights": (1, 1, 0)},
        {"relations": ("qk", "vv", "kk")},
    )
    values = [sum(MiniLM(**option)(**given).values()).item() for option in options]
    assert len({round(value, 4) for value in values}) == len(options)


def test_reads_only_what_its_relations_need():
    loss = MiniLM(student_block=3, teacher_block=0.875, relations="vv")
    assert loss.locations() == {"student_value": 3, "teacher_value": 0.875}
    assert set(MiniLM().inputs()) == {f"{side}_{s}" for side in ("student", "teacher") for s in SIGNALS.values()}


@pytest.mark.parametrize("num_prefix", [(1, 5), (0, 5), (1, 0), (2, 2), (0, 0)], ids=str)
def test_prefix_tokens_take_part_only_where_both_have_as_many(num_prefix):
    s, t = num_prefix
    given = signals(student=(2, 16), teacher=(4, 24), num_tokens=(s + 4, t + 4))
    loss = MiniLM(num_relation_heads=2)
    loss.build(info("student", 2, 8, s), info("teacher", 4, 6, t))
    dropped = {"student": 0, "teacher": 0} if s == t else {"student": s, "teacher": t}
    rest = {name: x[:, :, dropped[name.partition("_")[0]] :] for name, x in given.items()}
    torch.testing.assert_close(loss(**given), MiniLM(num_relation_heads=2)(**rest), rtol=0, atol=0)


def test_keeps_no_attention_sized_tensor_for_backward():
    given = {name: x.requires_grad_() for name, x in signals(num_tokens=(50, 50)).items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        MiniLM(num_relation_heads=6)(**given)
    assert (2, 6, 50, 2) in saved and max(shape.numel() for shape in saved) < 2 * 6 * 50 * 50


@pytest.mark.parametrize(
    ("options", "student", "teacher", "sentence"),
    [
        (
            {"num_relation_heads": "model"},
            info("student", 3, 4),
            info("teacher", 6, 4),
            "MiniLM: student must have as many heads as the teacher, got 3 and 6; "
            "pass num_relation_heads to re-split both.",
        ),
        (
            {"num_relation_heads": 8},
            info("student", 3, 4),
            info("teacher", 6, 4),
            "MiniLM: num_relation_heads must divide both widths 12 and 24, got 8; their greatest common divisor is 12.",
        ),
        (
            {},
            info("student", 3, 4, grid=(4, 4)),
            info("teacher", 3, 4, grid=(2, 8)),
            "MiniLM: student grid must equal teacher grid, got 4x4 and 2x8; "
            "choose image and patch sizes that give both the same.",
        ),
    ],
    ids=["heads", "width", "grid"],
)
def test_refuses_models_that_do_not_fit(options, student, teacher, sentence):
    with pytest.raises(ValueError) as caught:
        MiniLM(**options).build(student, teacher)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"relations": ()}, ValueError, "MiniLM: relations must be one or more different ones, got (); list each once"),
        ({"relations": ("vk",)}, ValueError, "MiniLM: relations must be a known one, got 'vk'; did you mean"),
        (
            {"weights": (1, 2)},
            ValueError,
            "MiniLM: weights must be one per relation, got 2 for ('qq', 'kk', 'vv'); None weighs them equally.",
        ),
        ({"weights": (1, -1, 1)}, ValueError, "MiniLM: weights must be >= 0, got -1; 0 switches a relation off."),
        ({"weights": 1.0}, TypeError, "MiniLM: weights must be a sequence, got 1.0; give one number per relation."),
        (
            {"num_relation_heads": 0},
            ValueError,
            "MiniLM: num_relation_heads must be > 0, got 0; 'auto' finds a divisor of both widths.",
        ),
        ({"num_relation_heads": None}, TypeError, "MiniLM: num_relation_heads must be an integer > 0, got None; "),
        (
            {"num_relation_heads": "models"},
            ValueError,
            "MiniLM: num_relation_heads must be a known one, got 'models'; ",
        ),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        MiniLM(**options)
    assert str(caught.value).startswith(sentence)


def test_wrong_inputs_are_named():
    with pytest.raises(
        TypeError, match=r"MiniLM: teacher_value must be given for relations \('vv',\); pass it by name"
    ):
        MiniLM(relations=("vv",))(student_value=torch.rand(1, 1, 2, 4))
    sentence = r"MiniLM: mask must have shape \(2, 5\) and a token that counts in every row, got \(2, {}\) with {} such"
    for mask, got in ((torch.ones(2, 4), (4, 2)), (torch.tensor([[1] * 5, [0] * 5]), (5, 1))):
        with pytest.raises(ValueError, match=sentence.format(*got)):
            MiniLM()(**signals(), mask=mask)
