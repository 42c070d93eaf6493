"""Fidelity worked out by hand for four images of three classes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdvit import Teacher
from kdvit.training import Accuracy, evaluate
from kdvit.training.fidelity import FIGURES, Fidelity, fidelity, teacher_prediction
from tests import tiny

STUDENT = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.3, 0.2], [0.25, 0.35, 0.4]])
TEACHER = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
LABELS = torch.tensor([0, 1, 1, 2])  # the student errs on the third, the teacher on the second


def loader(labels: Tensor = LABELS, batch_size: int = 3):
    """Images are their own numbers, so that predictions are looked up."""
    rows = [{"image": torch.tensor(index), "label": label} for index, label in enumerate(labels)]
    return Accelerator().prepare(torch.utils.data.DataLoader(rows, batch_size=batch_size))


def found(student: Tensor = STUDENT, teacher: Tensor | None = TEACHER, labels: Tensor = LABELS, **options) -> Fidelity:
    predict = None if teacher is None else lambda images: teacher.log()[images]
    return fidelity(lambda images: student.log()[images], predict, loader(labels, **options), 3, Accelerator())


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_figures_by_hand():
    result = found()
    figures = result.figures()
    assert list(figures) == list(FIGURES)
    assert (figures["top1"], figures["top5"], figures["agreement"]) == (75.0, 100.0, 50.0)
    assert figures["loss"] == pytest.approx(-sum(map(math.log, (0.7, 0.6, 0.3, 0.4))) / 4, rel=1e-6)
    rows = list(zip(STUDENT.tolist(), TEACHER.tolist(), strict=True))
    assert figures["kl"] == pytest.approx(sum(kl(t, s) for s, t in rows) / 4, rel=1e-5)
    assert figures["reverse_kl"] == pytest.approx(sum(kl(s, t) for s, t in rows) / 4, rel=1e-5)
    # Each image is alone in its bin.
    assert figures["calibration_error"] == pytest.approx(100 * (0.3 + 0.4 + 0.5 + 0.6) / 4, rel=1e-6)
    assert result.accuracy.num_images == 4 and result.class_accuracy == (100.0, 50.0, 100.0)


def test_the_teacher_by_hand():
    teacher = found().teacher
    assert (teacher.accuracy.top1, teacher.class_accuracy) == (75.0, (100.0, 50.0, 100.0))
    assert teacher.calibration_error == pytest.approx(100 * (0.1 + 0.6 + 0.2 + 0.3) / 4, rel=1e-6)
    assert teacher.figures()["agreement"] is teacher.figures()["kl"] is teacher.teacher is None


def test_bins_of_the_calibration_error():
    """In one bin, over- and under-confidence even out; across bins they do not."""
    student = torch.tensor([[0.62, 0.19, 0.19], [0.62, 0.19, 0.19], [0.98, 0.01, 0.01], [0.98, 0.01, 0.01]])
    error = found(student, None, torch.tensor([0, 1, 0, 0])).calibration_error
    assert error == pytest.approx(100 * (abs(1 - 2 * 0.62) + 2 * 0.02) / 4, rel=1e-5)
    # 9/15 < 0.61 and 0.66 < 10/15 < 0.69: the first two share a bin, and even out; the third has one of its own.
    student = torch.tensor([[0.61, 0.39, 0.0], [0.66, 0.34, 0.0], [0.69, 0.31, 0.0]]).clamp(min=1e-30)
    error = found(student, None, torch.tensor([0, 1, 1])).calibration_error
    assert error == pytest.approx(100 * (abs(1 - 0.61 - 0.66) + 0.69) / 3, rel=1e-5)
    sure = found(torch.tensor([[1.0, 0, 0]] * 4).clamp(min=1e-30), None, torch.zeros(4, dtype=torch.long))
    assert sure.calibration_error == 0.0


def test_equal_predictions_are_faithful():
    result = found(TEACHER, TEACHER)
    assert (result.agreement, result.kl, result.reverse_kl) == (100.0, 0.0, 0.0)
    assert result.accuracy == result.teacher.accuracy and result.calibration_error == result.teacher.calibration_error


def test_batches_do_not_matter():
    assert found(batch_size=1).figures() == pytest.approx(found(batch_size=4).figures(), rel=1e-6)


def test_accuracy_is_that_of_evaluate():
    expected = evaluate(lambda images: STUDENT.log()[images], loader(), Accelerator())
    assert found().accuracy == expected and isinstance(expected, Accuracy)


def test_without_a_teacher():
    result = found(teacher=None)
    assert result.accuracy == found().accuracy and result.teacher is None
    assert [name for name, value in result.figures().items() if value is None] == ["agreement", "kl", "reverse_kl"]


def test_a_class_without_images():
    result = found(labels=torch.tensor([0, 1, 1, 1]))
    assert result.class_accuracy[2] is None and 2 not in result.worst_classes()


def test_worst_classes():
    accuracy = Accuracy(50.0, 100.0, 1.0, 10)
    teacher = Fidelity(accuracy, 0.0, (95.0, 50.0, 90.0, None, 80.0))
    student = Fidelity(accuracy, 0.0, (90.0, 50.0, 70.0, None, 81.0), teacher=teacher)
    assert student.worst_classes() == (2, 0, 1, 4) and student.worst_classes(1) == (2,)
    assert teacher.worst_classes(2) == (1, 4)


def test_half_precision_is_compared_in_float32():
    half = [torch.log(probabilities).half() for probabilities in (STUDENT, TEACHER)]
    results = [
        fidelity(lambda i: pair[0][i], lambda i: pair[1][i], loader(), 3, Accelerator())  # noqa: B023 (called at once)
        for pair in (half, [logits.float() for logits in half])
    ]
    assert results[0] == results[1]


def test_huge_logits_stay_finite():
    result = fidelity(lambda i: 1e4 * STUDENT[i], lambda i: 1e4 * TEACHER[i], loader(), 3, Accelerator())
    assert all(map(math.isfinite, result.figures().values()))


def test_predictions_build_no_graph():
    weight, seen = torch.ones(1, requires_grad=True), []
    fidelity(lambda i: seen.append(STUDENT[i] * weight) or seen[-1], None, loader(), 3, Accelerator())
    assert len(seen) == 2 and not seen[0].requires_grad


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (
            torch.ones(4, 2),
            TEACHER,
            "fidelity: student_predict must give logits (B, 3), as the data has classes, got (3",
        ),
        (
            STUDENT,
            torch.ones(4, 5),
            "fidelity: teacher_predict must give logits (B, 3), as the data has classes, got (3",
        ),
    ],
)
def test_other_classes_are_one_sentence(student, teacher, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        found(student, teacher)


# Whether a teacher's predictions mean anything for the data


def batches():
    return [{"image": tiny.images(2), "label": tiny.labels(2)}]


def test_a_teacher_of_these_classes_predicts():
    teacher = Teacher(tiny.vit())
    predict = teacher_prediction(teacher, batches(), tiny.NUM_CLASSES)
    torch.testing.assert_close(predict(tiny.images(2)), teacher.predict(tiny.images(2)))


def test_other_classes_no_classifier_and_no_teacher_do_not():
    assert teacher_prediction(Teacher(tiny.vit()), batches(), tiny.NUM_CLASSES + 1) is None
    assert teacher_prediction(None, batches(), tiny.NUM_CLASSES) is None
    assert teacher_prediction(tiny.vit(), batches(), tiny.NUM_CLASSES) is None  # no live Teacher

    class Backbone(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"tokens": images}

    assert teacher_prediction(Teacher(Backbone(), input_size=(3, 32, 32)), batches(), tiny.NUM_CLASSES) is None
