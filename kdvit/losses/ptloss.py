"""PTLoss: a perturbed cross-entropy, whose minimiser is a teacher nearer to the labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.checks import count, logit_pair, number, same_classes
from kdvit.losses.labels import label_shares
from kdvit.losses.latch import Latch
from kdvit.losses.loss import Loss, register
from kdvit.signals import ModelInfo

_SEARCH_STEPS = 100
_MAX_NEWTON_STEPS = 100
#: Newton's method squares the error: what is left after the last step is rounding.
_TOLERANCE = 1e-8
#: Below any share that matters, and its square is still a float64.
_SMALLEST_SHARE = 1e-150


def proxy_teacher(teacher_probabilities: Tensor, coefficients: Tensor) -> Tensor:
    """The distribution that minimises `PTLoss` for each row: (B, C), coefficients (C,) or (C, M) -> (B, C), float64.

    It is the one q with p_c * (1 / q_c + sum_m m * e_cm * (1 - q_c)^(m-1)) = lambda for all classes c. The loss is
    convex in q where e_cm >= -1/m, and the sum of all q_c falls with lambda: Newton's method, or a bisection where that
    leaves what is known to hold lambda. For M = 1: q_c = p_c / (lambda - e_c * p_c).

    Example:
        >>> proxy_teacher(torch.tensor([[0.5, 0.5]]), torch.tensor([1.5, 0.0]))  # lambda 3/2: 1/2 / (3/2 - 3/4), ...
        tensor([[0.6667, 0.3333]], dtype=torch.float64)
    """
    coefficients = coefficients[:, None] if coefficients.ndim == 1 else coefficients
    if teacher_probabilities.ndim != 2 or len(coefficients) != teacher_probabilities.shape[1]:
        raise ValueError(
            f"proxy_teacher: coefficients must be of C={teacher_probabilities.shape[-1]} classes like "
            f"teacher_probabilities (B, C), got {len(coefficients)} and {tuple(teacher_probabilities.shape)}; "
            "give one row per class."
        )
    teacher = teacher_probabilities.double().clamp_min(_SMALLEST_SHARE)
    coefficients = coefficients.to(teacher)
    # Here the share of one class is 1, so that the sum of all is at least 1 ...
    low = (teacher * (1 + coefficients[:, 0])).amax(dim=1, keepdim=True)
    # ... and here no share is above the teacher's.
    high = 1 + (teacher * _slope(teacher, coefficients)).amax(dim=1, keepdim=True)
    multiplier = low
    for _ in range(_MAX_NEWTON_STEPS):
        shares = _shares(multiplier / teacher, coefficients)
        excess = shares.sum(dim=1, keepdim=True) - 1
        low, high = torch.where(excess >= 0, multiplier, low), torch.where(excess <= 0, multiplier, high)
        fall = (1 / (teacher * _curvature(shares, coefficients))).sum(dim=1, keepdim=True)
        newton, is_there = multiplier + excess / fall, excess.abs() <= _TOLERANCE
        moves = (low <= newton) & (newton <= high) & ((newton != multiplier) | is_there)
        multiplier = torch.where(moves, newton, (low + high) / 2)
        if is_there.all():
            break
    shares = _shares(multiplier / teacher, coefficients)
    return shares / shares.sum(dim=1, keepdim=True)


def _shares(target: Tensor, coefficients: Tensor) -> Tensor:
    """The q with 1 / q + slope(q) = target (B, C): the left side is convex and falls, so that Newton rises to it."""
    degrees = torch.arange(1, coefficients.shape[1] + 1).to(coefficients)
    # With the least slope that there is in [0, 1], q is too small; where there is one degree, it is right.
    least = coefficients[:, 0] + (degrees * coefficients.clamp_max(0))[:, 1:].sum(dim=1)
    shares = 1 / (target - least)
    for _ in range(_MAX_NEWTON_STEPS if coefficients.shape[1] > 1 else 0):
        gap = 1 / shares + _slope(shares, coefficients) - target
        step = torch.where(gap > 0, gap / _curvature(shares, coefficients), 0)
        shares = (shares + step).clamp_max(1)
        if (step <= _TOLERANCE * shares).all():
            break
    return shares


def _slope(shares: Tensor, coefficients: Tensor) -> Tensor:
    """sum_m m * e_cm * (1 - q_c)^(m-1): (B, C)."""
    return sum(m * e * (1 - shares) ** (m - 1) for m, e in enumerate(coefficients.T, 1))


def _curvature(shares: Tensor, coefficients: Tensor) -> Tensor:
    """The derivative of 1 / q + slope(q), negated: (B, C), positive."""
    terms = (m * (m - 1) * e * (1 - shares) ** (m - 2) for m, e in enumerate(coefficients.T, 1) if m > 1)
    return 1 / shares**2 + sum(terms)


def _distance(teacher: Tensor, labels: Tensor, coefficients: Tensor) -> tuple[float, Tensor]:
    """Mean cross-entropy of the labels (B, C) under the proxy teacher, and its gradient by the coefficients (C, M).

    The gradient is that of the implicit function: a coefficient moves its own share, and the multiplier all of them.
    """
    shares = proxy_teacher(teacher, coefficients)
    distance = -(labels * shares.log()).sum(dim=1).mean().item()
    freedom = 1 / _curvature(shares, coefficients).clamp_min(1e-6)  # 0 where e_cm = -1/m and a share is 1
    by_multiplier = freedom / teacher
    pull = labels / shares
    common = (pull * by_multiplier).sum(dim=1, keepdim=True) / by_multiplier.sum(dim=1, keepdim=True)
    by_slope = -freedom * (pull - common)
    columns = [m * (by_slope * (1 - shares) ** (m - 1)).mean(dim=0) for m in range(1, coefficients.shape[1] + 1)]
    return distance, torch.stack(columns, dim=1)


@register("ptloss")
class PTLoss(Loss):
    """Pull the student towards a proxy of the teacher that is nearer to the labels, by perturbing the cross-entropy.

    L = T^2 * mean_i sum_c p_c * (-log q_c + sum_{m=1..M} e_cm * (1 - q_c)^m),
    p = softmax(teacher / T), q = softmax(student / T)

    -log q = sum_m (1 - q)^m / m, so that e_cm changes the leading coefficients of this series, class by class. The
    minimiser over q is no longer p but the proxy teacher (`proxy_teacher`).

    The coefficients are given, or found once before training by `calibrate`, from images that are held out: those
    whose proxy teacher has the least cross-entropy with the labels. Our search is projected gradient descent from 0
    within [-1/m, max_coefficient], in float64; a step is halved until it lowers the cross-entropy, and doubled after it
    did; at most 100 steps, and none after one that gains less than a millionth. There is no chance in it, and its
    result is never worse than the teacher itself. It has C * M numbers to fit: hold out several images per class.
    Until then the coefficients are 0, and this is `KD` but for the teacher's entropy, a constant.

    Published: this loss alone or beside a task loss, M = 1; text classifiers (BERT, T5). The coefficients and weights
    could not be read.

    Args:
        degree: M, how many leading terms are perturbed. 1.
        coefficients: e, one number >= -1 for each class (C,), or one row of M numbers >= -1/m (C, M); None: found by
            `calibrate`.
        temperature: T > 0. 1.
        max_coefficient: > 0, the largest coefficient that `calibrate` may choose: the gradient of a class grows by up
            to 1 + this. 5.

    Inputs:
        student_logits: (B, C), raw.
        teacher_logits: (B, C), raw; of `calibrate`: those of all held-out images.
        labels: only of `calibrate`: (B,) class indices, or (B, C) soft labels, which count by their shares.

    Returns:
        Scalar >= 0 in nats * T^2; smallest, but not 0, where the student equals the proxy teacher.

    Raises:
        ValueError: degree or a number is out of its range; coefficients do not fit degree or the classes, or one is
            below -1/m; the logits differ in B or C, or are not (B, C); the labels fit neither (B,) nor (B, C).
        TypeError: an argument is no number; labels of shape (B,) are no integers.

    Source:
        Zhang et al., Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher, KDD 2024,
        https://arxiv.org/abs/2305.05010; no official code; from the paper: the perturbed series, the proxy teacher,
        coefficients by its distance to the labels. Our choice: T^2, the search, its bounds and its distance.

    Example:
        >>> import torch
        >>> from kdvit.losses import PTLoss
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
        >>> loss = PTLoss(coefficients=(2.0, 0.0))
        >>> round(loss(student, teacher).item(), 4)  # ln 2 + 3/4 * 2 * (1 - 1/2)
        1.4431
        >>> PTLoss().needs_calibration(), loss.needs_calibration()
        (True, False)
    """

    fixed_options = ("max_coefficient",)

    def __init__(
        self,
        degree: int = 1,
        coefficients: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        temperature: float = 1.0,
        max_coefficient: float = 5.0,
    ) -> None:
        super().__init__()
        self.degree = count(self, "degree", degree, "1 perturbs the first term of the series")
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.max_coefficient = number(self, "max_coefficient", max_coefficient, "> 0", "the usual range is 1 to 10")
        self.coefficients = None
        self.register_buffer("perturbation", None)  # (C, M), as soon as C is known
        self.calibrated = Latch()
        if coefficients is not None:
            given = self._checked(coefficients)
            self.calibrate = None
            self.coefficients = tuple(map(tuple, given.tolist())) if given.ndim == 2 else tuple(given.tolist())
            self.perturbation = given.reshape(len(given), self.degree).float()

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        num_classes = student["logits"].dim
        same_classes(self, num_classes, teacher["logits"].dim)
        if self.coefficients is None:
            self.perturbation = torch.zeros(num_classes, self.degree)
            self.calibrated.set(False)  # what was found for another teacher does not count
        self._check_classes(num_classes)

    def needs_calibration(self) -> bool:
        return self.coefficients is None and not self.calibrated

    @torch.no_grad()
    def calibrate(self, teacher_logits: Tensor, labels: Tensor) -> None:
        """Find the coefficients: teacher_logits (B, C) and labels (B,) or (B, C) of held-out images."""
        logits, _ = logit_pair(self, teacher_logits, teacher_logits, "teacher_logits")
        if not logits.isfinite().all() or not len(logits):
            raise ValueError("PTLoss: teacher_logits must be finite and not empty; check the calibration images.")
        teacher = (logits.double() / self.temperature).softmax(dim=1).clamp_min(_SMALLEST_SHARE)
        self.perturbation = self._search(teacher, label_shares(self, labels, teacher)).to(
            self.calibrated.is_set.device, torch.float32
        )
        self.calibrated.set()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        student, teacher = logit_pair(self, student_logits, teacher_logits)
        teacher = F.softmax(teacher / self.temperature, dim=1)
        log_student = F.log_softmax(student / self.temperature, dim=1)
        terms = -log_student
        if self.perturbation is not None:
            self._check_classes(student.shape[1])
            others = -torch.expm1(log_student)  # 1 - q, also where q is nearly 1
            for m, coefficient in enumerate(self.perturbation.to(others).T, 1):
                terms = terms + coefficient * others**m
        return self.temperature**2 * (teacher * terms).sum(dim=1).mean()

    def _search(self, teacher: Tensor, labels: Tensor) -> Tensor:
        degrees = torch.arange(1, self.degree + 1).to(teacher)
        lowest, highest = -1 / degrees, torch.full_like(degrees, self.max_coefficient)
        found = teacher.new_zeros(teacher.shape[1], self.degree)
        distance, gradient = _distance(teacher, labels, found)
        size = 1.0
        for _ in range(_SEARCH_STEPS):
            tried = (found - size * gradient).clamp(lowest, highest)
            tried_distance, tried_gradient = _distance(teacher, labels, tried)
            gain = distance - tried_distance
            if gain > 0:
                found, distance, gradient, size = tried, tried_distance, tried_gradient, 2 * size
            else:
                size /= 2
            if 0 <= gain <= 1e-6 * distance:
                break
        return found

    def _checked(self, coefficients: Sequence[float] | Sequence[Sequence[float]] | Tensor) -> Tensor:
        try:
            coefficients = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"PTLoss: coefficients must be numbers, got {coefficients!r}; give one for each class."
            ) from error
        shape = tuple(coefficients.shape)
        fits = shape[1:] == (self.degree,) or (len(shape) == 1 and self.degree == 1)
        if not fits or 0 in shape:
            raise ValueError(
                f"PTLoss: coefficients must have shape (C, {self.degree}) for degree={self.degree}, got {shape}; "
                "give one row per class, or another degree."
            )
        for m, column in enumerate(coefficients.reshape(len(coefficients), -1).T, 1):
            if not column.isfinite().all() or column.min() < -1 / m:
                raise ValueError(
                    f"PTLoss: coefficients must be finite and >= -1/m, got {column.tolist()} for m={m}; "
                    "below that it pushes the student away from a teacher that is sure."
                )
        return coefficients

    def _check_classes(self, num_classes: int) -> None:
        if len(self.perturbation) != num_classes:
            raise ValueError(
                f"PTLoss: coefficients must be of C={num_classes} classes like the logits, got "
                f"{len(self.perturbation)}; give one row per class."
            )
