"""The contract of a loss, and the one registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from kdvit.signals import LOCATED_SIGNALS, SIGNALS, Location, ModelInfo, nearest

#: Inputs of a loss that are not signals of a model. ``rerun_student`` is a function: other images (B, channels, H, W)
#: -> {input name: signal}, what this loss reads of the student, for those images and with their graph.
CONTEXT_INPUTS = ("labels", "images", "sample_ids", "progress", "rerun_student")
#: In front of an input's name: the signal of a second, differently augmented view of the same images.
SECOND_VIEW = "second_"

#: Sides that an input may name, and whose signals they are: ``teachers_logits`` is one value per teacher.
SIDES = {"student": "student", "teacher": "teacher", "teachers": "teacher"}

_registry: dict[str, type[Loss]] = {}


@dataclass(frozen=True)
class Mismatch:
    """What a loss does where student and teacher differ, in a few words each; "" where it plays no part.

    Args:
        width: D of tokens and maps.
        heads: H of query, key, value and attention.
        depth: the number of blocks or stages.
        grid: the patch grid, or that of the feature maps.
    """

    width: str = ""
    heads: str = ""
    depth: str = ""
    grid: str = ""


class Loss(nn.Module):
    """One distillation method: its inputs are the parameters of its ``forward``.

    A parameter is a signal name with ``student_`` or ``teacher_`` in front (``student_logits``), with ``second_``
    before that for a second augmented view of the images, or one of `CONTEXT_INPUTS`. ``teachers_logits`` is a tuple
    with the signal of each of several teachers; `build` is then given a tuple of their infos. A parameter that has a
    default is for direct callers (an injected mask or noise), and not filled by the `kdvit.Distiller` unless `inputs`
    names it.

    A subclass overrides `forward`; `locations` when it reads at blocks or stages; `build` when it has projectors,
    branches of the student, or needs the geometry of what it reads. Its own parameters are trained with the student
    and not exported; this holds for modules on the teacher's signals too. What it remembers from step to step (queues,
    memories) is in buffers that are made in `build`, changed in training mode alone, and equal in all processes.

    ``forward`` returns a scalar, or a dict of named scalars that are added up.

    Two more extension points see images that are held out of training:

    * ``def calibrate(self, teacher_logits, labels) -> None`` is called once before training, with its parameters'
      values for all calibration images together: labels, and signals of the teacher that ``forward`` reads too. What it
      finds, it keeps in buffers. `needs_calibration` says whether training must wait for it.
    * `meta_optimizer` trains meta-parameters (parameters with ``requires_grad=False``, so that no other optimizer
      moves them) by the bilevel steps of `kdvit.bilevel.Bilevel`, every `meta_interval` training steps.

    And two are for what a loss knows beyond a batch, and beyond training:

    * `allocate` is told the number of training images, which ``sample_ids`` count.
    * ``def predict(self, student_feature_map) -> Tensor`` makes the student's logits (B, C) at inference, from student
      inputs that ``forward`` reads too: the student is then deployed with this loss's modules, among them a frozen
      copy of the teacher's classifier (`adopt_head`). See `kdvit.deployment`.
    """

    name: ClassVar[str] = ""
    #: What it does where the models differ.
    mismatch: ClassVar[Mismatch] = Mismatch()
    #: Overridden as a method by losses that the student is deployed with.
    predict: ClassVar[Callable[..., Tensor] | None] = None
    #: Overridden as a method by losses that are fitted before training.
    calibrate: ClassVar[Callable[..., None] | None] = None
    #: Training steps from one bilevel step to the next.
    meta_interval: int = 1
    #: Large buffers that every process makes and changes alike: DistributedDataParallel need not copy them each step.
    replicated: ClassVar[tuple[str, ...]] = ()
    #: Numeric options that are read once, so that no schedule can change them.
    fixed_options: ClassVar[tuple[str, ...]] = ()

    def locations(self) -> Mapping[str, Location | Sequence[Location]]:
        """Where each located input is read: ``{"student_tokens": -1, "teacher_tokens": (0, 1)}``.

        With one location ``forward`` receives a tensor, with a sequence a tuple of tensors.
        """
        return {}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Make projectors and check geometry, from real sizes and before the optimizer exists."""

    def inputs(self) -> tuple[str, ...]:
        """The names of what ``forward`` must be given; overridden where an option decides what is read."""
        parameters = inspect.signature(self.forward).parameters.values()
        return tuple(p.name for p in parameters if p.default is p.empty)

    def needs_calibration(self) -> bool:
        """Whether `calibrate` must be called before training."""
        return False

    def meta_optimizer(self) -> Optimizer | None:
        """A new optimizer over the meta-parameters, or None where there are none."""
        return None

    def allocate(self, num_samples: int) -> None:
        """Make what has an entry per training image; sample ids are 0 to num_samples - 1."""

    def adopt_head(self, head: nn.Linear) -> None:
        """Keep the frozen copy of the teacher's classifier, pooled (B, D_t) -> logits (B, C), that `predict` needs."""
        self.head = head

    def extra_forwards(self) -> dict[str, float]:
        """Forward passes of ``student`` and ``teacher`` per training step beyond one each, for the methods page."""
        return {
            side: int(any(name.startswith(f"{SECOND_VIEW}{side}_") for name in self.inputs()))
            for side in ("student", "teacher")
        }

    def __repr__(self) -> str:
        """The call that makes this loss, from the arguments that it keeps under their own names."""
        arguments = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in arguments)})"


def register(name: str) -> Callable[[type[Loss]], type[Loss]]:
    """Class decorator that makes a loss known by a unique lower-case name.

    Raises:
        ValueError: the name is not lower case, or is taken.
        TypeError: the class is no `Loss`, or an input of its ``forward`` is not a known signal.
    """

    def decorate(cls: type[Loss]) -> type[Loss]:
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            raise TypeError(f"register('{name}'): the class must be a subclass of kdvit.losses.Loss, got {cls!r}.")
        if not name.isidentifier() or name != name.lower():
            raise ValueError(f"register: name must be a lower-case identifier, got '{name}'.")
        if name in _registry:
            raise ValueError(f"register: name '{name}' is taken by {_registry[name].__qualname__}; choose another.")
        for parameter in list(inspect.signature(cls.forward).parameters.values())[1:]:
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
                check_input(parameter.name, cls.__name__)
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def check_input(name: str, owner: str) -> None:
    """Refuse an input that is neither a signal of the student or teacher nor part of the context."""
    side, signal = split_input(name)
    if name in CONTEXT_INPUTS or (side in SIDES and signal in SIGNALS):
        return
    known = [f"{s}_{n}" for s in SIDES for n in SIGNALS] + list(CONTEXT_INPUTS)
    raise TypeError(f"{owner}: forward has an unknown input '{name}'{nearest(name, known)} Known: {', '.join(known)}.")


def split_input(name: str) -> tuple[str, str]:
    """(side, signal) of an input: ``second_student_logits`` -> ``("student", "logits")``."""
    side, _, signal = name.removeprefix(SECOND_VIEW).partition("_")
    return side, signal


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_registry)


def get(name: str) -> type[Loss]:
    """The class registered under a name.

    Raises:
        ValueError: no such name; the sentence has the nearest match.
    """
    if name not in _registry:
        hint = nearest(name, _registry) or ";"
        raise ValueError(f"unknown loss '{name}'{hint} `kdvit list losses` shows all {len(_registry)}.")
    return _registry[name]


def needs(loss: Loss, side: str) -> dict[str, Location | Sequence[Location] | None]:
    """What a loss reads of the student, or of a (or each) teacher: ``{signal: location(s) or None}``.

    A second view is read where the first is.

    Raises:
        TypeError: an input is unknown, or a located signal has no location (an error of the loss's author).
    """
    wanted: dict[str, Location | Sequence[Location] | None] = {}
    locations = loss.locations()
    inputs = loss.inputs()
    for name in inputs:
        check_input(name, type(loss).__name__)
        input_side, signal = split_input(name)
        if name in CONTEXT_INPUTS or SIDES[input_side] != side:
            continue
        first_view = name.removeprefix(SECOND_VIEW)
        if signal in LOCATED_SIGNALS and first_view not in locations:
            raise TypeError(f"{type(loss).__name__}: locations() must say where '{first_view}' is read.")
        wanted[signal] = locations.get(first_view)
    stray = [name for name in locations if name not in inputs and SECOND_VIEW + name not in inputs]
    if stray:
        raise TypeError(f"{type(loss).__name__}: locations() names {stray}, which forward does not take.")
    return wanted


def calibration_inputs(loss: Loss) -> tuple[str, ...]:
    """What `Loss.calibrate` is given; none where a loss is not calibrated.

    Raises:
        TypeError: a parameter is neither labels nor a teacher's signal that ``forward`` reads too (an error of the
            loss's author).
    """
    owner = type(loss).__name__
    if loss.calibrate is None:
        if loss.needs_calibration():
            raise TypeError(f"{owner}: a loss that needs calibration must have a method calibrate.")
        return ()
    asked = tuple(inspect.signature(loss.calibrate).parameters)
    known = ("labels", *(name for name in loss.inputs() if split_input(name)[0] == "teacher"))
    for name in asked:
        if name not in known:
            raise TypeError(f"{owner}: calibrate has an unknown input '{name}'; known here: {', '.join(known)}.")
    return asked


def reads_teacher(loss: Loss) -> bool:
    """Whether the loss needs a teacher at all."""
    return any(SIDES.get(split_input(name)[0]) == "teacher" for name in loss.inputs())


def reads_teachers(loss: Loss) -> bool:
    """Whether the loss reads all teachers together."""
    return any(split_input(name)[0] == "teachers" for name in loss.inputs())


def reads_second_view(loss: Loss) -> bool:
    """Whether the loss needs a second augmented view of every image."""
    return any(name.startswith(SECOND_VIEW) for name in loss.inputs())
