"""Taps through copies, pickles, evaluation passes, compile, checkpointing, autocast and removal."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from kdvit.taps.reader import Reader, Request, family_of
from kdvit.taps.tap import Tap, TapPoint, Taps

ALL = ["vit", "beit both biases", "cait", "dinov3", "convnext"]
SIGNALS = {
    "convnext": (("feature_map", 0), ("feature_map", -1), "pooled", "logits"),
    None: (
        ("tokens", 0),
        ("query", 0),
        ("key", 1),
        ("value", 1),
        ("attention", 1),
        "normed_tokens",
        "pooled",
        "logits",
    ),
}


@pytest.fixture(params=ALL)
def case(request, make_case):
    return make_case(request.param)


def signals_of(case) -> tuple:
    return SIGNALS.get(case.name, SIGNALS[None])


def hooks(model: nn.Module) -> int:
    """All hooks and hook flags on a model."""
    kinds = [name for name in vars(nn.Module()) if "hook" in name and isinstance(vars(nn.Module())[name], dict)]
    assert len(kinds) >= 8
    return sum(len(vars(module)[kind]) for module in model.modules() for kind in kinds)


def assert_same(one: dict, other: dict, **tolerance) -> None:
    assert list(one) == list(other) and one
    for a, b in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


# Copies


def test_an_ema_copy_pollutes_nothing_and_its_taps_are_inert(case):
    taps = case.reader(*signals_of(case))
    before = taps.read(case.images)[1]
    ema = ModelEmaV3(case.model, decay=0.5)
    ema.update(case.model)
    caught = taps.taps.caught
    values = caught.open(case.model)  # a capture that is going on while the copy runs
    ema.module(case.images + 1)
    assert values == {}
    caught.values = None
    found = [
        hook
        for module in ema.module.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert len(found) == len(taps.taps.points) >= 3
    assert all(isinstance(hook, Tap) and hook.caught is None for hook in found)
    assert_same(taps.read(case.images)[1], before)


def test_a_copy_after_a_training_step_holds_no_graph(case):
    """A hook that keeps tensors of a graph cannot be deep-copied: RuntimeError in torch."""
    case.model.train()
    taps = case.reader(*signals_of(case))
    output, _ = taps.read(case.images)
    output.sum().backward()
    twin = copy.deepcopy(case.model)
    assert_same(dict(twin.state_dict()), dict(case.model.state_dict()))


def test_a_copy_can_be_tapped_anew(case):
    taps = case.reader(*signals_of(case))
    twin = copy.deepcopy(case.model)
    number = hooks(twin)
    again = Reader(family_of(twin, "twin"), taps.requests, taps.input_size)
    assert hooks(twin) == number, "the inert taps were replaced, not joined"
    assert_same(again.read(case.images)[1], taps.read(case.images)[1])
    again.remove()
    assert hooks(twin) == 0 and hooks(case.model) == number


def test_a_copied_reader_reads_the_copied_model(case):
    """What holds a model and its reader, such as a student with projectors, is copied whole for an EMA."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader = case.reader(*signals_of(case), ("feature_map", 0), "head")
            self.model = case.model

    student = Student()
    twin = copy.deepcopy(student)
    assert twin.reader.family.model is twin.model is not student.model
    with torch.no_grad():
        for p in twin.model.parameters():
            p.mul_(1.1)
    ours, theirs = student.reader.read(case.images)[1], twin.reader.read(case.images)[1]
    assert not torch.allclose(ours[Request("pooled")], theirs[Request("pooled")])
    expected = Reader(family_of(copy.deepcopy(twin.model), "x"), twin.reader.requests, None).read(case.images)[1]
    head = theirs.pop(Request("head"))
    expected.pop(Request("head"))
    assert_same(theirs, expected)
    assert {id(p) for p in head.parameters()} < {id(p) for p in twin.model.parameters()}
    assert hooks(twin.model) == hooks(student.model)


# Pickles


def test_pickle_and_torch_save_of_a_tapped_model(case):
    taps = case.reader(*signals_of(case))
    output, signals = taps.read(case.images)
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(case.model)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(case.images), output)
        again = Reader(family_of(twin, "twin"), taps.requests, taps.input_size)
        assert_same(again.read(case.images)[1], signals)
    assert_same(taps.read(case.images)[1], signals)
    twin = pickle.loads(pickle.dumps(taps))
    assert twin.family.model is not case.model
    assert_same(twin.read(case.images)[1], signals)


def test_state_dict_keys_are_the_models_own(case):
    keys = list(case.model.state_dict())
    case.reader(*signals_of(case))
    assert list(case.model.state_dict()) == keys


# In between, and afterwards


def test_passes_between_captures_leave_nothing(case):
    taps = case.reader(*signals_of(case))
    before = taps.read(case.images)[1]
    case.model(case.images * 2)
    assert taps.taps.caught.values is None
    assert_same(taps.read(case.images)[1], before)


def test_nothing_is_kept_after_an_error(case):
    taps = case.reader(*signals_of(case))
    with pytest.raises(RuntimeError):
        taps.read(case.images[:, :1])
    assert taps.taps.caught.values is None
    output, signals = taps.read(case.images)
    torch.testing.assert_close(signals[Request("logits")], output)


def test_remove_leaves_the_model_as_it_was(case):
    state = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    output = case.model(case.images)
    assert hooks(case.model) == 0
    taps = case.reader(*signals_of(case))
    assert hooks(case.model) >= 3
    torch.testing.assert_close(taps.read(case.images)[0], output, rtol=0, atol=0)
    taps.remove()
    assert hooks(case.model) == 0
    torch.testing.assert_close(case.model(case.images), output, rtol=0, atol=0)
    assert_same(state, case.model.state_dict(), rtol=0, atol=0)
    taps.remove()  # twice is harmless


def test_hooks_of_others_stay(case):
    others = []
    handle = case.model.register_forward_hook(lambda *_: others.append(1))
    case.reader("logits", "pooled").remove()
    assert hooks(case.model) == 1
    case.model(case.images)
    assert others == [1]
    handle.remove()


def test_one_tap_a_place(make_case):
    """Five signals of one attention, read for several losses: one hook where each is read."""
    case = make_case("vit")
    taps = case.reader(*(("attention", 1), ("cls_attention", 1), ("query", 1), ("key", 1), ("query", -1)) * 2)
    assert len(taps.requests) == 5
    assert sorted(taps.taps.points) == [
        TapPoint("blocks.1.attn", "input"),
        TapPoint("blocks.1.attn.k_norm"),
        TapPoint("blocks.1.attn.q_norm"),
    ]
    assert hooks(case.model) == 4, "three hooks, and the flag of the one that takes keyword arguments"


def test_two_readers_on_one_model(case):
    signals = signals_of(case)
    one, two = case.reader(*signals), case.reader(signals[0], stop_early=True)
    whole, part = one.read(case.images), two.read(case.images)
    assert part[0] is None and whole[0] is not None
    torch.testing.assert_close(part[1][two.requests[0]], whole[1][one.requests[0]])
    two.remove()
    assert_same(one.read(case.images)[1], whole[1])
    one.remove()
    assert hooks(case.model) == 0


# Stopping early


@pytest.mark.parametrize("request_", [("tokens", 0), ("query", 0), ("attention", 0), ("cls_attention", 0)])
@pytest.mark.parametrize("name", ["vit", "deit distilled", "dinov3", "grouped query", "beit", "cait"])
def test_later_blocks_never_run(make_case, name, request_):
    case, ran = make_case(name), []
    if request_[0] == "cls_attention" and not case.flavour.has_cls_token:
        request_ = ("value", 0)
    for index, block in enumerate(case.model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    case.model.head.register_forward_pre_hook(lambda *_: ran.append("head"))
    _, true = case.read(request_)
    assert ran == [0, 1, "head"]
    ran.clear()
    output, signal = case.read(request_, stop_early=True)
    assert output is None and ran == [0]
    torch.testing.assert_close(signal, true)


def test_later_stages_never_run(stages_case):
    ran = []
    names = family_of(stages_case.model, "x").stages
    for name in names:
        stages_case.model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    output, signal = stages_case.read(("feature_map", 1), stop_early=True)
    assert output is None and ran == names[:2] and signal.ndim == 4


def test_the_model_runs_to_its_end_where_its_output_is_needed(make_case):
    case = make_case("vit")
    output, _, logits = case.read(("tokens", 0), "logits", stop_early=True)
    assert output is logits
    output, _, tail, head = case.read(("tokens", 0), ("tail", 0), "head", stop_early=True)
    assert output is None and callable(tail) and callable(head), "head and tail need no pass"
    output, tail = case.read(("tail", 0), stop_early=True)
    assert output is not None, "no tap, nothing to stop at"


# Activation checkpointing


@pytest.mark.parametrize("name", ["vit", "qk_norm", "dinov3", "beit both biases", "cait", "convnext"])
def test_checkpointing_changes_neither_signals_nor_gradients(make_case, name):
    signals, gradients, recomputed = [], [], []
    for checkpointing in (False, True):
        case = make_case(name)
        case.model.train().set_grad_checkpointing(checkpointing)
        passes = []
        watched = case.model.blocks[0] if hasattr(case.model, "blocks") else case.model.stages[0].blocks[0]
        watched.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        _, found = case.reader(*signals_of(case)).read(case.images)
        sum(signal.square().mean() for signal in found.values()).backward()
        signals.append({request: signal.detach() for request, signal in found.items()})
        gradients.append({path: p.grad for path, p in case.model.named_parameters() if p.grad is not None})
        recomputed.append(len(passes))
    assert recomputed == [1, 2], "the second model really recomputes its blocks"
    assert_same(*signals)
    assert len(gradients[0]) > 20
    assert_same(*gradients)


def test_stop_early_under_checkpointing(make_case):
    gradients = []
    for checkpointing in (False, True):
        case = make_case("vit")
        case.model.train().set_grad_checkpointing(checkpointing)
        output, query = case.read(("query", 1), stop_early=True)
        assert output is None
        query.square().mean().backward()
        gradients.append({path: p.grad for path, p in case.model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    assert_same(*gradients)


def test_reentrant_checkpointing_is_refused(make_case, monkeypatch):
    """It runs the blocks without a graph: a loss on what they give would silently train nothing."""
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    case = make_case("vit")
    case.model.train().set_grad_checkpointing(True)
    taps = case.reader(("tokens", 0))
    with pytest.raises(RuntimeError) as error:
        taps.read(case.images)
    assert str(error.value) == (
        "vit: the module at 'blocks.0' must run with a graph, or no loss trains it, but it runs under no_grad; "
        "use activation checkpointing with use_reentrant=False."
    )
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        with torch.no_grad():
            assert taps.read(case.images)[1], "without a graph there is none to lose"
        case.model.requires_grad_(False)
        assert taps.read(case.images)[1], "a frozen model has none to lose either"


# Compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [("vit", "eager"), ("vit", "aot_eager"), ("dinov3", "aot_eager"), ("beit both biases", "eager"), ("cait", "eager")],
)
def test_compiled_in_one_graph(make_case, name, backend):
    """The whole read, taps included, is one graph; gradients are the plain ones."""
    case = make_case(name)
    asked = signals_of(case)

    def step(read):
        case.model.zero_grad()
        output, signals = read(case.images)
        sum(signal.square().mean() for signal in signals.values()).backward()
        return output, signals, {path: p.grad for path, p in case.model.named_parameters() if p.grad is not None}

    taps = case.reader(*asked)
    output, signals, gradients = step(taps.read)
    compiled = step(torch.compile(taps.read, backend=backend, fullgraph=True))
    torch.testing.assert_close(compiled[0], output, rtol=1e-5, atol=1e-5)
    assert_same(compiled[1], signals, rtol=1e-5, atol=1e-5)
    assert_same(compiled[2], gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_that_is_compiled_in_place(make_case, backend):
    """taps installed before the first call of a model.compile()d model."""
    case = make_case("vit")
    plain = case.read(*signals_of(case))
    case.model.compile(backend=backend, fullgraph=True)
    taps = case.reader(*signals_of(case))
    for _ in range(2):
        output, signals = taps.read(case.images)
        torch.testing.assert_close([output, *signals.values()], plain, rtol=1e-5, atol=1e-5)
    case.model(case.images * 2)
    assert taps.taps.caught.values is None
    taps.remove()
    torch.testing.assert_close(case.model(case.images), plain[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_that_torch_compile_wrapped(make_case):
    case = make_case("vit")
    plain = case.read(*signals_of(case))
    case.model = torch.compile(case.model, backend="eager", fullgraph=True)
    taps = case.reader(*signals_of(case))
    assert taps.family.called is case.model and type(taps.family).__name__ == "TimmViT"
    output, signals = taps.read(case.images)
    torch.testing.assert_close([output, *signals.values()], plain, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(taps)
    assert twin.family.called._orig_mod is twin.family.model is not taps.family.model
    assert_same(twin.read(case.images)[1], signals, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_taps_that_come_after_the_first_compiled_call(make_case):
    """torch ignores such hooks: what was not caught is said, and never missing in silence."""
    case = make_case("vit")
    case.model.compile(backend="eager")
    case.model(case.images)
    taps = case.reader(("tokens", 1))
    with pytest.raises(ValueError) as error:
        taps.read(case.images)
    assert str(error.value) == (
        "vit: tokens is read at 'blocks.1', but the model's forward never calls that module; "
        "the model was compiled and called before: call torch.compiler.reset() first."
    )
    torch.compiler.reset()
    assert taps.read(case.images)[1][Request("tokens", 1)].shape == (2, 17, 24)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize("whole", [True, False], ids=["whole read", "model in place"])
def test_stopping_early_under_compile(make_case, whole):
    """The whole read is one graph; a model compiled in place breaks its graph where the pass ends."""
    case = make_case("vit")
    plain = case.read(("query", 0))[1]
    taps = case.reader(("query", 0), stop_early=True)
    if whole:
        read = torch.compile(taps.read, backend="eager", fullgraph=True)
    else:
        case.model.compile(backend="eager")
        read = taps.read
    output, signals = read(case.images)
    assert output is None
    torch.testing.assert_close(signals[Request("query", 0)], plain)


# Precision


def test_autocast(case):
    plain = case.read(*signals_of(case))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.read(*signals_of(case))
    for one, other in zip(plain, mixed, strict=True):
        scale = one.abs().max()
        assert (one - other.float()).abs().max() <= 0.06 * scale


def test_taps_of_nothing():
    """A reader of logits alone needs no tap."""
    taps = Taps(nn.Identity(), [])
    output, caught = taps.run(nn.Identity(), torch.ones(1))
    assert output.item() == 1 and caught == {}


def test_drop_path_and_dropout_signals_are_those_of_the_same_pass(make_case):
    """In training, tokens and logits belong to one random pass."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, drop_path_rate=0.9
    )
    taps = Reader(family_of(model.train(), "vit"), [Request("normed_cls_token"), Request("head")], None)
    output, signals = taps.read(torch.rand(8, 3, 32, 32))
    cls_token, head = signals.values()
    torch.testing.assert_close(head(cls_token), output)
