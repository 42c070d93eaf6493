from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn

from kdvit.losses import TinyMIM
from kdvit.losses.relations import RELATIONS
from kdvit.signals import ModelInfo, SignalInfo
from tests.losses.golden import assert_close, golden

CASES = golden("feature_tinymim")


def split(qkv: Tensor, num_heads: int, side: str) -> dict[str, Tensor]:
    """The signals in the output (B, L, 3D) of a qkv projection."""
    query, key, value = (x.unflatten(2, (num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return {f"{side}_query": query, f"{side}_key": key, f"{side}_value": value}


def info(side: str, num_heads: int = 6, head_dim: int = 4, num_prefix: int = 1, grid=(4, 4)) -> ModelInfo:
    shape = (num_heads, num_prefix + grid[0] * grid[1], head_dim)
    signals = {s: SignalInfo(s, "blocks.3.attn", shape, num_prefix, grid) for s in ("query", "key", "value")}
    return ModelInfo.of(side, **signals)


def signals(num_heads: int = 6, num_tokens: int = 17, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = split(torch.randn(2, num_tokens, 3 * 24, generator=generator), num_heads, "student")
    return student | split(torch.randn(2, num_tokens, 3 * 48, generator=generator), num_heads, "teacher")


def test_cases_were_found():
    assert len(CASES) == 2


def test_relations_equal_the_official_ones():
    case = CASES["relation_same_heads"]
    num_heads = case.options["num_heads"]
    qkv = case["in.qkv_s"].requires_grad_()
    terms = TinyMIM()(**split(qkv, num_heads, "student"), **split(case["in.qkv_t"], num_heads, "teacher"))
    assert_close(terms["qk"], case["out.loss_qk"], 1e-5)
    assert_close(terms["vv"], case["out.loss_vv"], 1e-5)
    value = sum(terms.values())
    assert_close(value, case["out.loss"], 1e-5)
    (grad,) = torch.autograd.grad(value, qkv)
    assert_close(grad, case["out.dqkv_s"], 1e-4)


def vit(weights: dict[str, Tensor], depth: int, embed_dim: int, num_heads: int) -> nn.Module:
    """A timm model with the official weights; what is behind the last qkv is left out of the golden file."""
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=embed_dim, depth=depth, num_heads=num_heads, num_classes=0
    )
    keys = model.load_state_dict(weights, strict=False)
    last = f"blocks.{depth - 1}."
    assert not keys.unexpected_keys
    assert all(key.startswith(("norm.", f"{last}attn.proj", f"{last}norm2", f"{last}mlp")) for key in keys.missing_keys)
    return model.eval()


def test_whole_models_equal_the_official_ones():
    case = CASES["model_last_layer_teacher"]
    image = case["in.image"].requires_grad_()
    given = {}
    for side in ("student", "teacher"):
        options = case.options[side]
        weights = {key.removeprefix(f"{side}."): x for key, x in case.group("w").items() if key.startswith(side)}
        model = vit(weights, options["depth"], options["embed_dim"], options["num_heads"])
        caught = []
        model.blocks[-1].attn.qkv.register_forward_hook(lambda *call: caught.append(call[-1]))  # noqa: B023
        # The last block of the official student has as many heads as its teacher.
        last_heads = options.get("last_heads", options["num_heads"])
        model.forward_features(image if side == "student" else image.detach())
        given |= split(caught[0], last_heads, side)
    terms = TinyMIM()(**given)
    assert_close(terms["qk"], case["out.loss_qk"], 1e-5)
    assert_close(terms["vv"], case["out.loss_vv"], 1e-5)
    (grad,) = torch.autograd.grad(sum(terms.values()), image)
    assert_close(grad, case["grad.image"], 1e-4)


def relation_loop(x: Tensor, y: Tensor, other_x: Tensor, other_y: Tensor) -> float:
    """KL(teacher || student), row by row; x, y are the student's."""
    total, rows = 0.0, 0
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(x.shape[2]):
                q = (y[b, h] @ x[b, h, i] / math.sqrt(x.shape[-1])).softmax(0)
                p = (other_y[b, h] @ other_x[b, h, i] / math.sqrt(other_x.shape[-1])).softmax(0)
                total += (p * (p / q).log()).sum().item()
                rows += 1
    return total / rows


@pytest.mark.parametrize("relation", RELATIONS)
def test_equals_a_plain_loop(relation):
    given = {name: x.double() for name, x in signals(num_heads=2, num_tokens=5).items()}
    names = {"q": "query", "k": "key", "v": "value"}
    operands = [given[f"{side}_{names[letter]}"] for side in ("student", "teacher") for letter in relation]
    loss = TinyMIM(relations=(relation,))
    value = loss(**{name: given[name] for name in loss.inputs()})[relation]
    assert value.item() == pytest.approx(relation_loop(*operands), rel=1e-10)


def test_resplit_heads_equal_a_plain_loop():
    student = split(torch.randn(2, 5, 3 * 12, generator=torch.Generator().manual_seed(0)).double(), 3, "student")
    teacher = split(torch.randn(2, 5, 3 * 16, generator=torch.Generator().manual_seed(1)).double(), 2, "teacher")
    given = {name: x for name, x in (student | teacher).items() if "value" in name}
    value = TinyMIM(relations=("vv",), num_relation_heads=4)(**given)["vv"]
    s, t = (x.transpose(1, 2).reshape(2, 5, 4, -1).transpose(1, 2) for x in given.values())
    assert s.shape[-1] == 3 and t.shape[-1] == 4
    assert value.item() == pytest.approx(relation_loop(s, s, t, t), rel=1e-10)
    unchanged = TinyMIM(relations=("vv",), num_relation_heads=3)(student_value=s[:, :3], teacher_value=t[:, :3])["vv"]
    assert unchanged.item() == pytest.approx(relation_loop(s[:, :3], s[:, :3], t[:, :3], t[:, :3]), rel=1e-10)


def test_value_by_hand():
    # One head of width 4, two tokens: scores of row 0 are (4 * 1 / sqrt(4), 0) = (2, 0), of row 1 (0, 0).
    teacher = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])[None, None]
    p = 1 / (1 + math.exp(-2))
    by_hand = 0.5 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    value = TinyMIM(relations=["vv"])(student_value=torch.zeros(1, 1, 2, 4), teacher_value=teacher)["vv"]
    assert value.item() == pytest.approx(by_hand, rel=1e-5)


def test_reads_only_what_its_relations_need():
    assert set(TinyMIM(relations="vv").inputs()) == {"student_value", "teacher_value"}
    loss = TinyMIM(student_block=3, teacher_block=17, relations=("qq", "kk"))
    assert loss.locations() == {"student_query": 3, "student_key": 3, "teacher_query": 17, "teacher_key": 17}


def test_relations_and_heads_change_the_value():
    given = signals()
    terms = {r: sum(TinyMIM(relations=(r,))(**given).values()).item() for r in RELATIONS}
    assert len({round(value, 4) for value in terms.values()}) == 4
    both = TinyMIM(relations=("qq", "kk"))(**given)
    assert {r: x.item() for r, x in both.items()} == {"qq": terms["qq"], "kk": terms["kk"]}
    resplit = TinyMIM(relations=("qq",), num_relation_heads=12)(**given)["qq"]
    assert abs(resplit.item() - terms["qq"]) > 1e-3


def test_prefix_tokens_take_part_only_where_both_have_as_many():
    student, teacher = signals(num_tokens=17), signals(num_tokens=20, seed=1)
    given = {name: (student if name.startswith("student") else teacher)[name] for name in student}
    loss = TinyMIM()
    loss.build(info("student", num_prefix=1), info("teacher", head_dim=8, num_prefix=4))
    patches = {name: x[:, :, 1 if name.startswith("student") else 4 :] for name, x in given.items()}
    torch.testing.assert_close(loss(**given), TinyMIM()(**patches), rtol=0, atol=0)
    loss.build(info("student", num_prefix=1), info("teacher", head_dim=8, num_prefix=1))
    torch.testing.assert_close(loss(**student), TinyMIM()(**student), rtol=0, atol=0)


def test_keeps_no_attention_sized_tensor_for_backward():
    given = {name: x.requires_grad_() for name, x in signals().items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        TinyMIM()(**given)
    assert (2, 6, 17, 4) in saved and max(shape.numel() for shape in saved) < 2 * 6 * 17 * 17


@pytest.mark.parametrize(
    ("options", "student", "teacher", "sentence"),
    [
        (
            {},
            info("student", num_heads=3),
            info("teacher"),
            "TinyMIM: student must have as many heads as the teacher, got 3 and 6; "
            "pass num_relation_heads to re-split both.",
        ),
        (
            {"num_relation_heads": 8},
            info("student", num_heads=3),
            info("teacher"),
            "TinyMIM: num_relation_heads must divide both widths 12 and 24, got 8; "
            "their greatest common divisor is 12.",
        ),
        (
            {},
            info("student", grid=(4, 4)),
            info("teacher", grid=(2, 8)),
            "TinyMIM: student grid must equal teacher grid, got 4x4 and 2x8; "
            "choose image and patch sizes that give both the same.",
        ),
    ],
    ids=["heads", "width", "grid"],
)
def test_refuses_models_that_do_not_fit(options, student, teacher, sentence):
    with pytest.raises(ValueError) as caught:
        TinyMIM(**options).build(student, teacher)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"relations": ("qk", "vq")},
            ValueError,
            "TinyMIM: relations must be a known one, got 'vq'; did you mean 'vv'? Known: qk, vv, qq, kk.",
        ),
        ({"relations": ()}, ValueError, "TinyMIM: relations must be one or more different ones, got (); "),
        ({"relations": ("vv", "vv")}, ValueError, "TinyMIM: relations must be one or more different ones, got "),
        (
            {"num_relation_heads": 0},
            ValueError,
            "TinyMIM: num_relation_heads must be > 0, got 0; None keeps the heads of the models.",
        ),
        ({"num_relation_heads": 2.5}, TypeError, "TinyMIM: num_relation_heads must be an integer > 0, got 2.5; "),
    ],
    ids=str,
)
def test_refuses_other_options(options, error, sentence):
    with pytest.raises(error) as caught:
        TinyMIM(**options)
    assert str(caught.value).startswith(sentence)


def test_refuses_a_second_derivative():
    """Its gradient is found in forward: a second derivative would lack what the scores change."""
    given = signals(num_tokens=5)
    value = TinyMIM(relations=("vv",))(
        student_value=given["student_value"].requires_grad_(), teacher_value=given["teacher_value"]
    )["vv"]
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.grad(value, given["student_value"], create_graph=True)
    assert str(caught.value) == (
        "Relations between tokens: create_graph must be False, got True; take differences of gradients, as "
        "kdvit.bilevel does."
    )


def test_a_missing_input_is_named():
    with pytest.raises(TypeError, match="TinyMIM: teacher_value must be given for relations .'vv',.; pass it by name."):
        TinyMIM(relations=("vv",))(student_value=torch.rand(1, 1, 2, 4))
