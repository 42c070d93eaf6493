"""FSDP2: a student whose weights are shared out over processes, and its whole state in plain tensors.

`fully_shard` (through Accelerate, or called by hand) turns the parameters of a Distiller into DTensors in place. The
Distiller, its taps and its losses go on as before, and every process keeps the whole teacher. What changes is
everything outside the Distiller's own forward: the student cannot be called alone, and a state dict holds shards. What
makes tensors whole is collective: all processes must call it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from kdvit.distiller import Distiller


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter is shared out over processes."""
    return any(_is_shard(parameter) for parameter in module.parameters())


def make_equal(module: nn.Module) -> None:
    """Give every process the first one's weights and buffers, as DDP does: FSDP2 takes each shard where it lies.

    Call it before sharding.
    """
    if distributed.is_available() and distributed.is_initialized():
        with torch.no_grad():
            for value in module.state_dict().values():
                distributed.broadcast(value, src=0)


def keep_tapped(distiller: Distiller) -> None:
    """Let the modules that a loss reads inside of keep their whole weights from the forward to the backward pass.

    FSDP2 gathers a module's weights again when the gradient of its output arrives. Where a loss reads within a block
    (queries, keys, an attention map) and nothing reads the block's output, that gradient never comes.

    Call it after sharding.
    """
    points = distiller.student.tap_paths()
    for path, module in distiller.student.model.named_modules():
        if isinstance(module, FSDPModule) and any(point.startswith(f"{path}.") for point in points):
            module.set_reshard_after_forward(False, recurse=False)


def full_state(state: Any) -> Any:
    """A copy of a state dict, of a module or an optimizer, on the CPU and with whole tensors in place of shards.

    It is then what the same run without FSDP would have: ``full_state(distiller.state_dict())`` loads into a Distiller
    of one process, ``full_state(optimizer.state_dict())`` into its optimizer, and back by `load_full_state` and
    `load_full_optimizer_state`.
    """
    if isinstance(state, Mapping):
        return type(state)((key, full_state(value)) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(full_state(value) for value in state)
    if isinstance(state, Tensor):
        return (state.full_tensor() if _is_shard(state) else state).detach().to("cpu", copy=True)
    return state


def load_full_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict, which every process holds, into a module that may be sharded.

    Raises:
        RuntimeError: the names or shapes are not the module's, as `nn.Module.load_state_dict` says it.
    """
    own = module.state_dict()
    module.load_state_dict({name: _as(value, own.get(name)) for name, value in state.items()})


def load_full_optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state of an optimizer, which every process holds; its parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {
            key: _as(value, parameters[number]) if isinstance(value, Tensor) else value for key, value in entry.items()
        }
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


class PlainStudent:
    """The plain student beside its sharded self: what is evaluated, and saved.

    Args:
        model: ``distiller.deployable``, before it is sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    def update(self, state: Mapping[str, Tensor]) -> nn.Module:
        """The plain model with these weights, sharded or whole: a state dict of the model, or `LocalShards.whole`."""
        self.model.load_state_dict(full_state(state))
        return self.model


class LocalShards(nn.Module):
    """This process's shards of a model as plain tensors: what `timm.utils.ModelEmaV3` can average.

    ``ema = ModelEmaV3(LocalShards(model), decay)``, ``ema.update(LocalShards(model), step)``, and
    ``plain.update(ema.module.whole(model))`` for the averaged weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for number, value in enumerate(model.state_dict().values()):
            value = value.to_local().detach() if _is_shard(value) else value.detach()
            if value.is_floating_point():  # ModelEmaV3 asks a parameter for the device
                self.register_parameter(str(number), nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(str(number), value)

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole tensors by name, laid out as in ``model``, the sharded one."""
        from torch.distributed.tensor import DTensor

        own, found = self.state_dict(), {}
        for number, (name, like) in enumerate(model.state_dict().items()):
            value = own[str(number)]
            if _is_shard(like):
                layout = {"shape": like.shape, "stride": like.stride()}
                value = DTensor.from_local(value, like.device_mesh, like.placements, **layout)
            found[name] = value
        return full_state(found)

    def load_whole(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Take this process's shards of whole tensors by name, laid out as in ``model``, the sharded one."""
        own = self.state_dict()
        with torch.no_grad():
            for number, (name, like) in enumerate(model.state_dict().items()):
                value = _as(state[name], like)
                own[str(number)].copy_(value.to_local() if _is_shard(value) else value)


def _is_shard(value: Any) -> bool:
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _as(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole tensor, shared out as another of its shape; a copy where that is not sharded, or not alike."""
    if not _is_shard(like) or value.shape != like.shape:
        return value.clone()  # an optimizer goes on counting in the tensor that it was given
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
