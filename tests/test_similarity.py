"""The layers of two models beside each other: by hand, by naive loops, and without a trace left on the models."""

from __future__ import annotations

import copy
import math
import re
from itertools import combinations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Student, Teacher
from kdvit.similarity import LayerSimilarity, layer_similarity, linear_cka
from tests import tiny


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim: int, seed: int = 5) -> Tensor:
    return torch.linalg.qr(draw(dim, dim, seed=seed)).Q


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 as Song et al. write it, with kernel matrices that lack their diagonal."""
    n = len(x)
    ours, theirs = (kernel - kernel.diag().diag() for kernel in (x @ x.T, y @ y.T))
    ones = torch.ones(n, dtype=x.dtype)
    sums = ours.sum() * theirs.sum() / ((n - 1) * (n - 2)), 2 / (n - 2) * (ones @ ours @ theirs @ ones)
    terms = (ours @ theirs).trace(), *sums
    return (terms[0] + terms[1] - terms[2]) / (n * (n - 3))


# linear_cka


def test_four_samples_by_hand():
    # x x^T has one pair off the diagonal, and so has y y^T: no entry in common, sums of 2, row sums with product 1.
    x, y = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    own, cross = 2 + 2 * 2 / 6 - 2 / 2 * 2, 0 + 2 * 2 / 6 - 2 / 2 * 1
    assert linear_cka(x, y).item() == pytest.approx(cross / own) == pytest.approx(-0.5)


@pytest.mark.parametrize(("num_samples", "dims"), [(4, (3, 2)), (9, (5, 20)), (30, (40, 7))])
def test_it_is_the_published_estimator(num_samples, dims):
    x = draw(num_samples, dims[0], seed=1)
    y = torch.cat([x[:, :2], draw(num_samples, dims[1], seed=2)], dim=1)
    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    torch.testing.assert_close(linear_cka(x, y), expected)


def test_it_is_blind_to_rotation_shift_and_scale_alone():
    x, y = draw(20, 6), draw(20, 8, seed=1)
    expected = linear_cka(x, y)
    torch.testing.assert_close(linear_cka(5 * x @ rotation(6) + 3, 0.1 * y @ rotation(8) - 2), expected)
    stretched = x * torch.tensor([9.0, 1, 1, 1, 1, 1])
    assert abs(linear_cka(stretched, y) - expected) > 0.01


def test_equal_features_give_one():
    x = draw(12, 5)
    assert linear_cka(x, x).item() == pytest.approx(1.0, abs=1e-12)


def test_fewer_samples_than_features_show_nothing_that_is_not_there():
    x, y = draw(30, 500), draw(30, 500, seed=1)
    centred = [z - z.mean(0) for z in (x, y)]
    gram = [z @ z.T for z in centred]
    plain = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert plain > 0.9 and abs(linear_cka(x, y)) < 0.1


def test_a_large_common_part_costs_no_precision():
    x, y = draw(50, 4), draw(50, 4, seed=1)
    torch.testing.assert_close(linear_cka(x + 1e6, y - 1e6), linear_cka(x, y), rtol=1e-6, atol=1e-9)


def test_constant_features_have_no_similarity():
    assert linear_cka(torch.ones(6, 3), draw(6, 3)).isnan()


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        (draw(5, 2), draw(6, 2), "linear_cka: x and y must be (n, D_x) and (n, D_y), got (5, 2) and (6, 2); give one"),
        (draw(5, 2, 2), draw(5, 2), "got (5, 2, 2) and (5, 2)"),
        (draw(3, 2), draw(3, 2), "linear_cka: n must be >= 4 samples, got 3; give more."),
    ],
)
def test_wrong_features_are_one_sentence(x, y, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        linear_cka(x, y)


# layer_similarity


def pair(student: nn.Module | None = None, teacher: nn.Module | None = None) -> tuple[Student, Teacher]:
    student, teacher = student or tiny.vit(0), teacher or tiny.vit(1, embed_dim=32, depth=3)
    return Student(student, input_size=(3, 32, 32)), Teacher(teacher, input_size=(3, 32, 32))


def batches(*sizes: int) -> list[Tensor]:
    return list(tiny.images(sum(sizes)).split(sizes))


def outputs(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """What a module gives, by a hook of our own."""
    kept = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0]


def test_cka_is_that_of_the_pooled_maps():
    student, teacher = pair(tiny.vit(0), tiny.cnn(1))
    images = tiny.images(9)
    found = layer_similarity(student, teacher, [images])
    assert found.student_layers == ("blocks.0", "blocks.1")
    assert found.teacher_layers == ("act1", "layer1", "layer2", "layer3", "layer4")
    assert found.cka.shape == found.relation_distance.shape == (2, 5)
    for s, t in ((0, 0), (1, 3), (0, 4)):
        tokens = outputs(student.model, found.student_layers[s], images)[:, 1:]
        feature_map = outputs(teacher.model, found.teacher_layers[t], images)
        torch.testing.assert_close(found.cka[s, t], linear_cka(tokens.mean(1), feature_map.mean((2, 3))))


def naive_distance(student: Tensor, teacher: Tensor, num_positions: int) -> float:
    squares = []
    for ours, theirs in zip(student, teacher, strict=True):
        for i, j in combinations(range(num_positions), 2):
            cosines = [F.cosine_similarity(x[:, i], x[:, j], dim=0) for x in (ours, theirs)]
            squares.append(float(cosines[0] - cosines[1]) ** 2)
    return math.sqrt(sum(squares) / len(squares))


def test_relation_distance_by_naive_loops():
    student, teacher = pair(tiny.vit(0), tiny.cnn(1))
    images = tiny.images(4)
    found = layer_similarity(student, teacher, [images])
    tokens = outputs(student.model, "blocks.1", images)[:, 1:].transpose(1, 2)  # (B, D, 16) on a 4x4 grid
    larger = outputs(teacher.model, "layer1", images)  # 8x8
    assert larger.shape[2:] == (8, 8)
    expected = naive_distance(tokens, F.avg_pool2d(larger, 2).flatten(2), 16)
    assert found.relation_distance[1, 1].item() == pytest.approx(expected, rel=1e-5)
    smaller = outputs(teacher.model, "layer3", images)  # 2x2
    assert smaller.shape[2:] == (2, 2)
    on_it = F.avg_pool2d(tokens.unflatten(2, (4, 4)), 2).flatten(2)
    assert found.relation_distance[1, 3].item() == pytest.approx(naive_distance(on_it, smaller.flatten(2), 4), rel=1e-5)


def test_a_single_position_has_no_relations():
    found = layer_similarity(*pair(tiny.vit(0), tiny.cnn(1)), batches(4))  # layer4 of the CNN is 1x1
    assert found.relation_distance.isnan().tolist() == [[False] * 4 + [True]] * 2
    assert found.cka.isfinite().all()


def test_large_grids_are_averaged_first():
    model = tiny.cnn(0)
    images = tiny.images(4, size=(64, 64))  # act1 is 32x32
    student, teacher = Student(model, input_size=(3, 64, 64)), Teacher(tiny.cnn(1), input_size=(3, 64, 64))
    found = layer_similarity(student, teacher, [images])
    maps = [F.adaptive_avg_pool2d(outputs(m, "act1", images), 14).flatten(2) for m in (model, teacher.model)]
    cosines = [F.normalize(x, dim=1).transpose(1, 2) @ F.normalize(x, dim=1) for x in maps]
    expected = ((cosines[0] - cosines[1]) ** 2).mean() * 196 / 195
    assert found.relation_distance[0, 0].item() == pytest.approx(expected.sqrt().item(), rel=1e-4)


def test_equal_models_are_equal_layer_by_layer():
    model = tiny.vit(0, depth=3)
    found = layer_similarity(*pair(model, copy.deepcopy(model)), batches(6))
    torch.testing.assert_close(found.cka.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found.relation_distance.diagonal().tolist() == [0.0] * 3
    off = ~torch.eye(3, dtype=torch.bool)
    assert (found.cka[off] < 0.999).all() and (found.relation_distance[off] > 1e-3).all()


def test_batches_do_not_matter():
    whole = layer_similarity(*pair(), batches(12))
    for sizes in ((5, 7), (1, 1, 10), (3, 3, 3, 3)):
        parts = layer_similarity(*pair(), batches(*sizes))
        torch.testing.assert_close(parts.cka, whole.cka, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(parts.relation_distance, whole.relation_distance, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("depth", "num_layers", "layers"),
    [(8, 4, (1, 3, 5, 7)), (7, 3, (2, 4, 6)), (2, 6, (0, 1)), (12, 6, (1, 3, 5, 7, 9, 11)), (5, 1, (4,))],
)
def test_layers_are_at_equal_shares_of_the_depth(depth, num_layers, layers):
    found = layer_similarity(*pair(tiny.vit(0, depth=depth)), batches(4), num_layers=num_layers)
    assert found.student_layers == tuple(f"blocks.{layer}" for layer in layers)


def test_a_hierarchical_transformer():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(2, 2)
    )
    found = layer_similarity(*pair(swin.eval()), batches(4))
    assert found.student_layers == ("layers.0", "layers.1") and found.cka.isfinite().all()


def test_the_teacher_sees_its_own_images():
    """Paired by a Distiller, the same model under another normalisation gets other pixels, and so other features."""
    facts = {"input_size": (3, 32, 32)}
    model = tiny.vit(0)
    student = Student(model, mean=(0.5,) * 3, std=(0.5,) * 3, **facts)
    teacher = Teacher(copy.deepcopy(model), mean=(0.2,) * 3, std=(0.3,) * 3, **facts)
    alone = layer_similarity(student, Teacher(copy.deepcopy(model), **facts), batches(5))
    distiller = Distiller(teacher, student, ["kd"])
    paired = layer_similarity(distiller.student, distiller.teacher, batches(5))
    torch.testing.assert_close(alone.cka.diagonal(), torch.ones(2, dtype=torch.float64))
    assert (paired.cka.diagonal() < 0.9999).all()


def test_a_grey_student_of_a_teacher_of_colours():
    student = Student(tiny.vit(0, in_chans=1), input_size=(1, 32, 32))
    distiller = Distiller(Teacher(tiny.cnn(1), input_size=(3, 64, 64)), student, ["kd"])
    images = tiny.images(5, channels=1)
    found = layer_similarity(distiller.student, distiller.teacher, [images])
    seen = distiller.teacher.bridge(images)
    assert seen.shape == (5, 3, 64, 64)
    pooled = outputs(distiller.teacher.model, "layer2", seen).mean((2, 3))
    tokens = outputs(student.model, "blocks.0", images)[:, 1:].mean(1)
    torch.testing.assert_close(found.cka[0, 2], linear_cka(tokens, pooled))


def test_grids_follow_the_images():
    model = tiny.vit(0, dynamic_img_size=True)
    student, teacher = Student(model, input_size=(3, 32, 32)), Teacher(tiny.vit(1, dynamic_img_size=True))
    assert layer_similarity(student, teacher, [tiny.images(4, size=(48, 48))]).cka.isfinite().all()
    assert student.input_size == (3, 32, 32)


def test_half_precision_teachers():
    student, teacher = pair()[0], Teacher(tiny.vit(1).bfloat16(), input_size=(3, 32, 32))
    exact = layer_similarity(student, Teacher(tiny.vit(1), input_size=(3, 32, 32)), batches(8))
    torch.testing.assert_close(layer_similarity(student, teacher, batches(8)).cka, exact.cka, rtol=0, atol=0.02)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_models_are_left_as_they_were():
    ours, theirs = tiny.cnn(0), tiny.cnn(1)
    distiller = Distiller(Teacher(theirs, input_size=(3, 32, 32)), Student(ours), ["kd", "rkd"])
    distiller.train()
    ours.layer2.eval()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    modes = [module.training for module in ours.modules()]
    taps, state = (hooks(ours), hooks(theirs)), torch.random.get_rng_state()
    step = distiller(tiny.images(), tiny.labels()).losses
    ours.load_state_dict(before)  # the step moved the statistics of BatchNorm
    layer_similarity(distiller.student, distiller.teacher, batches(3, 3))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert [module.training for module in ours.modules()] == modes
    assert not any(module.training for module in theirs.modules())
    assert (hooks(ours), hooks(theirs)) == taps and torch.equal(torch.random.get_rng_state(), state)
    again = distiller(tiny.images(), tiny.labels()).losses
    assert {name: value.item() for name, value in again.items()} == {name: value.item() for name, value in step.items()}


def test_models_are_left_as_they_were_after_a_failure():
    student, teacher = pair(tiny.cnn(0))
    student.train()
    taps = hooks(student.model), hooks(teacher.model)

    def broken():
        yield tiny.images()
        raise RuntimeError("an image is missing")

    with pytest.raises(RuntimeError, match="an image is missing"):
        layer_similarity(student, teacher, broken())
    assert student.model.training and (hooks(student.model), hooks(teacher.model)) == taps == (0, 0)


def test_the_result_holds_no_graph():
    found = layer_similarity(*pair(), batches(4))
    assert isinstance(found, LayerSimilarity)
    assert not found.cka.requires_grad and not found.relation_distance.requires_grad


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"num_layers": 0}, ValueError, "layer_similarity: num_layers must be >= 1, got 0; 6 suits most models."),
        ({"batches": []}, ValueError, "layer_similarity: batches must hold at least 4 images, got none; give more."),
        ({"batches": batches(3)}, ValueError, "layer_similarity: batches must hold at least 4 images, got 3; give mo"),
        ({"batches": [{}]}, TypeError, "batches must be tensors of images (B, C, H, W), got dict; stack them."),
        ({"batches": [torch.zeros(3, 32, 32)]}, TypeError, "(B, C, H, W), got shape (3, 32, 32); stack them."),
        ({"student": Student(tiny.plain(), input_size=(3, 32, 32))}, ValueError, "Sequential gives no feature_map at"),
    ],
)
def test_mistakes_are_one_sentence(given, kind, sentence):
    student, teacher = pair()
    with pytest.raises(kind, match=re.escape(sentence)):
        layer_similarity(**{"student": student, "teacher": teacher, "batches": batches(4), **given})
