"""Precisions through the Trainer: bf16 autocast on a CPU, and a teacher in half precision beside a float32 student."""

from __future__ import annotations

import pytest
import torch

from kdvit import Distiller, Student, Teacher
from tests.training.conftest import MEAN, STD, distiller, metrics, vit

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
