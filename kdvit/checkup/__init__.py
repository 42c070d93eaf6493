"""Look a training over before it starts: a few real steps on copies, and one screen that says what was found.

`check` works on any `kdvit.Distiller` and any batches, `check_training` on what a `kdvit.Trainer` is given; the command
``kdvit doctor`` is the second.
"""

from kdvit.checkup.examination import check
from kdvit.checkup.findings import Checkup, Finding, LossReading, StepCost
from kdvit.checkup.plan import Plan
from kdvit.checkup.run import check_training

__all__ = ["Checkup", "Finding", "LossReading", "Plan", "StepCost", "check", "check_training"]
