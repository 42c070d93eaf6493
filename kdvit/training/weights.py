"""The weights of a run: their average, what is evaluated and saved of them, and their state, whole or shared out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from kdvit.distiller import Distiller
from kdvit.training.settings import Training
from kdvit.training.sharding import (
    LocalShards,
    PlainStudent,
    full_state,
    keep_tapped,
    load_full_optimizer_state,
    load_full_state,
    make_equal,
)


class Weights:
    """Whole in every process: one process, or DDP.

    Args:
        distiller: the plain one, before it is prepared.
        ema_decay: see `Training`.
    """

    #: Whether each process can run the student by itself.
    are_whole = True

    def __init__(self, distiller: Distiller, ema_decay: float | None) -> None:
        self.distiller, self.ema_decay = distiller, ema_decay
        self.ema: nn.Module | None = None

    def start(self) -> None:
        """Called when the distiller is prepared."""
        if self.ema_decay is not None:
            from timm.utils import ModelEmaV3

            self.ema = ModelEmaV3(self.current(), decay=self.ema_decay, use_warmup=True)

    def current(self) -> nn.Module:
        """What is averaged."""
        return self.distiller.deployable

    def update(self, step: int) -> None:
        """Called after each step."""
        if self.ema is not None:
            self.ema.update(self.current(), step=step)

    def student(self) -> nn.Module:
        """The model that is evaluated and saved: of averaged weights, where there is an average. All must call it."""
        return self.ema.module if self.ema is not None else self.distiller.deployable

    def adopt_average(self) -> None:
        """Give the student itself the average of its weights, where there is one."""
        if self.ema is not None:
            self.distiller.deployable.load_state_dict(self.ema.module.state_dict())

    def state_dict(self, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
        """What a state holds of them and of their optimizer, on every process; all must call it."""
        return {
            "distiller": self.distiller.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: AcceleratedOptimizer) -> None:
        """
        Raises:
            RuntimeError: the weights are those of another student.
        """
        self.distiller.load_state_dict(state["distiller"])
        optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


class ShardedWeights(Weights):
    """Shared out over the processes by FSDP2. A state is that of whole weights, as a run without FSDP would save it."""

    are_whole = False

    def __init__(self, distiller: Distiller, ema_decay: float | None) -> None:
        super().__init__(distiller, ema_decay)
        make_equal(distiller)
        self.plain = PlainStudent(distiller.deployable)

    def start(self) -> None:
        keep_tapped(self.distiller)
        super().start()

    def current(self) -> nn.Module:
        return LocalShards(self.distiller.deployable)

    def student(self) -> nn.Module:
        return self.plain.update(self._averaged())

    def adopt_average(self) -> None:
        if self.ema is not None:
            load_full_state(self.distiller.deployable, self._averaged())

    def state_dict(self, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
        averaged = {f"module.{name}": value for name, value in self._averaged().items()}
        return {
            "distiller": full_state(self.distiller.state_dict()),
            "optimizer": full_state(optimizer.state_dict()),
            "ema": averaged if self.ema is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: AcceleratedOptimizer) -> None:
        load_full_state(self.distiller, state["distiller"])
        load_full_optimizer_state(optimizer.optimizer, state["optimizer"])
        if self.ema is not None:
            averaged = {name.removeprefix("module."): value for name, value in state["ema"].items()}
            self.ema.module.load_whole(self.distiller.deployable, averaged)

    def _averaged(self) -> dict[str, Tensor]:
        """Whole weights, the average where there is one."""
        model = self.distiller.deployable
        return self.ema.module.whole(model) if self.ema is not None else full_state(model.state_dict())


def weights_of(distiller: Distiller, settings: Training, accelerator: Accelerator) -> Weights:
    """Where the launcher puts them.

    Raises:
        ValueError: a setting cannot be had of weights that are shared out.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return Weights(distiller, settings.ema_decay)
    for name in ("compile", "gradient_share_steps"):
        if getattr(settings, name):
            raise ValueError(
                f"Training: {name} must be left out under FSDP, got {getattr(settings, name)}; use DDP, or drop it."
            )
    return ShardedWeights(distiller, settings.ema_decay)
