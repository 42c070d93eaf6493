"""What a user may get wrong, and the one sentence that says so: what is wrong, and what to do."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdvit import Distiller, Progress, Student, Teacher, create_model, losses
from kdvit.losses import KD, DeiT, FitNet, Loss, TinyMIM
from kdvit.models import SHIPPED, load_weights
from tests import tiny

Sentence = tuple[Callable[[], object], type[Exception], str]
VIT = "vit_tiny_patch16_224"


def distil(*given: object, teacher: object = "vit", student: object = "vit", **options) -> Distiller:
    """A Distiller whose models are tiny ViTs where nothing else is said."""
    teacher = tiny.vit(7) if teacher == "vit" else teacher
    student = tiny.vit() if student == "vit" else student
    return Distiller(teacher, student, list(given or ("kd",)), **options)


def plain(model: nn.Module | None = None) -> Student:
    return Student(model or tiny.plain(), input_size=(3, 32, 32))


def damaged() -> nn.Module:
    model = tiny.vit(7)
    model.blocks[1].mlp.fc1.weight.data[3, 4] = float("nan")
    return model


def sharing() -> tuple[nn.Module, Student]:
    teacher, student = tiny.plain(7), tiny.plain()
    student[0] = teacher[0]
    return teacher, plain(student)


class Boxes(nn.Module):
    """A detector."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny.plain()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.model(images)}


class Picky(nn.Module):
    """Refuses without a word."""

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError  # as a bare assert does


class Reentrant(nn.Module):
    """Hides its parameters from the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 5, 32), nn.Flatten()

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(lambda x: self.rest(self.first(x)), images.requires_grad_(), use_reentrant=True)


class PerImage(Loss):
    def forward(self, student_logits: Tensor) -> Tensor:
        return student_logits.square().mean(1)


class ANumber(Loss):
    def forward(self, student_logits: Tensor) -> dict[str, float]:
        return {"part": 1.0}


class TeacherAlone(Loss):
    def forward(self, teacher_logits: Tensor) -> Tensor:
        return teacher_logits.mean()


SAME_PARAMETERS = (
    "Distiller: the teacher must be another model than the student, got one that shares its parameters; "
    "pass copy.deepcopy(model) to let a model teach itself."
)
NOT_REACHED = (
    f"Distiller: the losses must reach a parameter of '{VIT}' that requires a gradient, got none; "
    "call student.requires_grad_(True), or choose losses that read the student."
)
NO_LOGITS = (
    "Boxes: the model must return logits as a tensor, a tuple, a dict or an object with .logits, got dict; "
    "choose a model with a classifier, or wrap it."
)
PAIRS = "losses must hold Loss objects, registered names or (weight, loss) pairs"
WRITE = "write losses=[(0.5, kdvit.losses.KD())]."

CONSTRUCTION: dict[str, Sentence] = {
    # losses and their options
    "unknown loss": (
        lambda: distil("vitkdd"),
        ValueError,
        f"unknown loss 'vitkdd'; did you mean 'vitkd'? `kdvit list losses` shows all {len(losses.names())}.",
    ),
    "unknown loss option": (
        lambda: losses.make("kd", temprature=2.0),
        ValueError,
        "kd: unknown option 'temprature'; did you mean 'temperature'? Known: temperature, standardize.",
    ),
    "negative temperature": (
        lambda: KD(temperature=-4.0),
        ValueError,
        "KD: temperature must be > 0, got -4.0; 1.0 leaves the logits as they are.",
    ),
    "the class of a loss": (lambda: distil(KD), TypeError, f"Distiller: {PAIRS}, got type; {WRITE}"),
    "pair in the wrong order": (lambda: distil(("kd", 0.5)), TypeError, f"Distiller: {PAIRS}, got float; {WRITE}"),
    "losses in a dict": (
        lambda: Distiller(tiny.vit(7), tiny.vit(), {"kd": 0.5}),
        TypeError,
        "Distiller: losses must be a list of losses or (weight, loss) pairs, got dict; "
        'write losses=["kd", (0.5, "vitkd")].',
    ),
    "weight that is no number": (
        lambda: distil(("0.5", "kd")),
        TypeError,
        "Distiller: the weight of 'kd' must be a number or a function of Progress, got '0.5'; write (0.5, loss).",
    ),
    "weight that is not finite": (
        lambda: distil((float("inf"), "kd")),
        ValueError,
        "Distiller: the weight of 'kd' must be finite, got inf; write (0.5, loss).",
    ),
    "task weight that is no number": (
        lambda: distil(task_weight=None),
        TypeError,
        "Distiller: the weight of 'task' must be a number or a function of Progress, got None; write task_weight=0.5.",
    ),
    "unknown task loss": (
        lambda: distil(task_loss="ce"),
        ValueError,
        "Distiller: task_loss must be 'cross_entropy', None or a function of (logits, labels), got 'ce'; "
        "pass one of them.",
    ),
    "nothing to minimise": (
        lambda: Distiller(None, tiny.vit(), [], task_loss=None),
        ValueError,
        "Distiller: there must be something to minimise, got no loss and task_loss=None; add one.",
    ),
    "loss per image": (
        lambda: distil(PerImage()),
        TypeError,
        "Distiller: loss 'perimage' must return a scalar tensor, got shape (2,); take its mean or sum.",
    ),
    "loss without a tensor": (
        lambda: distil(ANumber()),
        TypeError,
        "Distiller: loss 'anumber.part' must return a scalar tensor, got float; take its mean or sum.",
    ),
    "task loss per image": (
        lambda: distil(task_loss=nn.CrossEntropyLoss(reduction="none")),
        TypeError,
        "Distiller: loss 'task' must return a scalar tensor, got shape (2,); take its mean or sum.",
    ),
    "loss that does not read the student": (lambda: distil(TeacherAlone(), task_loss=None), ValueError, NOT_REACHED),
    # where to read
    "unknown block": (
        lambda: distil(TinyMIM(teacher_block=5)),
        ValueError,
        f"{VIT}: block must be in 0..1 (or -2..-1 from the end), got 5; the model has 2 blocks.",
    ),
    "unknown stage": (
        lambda: distil(FitNet(student_stage=-9), student=tiny.cnn()),
        ValueError,
        "resnet18: stage must be in 0..4 (or -5..-1 from the end), got -9; the model has 5 stages.",
    ),
    "unknown module path": (
        lambda: distil(FitNet(teacher_stage="block.1")),
        ValueError,
        f"{VIT}: module path must exist, got 'block.1'; did you mean 'blocks.1'?",
    ),
    "attention of a CNN": (
        lambda: distil("tinymim", teacher=tiny.cnn()),
        ValueError,
        "resnet18 gives no query at -1: it is a model of stages without token attention over one grid; choose a "
        "transformer (a timm or Hugging Face ViT, DeiT, DINO, BEiT, Eva, CaiT) or another loss.",
    ),
    "attention of a plain module": (
        lambda: distil("tinymim", teacher=tiny.plain()),
        ValueError,
        "Sequential gives no query at -1: it is a plain module, whose attention kdvit does not know; choose a "
        "transformer (a timm or Hugging Face ViT, DeiT, DINO, BEiT, Eva, CaiT) or another loss.",
    ),
    "no distillation head": (
        lambda: distil("deit"),
        ValueError,
        f"{VIT} gives no dist_logits: it has no distillation head; choose a distilled model such as "
        "deit_tiny_distilled_patch16_224, or loss 'kd'.",
    ),
    # the pair
    "other classes": (
        lambda: distil(teacher=tiny.vit(num_classes=9)),
        ValueError,
        f"Distiller: teacher '{VIT}' teaches 9 classes but student '{VIT}' has 5; give them the same classes, or pass "
        "Teacher(model, class_map=[...]) with the teacher's class for each of the student's.",
    ),
    "other classes than the distillation head": (
        lambda: distil(DeiT(), teacher=tiny.cnn(num_classes=2), student=tiny.distilled_vit(), task_loss=None),
        ValueError,
        "Distiller: teacher 'resnet18' teaches 2 classes but student 'deit_tiny_distilled_patch16_224' has 5; give "
        "them the same classes, or pass Teacher(model, class_map=[...]) with the teacher's class for each of the "
        "student's.",
    ),
    "sizes that cannot be bridged": (
        lambda: distil(teacher=tiny.vit(img_size=(32, 48))),
        ValueError,
        f"Teacher: '{VIT}' takes 32x48 images and the student's are 32x32: resizing would distort them; "
        "choose an input_size of one shape.",
    ),
    "ViTKD over different grids": (
        lambda: distil("vitkd", teacher=tiny.vit(img_size=48)),
        ValueError,
        "ViTKD: student grid must equal teacher grid, got 4x4 and 6x6; "
        "choose image and patch sizes that give both the same.",
    ),
    "TinyMIM over different heads": (
        lambda: distil("tinymim", teacher=tiny.vit(num_heads=3)),
        ValueError,
        "TinyMIM: student must have as many heads as the teacher, got 2 and 3; "
        "pass num_relation_heads to re-split both.",
    ),
    "teacher that is the student": (
        lambda: (lambda model: Distiller(model, model, ["kd"]))(tiny.vit()), ValueError, SAME_PARAMETERS
    ),
    "Teacher around the student": (
        lambda: (lambda model: Distiller(Teacher(model), model, ["kd"]))(tiny.vit()), ValueError, SAME_PARAMETERS
    ),
    "teacher that shares a layer": (lambda: Distiller(*sharing(), ["kd"]), ValueError, SAME_PARAMETERS),
    "loss without its teacher": (
        lambda: distil(teacher=None),
        ValueError,
        "Distiller: loss 'kd' reads the teacher, got teacher=None; pass a teacher.",
    ),
    # models
    "no model": (
        lambda: Student(224),
        TypeError,
        "Student: model must be a torch.nn.Module or a model name, got int; pass the plain model.",
    ),
    "Student as the teacher": (
        lambda: distil(teacher=Student(tiny.vit())),
        TypeError,
        "Teacher: model must be a torch.nn.Module or a model name, got Student; pass the plain model.",
    ),
    "unknown model": (
        lambda: distil(student="vit_tinny_patch16_224"),
        ValueError,
        "unknown model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_224'? "
        f"`kdvit list models WORD` searches the {len(timm.list_models()) + len(SHIPPED)} known names.",
    ),
    "unknown tag": (
        lambda: Teacher(f"{VIT}.nowhere"),
        ValueError,
        f"model '{VIT}.nowhere' cannot be made (Invalid pretrained tag (nowhere) for {VIT}); "
        "check its name, tag and options.",
    ),
    "unknown option of a model": (
        lambda: create_model(VIT, dept=2),
        ValueError,
        f"model '{VIT}' cannot be made (VisionTransformer.__init__() got an unexpected keyword argument 'dept'); "
        "check its name, tag and options.",
    ),
    "unknown folder": (
        lambda: create_model("runs/first/student"),
        ValueError,
        "model folder 'runs/first/student' must hold config.json and model.safetensors; check the path.",
    ),
    "no network": (
        lambda: Teacher("hf-hub:nobody/nothing"),
        ValueError,
        "model 'hf-hub:nobody/nothing': its published weights could not be downloaded (LocalEntryNotFoundError); "
        "connect to the network once, or give the weights as a file (--teacher-checkpoint FILE, checkpoint=).",
    ),
    "unknown input size": (
        lambda: Distiller(tiny.plain(7), tiny.plain(), ["kd"]),
        ValueError,
        "Student: the input size of 'Sequential' is not known; "
        "pass Student(model, input_size=(channels, height, width)).",
    ),
    "input size of two": (
        lambda: Student(tiny.plain(), input_size=(32, 32)),
        ValueError,
        "Student: input_size must be (channels, height, width), got (32, 32); write (3, 224, 224).",
    ),
    "input size that does not run": (
        lambda: distil(student=Student(tiny.vit(), input_size=(3, 48, 48))),
        ValueError,
        f"Student: '{VIT}' cannot run on 3x48x48 images (Input height (48) doesn't match model (32)); "
        "pass input_size=(channels, height, width) of the images that it takes.",
    ),
    "model that refuses without a word": (
        lambda: distil(student=plain(Picky())),
        ValueError,
        "Student: 'Picky' cannot run on 3x32x32 images (AssertionError); "
        "pass input_size=(channels, height, width) of the images that it takes.",
    ),
    "mean without std": (
        lambda: Student(tiny.plain(), mean=(0.5,)),
        ValueError,
        "Student: mean and std must be given together; give both or neither.",
    ),
    "std of 0": (
        lambda: Teacher(tiny.plain(), mean=(0.5,), std=(0.0,)),
        ValueError,
        "Teacher: mean and std must have one value, or one for each channel, and std > 0, got mean=(0.5,) and "
        "std=(0.0,); give those of the model's training images.",
    ),
    "two means for three channels": (
        lambda: Teacher(tiny.vit(), mean=(0.5, 0.5), std=(1, 1)),
        ValueError,
        "Teacher: mean and std must have one value, or one for each channel, and std > 0, got mean=(0.5, 0.5) and "
        "std=(1, 1); give those of the model's training images.",
    ),
    "student without logits": (lambda: distil(student=plain(Boxes()), teacher=tiny.plain()), TypeError, NO_LOGITS),
    "teacher without logits": (lambda: distil(teacher=Boxes(), student=plain()), TypeError, NO_LOGITS),
    "frozen student": (lambda: distil(student=tiny.vit().requires_grad_(False)), ValueError, NOT_REACHED),
    "reentrant checkpointing": (
        lambda: distil(student=plain(Reentrant())),
        ValueError,
        "Student: activation checkpointing must keep the graph, got use_reentrant=True; use use_reentrant=False.",
    ),
    # the teacher
    "NaN in a weight": (
        lambda: distil(teacher=damaged()),
        ValueError,
        f"Teacher: the weights of '{VIT}' must be finite, got NaN or infinity in 'blocks.1.mlp.fc1.weight'; "
        "load a sound checkpoint.",
    ),
    "no classes": (
        lambda: Teacher(tiny.vit(), class_map=[]),
        ValueError,
        "Teacher: class_map must name at least one class, got none; leave it out to keep all.",
    ),
    "classes that the teacher does not have": (
        lambda: distil(teacher=Teacher(tiny.vit(7), class_map=[0, 1, 2, 3, 5])),
        ValueError,
        "Teacher: class_map must name classes in 0..4, got 0..5; map onto the teacher's classes.",
    ),
    "names of classes": (
        lambda: Teacher(tiny.vit(), class_map=["cat", "dog"]),
        TypeError,
        "Teacher: class_map must list class numbers of the teacher, got ['cat', 'dog']; "
        "write one for each class of the student, in its order: [281, 7, 0].",
    ),
    "classes in a dict": (
        lambda: Teacher(tiny.vit(), class_map={0: 3, 1: 4}),
        TypeError,
        "Teacher: class_map must list class numbers of the teacher, got {0: 3, 1: 4}; "
        "write one for each class of the student, in its order: [281, 7, 0].",
    ),
    "precision in words": (
        lambda: Teacher(tiny.vit(), dtype="bfloat16"),
        TypeError,
        "Teacher: dtype must be a floating point torch.dtype, got 'bfloat16'; pass torch.bfloat16.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_one_clear_sentence_before_the_first_batch(name):
    action, kind, sentence = CONSTRUCTION[name]
    with pytest.raises(kind) as refused:
        action()
    assert str(refused.value) == sentence
    assert type(refused.value) is kind
    assert len(sentence) < 300


X, Y = tiny.images(), tiny.labels()
BATCHES: dict[str, tuple[Callable[[Distiller], object], str]] = {
    "labels out of range": (
        lambda distiller: distiller(X, Y + 3),
        "Distiller: labels must be in 0..4, got 3..6; check the data's classes or the student's num_classes.",
    ),
    "negative labels": (
        lambda distiller: distiller(X, Y - 1),
        "Distiller: labels must be in 0..4, got -1..2; check the data's classes or the student's num_classes.",
    ),
    "soft labels of other classes": (
        lambda distiller: distiller(X, torch.full((4, 7), 1 / 7)),
        "Distiller: soft labels must have C=5 classes, got 7; make them for the student's classes.",
    ),
    "labels of another batch": (
        lambda distiller: distiller(X, Y[:3]),
        "Distiller: labels must be (B,) class ids or (B, C) probabilities for B=4, got (3,) torch.int64; "
        "check the data loader.",
    ),
    "labels with a fraction": (
        lambda distiller: distiller(X, Y.float()),
        "Distiller: labels must be (B,) class ids or (B, C) probabilities for B=4, got (4,) torch.float32; "
        "check the data loader.",
    ),
    "no labels": (
        lambda distiller: distiller(X),
        "Distiller: the task loss needs labels; pass them, or set task_loss=None.",
    ),
    "one image": (
        lambda distiller: distiller(X[0], Y[:1]),
        "Distiller: images must be (B, 3, H, W) of floats, got (3, 32, 32) torch.float32; "
        "stack a batch of normalised images.",
    ),
    "grey images": (
        lambda distiller: distiller(X[:, :1], Y),
        "Distiller: images must be (B, 3, H, W) of floats, got (4, 1, 32, 32) torch.float32; "
        "stack a batch of normalised images.",
    ),
    "pixels": (
        lambda distiller: distiller(X.byte(), Y),
        "Distiller: images must be (B, 3, H, W) of floats, got (4, 3, 32, 32) torch.uint8; "
        "stack a batch of normalised images.",
    ),
    "another size": (
        lambda distiller: distiller(tiny.images(size=(48, 32)), Y),
        f"Distiller: '{VIT}' takes 32x32 images, got 48x32; resize them, or make the student with img_size=(48, 32).",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_one_clear_sentence_for_a_wrong_batch(name):
    action, sentence = BATCHES[name]
    with pytest.raises(ValueError) as refused:
        action(distil())
    assert str(refused.value) == sentence


def test_what_only_a_step_can_miss():
    with pytest.raises(ValueError) as refused:
        distil("dkd", task_loss=None)(X)
    assert str(refused.value) == "Distiller: loss 'dkd' needs labels; call distiller(..., labels=...)."
    scheduled = distil((lambda progress: progress.step, "kd"))
    with pytest.raises(ValueError) as refused:
        scheduled(X, Y)
    assert str(refused.value) == (
        "Distiller: the weight of 'kd' is a function of Progress, got none; call "
        "distiller(images, labels, progress=kdvit.Progress(step=..., total_steps=...))."
    )
    assert scheduled(X, Y, progress=Progress(step=2)).loss > 0


# Checkpoints


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


TENSORS_ALONE = "give a safetensors file, or a torch file of tensors alone: torch.save(model.state_dict(), FILE)."
NO_STATE = "must hold a state dict, bare or under 'state_dict' or 'model', got"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            lambda: tiny.vit(depth=3).state_dict(),
            "checkpoint 'it.pt' must be one of 'vit', but of its weights 12 unknown (first: blocks.2.norm1.weight); "
            "give the checkpoint of this model, or the model of this checkpoint.",
        ),
        (
            lambda: {"state_dict": tiny.vit(num_classes=7).state_dict()},
            "checkpoint 'it.pt' must be one of 'vit', but of its weights 2 of another shape (first: head.weight); "
            "give the checkpoint of this model, or the model of this checkpoint.",
        ),
        (
            lambda: tiny.plain().state_dict(),
            "checkpoint 'it.pt' must be one of 'vit', but of its weights 32 missing (first: cls_token), 4 unknown "
            "(first: 0.weight); give the checkpoint of this model, or the model of this checkpoint.",
        ),
        (lambda: [1, 2], f"checkpoint 'it.pt' {NO_STATE} list; save model.state_dict() into it."),
        (
            lambda: {"epoch": 3, "weights": {}},
            f"checkpoint 'it.pt' {NO_STATE} a dict of epoch, weights; save model.state_dict() into it.",
        ),
    ],
    ids=["deeper", "other classes", "another model", "no dict", "other keys"],
)
def test_a_checkpoint_of_something_else(content, sentence, tmp_path):
    model = tiny.vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:
        load_weights(model, saved(tmp_path / "it.pt", content()), "vit")
    assert str(refused.value) == sentence
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(ValueError) as refused:
        load_weights(tiny.vit(), path)
    assert str(refused.value) == f"checkpoint '{path}' must be a file, and there is none; check the path."


@pytest.mark.parametrize("by", ["pickle", "torch.save"])
def test_nothing_in_a_checkpoint_is_executed(by, tmp_path):
    path, written = tmp_path / "it.pt", tmp_path / "written"
    if by == "pickle":
        path.write_bytes(pickle.dumps({"model": Trap(written)}, protocol=2))
    else:
        saved(path, {"model": Trap(written)})
    with pytest.raises(ValueError) as refused:
        load_weights(tiny.vit(), path)
    assert not written.exists()
    assert str(refused.value).startswith("checkpoint 'it.pt' cannot be read (it holds ")
    assert str(refused.value).endswith(f"open, which could run code); {TENSORS_ALONE}")
    pickle.loads(pickle.dumps(Trap(written))).close()
    assert written.exists()  # the trap works


@pytest.mark.parametrize("file", ["it.pt", "it.safetensors"])
def test_a_damaged_checkpoint_is_named(file, tmp_path):
    (tmp_path / file).write_bytes(b"<html>404")
    with pytest.raises(ValueError) as refused:
        load_weights(tiny.vit(), tmp_path / file)
    assert str(refused.value).startswith(f"checkpoint '{file}' cannot be read (it is damaged, ")
    assert str(refused.value).endswith(f"); {TENSORS_ALONE}")


@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 1}])
def test_the_usual_checkpoints_load(wrap, tmp_path):
    state = {f"module.{key}": value for key, value in tiny.vit(3).state_dict().items()}
    model = tiny.vit()
    load_weights(model, saved(tmp_path / "it.pt", wrap(state)))
    assert torch.equal(model(X), tiny.vit(3)(X))
