"""What a run keeps for its report: right maps, whole files, and models that do not notice."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from kdvit import Distiller, Student, Teacher
from kdvit.data import FASHION_MNIST_TRANSFORM, ImageData
from kdvit.losses import make as make_loss
from kdvit.similarity import layer_similarity
from kdvit.training.attention_maps import KINDS, attention_maps
from kdvit.training.insight import sample_batch, spread_indices, write_insight
from tests import tiny

CLASS_TOKEN, MEAN, ACTIVATION = KINDS
NAMES = ["ant", "bee", "cat", "dog", "eel"]
PLAIN = {"mean": (0.5,), "std": (0.5,)}


def kept(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    return json.loads((folder / "insight.json").read_text()), load_file(folder / "insight.safetensors")


def write(distiller: Distiller, folder: Path, **options) -> tuple[dict, dict[str, np.ndarray]]:
    images, labels = tiny.images(6), tiny.labels(6)
    write_insight(distiller, images, labels, NAMES, folder / "insight", **PLAIN, **options)
    return kept(folder / "insight")


def attention_by_hand(model: nn.Module, block: int, images: torch.Tensor) -> torch.Tensor:
    """(n, H, N, N) of a timm ViT, from the output of its qkv projection."""
    caught = []
    handle = model.blocks[block].attn.qkv.register_forward_hook(lambda module, args, out: caught.append(out))
    with torch.no_grad():
        model(images)
    handle.remove()
    attention = model.blocks[block].attn
    query, key, _ = caught[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (query @ key.transpose(-2, -1) * attention.scale).softmax(-1)


def test_attention_is_that_of_the_class_token_to_the_patches():
    model = tiny.vit(depth=4)
    found = attention_maps(Student(model), tiny.images())
    assert found.kind == CLASS_TOKEN and found.layers == ("blocks.1.attn", "blocks.2.attn", "blocks.3.attn")
    for index, block in enumerate((1, 2, 3)):
        by_hand = attention_by_hand(model, block, tiny.images()).mean(1)[:, 0, 1:].unflatten(1, (4, 4))
        torch.testing.assert_close(found.maps[index], by_hand, rtol=1e-5, atol=1e-6)


def test_without_a_class_token_it_is_the_mean_over_the_queries():
    model = tiny.vit(class_token=False, global_pool="avg")
    found = attention_maps(Student(model), tiny.images())
    assert found.kind == MEAN and found.layers == ("blocks.0.attn", "blocks.1.attn")  # two blocks, named once each
    by_hand = attention_by_hand(model, 1, tiny.images()).mean((1, 2)).unflatten(1, (4, 4))
    torch.testing.assert_close(found.maps[1], by_hand, rtol=1e-5, atol=1e-6)


def test_a_cnn_shows_its_activations_where_they_have_places():
    model = tiny.cnn()
    found = attention_maps(Student(model, input_size=(3, 32, 32)), tiny.images())
    assert found.kind == ACTIVATION and found.layers == ("layer1", "layer3")  # layer4 is a single position
    caught = []
    handle = model.layer3.register_forward_hook(lambda module, args, out: caught.append(out))
    with torch.no_grad():
        model(tiny.images())
    handle.remove()
    torch.testing.assert_close(found.maps[1], caught[0].square().mean(1))
    large = attention_maps(Student(model, input_size=(3, 320, 320)), tiny.images(1, size=(320, 320)))
    assert [tuple(each.shape) for each in large.maps] == [(1, 64, 64), (1, 20, 20), (1, 10, 10)]


def test_a_teacher_looks_through_its_bridge():
    teacher = tiny.vit(3, img_size=48)
    distiller = Distiller(Teacher(teacher, mean=(0.2,), std=(0.4,)), Student(tiny.vit(), mean=(0.5,), std=(0.5,)), "kd")
    found = attention_maps(distiller.teacher, tiny.images())
    assert found.maps[0].shape == (4, 6, 6)
    by_hand = attention_by_hand(teacher, 1, distiller.teacher.bridge(tiny.images())).mean(1)[:, 0, 1:]
    torch.testing.assert_close(found.maps[1], by_hand.unflatten(1, (6, 6)), rtol=1e-5, atol=1e-6)


def test_models_without_places_are_refused():
    with pytest.raises(ValueError, match="gives no feature_map"):
        attention_maps(Student(tiny.plain(), input_size=(3, 32, 32)), tiny.images())
    with pytest.raises(ValueError, match="must have more than one position, got one for images of 4x4; there is"):
        attention_maps(Student(tiny.cnn(), input_size=(3, 4, 4)), tiny.images(size=(4, 4)))


def test_what_is_kept(tmp_path):
    student, teacher = tiny.vit(), tiny.cnn(5)
    distiller = Distiller(Teacher(teacher, input_size=(3, 32, 32)), student, "kd")
    facts, tensors = write(distiller, tmp_path, num_shown=4)
    images = tiny.images(6)
    assert facts["labels"] == ["ant", "bee", "cat", "dog"]
    assert (facts["student"]["kind"], facts["teacher"]["kind"]) == (CLASS_TOKEN, ACTIVATION)
    assert tensors["student.1"].shape == (4, 4, 4) and tensors["teacher.0"].shape == (4, 8, 8)
    assert tensors["images"].dtype == np.uint8 and tensors["images"].shape == (4, 3, 32, 32)
    expected = ((images[:4] * 0.5 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(tensors["images"] - expected).max() == 0
    with torch.no_grad():
        for side, model in (("student", student), ("teacher", teacher)):
            seen = images[:4] if side == "student" else distiller.teacher.bridge(images[:4])
            probabilities = model.eval()(seen).softmax(1)
            assert [row[0][0] for row in facts[side]["predictions"]] == [NAMES[i] for i in probabilities.argmax(1)]
            first = [row[0][1] for row in facts[side]["predictions"]]
            torch.testing.assert_close(torch.tensor(first), probabilities.amax(1), rtol=0, atol=6e-5)
            assert all(len(row) == 3 and row[0][1] >= row[1][1] >= row[2][1] for row in facts[side]["predictions"])
    found = layer_similarity(distiller.student, distiller.teacher, [images])
    assert facts["similarity"]["num_images"] == 6 and facts["similarity"]["note"] is None
    assert tuple(facts["similarity"]["teacher_layers"]) == found.teacher_layers
    np.testing.assert_allclose(tensors["cka"], found.cka, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tensors["relation_distance"], found.relation_distance, rtol=1e-5, atol=1e-6)


def test_nobody_notices(tmp_path):
    student = tiny.cnn()
    distiller = Distiller(tiny.vit(3), Student(student, input_size=(3, 32, 32)), ["kd", "rkd"]).train()
    student.layer1.eval()
    student.conv1.register_forward_hook(lambda *call: (random.random(), np.random.rand(), torch.rand(1)) and None)
    before = copy.deepcopy(distiller.state_dict())
    modes = [module.training for module in distiller.modules()]
    models = student, distiller.teacher.model
    hooks = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] for model in models]
    drawn = random.getstate(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_rng_state()
    write(distiller, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in distiller.state_dict().items())
    assert [module.training for module in distiller.modules()] == modes and True in modes and False in modes
    assert [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] for model in models] == hooks
    assert random.getstate() == drawn[0] and np.random.get_state(legacy=False)["state"]["pos"] == drawn[1]
    assert torch.equal(torch.get_rng_state(), drawn[2])
    assert all(p.grad is None for p in distiller.parameters())
    assert distiller(tiny.images(), tiny.labels()).loss.isfinite()  # its own taps still fire


def test_the_average_of_the_weights_is_looked_at_where_it_is_what_is_evaluated(tmp_path):
    distiller, average = Distiller(tiny.vit(3), tiny.vit(), "kd"), tiny.vit(9)
    own, _ = write(distiller, tmp_path / "own")
    facts, tensors = write(distiller, tmp_path / "average", model=average)
    assert facts["student"]["predictions"] != own["student"]["predictions"]
    by_hand = attention_by_hand(average, 1, tiny.images(6)).mean(1)[:, 0, 1:].unflatten(1, (4, 4))
    np.testing.assert_allclose(tensors["student.1"], by_hand, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_deployed_with_a_projector(tmp_path):
    distiller = Distiller(tiny.vit(3, embed_dim=32), tiny.vit(), make_loss("simkd", feature="pooled"))
    facts, _ = write(distiller, tmp_path / "own")
    copied, _ = write(distiller, tmp_path / "copied", model=copy.deepcopy(distiller.deployable))
    with torch.no_grad():
        expected = distiller.deployable.eval()(tiny.images(6)).argmax(1)
    assert [row[0][0] for row in facts["student"]["predictions"]] == [NAMES[index] for index in expected]
    assert copied == facts


def test_what_cannot_be_seen_is_said(tmp_path):
    alone, _ = write(Distiller(None, tiny.vit(), []), tmp_path / "alone")
    assert alone["teacher"] is None and alone["similarity"] is None
    plain = Distiller(Teacher(tiny.plain(2), input_size=(3, 32, 32)), tiny.vit(), "kd")
    facts, tensors = write(plain, tmp_path / "plain")
    assert facts["teacher"]["kind"] is None and "gives no feature_map" in facts["teacher"]["note"]
    assert facts["teacher"]["predictions"] is not None and facts["student"]["note"] is None
    assert facts["similarity"]["note"] and "cka" not in tensors and "teacher.0" not in tensors
    backbone = Distiller(tiny.vit(3), tiny.vit(num_classes=0), ["tinymim"], task_loss=None)
    assert write(backbone, tmp_path / "backbone")[0]["student"]["predictions"] is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA out of memory\nTried to allocate"), "RuntimeError: CUDA out of memory"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_a_model_that_fails_does_not_fail_a_finished_run(tmp_path, error, reason):
    def fail(module, args):
        if len(args[0]) > 2:  # than a model is tried with beforehand
            raise error

    distiller = Distiller(tiny.vit(3), tiny.vit(), "kd")
    distiller.teacher.model.register_forward_pre_hook(fail)
    facts, tensors = write(distiller, tmp_path)
    assert facts["teacher"] == {
        "name": distiller.teacher.name, "kind": None, "layers": [], "note": reason, "predictions": None,
    }  # fmt: skip
    assert facts["similarity"]["note"] == reason and facts["student"]["predictions"] is not None
    assert sorted(tensors) == ["images", "student.0", "student.1"]


def test_logits_that_are_no_numbers_are_no_predictions(tmp_path):
    distiller = Distiller(tiny.vit(3), tiny.vit(), "kd")
    distiller.teacher.model.head.register_forward_hook(lambda module, args, out: out * math.nan)
    facts, tensors = write(distiller, tmp_path)
    assert facts["teacher"]["note"] == "no predictions: its logits are NaN or infinite"
    assert facts["teacher"]["kind"] == CLASS_TOKEN and facts["teacher"]["predictions"] is None and "cka" in tensors


def test_a_stored_teacher_has_no_maps(tmp_path):
    class Stored(nn.Module):
        name = "far away"

    distiller = Distiller(tiny.vit(3), tiny.vit(), "kd")
    distiller.teachers = (Stored(),)
    facts, tensors = write(distiller, tmp_path)
    assert facts["teacher"]["note"] == "the outputs of 'far away' were stored: the model itself was not at hand"
    assert facts["teacher"]["predictions"] is None and facts["similarity"] is None
    assert sorted(tensors) == ["images", "student.0", "student.1"]


def test_large_images_are_kept_small(tmp_path):
    distiller = Distiller(None, Student(tiny.vit(img_size=384, patch_size=32)), [])
    images = torch.rand(8, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    write_insight(distiller, images, tiny.labels(8), NAMES, tmp_path / "insight", mean=(0.0,) * 3, std=(1.0,) * 3)
    assert sum(file.stat().st_size for file in (tmp_path / "insight").iterdir()) < 2 * 2**20
    _, tensors = kept(tmp_path / "insight")
    assert tensors["images"].shape == (8, 3, 224, 224)
    assert tensors["images"].mean() == pytest.approx(255 * images.mean().item(), abs=1)


def test_an_earlier_folder_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    distiller = Distiller(None, tiny.vit(), [])
    first = write(distiller, tmp_path)
    monkeypatch.setattr("kdvit.training.insight.json.dumps", lambda record: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write(Distiller(None, tiny.vit(9), []), tmp_path)
    monkeypatch.undo()
    again = kept(tmp_path / "insight")
    assert again[0] == first[0] and np.array_equal(again[1]["student.1"], first[1]["student.1"])
    assert [path.name for path in tmp_path.iterdir()] == ["insight"]


@pytest.mark.parametrize(
    ("images", "labels"), [(torch.zeros(3, 32, 32), 3), (torch.zeros(4, 3, 32, 32), 3), (torch.zeros(0, 3, 32, 32), 0)]
)
def test_wrong_arguments_are_refused(tmp_path, images, labels):
    distiller = Distiller(None, tiny.vit(), [])
    with pytest.raises(
        ValueError, match=r"images and labels must be \(n, C, H, W\) and \(n,\), got .*; give one label"
    ):
        write_insight(distiller, images, torch.zeros(labels), NAMES, tmp_path / "insight", **PLAIN)
    assert not (tmp_path / "insight").exists()


def test_samples_are_spread_over_the_classes():
    labels = np.repeat(np.arange(100), 5)
    eight = labels[spread_indices(labels, 8)]
    assert len(set(eight.tolist())) == 8 and np.diff(np.sort(eight)).max() <= 30
    many = spread_indices(labels, 120)
    assert many[:8] == spread_indices(labels, 8) and len(set(many)) == 120
    assert set(labels[many].tolist()) == set(range(100))
    assert sorted(spread_indices(np.array([1, 1, 0]), 10)) == [0, 1, 2]


def test_a_sample_batch_is_what_evaluation_sees(tiny_data: ImageData):
    images, labels = sample_batch(tiny_data.test, FASHION_MNIST_TRANSFORM, 12)
    indices = spread_indices(tiny_data.test.labels, 12)
    assert labels.tolist() == tiny_data.test.labels[indices].tolist() and images.shape == (12, 1, 28, 28)
    pixels = ((images[3] * 0.353 + 0.286) * 255).round().to(torch.uint8)[0]
    assert np.array_equal(pixels, np.array(tiny_data.test.image(indices[3]).convert("L")))
