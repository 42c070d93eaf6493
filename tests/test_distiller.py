from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Progress, Student, Teacher
from kdvit.losses import DKD, KD, DeiT, FitNet, Loss, TinyMIM, ViTKD
from tests import tiny

# By hand: every method once more, on what plain forward hooks of this file catch.


def caught(model: nn.Module, images: Tensor, *paths: str) -> list[Tensor]:
    """The outputs of the modules at these paths."""
    values: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: values.__setitem__(path, out))
        for path in paths
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return [values[path] for path in paths]


def kd_by_hand(student: nn.Module, teacher: nn.Module, loss: KD, images: Tensor) -> Tensor:
    with torch.no_grad():
        p = (teacher(images) / loss.temperature).softmax(1)
    q = (student(images) / loss.temperature).softmax(1)
    return loss.temperature**2 * (p * (p.log() - q.log())).sum() / len(images)


def deit_by_hand(student: nn.Module, teacher: nn.Module, loss: DeiT, images: Tensor) -> Tensor:
    (logits,) = caught(student, images, "head_dist")
    with torch.no_grad():
        decision = teacher(images).argmax(1)
    return -logits.log_softmax(1).gather(1, decision[:, None]).mean()


def vitkd_by_hand(student: nn.Module, teacher: nn.Module, loss: ViTKD, images: Tensor) -> Tensor:
    paths = ("blocks.0", "blocks.1", "norm")
    ours = [tokens[:, 1:] for tokens in caught(student, images, *paths)]
    with torch.no_grad():
        theirs = [tokens[:, 1:] for tokens in caught(teacher, images, *paths)]
    batch, num_tokens, dim = theirs[2].shape
    linears = loss.shallow_projectors
    mimic = sum((lin(s) - t).square().sum() / batch for lin, s, t in zip(linears, ours[:2], theirs[:2], strict=True))
    noise = torch.rand(batch, num_tokens, generator=seeded())
    projected, generate = loss.deep_projector(ours[2]), 0.0
    for image in range(batch):
        is_kept = torch.zeros(num_tokens, dtype=torch.bool)
        is_kept[noise[image].argsort()[: num_tokens // 2]] = True
        filled = torch.where(is_kept[:, None], projected[image], loss.mask_token[0])
        generated = loss.generation(filled.T.reshape(1, dim, 4, 4))[0].flatten(1).T
        generate = generate + (generated - theirs[2][image])[~is_kept].square().sum()
    return loss.alpha * mimic + loss.beta * generate / batch / loss.mask_ratio


def tinymim_by_hand(student: nn.Module, teacher: nn.Module, loss: TinyMIM, images: Tensor) -> Tensor:
    def heads(qkv: Tensor) -> Tensor:
        return qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)  # (B, L, 3 * D) -> (3, B, H, L, d)

    def relation(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.transpose(-2, -1) / x.shape[-1] ** 0.5).softmax(-1)

    q, k, v = heads(*caught(student, images, "blocks.1.attn.qkv"))
    with torch.no_grad():
        teacher_q, teacher_k, teacher_v = heads(*caught(teacher, images, "blocks.1.attn.qkv"))
    pairs = (relation(q, k), relation(teacher_q, teacher_k)), (relation(v, v), relation(teacher_v, teacher_v))
    return sum((theirs * (theirs.log() - ours.log())).sum(-1).mean() for ours, theirs in pairs)


def fitnet_by_hand(student: nn.Module, teacher: nn.Module, loss: FitNet, images: Tensor) -> Tensor:
    (ours,) = caught(student, images, "layer3")
    with torch.no_grad():
        (theirs,) = caught(teacher, images, "layer2")
    return (loss.norm(loss.conv(ours)).clamp_min(0) - theirs).square().mean()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@dataclass
class ByHand:
    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    loss: Callable[[], Loss]
    value: Callable[[nn.Module, nn.Module, Loss, Tensor], Tensor]


BY_HAND = {
    "kd": ByHand(tiny.vit, lambda: tiny.vit(7, depth=3), lambda: KD(temperature=3.0), kd_by_hand),
    "deit": ByHand(tiny.distilled_vit, lambda: tiny.cnn(7), DeiT, deit_by_hand),
    "vitkd": ByHand(tiny.vit, lambda: tiny.vit(7, embed_dim=32), lambda: ViTKD(alpha=0.3, beta=0.2), vitkd_by_hand),
    "tinymim": ByHand(
        tiny.vit, lambda: tiny.vit(7, embed_dim=32, depth=3), lambda: TinyMIM(teacher_block=1), tinymim_by_hand
    ),
    "fitnet": ByHand(tiny.cnn, lambda: tiny.cnn(7), lambda: FitNet(student_stage=3, teacher_stage=2), fitnet_by_hand),
}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """And forget them."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


@pytest.mark.parametrize("name", BY_HAND)
def test_the_loss_is_the_weighted_sum_written_by_hand(name):
    case = BY_HAND[name]
    distiller = Distiller(case.teacher(), case.student(), [(0.5, case.loss())], task_weight=0.7).double().train()
    student, loss = distiller.student.model, distiller.losses[name]
    images, labels = tiny.images().double(), tiny.labels()
    loss.generator = seeded()
    out = distiller(images, labels)
    out.loss.backward()
    got = gradients(distiller)

    logits = caught(student, images, "head")[0] if name == "deit" else student(images)  # deit: the class head alone
    task, term = F.cross_entropy(logits, labels), case.value(student, case.teacher().double(), loss, images)
    total = 0.7 * task + 0.5 * term
    total.backward()
    expected = gradients(distiller)

    parts = sum(value for key, value in out.losses.items() if key != "task")
    for value, by_hand in ((out.loss, total), (parts, term), (out.losses["task"], task)):
        torch.testing.assert_close(value, by_hand, rtol=1e-6, atol=1e-6)
    assert got.keys() == expected.keys()
    assert len(got) >= len(list(student.parameters()))
    for key, gradient in expected.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-6, atol=1e-6, msg=key)
        assert gradient.abs().max() > 1e-9 or "qkv.bias" in key, key


# What may be given


def test_losses_are_names_objects_and_pairs_and_their_terms_have_unique_names():
    distiller = Distiller(tiny.vit(7), tiny.vit(), ["kd", KD(2.0), (0.3, "dkd"), (0.1, KD(1.0))])
    out = distiller(tiny.images(), tiny.labels())
    assert list(out.losses) == ["task", "kd", "kd_2", "dkd.target", "dkd.non_target", "kd_3"]
    assert distiller.weights == {"task": 1.0, "kd": 1.0, "kd_2": 1.0, "dkd": 0.3, "kd_3": 0.1}
    dkd = out.losses["dkd.target"] + out.losses["dkd.non_target"]
    total = out.losses["task"] + out.losses["kd"] + out.losses["kd_2"] + 0.3 * dkd + 0.1 * out.losses["kd_3"]
    torch.testing.assert_close(out.loss.detach(), total)


@pytest.mark.parametrize("losses", ["kd", KD(), ["kd"], ("kd",), [(1, "kd")]])
def test_one_loss_needs_no_list(losses):
    assert list(Distiller(tiny.plain(7), Student(tiny.plain(), input_size=(3, 32, 32)), losses).losses) == ["kd"]


def test_a_loss_named_task_does_not_take_the_weight_of_the_task_loss():
    class Task(KD):
        name = "task"

    distiller = Distiller(tiny.vit(7), tiny.vit(), [(0.5, Task())], task_weight=2.0)
    assert distiller.weights == {"task": 2.0, "task_2": 0.5}
    assert list(distiller(tiny.images(), tiny.labels()).losses) == ["task", "task_2"]


def test_a_weight_is_a_function_of_progress():
    warm_up = lambda progress: progress.step / progress.total_steps  # noqa: E731
    distiller = Distiller(tiny.vit(7), tiny.vit(), [(warm_up, "kd")], task_weight=lambda progress: 1 - progress.epoch)
    for step, epoch in ((0, 0.0), (3, 0.25)):
        out = distiller(tiny.images(), tiny.labels(), progress=Progress(step, epoch, total_steps=4))
        expected = (1 - epoch) * out.losses["task"] + step / 4 * out.losses["kd"]
        torch.testing.assert_close(out.loss.detach(), expected)


def test_task_loss_none_leaves_the_labels_out():
    distiller = Distiller(tiny.vit(7), tiny.vit(), ["kd"], task_loss=None)
    out = distiller(tiny.images())
    assert list(out.losses) == ["kd"]
    torch.testing.assert_close(out.loss.detach(), out.losses["kd"])
    assert out.logits.shape == (4, 5)


@pytest.mark.parametrize(
    ("task_loss", "labels"),
    [
        (nn.CrossEntropyLoss(label_smoothing=0.1), tiny.labels()),
        (nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0)), tiny.labels()),
        (nn.BCEWithLogitsLoss(), F.one_hot(tiny.labels(), 5).float()),
        (lambda logits, labels: F.multi_margin_loss(logits, labels, p=2), tiny.labels()),
    ],
    ids=["label smoothing", "class weights", "soft labels only", "class ids only"],
)
def test_a_task_loss_of_ones_own(task_loss, labels):
    distiller = Distiller(tiny.vit(7), tiny.vit(), ["kd"], task_loss)
    out = distiller(tiny.images(), labels)
    torch.testing.assert_close(out.losses["task"], task_loss(distiller.student.model(tiny.images()), labels).detach())


def test_without_a_teacher_it_is_plain_training():
    distiller = Distiller(None, tiny.vit(), [])
    out = distiller(tiny.images(), tiny.labels())
    torch.testing.assert_close(out.loss.detach(), F.cross_entropy(out.logits, tiny.labels()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_soft_labels_of_any_precision(dtype):
    soft = F.one_hot(tiny.labels(), 5) * 0.75 + 0.05
    out = Distiller(tiny.vit(7), tiny.vit(), ["kd", "dkd"])(tiny.images(), soft.to(dtype))
    soft = soft.to(dtype).float()  # what bfloat16 keeps of them
    torch.testing.assert_close(out.losses["task"], -(soft * out.logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_class_ids_of_any_integer_kind(dtype):
    distiller = Distiller(tiny.vit(7), tiny.vit(), ["dkd"])
    expected = distiller(tiny.images(), tiny.labels())
    assert torch.equal(distiller(tiny.images(), tiny.labels().to(dtype)).loss, expected.loss)


# Models of any kind


def test_a_hugging_face_teacher_teaches_a_timm_student():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=5,
    )  # fmt: skip
    teacher = tiny.redraw(transformers.ViTForImageClassification(config), 7).eval()
    distiller = Distiller(teacher, tiny.vit(), ["kd", "vitkd", "tinymim"])
    out = distiller(tiny.images(), tiny.labels())
    student_logits, teacher_logits = distiller.student.model(tiny.images()), teacher(tiny.images()).logits
    torch.testing.assert_close(out.losses["kd"], KD()(student_logits, teacher_logits).detach())
    assert all(value > 0 for value in out.losses.values())
    assert "ViTForImageClassification" in distiller.describe()


def test_plain_modules_teach_by_module_path():
    teacher, student = tiny.plain(7), Student(tiny.plain(), input_size=(3, 32, 32))
    distiller = Distiller(teacher, student, ["kd", FitNet(student_stage="1", teacher_stage="1")])
    out = distiller(tiny.images(), tiny.labels())
    torch.testing.assert_close(out.losses["kd"], KD()(student.model(tiny.images()), teacher(tiny.images())).detach())
    assert distiller.teacher.input_size == (3, 32, 32)


@pytest.mark.parametrize("wrap", [Teacher, lambda model: model], ids=["one Teacher", "one model"])
def test_distillers_on_the_same_teacher_do_not_disturb_each_other(wrap):
    teacher, given = tiny.vit(7, dynamic_img_size=True), tiny.images()
    wrapped = wrap(teacher)
    first = Distiller(wrapped, tiny.vit(), [KD(), ViTKD()])
    expected = first(given, tiny.labels()).losses["kd"]
    second = Distiller(wrapped, tiny.vit(1, img_size=64), [TinyMIM()], task_loss=None)
    large = second(tiny.images(size=(64, 64)))
    assert second.teacher.input_size == (3, 64, 64) and first.teacher.input_size == (3, 32, 32)
    assert large.losses["tinymim.qk"] > 0
    assert torch.equal(first(given, tiny.labels()).losses["kd"], expected)


def test_a_teacher_that_states_no_size_takes_each_students():
    teacher = Teacher(tiny.plain(7))
    sizes = [(3, 32, 32), (3, 64, 64)]
    both = [Distiller(teacher, Student(tiny.plain(), input_size=size), ["kd"]) for size in sizes]
    assert [distiller.teacher.input_size for distiller in both] == sizes
    given = tiny.images(size=(64, 64))
    assert torch.equal(both[1].teacher.predict(given), teacher.model(given))


def test_a_student_moves_from_one_distiller_to_the_next():
    student = Student(tiny.plain(), input_size=(3, 32, 32))
    first = Distiller(tiny.plain(7), student, [FitNet("1", "1")], task_loss=None)
    second = Distiller(tiny.plain(8), student, ["kd"])
    for distiller in (first, second):
        distiller(tiny.images(), tiny.labels()).loss.backward()
    assert all(p.grad is not None for p in student.model.parameters())


# What it is as a module


def everything() -> Distiller:
    """Reads tokens, attention and logits; has projectors."""
    return Distiller(tiny.vit(7, embed_dim=32), tiny.vit(), [(0.5, "kd"), ViTKD(alpha=1e-3, beta=1e-3), "tinymim"])


def test_results_for_looking_at_carry_no_graph():
    out = everything()(tiny.images(), tiny.labels())
    assert out.loss.requires_grad
    assert not out.logits.requires_grad
    assert not any(value.requires_grad for value in out.losses.values())


def test_the_teacher_is_no_part_of_the_module():
    distiller = everything()
    teacher = {id(p) for p in distiller.teacher.model.parameters()}
    ours = list(distiller.student.model.parameters()) + list(distiller.losses.parameters())
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in ours} and len(ours) > 30
    assert not teacher & {id(p) for p in distiller.parameters()}
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "losses"}
    assert len(distiller.state_dict()) == len(ours)
    assert distiller.teacher not in set(distiller.modules())


def test_the_student_leaves_alone():
    distiller = everything()
    other = tiny.vit(9)
    other.load_state_dict(distiller.student_state_dict(), strict=True)
    distiller.eval()
    assert torch.equal(other(tiny.images()), distiller(tiny.images(), tiny.labels()).logits)


def test_moving_the_distiller_moves_the_teacher():
    distiller = everything().to("meta")
    assert {p.device.type for p in distiller.teacher.model.parameters()} == {"meta"}
    distiller = everything().double()
    assert {p.dtype for p in distiller.teacher.model.parameters()} == {torch.float64}
    assert distiller(tiny.images().double(), tiny.labels()).loss.dtype == torch.float64


def through_pickle(distiller: Distiller) -> Distiller:
    return pickle.loads(pickle.dumps(distiller))


def through_torch_save(distiller: Distiller) -> Distiller:
    file = io.BytesIO()
    torch.save(distiller, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_copy_works_by_itself(duplicate, after_a_step):
    distiller = everything().eval()
    if after_a_step:
        distiller(tiny.images(), tiny.labels()).loss.backward()
    other = duplicate(distiller)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    torch.manual_seed(0)
    expected = distiller(tiny.images(), tiny.labels())
    torch.manual_seed(0)
    changed = other(tiny.images(2), tiny.labels(2))
    torch.manual_seed(0)
    again = distiller(tiny.images(), tiny.labels())
    assert changed.loss != expected.loss and changed.logits.shape == (2, 5)
    assert torch.equal(again.loss, expected.loss)  # the copy caught nothing for the original
    other.zero_grad()
    changed.loss.backward()
    assert all(p.grad is not None for p in other.parameters())
    assert other.teacher is not distiller.teacher


@pytest.mark.parametrize("part", ["distiller", "student"])
def test_ema_copies_follow_and_leave_no_trace(part):
    distiller = everything()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    averaged = distiller if part == "distiller" else distiller.student.model
    ema = ModelEmaV3(averaged, decay=0.5)
    before = copy.deepcopy(averaged.state_dict())
    out = distiller(tiny.images(), tiny.labels())
    (ema.module(tiny.images(), tiny.labels()) if part == "distiller" else ema.module(tiny.images(2)))
    out.loss.backward()
    optimizer.step()
    ema.update(averaged)
    for key, value in averaged.state_dict().items():
        torch.testing.assert_close(ema.module.state_dict()[key], (before[key] + value) / 2)


@pytest.mark.parametrize("loss", [KD(), DKD(), ViTKD(), TinyMIM(teacher_block=1)], ids=lambda loss: loss.name)
def test_compiled_without_a_graph_break(loss):
    torch._dynamo.reset()
    distiller = Distiller(tiny.vit(7, embed_dim=32, depth=3), tiny.vit(), [loss])
    torch.manual_seed(0)
    expected = distiller(tiny.images(), tiny.labels())
    expected.loss.backward()
    gradient = gradients(distiller)
    torch.manual_seed(0)
    out = torch.compile(distiller, backend="eager", fullgraph=True)(tiny.images(), tiny.labels())
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    assert list(out.losses) == list(expected.losses)
    compiled = gradients(distiller)
    assert compiled.keys() == gradient.keys()
    for key in gradient:
        torch.testing.assert_close(compiled[key], gradient[key])


def test_autocast_to_bfloat16_stays_near():
    distiller = everything().eval()
    torch.manual_seed(0)
    expected = distiller(tiny.images(), tiny.labels())
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = distiller(tiny.images(), tiny.labels())
    assert out.loss.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    for name, value in expected.losses.items():
        torch.testing.assert_close(out.losses[name], value, rtol=0.1, atol=0.02, msg=name)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.parameters())


def test_checkpointed_activations_give_the_same_gradients():
    distiller = everything()
    found = []
    for enable in (False, True):
        distiller.student.model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        distiller(tiny.images(), tiny.labels()).loss.backward()
        found.append(gradients(distiller))
    assert found[0].keys() == found[1].keys()
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], msg=key)


# What no loss reaches


UNREACHED = {
    "kd": (tiny.vit, lambda: tiny.vit(7), "kd", None),
    "vitkd": (lambda: tiny.vit(depth=3), lambda: tiny.vit(7, embed_dim=32), "vitkd", None),
    "tinymim": (tiny.vit, lambda: tiny.vit(7), "tinymim", None),
    "tinymim in the middle": (lambda: tiny.vit(depth=3), lambda: tiny.vit(7), TinyMIM(student_block=1), None),
    "fitnet": (tiny.cnn, lambda: tiny.cnn(7), FitNet(student_stage=2, teacher_stage=2), None),
    "deit": (tiny.distilled_vit, lambda: tiny.cnn(7), "deit", None),
    "deit and task": (tiny.distilled_vit, lambda: tiny.cnn(7), "deit", "cross_entropy"),
    "vitkd and task": (tiny.vit, lambda: tiny.vit(7), "vitkd", "cross_entropy"),
}


@pytest.mark.parametrize("name", UNREACHED)
def test_parameters_without_gradient_are_those_that_backward_leaves_out(name):
    student, teacher, loss, task_loss = UNREACHED[name]
    distiller = Distiller(teacher(), student(), [loss], task_loss).train()
    distiller(tiny.images(), tiny.labels()).loss.backward()
    left_out = {key for key, p in distiller.named_parameters() if p.grad is None}
    assert set(distiller.parameters_without_gradient) == left_out
    assert bool(left_out) == (name != "kd" and task_loss is None)
    if task_loss is None and name not in ("kd", "deit"):
        assert {"student.model.head.weight", "student.model.fc.weight"} & left_out


def test_frozen_parameters_of_the_student_are_not_listed():
    student = tiny.vit()
    student.patch_embed.requires_grad_(False)
    distiller = Distiller(tiny.vit(7), student, [ViTKD()], task_loss=None)
    assert distiller.parameters_without_gradient == ["student.model.head.weight", "student.model.head.bias"]


def test_every_name_of_a_tied_parameter_is_listed():
    student = tiny.vit()
    student.other_head = nn.Linear(24, 5)
    student.other_head.weight = student.head.weight
    listed = Distiller(tiny.vit(7), student, ["vitkd"], task_loss=None).parameters_without_gradient
    assert {"student.model.head.weight", "student.model.other_head.weight"} <= set(listed)


# Construction


class CountsCalls(KD):
    """Changes a buffer in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(student_logits, teacher_logits)


def test_construction_leaves_everything_as_it_was(capsys):
    student, teacher = tiny.cnn(), tiny.cnn(7)
    student.train()
    student.layer2.eval()  # partly frozen, as for fine-tuning
    flags = {name: module.training for name, module in student.named_modules()}
    state = {side: copy.deepcopy(model.state_dict()) for side, model in (("s", student), ("t", teacher))}
    loss = CountsCalls()
    torch.manual_seed(5)
    draw = torch.get_rng_state()
    distiller = Distiller(teacher, student, [loss])
    page = distiller.describe()
    assert torch.equal(torch.get_rng_state(), draw)
    assert {name: module.training for name, module in student.named_modules()} == flags
    assert set(flags.values()) == {True, False}
    assert loss.num_calls == 0
    for side, model in (("s", student), ("t", teacher)):
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[side][key]), key
    assert all(p.grad is None for p in distiller.parameters())
    assert capsys.readouterr() == ("", "") and "change" not in page
    distiller(tiny.images(), tiny.labels())
    assert loss.num_calls == 1


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_refused_pair_keeps_no_taps():
    teacher, student = tiny.vit(7, img_size=48), tiny.vit()
    with pytest.raises(ValueError, match="grid"):
        Distiller(teacher, student, [ViTKD()])
    assert num_hooks(teacher) == num_hooks(student) == 0
    kept = Distiller(tiny.vit(7), student, [ViTKD()])
    assert num_hooks(student) == 3
    kept.student.deafen()
    assert num_hooks(student) == 0


def test_model_may_teach_its_own_copy():
    model = tiny.vit()
    with pytest.raises(ValueError, match="copy.deepcopy"):
        Distiller(model, model, ["kd"])
    assert all(p.requires_grad for p in model.parameters())  # the refusal froze nothing
    out = Distiller(copy.deepcopy(model), model, [KD()])(tiny.images(), tiny.labels())
    assert abs(out.losses["kd"]) < 1e-6


def test_no_weight_decay_names_exist():
    distiller = everything()
    expected = {"student.model.pos_embed", "student.model.cls_token", "losses.vitkd.mask_token"}
    assert expected <= dict(distiller.named_parameters()).keys() and expected <= distiller.no_weight_decay()


# The page


def test_describe_names_losses_signals_shapes_and_bridges():
    teacher = Teacher(tiny.vit(7, img_size=48, num_classes=9), class_map=[8, 1, 2, 3, 0], mean=(0.4,), std=(1.0,))
    schedule = lambda progress: 0.5  # noqa: E731
    losses = [(0.25, "kd"), (schedule, "deit"), TinyMIM(relations=("vv",))]
    student = tiny.distilled_vit(img_size=48)
    page = Distiller(teacher, student, losses).describe()
    rows = [line.split() for line in page.splitlines()]
    assert "task 1 student logits, labels output".split() in rows
    assert "kd 0.25 student logits head 5 nothing".split() in rows
    assert "deit function student dist_logits head_dist 5 nothing".split() in rows
    assert "tinymim 1 student value blocks.1.attn 2x38x12 nothing".split() in rows
    assert "teacher value blocks.1.attn 2x37x12".split() in rows
    assert ["teacher", "vit_tiny_patch16_224", "3x48x48"] in [row[:3] for row in rows]
    assert "image bridge, student to teacher: change of normalisation" in page
    assert "the classes of the teacher, in the student's order: [8, 1, 2, 3, 0]" in page
    assert "trainable parameters that no loss reaches: none" in page


def test_describe_counts_what_trains_and_says_what_no_loss_reaches():
    page = Distiller(tiny.vit(7, embed_dim=32), tiny.vit(), ["vitkd"], task_loss=None).describe()
    assert "trainable parameters that no loss reaches: 2 tensors, first student.model.head.weight" in page
    assert "image bridge, student to teacher: none" in page
    # three linears 24 -> 32, the mask token, two 3x3 convolutions 32 -> 32
    num_own = 3 * (24 * 32 + 32) + 32 + 2 * (9 * 32 * 32 + 32)
    assert num_own == 20928
    assert "vitkd 1 student patch_tokens blocks.0 16x24 20.9k".split() in [line.split() for line in page.splitlines()]
