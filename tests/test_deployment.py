"""Students that are shipped with a projector and the teacher's classifier: whole, and alone."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import kdvit
from kdvit import Distiller, Student, Teacher
from kdvit.deployment import DeployedStudent
from kdvit.losses import PromptKD, SimKD, make
from kdvit.models import save_model
from kdvit.schedules import Linear
from tests import tiny

#: Losses that the student is deployed with, and the teachers that each of them is for.
CASES = {
    "simkd": (lambda: SimKD(), lambda: tiny.cnn(7)),
    "simkd-pooled": (lambda: SimKD(feature="pooled", relu=False), lambda: tiny.vit(7, embed_dim=32)),
    "promptkd": (lambda: PromptKD(), lambda: tiny.vit(7, embed_dim=32)),
    "promptkd-scheduled": (lambda: make("promptkd", temperature=Linear(4.0, 1.0)), lambda: tiny.cnn(7)),
}
every_case = pytest.mark.parametrize("make_loss, make_teacher", CASES.values(), ids=CASES)


def trained(make_loss, make_teacher, student: nn.Module | None = None) -> Distiller:
    """After a few steps, so that projector, statistics and student have moved."""
    torch.manual_seed(0)
    distiller = Distiller(make_teacher(), student or tiny.vit(), [make_loss()], task_loss=None).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05)
    for seed in range(3):
        optimizer.zero_grad()
        distiller(tiny.images(8, seed=seed), progress=kdvit.Progress(step=seed, total_steps=3)).loss.backward()
        optimizer.step()
    return distiller


@every_case
def test_it_predicts_through_the_teachers_classifier(make_loss, make_teacher):
    distiller = trained(make_loss, make_teacher)
    deployed = distiller.deployable.eval()
    assert isinstance(deployed, DeployedStudent) and deployed.num_classes == tiny.NUM_CLASSES
    images, teacher = tiny.images(8, seed=9), make_teacher()
    logits = deployed(images)
    # The classifier is the teacher's, to the bit, and no gradient trains it.
    torch.testing.assert_close(deployed.loss.head.weight, teacher.get_classifier().weight, rtol=0, atol=0)
    assert not deployed.loss.head.weight.requires_grad
    assert logits.shape == (8, tiny.NUM_CLASSES) and not torch.allclose(logits, distiller.student.model(images))


@every_case
def test_saved_and_loaded_alone(make_loss, make_teacher, tmp_path):
    deployed = trained(make_loss, make_teacher).deployable.eval()
    images = tiny.images(8, seed=9)
    expected = deployed(images)
    save_model(deployed, tmp_path / "student", normalisation=((0.1,) * 3, (0.7,) * 3), class_names=list("abcde"))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224" and config["label_names"] == list("abcde")
    loaded = kdvit.create_model(str(tmp_path / "student"))
    torch.testing.assert_close(loaded(images), expected, rtol=0, atol=0)
    # Another process, which has never seen the teacher.
    torch.save({"images": images}, tmp_path / "images.pt")
    code = (
        "import sys, torch, kdvit; images = torch.load(sys.argv[2], weights_only=True)['images'];"
        "print(kdvit.create_model(sys.argv[1])(images).argmax(1).tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "student"), str(tmp_path / "images.pt")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(expected.argmax(1).tolist())
    # It may teach in turn, and says what images it wants.
    teacher = Teacher(loaded)
    assert teacher.input_size == (3, 32, 32) and teacher.normalisation == ((0.1,) * 3, (0.7,) * 3)
    Distiller(teacher, tiny.vit(3), ["kd"])(images, tiny.labels(8)).loss.backward()


@every_case
def test_it_shares_its_weights_with_the_distiller_and_copies_are_independent(make_loss, make_teacher):
    distiller = trained(make_loss, make_teacher)
    images, deployed = tiny.images(4), distiller.deployable.eval()
    ema = copy.deepcopy(deployed)
    before = deployed(images)
    torch.testing.assert_close(ema(images), before)
    with torch.no_grad():
        distiller.student.model.blocks[0].mlp.fc1.weight.add_(0.1)
    assert not torch.allclose(deployed(images), before)
    torch.testing.assert_close(ema(images), before)
    twin = copy.deepcopy(distiller)
    twin.deployable.eval()
    torch.testing.assert_close(twin.deployable(images), deployed(images))
    assert twin.deployable.loss is not deployed.loss
    distiller.double()
    assert distiller.deployable(images.double()).dtype == torch.float64


def test_class_maps_reach_the_classifier(tmp_path):
    teacher = tiny.vit(7, num_classes=9)
    distiller = Distiller(Teacher(teacher, class_map=[8, 0, 3, 1, 2]), tiny.vit(), ["promptkd"], task_loss=None)
    head = distiller.deployable.loss.head
    assert torch.equal(head.weight, teacher.head.weight[[8, 0, 3, 1, 2]])
    assert torch.equal(head.bias, teacher.head.bias[[8, 0, 3, 1, 2]])


def test_without_such_a_loss_the_plain_student_is_deployed():
    model = tiny.vit()
    assert Distiller(tiny.vit(7), model, ["kd"]).deployable is model


def test_a_student_without_a_classifier_of_its_own(tmp_path):
    student = Student(tiny.vit(0, num_classes=0))
    distiller = Distiller(tiny.cnn(7), student, ["simkd"], task_loss=None)
    deployed = distiller.deployable.eval()
    save_model(deployed, tmp_path)
    images = tiny.images()
    torch.testing.assert_close(kdvit.create_model(str(tmp_path))(images), deployed(images))


def cosine_teacher() -> nn.Module:
    model = tiny.vit(7)
    model.head = nn.Sequential(nn.ReLU(), nn.Linear(24, 5))
    return model


WRONG = {
    "two of them": (
        lambda: Distiller(tiny.vit(7), tiny.vit(), ["promptkd", SimKD(feature="pooled")]),
        "Distiller: at most one loss may bring the classifier that the student is deployed with, from one teacher, got "
        "promptkd and simkd with 1 teacher(s); drop the others.",
    ),
    "two teachers": (
        lambda: Distiller([tiny.vit(7), tiny.cnn(8)], tiny.vit(), ["promptkd"]),
        "EachTeacher: loss must be one of a single teacher that can be repeated, got PromptKD, which deploys",
    ),
    "no linear classifier": (
        lambda: Distiller(cosine_teacher(), tiny.vit(), ["promptkd"]),
        "the classifier must be a linear layer to be deployed with a student, got Sequential;",
    ),
    "plain teacher": (lambda: Distiller(tiny.plain(7), tiny.vit(), ["promptkd"]), "gives no "),
}


@pytest.mark.parametrize("make_it, sentence", WRONG.values(), ids=WRONG)
def test_what_cannot_be_deployed_is_refused(make_it, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_it()


def test_a_saved_one_takes_no_options(tmp_path):
    save_model(trained(*CASES["simkd"]).deployable, tmp_path)
    with pytest.raises(ValueError, match="it must be made as it was saved, got num_classes; leave them out"):
        kdvit.create_model(str(tmp_path), num_classes=3)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    from safetensors.torch import save_file

    save_file(other.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model folder .* must hold the weights of its config.json, and does not"):
        kdvit.create_model(str(tmp_path))


def test_describe_says_what_is_deployed_and_counts_what_trains():
    distiller = Distiller(tiny.cnn(7), tiny.vit(), ["simkd"], task_loss=None)
    projector, head = distiller.losses["simkd"].projector, distiller.losses["simkd"].head
    num_own, num_head = (sum(p.numel() for p in module.parameters()) for module in (projector, head))
    assert (num_own, num_head) == (3328, 165)  # the classifier is a copy, and frozen
    page = distiller.describe()
    assert "simkd 1 student feature_map blocks.1 24x4x4 3.33k".split() in [line.split() for line in page.splitlines()]
    num_all = sum(p.numel() for p in distiller.student.parameters()) + num_own + num_head
    assert f"deployed: the student with the modules of simkd and the teacher's classifier, {num_all / 1e3:.3g}k" in page
    assert "deployed" not in Distiller(tiny.cnn(7), tiny.vit(), ["kd"]).describe()


@pytest.mark.parametrize("losses", [["kd"], [SimKD(feature="pooled")]], ids=["plain", "deployed"])
def test_a_compiled_student_is_saved_under_its_own_names(losses, tmp_path):
    torch.compiler.reset()  # of what other tests compiled
    student = Student(torch.compile(tiny.vit(), backend="eager"), input_size=(3, 32, 32))
    distiller = Distiller(tiny.vit(7, embed_dim=32), student, losses)
    save_model(distiller.deployable, tmp_path)
    images = tiny.images()
    torch.testing.assert_close(kdvit.create_model(str(tmp_path)).eval()(images), distiller.deployable.eval()(images))
    tiny.vit(3).load_state_dict(distiller.student_state_dict())
