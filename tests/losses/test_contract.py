"""What holds for every registered loss."""

from __future__ import annotations

import copy
import doctest
import inspect
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdvit.losses
import kdvit.schedules
from kdvit.losses import Loss, Scheduled, Standardized, get, names
from kdvit.losses.loss import CONTEXT_INPUTS, SECOND_VIEW, check_input, needs, reads_teacher, split_input
from tests.losses.cases import CASES, Case, built, example

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
CLASSES = [*map(get, names()), Scheduled, Standardized]
DIFFERENTIABLE = {name: case for name, case in CASES.items() if not case.stops_gradient}
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
SECTIONS = ("Args", "Inputs", "Returns", "Raises", "Source", "Example")


def run(loss: Loss, inputs: dict[str, Any], case: Case) -> dict[str, Tensor]:
    """The terms of a loss; a scalar has the name ``""``."""
    batch = len(next(iter(tensors(inputs))))
    result = loss(**inputs, **case.extras(batch))
    return result if isinstance(result, dict) else {"": result}


def total(loss: Loss, inputs: dict[str, Any], case: Case) -> Tensor:
    return torch.stack(list(run(loss, inputs, case).values())).sum()


def change(inputs: dict[str, Any], edit: Callable[[Tensor], Tensor], start: str = "") -> dict[str, Any]:
    """Inputs with every floating tensor edited whose name starts so."""

    def changed(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(changed, x))
        return edit(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    return {name: changed(x) if starts(name, start) else x for name, x in inputs.items()}


def starts(name: str, start: str) -> bool:
    return name.removeprefix(SECOND_VIEW).startswith(start)


def tensors(inputs: dict[str, Any], start: str = "") -> list[Tensor]:
    """All tensors of the inputs whose name starts so, in either view."""

    def flat(x: Any) -> list[Any]:
        return [leaf for item in x for leaf in flat(item)] if isinstance(x, tuple) else [x]

    found = [x for name, value in inputs.items() if starts(name, start) for x in flat(value)]
    return [x for x in found if isinstance(x, Tensor)]


def with_grad(inputs: dict[str, Any]) -> dict[str, Any]:
    return change(inputs, lambda x: x.clone().requires_grad_())


def trained(loss: Loss, inputs: dict[str, Any], case: Case) -> list[Tensor]:
    """What must get a gradient: what is read of the student, and the loss's own parameters; not meta-parameters."""
    read = {name: x for name, x in inputs.items() if name not in case.detached}
    images = tensors(read, "images") if "rerun_student" in inputs else []  # the student runs again, on these
    return [*tensors(read, "student_"), *images, *(p for p in loss.parameters() if p.requires_grad)]


def assert_finite(loss: Loss, inputs: dict[str, Any], case: Case) -> None:
    """Value and all gradients are finite."""
    inputs = with_grad(inputs)
    value = total(loss, inputs, case)
    value.backward()
    assert value.isfinite()
    for x in trained(loss, inputs, case):
        assert x.grad is not None and x.grad.isfinite().all()


def test_every_registered_loss_has_a_case():
    made = [case.make() for case in CASES.values()]
    covered = {loss.loss.name if isinstance(loss, Standardized) else loss.name for loss in made}
    assert covered == set(names())
    assert len(covered) >= 7 and any(isinstance(loss, Standardized) for loss in made)


@every_case
def test_inputs_are_known_and_located(case):
    loss = case.make()
    for name in loss.inputs():
        check_input(name, type(loss).__name__)
    wanted = {f"{side}_{signal}" for side in ("student", "teacher") for signal in needs(loss, side)}
    read = {name.removeprefix(SECOND_VIEW).replace("teachers_", "teacher_") for name in loss.inputs()}
    assert wanted == read - set(CONTEXT_INPUTS)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_returns_finite_scalars_of_the_right_precision(case, dtype):
    expected = torch.promote_types(dtype, torch.float32)
    loss = built(case, dtype=expected)
    terms = run(loss, change(example(loss).inputs, lambda x: x.to(dtype)), case)
    assert terms
    for value in terms.values():
        assert value.shape == () and value.dtype == expected and value.isfinite()


@every_case
def test_gradient_reaches_the_student_and_own_parameters_alone(case):
    loss = built(case)
    inputs = with_grad(example(loss).inputs)
    total(loss, inputs, case).backward()
    learns = trained(loss, inputs, case)
    assert learns and all(x.grad is not None and x.grad.abs().max() > 0 for x in learns)
    assert all(x.grad is None for x in tensors(inputs, "teacher"))


@every_case
def test_inputs_are_not_modified(case):
    loss = built(case)
    inputs = example(loss).inputs
    before = [x.clone() for x in tensors(inputs)]
    total(loss, with_grad(inputs), case).backward()
    run(loss, inputs, case)
    assert all(torch.equal(x, y) for x, y in zip(before, tensors(inputs), strict=True))


@every_case
def test_value_at_a_perfect_match(case):
    loss = built(case, same=True)
    terms = run(loss, example(loss, same=True).inputs, case)
    assert case.at_match.keys() <= terms.keys()
    assert {name: terms[name].item() for name in case.at_match} == pytest.approx(case.at_match, abs=1e-6)
    other = run(built(case), example(loss).inputs, case)
    assert all(other[name] > value for name, value in case.at_match.items())


@every_case
def test_order_of_the_batch_does_not_matter(case):
    loss = built(case)
    inputs = example(loss, batch=5).inputs
    order = torch.tensor([3, 0, 4, 1, 2])
    extras = case.extras(5)

    def permuted(x: Any) -> Any:
        return tuple(map(permuted, x)) if isinstance(x, tuple) else x[order] if isinstance(x, Tensor) else x

    value = loss(**inputs, **extras)
    shuffled = loss(**{k: permuted(x) for k, x in inputs.items()}, **{k: permuted(x) for k, x in extras.items()})
    torch.testing.assert_close(shuffled, value, rtol=1e-5, atol=1e-7)


@every_case
def test_bfloat16_autocast_is_near_float32(case):
    loss = built(case)
    inputs = change(example(loss).inputs, lambda x: x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        half = run(loss, inputs, case)
    full = run(loss, change(inputs, lambda x: x.float()), case)
    # Projectors run in bfloat16 under autocast, everything else of a loss in float32.
    relative = 2e-2 if list(loss.parameters()) else 1e-5
    torch.testing.assert_close(half, full, rtol=relative, atol=1e-7)


@pytest.mark.parametrize("case", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradients_in_float64_equal_differences(case):
    loss = built(case, dtype=torch.float64)
    inputs = example(loss, dtype=torch.float64).inputs
    read = {k: x for k, x in inputs.items() if starts(k, "student_") and k not in case.detached}
    inputs = inputs | with_grad(read)
    leaves = [x for x in tensors(inputs) if x.requires_grad]
    parameters = {name: p for name, p in loss.named_parameters() if p.requires_grad}
    extras = {k: x.double() for k, x in case.extras(3).items()}

    def function(*values: Tensor) -> Tensor:
        rest = iter(values)
        given = change(inputs, lambda x: next(rest) if x.requires_grad else x)
        weights = dict(zip(parameters, rest, strict=True))
        result = torch.func.functional_call(loss, weights, (), given | extras)
        return sum(result.values()) if isinstance(result, dict) else result

    assert torch.autograd.gradcheck(function, (*leaves, *parameters.values()), fast_mode=True)


@every_case
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    loss = built(case)
    compiled = torch.compile(copy.deepcopy(loss), backend="eager", fullgraph=True)
    inputs, twin = with_grad(example(loss).inputs), with_grad(example(loss).inputs)
    expected, value = total(loss, inputs, case), total(compiled, twin, case)
    torch.testing.assert_close(value, expected)
    expected.backward()
    value.backward()
    for x, y in zip(tensors(inputs, "student_"), tensors(twin, "student_"), strict=True):
        torch.testing.assert_close(y.grad, x.grad)


@every_case
def test_survives_state_dict_copy_and_pickle(case):
    loss = built(case)
    inputs = example(loss).inputs
    buffer = io.BytesIO()
    torch.save(loss.state_dict(), buffer)
    buffer.seek(0)
    loaded = built(case, seed=4)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    twins = [loaded, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = run(loss, inputs, case)
    for twin in twins:
        assert repr(twin) == repr(loss)
        torch.testing.assert_close(run(twin, inputs, case), expected, rtol=0, atol=0)


@every_case
def test_batch_of_one_is_finite(case):
    loss = built(case)
    assert_finite(loss, example(loss, batch=1).inputs, case)


@every_case
def test_equal_entries_are_finite(case):
    loss = built(case)
    inputs = example(loss).inputs
    for constant in (0.0, 0.3, -1e4):
        assert_finite(loss, change(inputs, lambda x: torch.full_like(x, constant)), case)  # noqa: B023
        assert_finite(loss, change(inputs, lambda x: torch.full_like(x, constant), "student_"), case)  # noqa: B023
        assert_finite(loss, change(inputs, lambda x: torch.full_like(x, constant), "teacher"), case)  # noqa: B023


@every_case
@pytest.mark.parametrize("start", ["", "student_", "teacher"], ids=["both", "student", "teacher"])
def test_huge_inputs_are_finite(case, start):
    loss = built(case)
    assert_finite(loss, change(example(loss).inputs, lambda x: 1e4 * x, start), case)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_logits_are_finite_under_autocast(case, dtype):
    loss = built(case)
    inputs = example(loss).inputs
    huge = inputs | change({name: x for name, x in inputs.items() if name.endswith("logits")}, lambda x: 1e4 * x)
    leaves = with_grad(change(huge, lambda x: x.clamp(-6e4, 6e4)))
    with torch.autocast("cpu", dtype):
        value = total(loss, change(leaves, lambda x: x.to(dtype)), case)
    assert value.isfinite() and value.dtype == torch.float32
    value.backward()
    assert all(x.grad.isfinite().all() for x in trained(loss, leaves, case))


LABELLED = {name: case for name, case in CASES.items() if "labels" in case.make().inputs()}
every_labelled = pytest.mark.parametrize("case", LABELLED.values(), ids=LABELLED)


@every_labelled
def test_soft_labels_count_as_their_largest_or_as_shares(case):
    loss = built(case)
    inputs = example(loss).inputs
    hard = torch.nn.functional.one_hot(inputs["labels"], 7).float()
    torch.testing.assert_close(run(loss, inputs | {"labels": hard}, case), run(loss, inputs, case))
    soft = 0.7 * hard + 0.3 * hard.roll(1, dims=1)
    values = run(loss, inputs | {"labels": soft}, case)
    assert all(value.isfinite() for value in values.values())
    differs = any(not torch.allclose(value, run(loss, inputs, case)[name]) for name, value in values.items())
    assert differs == {"largest": False, "shares": True}[case.soft_labels]


@every_labelled
def test_wrong_labels_are_refused(case):
    loss = built(case)
    inputs = example(loss).inputs
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\) or \(3, 7\) like the logits, got \(3, 2\)"):
        run(loss, inputs | {"labels": torch.full((3, 2), 0.5)}, case)
    with pytest.raises(TypeError, match=r"labels of shape \(3,\) must be integers, got torch.float32"):
        run(loss, inputs | {"labels": inputs["labels"].float()}, case)


def test_losses_with_labels_were_found():
    assert len(LABELLED) >= 3


TAUGHT = {name: case for name, case in CASES.items() if reads_teacher(case.make())}


@pytest.mark.parametrize("case", TAUGHT.values(), ids=TAUGHT)
def test_wrong_shapes_give_the_message(case):
    loss = built(case)
    inputs = example(loss).inputs
    axis = dict.fromkeys(("query", "key", "value", "feature_map", "pre_activation", "cls_attention"), 2)
    short = {}
    for name, x in inputs.items():
        at = axis.get(split_input(name)[1], 1)
        short |= change({name: x}, lambda t: t.narrow(at, 0, t.shape[at] - 1), "teacher")  # noqa: B023
    if case.any_shape:
        assert all(value.isfinite() for value in run(loss, short, case).values())
    else:
        with pytest.raises(ValueError, match=re.escape(case.wrong_shape)):
            run(loss, short, case)
    with pytest.raises((ValueError, TypeError)) as caught:
        run(loss, change(inputs, lambda x: x[:2], "teacher"), case)
    assert re.fullmatch(r"\w+: \w+ .*; .*\.", str(caught.value))  # one sentence that ends with what to do


@every_case
def test_repr_rebuilds_and_arguments_are_kept(case):
    loss = case.make()
    twin = eval(repr(loss), vars(kdvit.losses) | vars(kdvit.schedules))
    assert repr(twin) == repr(loss) and type(twin) is type(loss)
    for name, parameter in inspect.signature(type(loss)).parameters.items():
        if isinstance(parameter.default, float):
            assert isinstance(getattr(loss, name), float)


@every_class
def test_docstring_is_complete(cls):
    text = inspect.getdoc(cls)
    assert re.match(r"[A-Z][^\n]*\.\n\n", text), "one line first"
    found = re.findall(rf"^({'|'.join(SECTIONS)}):$", text, re.MULTILINE)
    assert found == list(SECTIONS)
    assert re.search(r"^L = |^hard: L = ", text, re.MULTILINE), "the formula"
    parts = re.split(rf"^(?:{'|'.join(SECTIONS)}):$", text, flags=re.MULTILINE)
    for argument in inspect.signature(cls).parameters:
        assert re.search(rf"^    {argument}: ", parts[1], re.MULTILINE), f"Args lacks {argument}"
    for name in (p.name for p in inspect.signature(cls.forward).parameters.values()):
        if name.startswith(("student_", "teacher", SECOND_VIEW, *CONTEXT_INPUTS)):
            assert re.search(rf"\b{name}\b", parts[2]), f"Inputs lacks {name}"
    from_the_paper = "no official code; from the paper" in " ".join(parts[5].split())
    assert "https://" in parts[5] and (from_the_paper or re.search(r"Checked\s+against \S+@[0-9a-f]{7}", parts[5]))
    assert re.search(r"^Published: ", text, re.MULTILINE), "the weights around it, and what else the paper sets"


@every_class
def test_docstring_example_runs(cls):
    (example_test,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, globs={})
    results = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(example_test)
    assert results.attempted >= 3 and results.failed == 0


def test_losses_need_torch_alone():
    code = "import sys, kdvit.losses; print([m for m in ('timm', 'torchvision', 'accelerate') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
