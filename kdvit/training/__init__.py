"""Train a student: `Trainer` and its `Training` settings."""

from kdvit.training.comparison import Comparison, compare
from kdvit.training.evaluation import Accuracy, evaluate
from kdvit.training.fidelity import Fidelity
from kdvit.training.preparation import stronger, transform_for
from kdvit.training.settings import Training
from kdvit.training.stages import Stage, run_stages
from kdvit.training.trainer import Result, Trainer

__all__ = [
    "Accuracy",
    "Comparison",
    "Fidelity",
    "Result",
    "Stage",
    "Trainer",
    "Training",
    "compare",
    "evaluate",
    "run_stages",
    "stronger",
    "transform_for",
]
