"""A loss around a loss: what standardisation and schedules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from kdvit.losses.loss import Loss, Mismatch
from kdvit.signals import Location, ModelInfo


class LossWrapper(Loss):
    """Stands for the loss inside it; a subclass overrides what it changes.

    Raises:
        TypeError: loss is no `Loss`.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        if not isinstance(loss, Loss):
            name = type(self).__name__
            raise TypeError(f"{name}: loss must be a kdvit.losses.Loss, got {loss!r}; make one, such as KD().")
        self.loss = loss

    @property
    def name(self) -> str:
        """The name of the loss, marked."""
        return f"{type(self).__name__.lower()}_{self.loss.name}"

    @property
    def mismatch(self) -> Mismatch:
        return self.loss.mismatch

    @property
    def predict(self) -> Callable[..., Tensor] | None:
        return self.loss.predict

    @property
    def calibrate(self) -> Callable[..., None] | None:
        return self.loss.calibrate

    @property
    def meta_interval(self) -> int:
        return self.loss.meta_interval

    def inputs(self) -> tuple[str, ...]:
        return self.loss.inputs()

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        return self.loss.locations()

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.loss.build(student, teacher)

    def allocate(self, num_samples: int) -> None:
        self.loss.allocate(num_samples)

    def adopt_head(self, head: nn.Linear) -> None:
        self.loss.adopt_head(head)

    def needs_calibration(self) -> bool:
        return self.loss.needs_calibration()

    def meta_optimizer(self) -> Optimizer | None:
        return self.loss.meta_optimizer()

    def extra_forwards(self) -> dict[str, float]:
        return self.loss.extra_forwards()
