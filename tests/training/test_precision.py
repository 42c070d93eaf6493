"""Less memory and less time through the Trainer: precisions, checkpointed blocks, a compiled step."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch

from kdvit import Distiller, Student, Teacher, Training
from kdvit.training.interruption import Interrupted
from tests.training.conftest import MEAN, STD, distiller, metrics, newest_state, vit

LOSSES = ["dkd", "tinymim"]


def run(make_trainer, teacher_dtype: torch.dtype | None = None, **options):
    """(distiller, mean losses of the last line, dtypes that the student's first block gave)."""
    subject = distiller(LOSSES)
    if teacher_dtype is not None:
        torch.manual_seed(1)
        teacher = Teacher(vit(7, embed_dim=32), dtype=teacher_dtype)
        subject = Distiller(teacher, Student(vit(), mean=MEAN, std=STD, name="small"), LOSSES)
    seen: set[torch.dtype] = set()
    subject.student.model.blocks[0].attn.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    result = make_trainer(subject, **options).fit()
    return subject, metrics(result, "step")[-1]["losses"], seen


def test_bf16_on_a_cpu(make_trainer):
    plain, expected, whole = run(make_trainer)
    half, found, seen = run(make_trainer, mixed_precision="bf16")
    assert whole == {torch.float32} and seen == {torch.bfloat16}
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert found.keys() == expected.keys() and found != expected
    assert found == pytest.approx(expected, rel=0.05)


def test_a_teacher_in_bfloat16_beside_a_float32_student(make_trainer):
    _, expected, _ = run(make_trainer)
    subject, found, seen = run(make_trainer, teacher_dtype=torch.bfloat16)
    assert {p.dtype for p in subject.teacher.model.parameters()} == {torch.bfloat16}
    assert seen == {torch.float32} and {p.dtype for p in subject.parameters()} == {torch.float32}
    assert found != expected and found == pytest.approx(expected, rel=0.05)


def test_checkpointed_blocks_give_the_same_run(make_trainer, tmp_path):
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        subject = distiller(LOSSES, drop_path_rate=0.3)
        make_trainer(subject, folder=tmp_path / name, grad_checkpointing=checkpointing).fit()
        assert subject.student.model.grad_checkpointing == checkpointing
    ours, theirs = (newest_state(tmp_path / name)["distiller"] for name in ("checkpointed", "plain"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_a_compiled_run_is_the_run_and_resumes(make_trainer, tmp_path, monkeypatch):
    compiled = partial(torch.compile, backend="aot_eager")  # the default one needs a C++ compiler
    monkeypatch.setattr(torch, "compile", compiled)

    def weight(progress, stop_at: int = -1) -> float:  # weights are worked out before the graph
        if progress.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.5

    make_trainer(distiller([(weight, "dkd"), "tinymim"]), folder=tmp_path / "plain", epochs=2).fit()
    subject = distiller([(partial(weight, stop_at=5), "dkd"), "tinymim"])
    with pytest.raises(Interrupted):
        make_trainer(subject, folder=tmp_path / "compiled", epochs=2, compile=True).fit()
    assert subject._compiled_step is not None
    subject = distiller([(weight, "dkd"), "tinymim"])
    make_trainer(subject, folder=tmp_path / "compiled", epochs=2, compile=True, resume=True).fit()
    ours, theirs = (newest_state(tmp_path / name)["distiller"] for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_gradient_shares_of_a_compiled_step_are_refused():
    with pytest.raises(
        ValueError, match="Training: gradient_share_steps must be None where the step is compiled, got 5;"
    ):
        Training(compile=True, gradient_share_steps=5)


def test_fp16_on_a_cpu_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match="Training: mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16', which"
    ):
        make_trainer(distiller(), mixed_precision="fp16")
