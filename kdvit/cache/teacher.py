"""A teacher whose outputs are on the disk: to a Distiller and its losses it looks like a live one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdvit.bridge import ImageBridge
from kdvit.cache.fingerprint import differences, of_images, of_teacher
from kdvit.cache.forms import Form
from kdvit.cache.manifest import CONSTANTS, REBUILD, Manifest
from kdvit.cache.shards import Rows, faults, file_fault, open_shard
from kdvit.losses.loss import SECOND_VIEW, SIDES, Loss, split_input
from kdvit.signals import CALLABLE_SIGNALS, SignalInfo
from kdvit.taps.family import Family
from kdvit.taps.reader import Request

if TYPE_CHECKING:
    from kdvit.wrappers import Teacher

#: A part of a row: name of the signal's entry and of the form's part.
PART = "{}:{}"


class StoredTeacher(nn.Module):
    """What a teacher said, in the place of the teacher: ``Distiller(StoredTeacher("caches/a"), student, losses)``.

    `kdvit.cache.build` makes the folder. The trainer loads the rows beside the images. In a loop of your own, either do
    so too::

        loader = make_loader(split, transform, ..., rows=distiller.stored_rows,
                             augmentation_epochs=distiller.augmentation_epochs)
        out = distiller(batch["image"], batch["label"], stored=batch["rows"])

    or pass ``sample_ids`` and ``progress``, and they are read in the step, of epoch int(progress.epoch).

    Sizes of all shards are checked here; flipped bytes in them are found by ``verify=True`` and by ``kdvit cache
    verify``, which read everything: too slow for every start.

    Args:
        folder: of the cache.
        verify: also compare all checksums.
        name: how errors and `describe` call it; the teacher's own by default.

    Raises:
        ValueError: there is no whole cache, or a file is missing, cut short or altered.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False, name: str | None = None) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if not self.manifest.complete:
            raise ValueError(
                f"StoredTeacher: '{folder}' must be a whole cache, and its building was stopped; run the same "
                "`kdvit cache build` command again: whole shards are kept."
            )
        self.source = Rows(self.folder, self.manifest)
        if verify:
            damaged = [f"'{self.folder / file}' {wrong}" for file, wrong in faults(self.folder, self.manifest) if wrong]
            if damaged:
                raise ValueError(f"StoredTeacher: {'; '.join(damaged)}; {REBUILD}.")
        facts = self.manifest.teacher
        self.name = name or facts["name"]
        self.stated_size = _tuple(facts["input_size"])
        self.input_size = self.stated_size
        self.takes_any_size: bool | None = facts["takes_any_size"]
        self.normalisation = _tuple(facts["normalisation"])
        #: Of the live teacher: what a stored one saves.
        self.num_parameters: int = facts["num_parameters"]
        self.num_macs: int = facts["num_macs"]
        #: top1, top5, loss and num_images of the live teacher on the test images; None where it has other classes.
        self.accuracy = self.manifest.accuracy
        class_map = self.manifest.fingerprint["teacher"]["teacher_class_map"]
        self.register_buffer("class_map", None if class_map is None else torch.tensor(class_map), persistent=False)
        self.bridge = ImageBridge()
        self._entries = {entry.key: entry for entry in self.manifest.signals}
        self._head = self._load_head()
        #: What the losses read; None before `listen`.
        self._forms: dict[Request, tuple[str, Form]] | None = None
        self.eval()

    def _load_head(self) -> nn.Linear | None:
        if not self.manifest.constants:
            return None
        path = self.folder / CONSTANTS
        wrong = file_fault(path, self.manifest.constants)  # of some megabytes, and a student may be deployed with it
        if wrong:
            raise ValueError(f"StoredTeacher: '{path}' {wrong}; {REBUILD}.")
        constants = open_shard(path)
        if "head.weight" not in constants:
            return None
        weight, bias = constants["head.weight"], constants.get("head.bias")
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        head.load_state_dict({"weight": weight} | ({"bias": bias} if bias is not None else {}))
        return head.requires_grad_(False)

    @property
    def augmentation_epochs(self) -> int | None:
        """How many epochs of augmentation training replays; None where every epoch has its own."""
        return self.manifest.augmentation_epochs

    def describe(self) -> str:
        """What is stored, in words."""
        entries = [f"{entry.key} ({entry.form})" for entry in self.manifest.signals]
        replayed = [] if self.augmentation_epochs is None else [f"{self.augmentation_epochs} epochs to replay"]
        return ", ".join([*entries, *(["head"] if self._head is not None else []), *replayed])

    def train(self, mode: bool = True) -> StoredTeacher:
        """A teacher stays in eval mode, whatever is asked."""
        return super().train(False)

    # What a Distiller asks of a teacher

    def own(self) -> StoredTeacher:
        """This one; or, where it serves a Distiller already, one more that reads the same rows."""
        if self._forms is None:
            return self
        other = copy.copy(self)
        other._modules, other._buffers = dict(self._modules), dict(self._buffers)
        other.source = copy.copy(self.source)
        other.deafen()
        other.input_size = self.stated_size
        return other

    def check_images(self, image_size: Sequence[int]) -> None:
        """Refuse a student of another input size or normalisation than the rows were made for.

        Args:
            image_size: (height, width) of the student's images.

        Raises:
            ValueError: the sentence says what differs.
        """
        seen = of_images(self.bridge, self.input_size, image_size)
        differs = differences(self.manifest.fingerprint["images"], seen)
        if differs:
            raise ValueError(
                f"StoredTeacher: '{self.folder}' must be used with the images that it was made from, but what the "
                f"teacher was shown differs: {differs}; give the student the same input size, mean and std, or build "
                "another cache."
            )

    def check_loss(self, name: str, loss: Loss, own: Sequence[Request], requests: Sequence[Request]) -> None:
        """Refuse a loss that needs more of the teacher than is stored.

        Args:
            name: of the loss in the Distiller.
            loss: it.
            own: what it reads of the teacher.
            requests: what all losses together read of it.

        Raises:
            ValueError: the sentence names the loss, what it reads and what is stored.
        """
        fault = live_fault(loss)
        if not fault and loss.predict is not None and self._head is None:
            fault = "needs the classifier"
        for request in () if fault else own:
            if not self._stores(request, requests):
                fault = f"reads {_words(request)}"
                break
        if fault:
            raise ValueError(
                f"Distiller: loss '{name}' {fault} of teacher '{self.name}', and '{self.folder}' stores "
                f"{self.describe()}; {_cure(loss)}."
            )

    def listen(self, requests: Sequence[Request]) -> dict[Request, SignalInfo]:
        """Choose what is read.

        Raises:
            ValueError: something is not stored.
        """
        forms, infos = {}, {}
        for request in requests:
            if not self._stores(request, requests):
                raise ValueError(
                    f"StoredTeacher: '{self.folder}' must store {_words(request)}, and stores {self.describe()}; "
                    "build another cache, or use the live teacher."
                )
            if request.signal == "head":
                infos[request] = SignalInfo("head", "head", (), model=self.name)
                continue
            key = self._key(request, requests)
            form = self._entries[key].make_form()
            forms[request], infos[request] = (key, form), replace(form.info, model=self.name)
        self._forms = forms
        return infos

    def deafen(self) -> None:
        """Read nothing."""
        self._forms = None

    def forward(self, images: Tensor, rows: Mapping[str, Tensor]) -> dict[Request, Any]:
        """The signals of a batch from its encoded rows, on the device of the images, which are not looked at."""
        missing = [part for part in self.parts if part not in rows or len(rows[part]) != len(images)]
        if missing:
            raise ValueError(
                f"StoredTeacher: rows must have '{missing[0]}' for the {len(images)} images of the batch; take them "
                "from a loader for this Distiller: make_loader(..., rows=distiller.stored_rows)."
            )
        signals: dict[Request, Any] = {}
        dtype = torch.promote_types(images.dtype, torch.float32)  # float64 where all is
        for request, (key, form) in (self._forms or {}).items():
            parts = {part: rows[PART.format(key, part)].to(images.device, non_blocking=True) for part in form.layout()}
            signals[request] = form.decode(parts).to(dtype)
        if self._head is not None:
            signals[Request("head")] = lambda x: self._head(x.to(self._head.weight.dtype)).to(x.dtype)
        return signals

    def classifier(self) -> nn.Linear:
        """A frozen copy of the teacher's last layer, pooled (B, D) -> logits (B, C).

        Raises:
            ValueError: it is not stored.
        """
        if self._head is None:
            raise ValueError(
                f"StoredTeacher: '{self.folder}' must store the teacher's classifier, and stores {self.describe()}; "
                "build it for the loss that needs it: kdvit cache build --loss simkd."
            )
        return copy.deepcopy(self._head)

    @property
    def model(self) -> nn.Module:
        """There is none.

        Raises:
            RuntimeError: always, in a sentence for those who wanted to run it.
        """
        raise RuntimeError(
            f"StoredTeacher: '{self.name}' is stored, and there is no model that could be run or looked at; use the "
            "live teacher here."
        )

    def predict(self, images: Tensor) -> Tensor:
        """Never, as nothing is known of other images; the test accuracy is in ``accuracy``.

        Raises:
            RuntimeError: always.
        """
        return self.model(images)

    # Rows

    @property
    def parts(self) -> list[str]:
        """The parts of a row that the losses read."""
        found = [PART.format(key, part) for key, form in (self._forms or {}).values() for part in form.layout()]
        return list(dict.fromkeys(found))  # a block may be asked for by its number and from the end

    def rows(self, sample_ids: Tensor, epoch: int) -> dict[str, Tensor]:
        """The encoded rows of these samples, for a loop that does not load them beside the images."""
        if self.augmentation_epochs is not None:
            epoch %= self.augmentation_epochs
        return self.source.read([(epoch, sample) for sample in sample_ids.tolist()], self.parts)

    def some_rows(self, count: int) -> dict[str, Tensor]:
        """Any rows, for the Distiller's rehearsal."""
        return self.source.first(count, self.parts)

    # What must be equal

    def check_teacher(self, teacher: Teacher) -> None:
        """Refuse a live teacher that is not the one that was stored.

        Raises:
            ValueError: the sentence says what differs.
        """
        self._check("teacher", of_teacher(teacher), "store this teacher: kdvit cache build, in another folder")

    def is_of(self, teacher: Teacher) -> bool:
        """Whether a live teacher is the one that was stored."""
        return not differences(self.manifest.fingerprint["teacher"], of_teacher(teacher))

    def check_job(self, job: Mapping[str, Any], num_epochs: int) -> None:
        """Refuse a training run whose images are not those that were stored.

        Args:
            job: `kdvit.cache.fingerprint.of_job` of the run.
            num_epochs: how many epochs it trains.

        Raises:
            ValueError: the sentence says what differs.
        """
        self._check("job", job, "train as it was built, or build another cache for this job")
        if self.augmentation_epochs is None and num_epochs > self.manifest.num_epochs:
            raise ValueError(
                f"StoredTeacher: '{self.folder}' must have the {num_epochs} epochs of this run, and has "
                f"{self.manifest.num_epochs}; build the others (the same command with more --epochs), or replay those "
                "that are there (--augmentation-epochs)."
            )

    def _check(self, part: str, found: Mapping[str, Any], cure: str) -> None:
        differs = differences(self.manifest.fingerprint[part], found)
        if differs:
            raise ValueError(
                f"StoredTeacher: '{self.folder}' must be used with what it was made of, but {differs}; {cure}."
            )

    def _key(self, request: Request, requests: Sequence[Request]) -> str:
        return key_of(request, requests, self.manifest.teacher["num_blocks"], self.name)

    def _stores(self, request: Request, requests: Sequence[Request]) -> bool:
        if request.signal in CALLABLE_SIGNALS:
            return request.signal == "head" and self._head is not None
        return self._key(request, requests) in self._entries


class StoredRows:
    """What a loader calls for the rows of a batch, of all stored teachers: {number of the teacher: {part: row}}.

    Args:
        teachers: stored teachers by their place among all.
    """

    def __init__(self, teachers: Mapping[int, StoredTeacher]) -> None:
        self.sources = {str(number): (teacher.source, teacher.parts) for number, teacher in teachers.items()}

    def __call__(self, keys: Sequence[tuple[int, int]]) -> list[dict[str, dict[str, Tensor]]]:
        """One entry for each (epoch, sample id)."""
        batches = {number: source.read(keys, parts) for number, (source, parts) in self.sources.items()}
        return [
            {number: {part: values[place] for part, values in parts.items()} for number, parts in batches.items()}
            for place in range(len(keys))
        ]


def key_of(request: Request, requests: Sequence[Request], num_blocks: int | None, name: str) -> str:
    """The name of an entry, "tokens@3": negative indices and shares of the depth lead to the block that they mean.

    Args:
        request: what is read.
        requests: all that is read of the teacher: beside the logits of a distillation head, ``logits`` are the class
            head's alone, else the mean of both.
        num_blocks: of the teacher; None where an index names nothing.
        name: of the teacher.
    """
    at = request.location
    if isinstance(at, (int, float)) and num_blocks is not None:
        at = Family(nn.Identity(), name).index(at, num_blocks)
    splits = request.signal == "logits" and any(r.signal in ("dist_logits", "dense_dist_logits") for r in requests)
    signal = "logits of the class head" if splits else request.signal
    return signal if at is None else f"{signal}@{at}"


def live_fault(loss: Loss) -> str:
    """What a loss needs of a teacher that no store has, in words; "" for nothing."""
    of_teacher = [name for name in loss.inputs() if SIDES.get(split_input(name)[0]) == "teacher"]
    if any(name.startswith(SECOND_VIEW) for name in of_teacher):
        return "reads a second view"
    if any(split_input(name)[1] == "tail" for name in of_teacher):
        return "reads the tail (the rest of the model, as a function)"
    return "must be calibrated with signals for held-out images" if loss.needs_calibration() else ""


def _cure(loss: Loss) -> str:
    if live_fault(loss):
        return "use the live teacher"
    method = loss.name or type(loss).__name__.lower()
    return f"build a cache for this loss (kdvit cache build --loss {method} with its options), or use the live teacher"


def _words(request: Request) -> str:
    return request.signal if request.location is None else f"{request.signal} at {request.location!r}"


def _tuple(value: Any) -> Any:
    """JSON knows lists alone."""
    return tuple(map(_tuple, value)) if isinstance(value, (list, tuple)) else value
