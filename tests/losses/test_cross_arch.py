from __future__ import annotations

import doctest
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kdvit
from kdvit.losses import CrossArch, cross_arch
from kdvit.losses.attending import attend
from kdvit.losses.cross_arch import neighbourhoods
from kdvit.signals import ModelInfo, SignalInfo
from tests.tiny import cnn, images, labels, vit

SIGNALS = ("query", "key", "value")


def example(
    prefix: int = 1, grid=(2, 3), student_grid=(2, 3), heads: int = 2, dim: int = 3, student_dim: int = 4
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    patches = grid[0] * grid[1]
    inputs = {"student_feature_map": draw(student_dim, *student_grid), "teacher_feature_map": draw(5, *grid)}
    for signal in SIGNALS:
        tokens = draw(heads, patches, dim)
        registers = 1e3 * torch.randn(2, heads, prefix, dim, dtype=torch.float64)
        inputs[f"teacher_{signal}"] = torch.cat([registers, tokens], dim=2)
    return inputs


def built(inputs: dict[str, Tensor], prefix: int = 1, **options) -> CrossArch:
    loss = CrossArch(**options)
    torch.manual_seed(0)
    taught = {s: SignalInfo.of(s, inputs[f"teacher_{s}"], num_prefix_tokens=prefix) for s in SIGNALS}
    loss.build(
        ModelInfo.of(feature_map=SignalInfo.of("feature_map", inputs["student_feature_map"])),
        ModelInfo.of(feature_map=SignalInfo.of("feature_map", inputs["teacher_feature_map"]), **taught),
    )
    return loss.to(torch.float64)


def noise(heads: int = 2, dim: int = 3) -> Tensor:
    return torch.rand(2, 3, heads, 6, dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_equals_a_plain_loop():
    inputs, u = example(prefix=2), noise()
    loss = built(inputs, prefix=2, alpha=0.5, beta=3.0, replace_ratio=0.4, neighbourhood=2)
    maps = [conv(inputs["student_feature_map"]).detach() for conv in loss.convolutions]
    places = [(i, j) for i in range(2) for j in range(3)]
    attention = value = feature = 0.0
    for b in range(2):
        for h in range(2):
            theirs = [inputs[f"teacher_{s}"][b, h, 2:] for s in SIGNALS]
            own = [torch.stack([m[b, 3 * h : 3 * h + 3, *at] for at in places]) for m in maps]
            mixed = [t.where(u[b, i, h] < 0.4, s) for i, (s, t) in enumerate(zip(own, theirs, strict=True))]
            outputs = [(q @ k.T / math.sqrt(3)).softmax(1) @ v for q, k, v in (mixed, theirs)]
            attention += ((outputs[0] - outputs[1]) ** 2).sum().item() / (2 * 2 * 6 * 3)
            relations = [x[2] @ x[2].T / math.sqrt(3) for x in (own, theirs)]
            value += ((relations[0] - relations[1]) ** 2).sum().item() / (2 * 2 * 6 * 6)
        for at in places:
            linear = loss.linears[0 if at[1] < 2 else 1][0]
            x = linear.weight @ inputs["student_feature_map"][b, :, *at] + linear.bias
            feature += ((x - inputs["teacher_feature_map"][b, :, *at]) ** 2).sum().item() / (2 * 6 * 5)
    terms = {name: x.item() for name, x in loss(**inputs, noise=u).items()}
    assert terms == pytest.approx(
        {"attention": 0.5 * attention, "value": 0.5 * value, "feature": 3 * feature}, rel=1e-10
    )


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_of_the_teacher_play_no_part(prefix):
    inputs = example(prefix=1)
    expected = built(inputs)(**inputs, noise=noise())
    for signal in SIGNALS:
        patches = inputs[f"teacher_{signal}"][:, :, 1:]
        inputs[f"teacher_{signal}"] = torch.cat([torch.full((2, 2, prefix, 3), 7e3, dtype=torch.float64), patches], 2)
    torch.testing.assert_close(built(inputs, prefix=prefix)(**inputs, noise=noise()), expected)


def test_what_is_replaced_cannot_be_wrong():
    """Partially cross attention: with the teacher's numbers everywhere, its attention comes out."""
    inputs = example()
    loss = built(inputs)
    half = noise()
    everything, none = torch.zeros_like(half), torch.ones_like(half)
    assert loss(**inputs, noise=everything)["attention"].item() == pytest.approx(0.0, abs=1e-20)
    values = [loss(**inputs, noise=u)["attention"].item() for u in (half, none)]
    assert 0 < values[0] and values[0] != pytest.approx(values[1])
    # The relations of the values are of the student's own ones.
    assert loss(**inputs, noise=half)["value"] == loss(**inputs, noise=none)["value"]


def test_replaces_each_number_with_its_probability(monkeypatch):
    inputs = example(grid=(16, 16), student_grid=(16, 16), dim=8)
    for ratio in (0.0, 0.3):
        loss, seen = built(inputs, replace_ratio=ratio), []
        loss.generator = torch.Generator().manual_seed(3)
        monkeypatch.setattr(cross_arch, "attend", lambda *x: seen.append(x) or attend(*x))  # noqa: B023
        loss(**inputs)
        for mixed, theirs in zip(seen[0][:3], seen[1][:3], strict=True):
            assert (mixed == theirs).double().mean().item() == pytest.approx(ratio, abs=0.02)


def test_the_generator_decides():
    inputs = example()
    loss = built(inputs, dropout=0.5)

    def draw(seed: int) -> list[float]:
        loss.generator = torch.Generator().manual_seed(seed)
        return [x.item() for x in loss(**inputs).values()]

    assert draw(1) == draw(1) != draw(2)
    assert draw(1)[2] != draw(2)[2]  # dropout
    loss.eval()
    assert draw(1)[2] == draw(2)[2] and draw(1)[0] != draw(2)[0]  # in evaluation nothing is dropped


def test_dropout_keeps_the_mean():
    inputs = example(student_dim=4000)
    loss = built(inputs, dropout=0.25)
    for linear in loss.linears:
        linear[0].weight.data.fill_(1 / 4000)
        linear[0].bias.data.zero_()
    inputs["student_feature_map"] = torch.ones_like(inputs["student_feature_map"])
    expected = F.mse_loss(torch.ones_like(inputs["teacher_feature_map"]), inputs["teacher_feature_map"])
    assert loss(**inputs)["feature"].item() == pytest.approx(expected.item(), rel=0.05)


def test_neighbours_share_a_layer():
    assert neighbourhoods((2, 3), 2) == [[0, 1, 3, 4], [2, 5]]
    published = neighbourhoods((14, 14), 4)
    assert len(published) == 16 and sorted(sum(published, [])) == list(range(196))
    assert published[0] == [14 * i + j for i in range(4) for j in range(4)]
    assert [len(neighbourhoods(grid, 4)) for grid in ((7, 7), (1, 1), (4, 5))] == [4, 1, 2]
    (test,) = doctest.DocTestFinder().find(neighbourhoods, globs=vars(cross_arch))
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "nearest", "pool"])
def test_the_students_map_is_brought_to_the_teachers_grid(resize):
    inputs = example(grid=(4, 4), student_grid=(2, 2))
    u = torch.full((2, 3, 1, 1, 1), 0.9, dtype=torch.float64)
    loss = built(inputs, resize=resize)
    options = {} if resize == "nearest" else {"align_corners": False}
    x = inputs["student_feature_map"]
    by_hand = F.adaptive_avg_pool2d(x, 4) if resize == "pool" else F.interpolate(x, (4, 4), mode=resize, **options)
    torch.testing.assert_close(loss(**inputs, noise=u), loss(**inputs | {"student_feature_map": by_hand}, noise=u))


def test_keeps_one_tensor_with_an_entry_for_each_pair():
    inputs = {k: x.float() for k, x in example(grid=(16, 16), student_grid=(16, 16)).items()}
    loss, pairs = built(inputs).float(), {}

    def note(x):
        if x.numel() >= 2 * 2 * 256 * 256:
            pairs[x.data_ptr()] = x.shape
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss(**inputs, noise=torch.full((2, 3, 1, 1, 1), 0.9))
    assert len(pairs) == 1  # the difference of the relations of values


@pytest.mark.parametrize("student", [cnn, lambda: vit(embed_dim=40, num_heads=4), lambda: vit(patch_size=16)], ids=str)
@pytest.mark.parametrize("teacher", [vit, lambda: vit(reg_tokens=4)], ids=["vit", "registers"])
def test_any_student_learns_from_a_transformer(student, teacher):
    distiller = kdvit.Distiller(teacher(), student(), ["cross_arch"])
    distiller(images(), labels()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in distiller.losses.parameters())


def test_a_teacher_without_attention_is_refused_at_construction():
    with pytest.raises(ValueError, match="needs teacher_query|query"):
        kdvit.Distiller(cnn(), vit(), ["cross_arch"])


def test_refuses_what_cannot_work():
    inputs = example()
    for options, error, sentence in (
        ({"alpha": -1}, ValueError, "CrossArch: alpha must be >= 0, got -1; 0 switches the partially cross attention"),
        (
            {"beta": "x"},
            TypeError,
            "CrossArch: beta must be a number >= 0, got 'x'; 0 switches the linear features off.",
        ),
        (
            {"replace_ratio": 1},
            ValueError,
            "CrossArch: replace_ratio must be < 1, got 1.0; the published value is 0.5.",
        ),
        ({"dropout": 1.5}, ValueError, "CrossArch: dropout must be < 1, got 1.5; 0 drops nothing."),
        ({"dropout": -0.5}, ValueError, "CrossArch: dropout must be >= 0, got -0.5; 0 drops nothing."),
        ({"neighbourhood": 0}, ValueError, "CrossArch: neighbourhood must be > 0, got 0; the published value is 4."),
        ({"resize": "area"}, ValueError, "CrossArch: resize must be a known one, got 'area'"),
    ):
        with pytest.raises(error) as caught:
            CrossArch(**options)
        assert str(caught.value).startswith(sentence)
    with pytest.raises(RuntimeError, match="CrossArch: build must be called before forward"):
        CrossArch()(**inputs)
    with pytest.raises(
        ValueError, match="CrossArch: teacher must have one query for each of 6 patches, got 7 for 'mod"
    ):
        built(inputs, prefix=0)
    loss = built(inputs)
    with pytest.raises(ValueError, match=r"CrossArch: teacher_value must have shape \(B, 2, 7, 3\) as in build, got"):
        loss(**inputs | {"teacher_value": inputs["teacher_value"][..., :2]})
    with pytest.raises(ValueError, match="CrossArch: teacher_feature_map must have D=5 as in build, got D=4; build"):
        loss(**inputs | {"teacher_feature_map": inputs["teacher_feature_map"][:, :4]})
    with pytest.raises(ValueError, match="CrossArch: teacher_feature_map must have the grid 2x3 as in build, got 2x2;"):
        loss(**inputs | {"teacher_feature_map": inputs["teacher_feature_map"][..., :2]})
    with pytest.raises(ValueError, match="CrossArch: teacher_key has B=1 but student_feature_map has B=2; give both"):
        loss(**inputs | {"teacher_key": inputs["teacher_key"][:1]})
    for u in (noise()[:1], noise()[:, :, :1, :1, :1], noise()[:, :1]):  # 1 wherever it likes
        loss(**inputs, noise=u)
    for u in (noise()[0], noise()[:, :2], noise(dim=2)):
        with pytest.raises(
            ValueError, match=r"CrossArch: noise must have shape \(2, 3, 2, 6, 3\), or 1 in some places"
        ):
            loss(**inputs, noise=u)


def test_places_are_where_it_reads():
    assert CrossArch(student_stage="layer3", teacher_block=5).locations() == {
        "student_feature_map": "layer3",
        "teacher_query": 5,
        "teacher_key": 5,
        "teacher_value": 5,
        "teacher_feature_map": 5,
    }
