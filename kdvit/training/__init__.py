"""Train a student: `Trainer` and its `Training` settings."""

from kdvit.training.evaluation import Accuracy, evaluate
from kdvit.training.settings import Training
from kdvit.training.trainer import Result, Trainer, transform_for

__all__ = ["Accuracy", "Result", "Trainer", "Training", "evaluate", "transform_for"]
