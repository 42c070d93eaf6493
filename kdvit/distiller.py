"""Teacher + student + losses -> one number, and its named parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import register_pytree_node

from kdvit.bridge import ImageBridge
from kdvit.cache.teacher import StoredRows, StoredTeacher
from kdvit.deployment import DeployedStudent
from kdvit.losses.each_teacher import EachTeacher
from kdvit.losses.factory import make
from kdvit.losses.loss import (
    SECOND_VIEW,
    SIDES,
    Loss,
    calibration_inputs,
    needs,
    reads_second_view,
    reads_teacher,
    reads_teachers,
    split_input,
)
from kdvit.losses.precision import at_least_float32
from kdvit.models import uncompiled
from kdvit.signals import CLASS_SIGNALS, ModelInfo, Progress, SignalInfo
from kdvit.taps.probing import probe
from kdvit.taps.reader import Request, model_info, pick, requests_of
from kdvit.wrappers import Student, Teacher

if TYPE_CHECKING:
    from kdvit.checkup import Checkup, Plan
    from kdvit.data import ImageData

Weight = float | Callable[[Progress], float]
TaskLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class DistillerOutput:
    """One step's result.

    Args:
        loss: what to call ``backward()`` on.
        losses: every term by name, unweighted and without a graph: ``task``, ``dkd``, ``vitkd.mimic``, ...
        logits: the student's logits, without a graph, for metrics. Own objectives go into ``task_loss``.
        weighted: every term by name, times its weight and with its graph: they sum to ``loss``, and the graph is
            the same one, which ``loss.backward()`` frees. For `kdvit.training.gradient_share`. Empty in a compiled
            step.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    logits: Tensor | None
    weighted: dict[str, Tensor]


# FSDP2 looks for the tensors that a backward pass starts from in what the forward pass returned. torch 2.14 looks into
# dataclasses; releases before looked into pytrees alone, and would share out no gradient.
register_pytree_node(
    DistillerOutput, lambda output: (list(vars(output).values()), None), lambda x, _: DistillerOutput(*x)
)


class Distiller(nn.Module):
    """Distils a teacher into a student: one module whose forward does everything, so that DDP sees all of it.

    loss = task_weight * task_loss(logits, labels) + sum_i weight_i * loss_i(...)

    Its parameters are the student's and the losses' (projectors); the teacher is in neither ``parameters()`` nor
    ``state_dict()``, but moves with ``.to()``.

    Args:
        teacher: a `Teacher`, any nn.Module, or a model name; a `kdvit.cache.StoredTeacher`; None where no loss needs
            one. A list of them: losses of one teacher are then averaged over all (`kdvit.losses.EachTeacher`), those of
            several read all together.
        student: a `Student`, any nn.Module, or a model name.
        losses: each a `Loss`, a registered name, or a pair (weight, loss). A weight is a number, or a function
            of `kdvit.signals.Progress`.
        task_loss: ``"cross_entropy"``, None, or a function (logits, labels) -> scalar.
        task_weight: weight of the task loss.

    Inputs:
        images: (B, C, H, W), normalised for the student.
        labels: (B,) class ids, or (B, C) probabilities (mixup); may be left out where nothing needs them.
        second_images: (B, C, H, W), another augmentation of the same images, where a loss reads a second view
            (`reads_second_view`).
        sample_ids: (B,) whole numbers that name the images, where a loss asks for them.
        progress: where training stands, where a weight or a loss follows a schedule.
        stored: what the loader gives of stored teachers, see `stored_rows`; where it is left out, they read their rows
            themselves, by ``sample_ids`` and the epoch of ``progress``.

    Raises:
        ValueError: anything that does not fit together; all of it is checked here, before the first batch.

    Example:
        >>> import kdvit, torch
        >>> teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        >>> distiller = Distiller(teacher, Student(student, input_size=(3, 2, 2)), losses=[(0.5, "kd")])
        >>> out = distiller(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 3]))
        >>> sorted(out.losses)
        ['kd', 'task']
    """

    def __init__(
        self,
        teacher: Teacher | StoredTeacher | nn.Module | str | Sequence[Teacher | StoredTeacher | nn.Module | str] | None,
        student: Student | nn.Module | str,
        losses: Sequence[Loss | str | tuple[Weight, Loss | str]],
        task_loss: str | TaskLoss | None = "cross_entropy",
        task_weight: Weight = 1.0,
    ) -> None:
        super().__init__()
        student = student if isinstance(student, Student) else Student(student)
        teachers = _listed(teacher)
        for each in teachers:
            _refuse_shared(each, student)  # before Teacher freezes the weights that it would share
        teachers = [each if isinstance(each, (Teacher, StoredTeacher)) else Teacher(each) for each in teachers]
        self.student = student.own()
        # In a tuple nn.Module does not see them: no parameters, no checkpoint entries, nothing for DDP to wrap.
        self.teachers = tuple(each.own() for each in teachers)
        self.task_loss = _task_loss(task_loss)
        self.weights: dict[str, Weight] = {"task": _checked_weight("task", task_weight)}
        self._compiled_step: Callable[..., DistillerOutput] | None = None
        self.losses = nn.ModuleDict()
        if not isinstance(losses, (Loss, str, list, tuple)):
            raise TypeError(
                f"Distiller: losses must be a list of losses or (weight, loss) pairs, got {type(losses).__name__}; "
                'write losses=["kd", (0.5, "vitkd")].'
            )
        for item in [losses] if isinstance(losses, (Loss, str)) else losses:
            self._add(item)
        self._check_objective()
        for loss in self.losses.values():
            calibration_inputs(loss)  # refuses what calibrate cannot be given
        #: Which models some loss reads a second view of.
        self.second_sides = {
            SIDES[split_input(name)[0]]
            for loss in self.losses.values()
            for name in loss.inputs()
            if name.startswith(SECOND_VIEW)
        }
        self.needs = {
            side: {name: needs(loss, side) for name, loss in self.losses.items()} for side in ("student", "teacher")
        }
        self._check_pairs()
        #: The model to evaluate and to ship: the plain student, or where a loss predicts, the student with that loss.
        self._keep_deployable(self.student.model)
        try:
            self._listen()
            self._deploy()
            self._rehearse()
        except Exception:
            self._deafen()
            raise

    # Construction

    def _add(self, item: Loss | str | tuple[Weight, Loss | str]) -> None:
        weight, loss = item if isinstance(item, tuple) and len(item) == 2 else (1.0, item)
        loss = make(loss) if isinstance(loss, str) else loss
        if not isinstance(loss, Loss):
            raise TypeError(
                f"Distiller: losses must hold Loss objects, registered names or (weight, loss) pairs, "
                f"got {type(loss).__name__}; write losses=[(0.5, kdvit.losses.KD())]."
            )
        if any(loss is other for other in self.losses.values()):
            raise ValueError(f"Distiller: losses must be objects of their own, got one {loss!r} twice; make another.")
        if len(self.teachers) > 1 and reads_teacher(loss) and not reads_teachers(loss):
            loss = EachTeacher(loss)
        name = base = loss.name or type(loss).__name__.lower()
        count = 1
        while name in self.weights:
            count += 1
            name = f"{base}_{count}"
        self.losses[name] = loss
        self.weights[name] = _checked_weight(name, weight)

    def _check_objective(self) -> None:
        if not self.losses and self.task_loss is None:
            raise ValueError("Distiller: there must be something to minimise, got no loss and task_loss=None; add one.")
        replayed = {each.augmentation_epochs for each in self._stored.values()}
        if len(replayed) > 1:
            raise ValueError(
                f"Distiller: stored teachers must replay equally many epochs, got {sorted(map(str, replayed))}; build "
                "them with the same --augmentation-epochs."
            )
        readers = [name for name, loss in self.losses.items() if reads_teacher(loss)]
        if readers and not self.teachers:
            raise ValueError(f"Distiller: loss '{readers[0]}' reads the teacher, got teacher=None; pass a teacher.")

    def _check_pairs(self) -> None:
        student = self.student
        sizes = (size for size in (student.input_size, *(teacher.input_size for teacher in self.teachers)) if size)
        student.input_size = next(sizes, None)
        if student.input_size is None:
            raise ValueError(
                f"Student: the input size of '{student.name}' is not known; "
                "pass Student(model, input_size=(channels, height, width))."
            )
        for teacher in self.teachers:
            teacher.bridge = ImageBridge.between(student, teacher)
            if teacher.input_size is None or teacher.takes_any_size:
                channels = teacher.bridge.channels or student.input_size[0]
                teacher.input_size = (channels, *student.input_size[1:])

    def _listen(self) -> None:
        """Tap all models, then let every loss build its projectors from what they really give."""
        ours = self._requests("student")
        if self.task_loss is not None:
            ours.append(Request("logits"))
        student = self.student.listen(ours)
        classes = student.get(Request("logits")) or student.get(Request("dist_logits"))
        self.num_classes = classes.dim if classes is not None else None
        #: What each model gives: of the student, and of each teacher.
        self.signals = {"student": [student], "teacher": []}
        for teacher in self.teachers:
            self._check_stored(teacher)
            signals = teacher.listen(self._requests("teacher"))
            taught = signals.get(Request("logits"))
            if classes is not None and taught is not None and classes.dim != taught.dim:
                raise ValueError(
                    f"Distiller: teacher '{taught.model}' teaches {taught.dim} classes but student '{classes.model}' "
                    f"has {classes.dim}; give them the same classes, or pass Teacher(model, class_map=[...]) with the "
                    "teacher's class for each of the student's."
                )
            self.signals["teacher"].append(signals)
        for name, loss in self.losses.items():
            loss.build(*self._infos(name))
            # Projectors follow the student: a Distiller may be built from models that are on a device already.
            loss.to(self._device)

    def _check_stored(self, teacher: Teacher | StoredTeacher) -> None:
        if isinstance(teacher, StoredTeacher):
            teacher.check_images(self.student.input_size[1:])
            for name, wanted in self.needs["teacher"].items():
                own = [request for each in wanted.items() for request in requests_of(*each)]
                teacher.check_loss(name, self.losses[name], own, self._requests("teacher"))

    def _infos(self, name: str) -> tuple[ModelInfo, ModelInfo | tuple[ModelInfo, ...]]:
        """What a loss is built for."""
        (student,), ours = self.signals["student"], self.needs["student"][name]
        teachers = tuple(
            model_info(teacher.name, _num_classes(signals), self.needs["teacher"][name], signals, teacher.input_size)
            for teacher, signals in zip(self.teachers, self.signals["teacher"], strict=True)
        )
        one = teachers[0] if teachers else ModelInfo("teacher")
        of_all = reads_teachers(self.losses[name])
        info = model_info(self.student.name, self.num_classes, ours, student, self.student.input_size)
        return info, teachers if of_all else one

    def _deploy(self) -> None:
        """Give the loss that the student is deployed with, if there is one, the teacher's classifier."""
        predicting = [name for name, loss in self.losses.items() if loss.predict is not None]
        if not predicting:
            return
        if len(predicting) > 1 or len(self.teachers) > 1:
            got = f"{' and '.join(predicting)} with {len(self.teachers)} teacher(s)"
            raise ValueError(
                "Distiller: at most one loss may bring the classifier that the student is deployed with, from one "
                f"teacher, got {got}; drop the others."
            )
        loss, wanted = self.losses[predicting[0]], self.needs["student"][predicting[0]]
        loss.adopt_head(self.teachers[0].classifier().to(next(self.student.parameters()).device))
        self._keep_deployable(DeployedStudent(self.student, loss, wanted, self._infos(predicting[0])))

    def _keep_deployable(self, model: nn.Module) -> None:
        # Behind nn.Module's back: all its weights are the student's and the loss's.
        object.__setattr__(self, "_deployable", model)

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters(), torch.zeros(())).device

    def _requests(self, side: str) -> list[Request]:
        return [
            request
            for wanted in self.needs[side].values()
            for signal, location in wanted.items()
            for request in requests_of(signal, location)
        ]

    def allocate(self, num_samples: int) -> None:
        """Tell the losses how many training images there are, where a loss keeps something for each (CRD).

        The Trainer does so. Call it before the optimizer is made, and use sample ids from 0 to ``num_samples`` - 1.
        """
        for loss in self.losses.values():
            loss.allocate(num_samples)
            loss.to(self._device)

    def _rehearse(self) -> None:
        """Run every loss once on blank images, so that what does not fit fails now; find what no loss reaches.

        A feature-only objective leaves parameters without a gradient (the head, what lies behind the last tap).
        DDP would wait for them on the second step, so it is told to leave them alone. Zero gradients instead
        would let weight decay shrink them, here but not in one process.
        """
        buffers = {key: value.clone() for key, value in self.losses.state_dict().items()}
        modes = {module: module.training for module in self.modules()}
        self.eval()
        parameter = next(self.student.parameters(), torch.zeros(()))
        labels = self._blank_labels(2, parameter.device)
        sample_ids = torch.arange(2, device=parameter.device)
        stored = {str(number): teacher.some_rows(2) for number, teacher in self._stored.items()}
        reached: set[int] = set()

        def run(images: Tensor) -> None:
            with torch.enable_grad():
                second = images if self.reads_second_view else None
                out = self(
                    images, labels, second_images=second, sample_ids=sample_ids, progress=Progress(), stored=stored
                )
                reached.update(_leaves(out.loss))

        try:
            probe(run, self.student.model, self.student.input_size)
        finally:
            for module, training in modes.items():
                module.training = training
            self.losses.load_state_dict(buffers)
        if not any(id(p) in reached for p in self.student.parameters()):
            raise ValueError(
                f"Distiller: the losses must reach a parameter of '{self.student.name}' that requires a gradient, got "
                "none; call student.requires_grad_(True), or choose losses that read the student."
            )
        # A tied parameter has several names, and DDP asks for each of them.
        trainable = [(name, p) for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad]
        #: Names of trainable parameters that no loss reaches.
        self.parameters_without_gradient = [name for name, p in trainable if id(p) not in reached]
        replicated = [
            f"losses.{path}.{name}"
            for path, module in self.losses.named_modules()
            for name in getattr(module, "replicated", ())
        ]
        self._ddp_params_and_buffers_to_ignore = [*self.parameters_without_gradient, *replicated]

    def _blank_labels(self, batch_size: int, device: torch.device) -> Tensor:
        """Class ids; or a row of class shares per image where the user's task loss takes nothing else (BCE)."""
        ids = torch.zeros(batch_size, dtype=torch.long, device=device)
        if self.task_loss is None or self.task_loss is cross_entropy:
            return ids
        shares = F.one_hot(ids, self.num_classes).float()
        try:
            self.task_loss(torch.zeros_like(shares), ids)
        except Exception:  # what is wrong with both kinds of labels is raised by the rehearsal itself
            return shares
        return ids

    def _deafen(self) -> None:
        for wrapper in (self.student, *self.teachers):
            wrapper.deafen()

    @property
    def teacher(self) -> Teacher | StoredTeacher | None:
        """The teacher, the first of several; None where there is none."""
        return self.teachers[0] if self.teachers else None

    @property
    def _stored(self) -> dict[int, StoredTeacher]:
        return {number: each for number, each in enumerate(self.teachers) if isinstance(each, StoredTeacher)}

    @property
    def stored_rows(self) -> StoredRows | None:
        """What a loader asks for the rows of stored teachers, ``make_loader(..., rows=distiller.stored_rows)``.

        The batch's ``"rows"`` are then the step's ``stored``. None where no teacher is stored.
        """
        return StoredRows(self._stored) if self._stored else None

    @property
    def augmentation_epochs(self) -> int | None:
        """How many epochs of augmentation stored teachers ask to replay, for `kdvit.data.make_loader`; None for all."""
        return next((teacher.augmentation_epochs for teacher in self._stored.values()), None)

    @property
    def reads_second_view(self) -> bool:
        """Whether some loss reads a second view: the step then needs ``second_images``."""
        return bool(self.second_sides)

    # The step

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        second_images: Tensor | None = None,
        sample_ids: Tensor | None = None,
        progress: Progress | None = None,
        stored: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> DistillerOutput:
        self._check_batch(images, labels)
        self._check_calibrated()
        weights = {
            name: self._weight(name, progress) for name in self.weights if name != "task" or self.task_loss is not None
        }
        step = self._compiled_step or self._step
        return step(images, labels, weights, second_images, sample_ids, progress, stored)

    def compile(self, **options: Any) -> None:
        """Compile the step in place, with options of `torch.compile` (``fullgraph=True``, ``mode``, ``backend``).

        Names of weights stay what they are. Loss weights that follow a schedule are worked out before the compiled
        part: each costs one more compilation, when it first changes.
        """
        self._compiled_step = torch.compile(self._step, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_compiled_step": None}  # it belongs to this object's weights

    def _step(
        self,
        images: Tensor,
        labels: Tensor | None,
        weights: Mapping[str, float],
        second_images: Tensor | None,
        sample_ids: Tensor | None,
        progress: Progress | None,
        stored: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> DistillerOutput:
        taught = self._taught(images, sample_ids, progress, stored)
        logits, learned = self.student(images)
        views = [{"student": [learned], "teacher": taught}]
        if self.reads_second_view:
            views.append(self._second_view(images, second_images))
        context = {"labels": labels, "images": images, "sample_ids": sample_ids, "progress": progress}

        terms: dict[str, Tensor] = {}
        weighted: dict[str, Tensor] = {}
        if self.task_loss is not None:
            terms["task"] = _parts("task", self.task_loss(learned[Request("logits")], labels))["task"]
            weighted["task"] = weights["task"] * terms["task"]
        for name, loss in self.losses.items():
            for part, scalar in _parts(name, loss(**self._inputs(name, loss, views, context))).items():
                terms[part], weighted[part] = scalar, weights[name] * scalar
        losses = {name: value.detach() for name, value in terms.items()}
        return DistillerOutput(
            loss=sum(weighted.values()),
            losses=losses,
            logits=logits.detach() if logits is not None else None,
            # Several outputs with a graph do not survive torch.compile, which hands equal tensors (1.0 * x) out as one.
            weighted={} if torch.compiler.is_compiling() else weighted,
        )

    def _taught(
        self,
        images: Tensor,
        sample_ids: Tensor | None,
        progress: Progress | None,
        stored: Mapping[str, Mapping[str, Tensor]] | None,
    ) -> list[dict[Request, Any]]:
        """The signals of each teacher."""
        if self._stored and stored is None:
            if sample_ids is None or progress is None:
                raise ValueError(
                    "Distiller: a stored teacher needs to know which rows are asked for; call distiller(..., "
                    'stored=batch["rows"]), or give sample_ids= and progress=.'
                )
            stored = {str(n): each.rows(sample_ids, int(progress.epoch)) for n, each in self._stored.items()}
        return [
            teacher(images, stored[str(number)]) if isinstance(teacher, StoredTeacher) else teacher(images)
            for number, teacher in enumerate(self.teachers)
        ]

    def _second_view(self, images: Tensor, second_images: Tensor | None) -> dict[str, list[Mapping[Request, Any]]]:
        if second_images is None:
            reader = next(name for name, loss in self.losses.items() if reads_second_view(loss))
            raise ValueError(
                f"Distiller: loss '{reader}' reads a second view, got none; call distiller(..., second_images=...) "
                "with another augmentation of the same images."
            )
        if second_images.shape != images.shape:
            raise ValueError(
                f"Distiller: second_images must have the shape of images, {tuple(images.shape)}, got "
                f"{tuple(second_images.shape)}; augment the same images once more."
            )
        return {
            "student": [self.student(second_images)[1]] if "student" in self.second_sides else [],
            "teacher": [teacher(second_images) for teacher in self.teachers] if "teacher" in self.second_sides else [],
        }

    def _inputs(
        self, name: str, loss: Loss, views: Sequence[Mapping[str, Sequence[Mapping[Request, Any]]]], context: Mapping
    ) -> dict[str, Any]:
        inputs = {}
        for parameter in loss.inputs():
            side, signal = split_input(parameter)
            if parameter in context:
                inputs[parameter] = self._context(name, parameter, context)
            elif parameter == "rerun_student":
                inputs[parameter] = lambda images: self._student_inputs(name, images)
            else:
                view, location = views[parameter.startswith(SECOND_VIEW)], self.needs[SIDES[side]][name][signal]
                values = tuple(pick(signal, location, signals) for signals in view[SIDES[side]])
                inputs[parameter] = values if side == "teachers" else values[0]
        return inputs

    def _student_inputs(self, name: str, images: Tensor) -> dict[str, Any]:
        """What a loss reads of the student, for other images than the batch's."""
        _, signals = self.student(images)
        wanted = self.needs["student"][name].items()
        return {f"student_{signal}": pick(signal, location, signals) for signal, location in wanted}

    def _context(self, name: str, parameter: str, context: Mapping) -> Any:
        if context[parameter] is None:
            raise ValueError(f"Distiller: loss '{name}' needs {parameter}; call distiller(..., {parameter}=...).")
        return context[parameter]

    def _weight(self, name: str, progress: Progress | None) -> float:
        weight = self.weights[name]
        if not callable(weight):
            return weight
        if progress is None:
            raise ValueError(
                f"Distiller: the weight of '{name}' is a function of Progress, got none; call "
                "distiller(images, labels, progress=kdvit.Progress(step=..., total_steps=...))."
            )
        return weight(progress)

    def _check_calibrated(self) -> None:
        waiting = [name for name, loss in self.losses.items() if loss.needs_calibration()] if self.training else []
        if waiting:
            raise RuntimeError(
                f"Distiller: loss '{waiting[0]}' must be calibrated before training; call "
                "kdvit.calibrate(distiller, batches) with batches of held-out images and labels."
            )

    def _check_batch(self, images: Tensor, labels: Tensor | None) -> None:
        size = self.student.input_size
        if images.ndim != 4 or images.shape[1] != size[0] or not images.is_floating_point():
            raise ValueError(
                f"Distiller: images must be (B, {size[0]}, H, W) of floats, got {tuple(images.shape)} {images.dtype}; "
                "stack a batch of normalised images."
            )
        if self.student.takes_any_size is False and tuple(images.shape[2:]) != tuple(size[1:]):
            raise ValueError(
                f"Distiller: '{self.student.name}' takes {size[1]}x{size[2]} images, got "
                f"{images.shape[2]}x{images.shape[3]}; resize them, or make the student with img_size="
                f"{tuple(images.shape[2:])}."
            )
        if labels is None:
            if self.task_loss is not None:
                raise ValueError("Distiller: the task loss needs labels; pass them, or set task_loss=None.")
            return
        hard = labels.ndim == 1 and not labels.is_floating_point()
        soft = labels.ndim == 2 and labels.is_floating_point()
        if not (hard or soft) or len(labels) != len(images):
            raise ValueError(
                f"Distiller: labels must be (B,) class ids or (B, C) probabilities for B={len(images)}, got "
                f"{tuple(labels.shape)} {labels.dtype}; check the data loader."
            )
        if soft and self.num_classes is not None and labels.shape[1] != self.num_classes:
            raise ValueError(
                f"Distiller: soft labels must have C={self.num_classes} classes, got {labels.shape[1]}; "
                "make them for the student's classes."
            )
        # Reading values of a CUDA tensor would stall the GPU on every step; the Trainer checks the data set instead.
        if hard and labels.device.type == "cpu" and self.num_classes is not None and not torch.compiler.is_compiling():
            if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
                raise ValueError(
                    f"Distiller: labels must be in 0..{self.num_classes - 1}, got {int(labels.min())}.."
                    f"{int(labels.max())}; check the data's classes or the student's num_classes."
                )

    # What users take away

    def student_state_dict(self) -> dict[str, Tensor]:
        """The student's weights alone; they load strictly into the plain model."""
        return uncompiled(self.student.model).state_dict()

    @property
    def deployable(self) -> nn.Module:
        """The model to evaluate and to ship, images -> logits: the plain student model.

        With a loss that the student is deployed with (`SimKD`, `PromptKD`), a `kdvit.deployment.DeployedStudent`: the
        student, that loss's projector and a copy of the teacher's classifier, without the teacher. It shares its
        weights with this Distiller; `kdvit.save_model` saves it whole.
        """
        return self._deployable

    @property
    def trains_classifier(self) -> bool:
        """Whether the student's accuracy means anything: a feature-only objective leaves its classifier as it was."""
        read = [split_input(name) for loss in self.losses.values() for name in loss.inputs()]
        reads_logits = any(side == "student" and signal in CLASS_SIGNALS for side, signal in read)
        return self.task_loss is not None or reads_logits or self.deployable is not self.student.model

    def no_weight_decay(self) -> set[str]:
        """Names that timm's optimizer factory leaves without weight decay: what the student says, and mask tokens."""
        own = getattr(self.student.model, "no_weight_decay", set)()
        return {f"student.model.{name}" for name in own} | {
            name for name, _ in self.named_parameters() if name.endswith("mask_token")
        }

    def describe(self) -> str:
        """A page of text: which signal comes from where, projectors, bridges, parameters without a gradient."""
        from kdvit.description import describe

        return describe(self)

    def check(
        self,
        batches: Iterable[Any],
        *,
        num_batches: int = 5,
        sample: Iterable[Any] | None = None,
        data: ImageData | None = None,
        plan: Plan | None = None,
    ) -> Checkup:
        """Look the coming training over on a few batches, (images, labels) or dicts of a loader; nothing is changed.

        ``print`` the result, and ask ``.ok``: see `kdvit.checkup.check`, which has the arguments in full.
        """
        from kdvit.checkup import check

        return check(self, batches, num_batches=num_batches, sample=sample, data=data, plan=plan)

    def _apply(self, fn: Callable, recurse: bool = True) -> Distiller:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _listed(teacher: Teacher | StoredTeacher | nn.Module | str | Sequence[Teacher | nn.Module | str] | None) -> list:
    """The teachers as a list."""
    if teacher is None:
        return []
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    # A name is equal to itself; another wrapper around the same model, or another reader of a folder, teaches the same.
    models = [
        each.model if isinstance(each, Teacher) else each.folder if isinstance(each, StoredTeacher) else each
        for each in teachers
    ]
    if not teachers or any(each in models[:index] for index, each in enumerate(models)):
        got = "none" if not teachers else "one of them twice"
        raise ValueError(f"Distiller: the list of teachers must name different ones, got {got}; name each once.")
    return teachers


def _num_classes(signals: Mapping[Request, SignalInfo]) -> int | None:
    logits = signals.get(Request("logits"))
    return logits.dim if logits is not None else None


def _task_loss(task_loss: str | TaskLoss | None) -> TaskLoss | None:
    if task_loss is None or callable(task_loss):
        return task_loss
    if task_loss != "cross_entropy":
        raise ValueError(
            f"Distiller: task_loss must be 'cross_entropy', None or a function of (logits, labels), got {task_loss!r}; "
            "pass one of them."
        )
    return cross_entropy


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32, for class ids (B,) or probabilities (B, C)."""
    logits = at_least_float32(logits)
    return F.cross_entropy(logits, labels.to(logits.dtype) if labels.is_floating_point() else labels.long())


def _checked_weight(name: str, weight: Weight) -> Weight:
    if callable(weight):
        return weight
    cure = "write task_weight=0.5" if name == "task" else "write (0.5, loss)"
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise TypeError(
            f"Distiller: the weight of '{name}' must be a number or a function of Progress, got {weight!r}; {cure}."
        )
    if not isfinite(weight):
        raise ValueError(f"Distiller: the weight of '{name}' must be finite, got {weight}; {cure}.")
    return float(weight)


def _refuse_shared(teacher: Teacher | nn.Module | str | None, student: Student) -> None:
    model = teacher.model if isinstance(teacher, Teacher) else teacher
    if not isinstance(model, nn.Module):
        return
    own = {id(parameter) for parameter in student.model.parameters()}
    if model is student.model or any(id(parameter) in own for parameter in model.parameters()):
        raise ValueError(
            "Distiller: the teacher must be another model than the student, got one that shares its parameters; "
            "pass copy.deepcopy(model) to let a model teach itself."
        )


def _parts(name: str, value: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a loss returned, by the names of its parts."""
    parts = {name: value}
    if isinstance(value, Mapping):
        parts = {f"{name}.{part}": scalar for part, scalar in value.items()}
    for part, scalar in parts.items():
        if not isinstance(scalar, Tensor) or scalar.ndim != 0:
            got = f"shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else type(scalar).__name__
            raise TypeError(f"Distiller: loss '{part}' must return a scalar tensor, got {got}; take its mean or sum.")
    return parts


def _leaves(loss: Tensor) -> set[int]:
    """Ids of the parameters that a graph reaches.

    Raises:
        ValueError: reentrant checkpointing hides the parameters inside from the graph, and from DDP.
    """
    seen, found, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise ValueError(
                "Student: activation checkpointing must keep the graph, got use_reentrant=True; "
                "use use_reentrant=False."
            )
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(child for child, _ in node.next_functions)
    return found
