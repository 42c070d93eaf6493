"""Run a teacher once over the images of a training job, and store what the losses read of it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from kdvit.cache.fingerprint import differences, of_images, of_job, of_teacher
from kdvit.cache.forms import Form, Projected, choose_forms
from kdvit.cache.manifest import CONSTANTS, NAME, Manifest, Shard, Stored
from kdvit.cache.shards import SAMPLE_ID, open_shard, size_fault, write_shard
from kdvit.cache.teacher import PART, key_of, live_fault
from kdvit.cost import num_macs, num_parameters
from kdvit.data import BatchMixer, EpochBatchSampler, ImageData, ReplayableDataset, TransformSettings, make_loader
from kdvit.distiller import Distiller
from kdvit.files import WRITE_ERRORS, lock, sha256, whole_file, why
from kdvit.signals import CALLABLE_SIGNALS
from kdvit.taps.reader import Request
from kdvit.training.display import Display
from kdvit.training.evaluation import evaluate
from kdvit.training.fidelity import teacher_prediction
from kdvit.training.preparation import make_accelerator, split_of, transform_for
from kdvit.training.settings import Training
from kdvit.wrappers import Teacher

#: What each process notes of the shards that it wrote, until they are in the manifest.
_NOTES = "building-{}.jsonl"
#: Of a shard, also where they are small: processes share out shards, and one that is killed loses what it had of one.
MAX_ROWS = 2**16
#: Held by the command that builds.
_LOCK = ".lock"
#: What a process leaves that is killed before there is a manifest.
_REMAINS = {_LOCK, CONSTANTS, *(f".{name}.tmp" for name in (CONSTANTS, NAME))}
#: Epoch and number of a shard.
Unit = tuple[int, int]


def build(
    folder: str | Path,
    distiller: Distiller,
    data: ImageData,
    settings: Training,
    *,
    transform: TransformSettings | None = None,
    form: str | Sequence[str] = "fp16",
    augmentation_epochs: int | None = None,
    shard_mib: float = 256,
    quiet: bool = False,
) -> list[Path]:
    """Store what the losses of a Distiller read of its teacher, for every image of every epoch of a training job.

    All arguments but the last are those that the training will get. A building that was stopped goes on where it was;
    one that is whole is checked, and damaged shards are made anew. Several processes (torchrun, accelerate launch)
    share out the shards.

    Args:
        folder: made if missing. Of several live teachers each gets a folder of its own in it: teacher-1, teacher-2.
        distiller: with the live teacher, a student of the size and normalisation to come, and the losses.
        data: that will be trained on.
        settings: of the training.
        transform: as for `kdvit.Trainer`.
        form: of all signals that it suits, or ``SIGNAL=FORM``, or several of these; see `kdvit.cache.forms`.
        augmentation_epochs: store so many epochs alone, which training replays again and again; None for all.
        shard_mib: size of a shard.
        quiet: show nothing.

    Returns:
        The folders, for `StoredTeacher`.

    Raises:
        ValueError: a loss needs more of a teacher than can be stored, the cache would not fit onto the disk, the
            folder holds another cache, a form does not suit a signal.
        RuntimeError: the disk is full (what is whole is kept), or the teacher gives NaN.
    """
    accelerator = make_accelerator(replace(settings, trackers=()), folder)
    builders = plan(
        folder, distiller, data, settings, accelerator, transform=transform, form=form,
        augmentation_epochs=augmentation_epochs, shard_mib=shard_mib,
    )  # fmt: skip
    check_space(folder, builders)
    for builder in builders:
        builder.run(show=accelerator.is_main_process and not quiet)
    return [builder.folder for builder in builders]


def plan(
    folder: str | Path,
    distiller: Distiller,
    data: ImageData,
    settings: Training,
    accelerator: Accelerator,
    *,
    transform: TransformSettings | None = None,
    form: str | Sequence[str] = "fp16",
    augmentation_epochs: int | None = None,
    shard_mib: float = 256,
) -> list[Builder]:
    """A `Builder` for each live teacher; see `build`. Nothing is written yet."""
    live = [number for number, teacher in enumerate(distiller.teachers) if isinstance(teacher, Teacher)]
    if not any(distiller.signals["teacher"][number] for number in live):
        raise ValueError(
            "cache: there must be a live teacher that some loss reads, got none; name the teacher and the losses."
        )
    for name, loss in distiller.losses.items():
        fault = live_fault(loss)
        if fault:
            raise ValueError(
                f"cache: loss '{name}' must need no more of a teacher than can be stored, and it {fault}; train it "
                "with the live teacher."
            )
    data.check(num_images=16)
    transform = transform or transform_for(distiller.student)
    split, _ = split_of(distiller, data.train, settings, accelerator.num_processes)
    return [
        Builder(
            Path(folder) / f"teacher-{place}" if len(live) > 1 else Path(folder),
            distiller, number, data, settings, accelerator, transform=transform, form=form,
            job=of_job(split, transform, settings, holds_out=len(split) < len(data.train)),
            dataset=ReplayableDataset(split, transform.training(), settings.seed),
            augmentation_epochs=augmentation_epochs, shard_mib=shard_mib,
        )
        for place, number in enumerate(live, start=1)
    ]  # fmt: skip


def check_space(folder: str | Path, builders: Sequence[Builder]) -> None:
    """
    Raises:
        ValueError: what all of them have still to write does not fit.
    """
    left, free = sum(builder.left_bytes for builder in builders), builders[0].free_bytes
    if left > free:
        raise ValueError(
            f"cache '{folder}': {left / 2**30:.3g} GiB must fit onto the disk, which has {free / 2**30:.3g} GiB free; "
            "choose a smaller form, fewer --augmentation-epochs, or another disk."
        )


class Builder:
    """The cache of one teacher: what it will hold, how large it will be, and how it is made.

    Args:
        folder: of the cache.
        distiller, number: the teacher is ``distiller.teachers[number]``.
        data, settings, transform, form, augmentation_epochs, shard_mib: see `build`.
        accelerator: shares the work out.
        job: fingerprint of the training job.
        dataset: its images, augmented.
    """

    def __init__(
        self,
        folder: Path,
        distiller: Distiller,
        number: int,
        data: ImageData,
        settings: Training,
        accelerator: Accelerator,
        *,
        transform: TransformSettings,
        form: str | Sequence[str],
        job: Mapping[str, object],
        dataset: ReplayableDataset,
        augmentation_epochs: int | None,
        shard_mib: float,
    ) -> None:
        self.folder, self.data, self.settings, self.accelerator = folder, data, settings, accelerator
        self.transform, self.dataset = transform, dataset
        self.teacher: Teacher = distiller.teachers[number]
        self.image_size = distiller.student.input_size[1:]
        signals = distiller.signals["teacher"][number]
        self.reads_head = any(request.signal == "head" for request in signals) or any(
            loss.predict is not None for loss in distiller.losses.values()
        )
        requests = [request for request in signals if request.signal not in CALLABLE_SIGNALS]
        num_blocks = self.teacher.family().num_blocks()
        keys = {request: key_of(request, requests, num_blocks, self.teacher.name) for request in requests}
        #: What is read for each entry, and in which form it is stored.
        self.requests: dict[str, Request] = {key: request for request, key in keys.items()}
        infos = [signals[request] for request in self.requests.values()]
        self.forms: dict[str, Form] = dict(zip(self.requests, choose_forms(form, infos)))
        self._check_projections()
        self.mixer = self._mixer()
        self.manifest = self._manifest(job, num_blocks, augmentation_epochs, shard_mib)
        self.sampler = EpochBatchSampler(
            len(dataset), self.manifest.batch_size, seed=settings.seed, drop_last=self.mixer is not None
        )
        self.units: list[Unit] = [
            (epoch, number)
            for epoch in range(self.manifest.num_epochs)
            for number in range(-(-self.sampler.batches_per_epoch // self.manifest.batches_per_shard))
        ]

    def _check_projections(self) -> None:
        if self.reads_head and any(isinstance(form, Projected) for form in self.forms.values()):
            raise ValueError(
                "cache: form project<k> must not be used where a loss applies the teacher's classifier, which knows "
                "the teacher's own width; use fp16 or int8."
            )

    def _mixer(self) -> BatchMixer | None:
        """As in training; soft labels alone leave the images as they are."""
        settings = self.settings
        if not (settings.mixup_alpha or settings.cutmix_alpha):
            return None
        return BatchMixer(
            settings.mixup_alpha, settings.cutmix_alpha, num_classes=len(self.data.classes), seed=settings.seed
        )

    def _manifest(
        self, job: Mapping[str, object], num_blocks: int | None, augmentation_epochs: int | None, shard_mib: float
    ) -> Manifest:
        """What the cache will hold; or, where a part of it is there, what that part began."""
        teacher, settings = self.teacher, self.settings
        if not 0 < shard_mib < math.inf:
            raise ValueError(f"cache: shard_mib must be > 0 and finite, got {shard_mib}; the default is 256.")
        num_epochs = self._num_epochs(augmentation_epochs)
        manifest = Manifest(
            teacher={
                "name": teacher.name,
                "input_size": teacher.stated_size,
                "takes_any_size": teacher.takes_any_size,
                "normalisation": teacher.normalisation,
                "num_blocks": num_blocks,
                "num_parameters": num_parameters(teacher.model),
                "num_macs": num_macs(teacher.model, teacher.input_size),
            },
            fingerprint={
                "teacher": of_teacher(teacher),
                "images": of_images(teacher.bridge, teacher.input_size, self.image_size),
                "job": dict(job),
                "building": {"mixed_precision": settings.mixed_precision},
            },
            signals=[Stored(key, form.text, form.source) for key, form in self.forms.items()],
            num_samples=len(self.dataset),
            num_epochs=num_epochs,
            augmentation_epochs=augmentation_epochs,
            batch_size=settings.batch_size,
            batches_per_shard=max(1, int(min(shard_mib * 2**20 / self.row_bytes, MAX_ROWS) / settings.batch_size)),
            data=self.data.name,
            versions={
                name: metadata.version(name) for name in ("torch", "timm", "torchvision", "pillow", "safetensors")
            },
        )
        if not (self.folder / NAME).exists():
            if self.folder.is_dir() and any(path.name not in _REMAINS for path in self.folder.iterdir()):
                raise ValueError(
                    f"cache '{self.folder}' must be empty or a cache, and holds other files; choose another."
                )
            return manifest
        begun = Manifest.read(self.folder)
        self._check_same(begun, manifest)
        manifest.num_epochs = max(begun.num_epochs, num_epochs)
        for name in ("batch_size", "batches_per_shard", "accuracy", "constants", "shards"):
            setattr(manifest, name, getattr(begun, name))
        return manifest

    def _num_epochs(self, augmentation_epochs: int | None) -> int:
        """How many epochs are stored: those of the training, or those that it replays."""
        settings = self.settings
        batches = len(self.dataset) // settings.batch_size // self.accelerator.num_processes
        num_epochs = settings.length(max(1, batches)).num_epochs
        if augmentation_epochs is None:
            return num_epochs
        if not 1 <= augmentation_epochs <= num_epochs:
            raise ValueError(
                f"cache: augmentation_epochs must be in 1..{num_epochs}, the epochs of the training, got "
                f"{augmentation_epochs}; leave it out to store each."
            )
        return augmentation_epochs

    def _check_same(self, begun: Manifest, manifest: Manifest) -> None:
        def facts(one: Manifest) -> dict[str, object]:
            forms = {entry.key: entry.form for entry in one.signals}
            return {name: fact for part in (*one.fingerprint.values(), forms) for name, fact in part.items()}

        differs = differences(facts(begun), facts(manifest))
        if differs:
            raise ValueError(
                f"cache '{self.folder}' must be gone on with as it was begun, but {differs}; repeat its command, or "
                "choose another folder."
            )

    # Sizes

    @property
    def row_bytes(self) -> int:
        """Of one image in one epoch."""
        return 8 + sum(form.num_bytes for form in self.forms.values())

    @property
    def num_rows(self) -> int:
        """Of one epoch."""
        return min(len(self.dataset), self.sampler.batches_per_epoch * self.manifest.batch_size)

    @property
    def total_bytes(self) -> int:
        """Of the whole cache, without some kilobytes of names."""
        return self.row_bytes * self.num_rows * self.manifest.num_epochs

    @property
    def free_bytes(self) -> int:
        """Of the disk."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    @property
    def left_bytes(self) -> int:
        """What is still to be written."""
        return self.total_bytes - sum(shard.num_bytes for shard in self._records().values())

    # Building

    def run(self, show: bool = True) -> None:
        """Make what is missing.

        Raises:
            ValueError: another process builds it.
            RuntimeError: it cannot be written, or the teacher gives NaN.
        """
        with self._alone():
            self._run(show)

    def _run(self, show: bool) -> None:
        main, wait = self.accelerator.is_main_process, self.accelerator.wait_for_everyone
        self.teacher.to(self.accelerator.device)
        records = self._records()
        self.manifest.shards = [records[unit] for unit in sorted(records)]
        wait()  # all have read before the first writes
        if self.manifest.accuracy is None:
            self.manifest.accuracy = self._accuracy()
        if main:
            self._write(self._begin)
        wait()
        mine = self.units[self.accelerator.process_index :: self.accelerator.num_processes]
        todo = [unit for unit in mine if not self._is_whole(records.get(unit))]
        total = sum(map(self._num_batches, todo))
        display = Display(total, title=f"store {self.teacher.name}", show=show)
        with display:
            if len(todo) < len(mine):
                display.line(f"{len(mine) - len(todo)} of {len(mine)} shards are there already and whole")
            self._build(todo, display)
        wait()
        if main:
            self._write(self._finish)
        wait()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Make the folder, and keep other commands out of it, however this one ends."""
        if not self.accelerator.is_main_process:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = lock(self.folder / _LOCK)
        except BlockingIOError as error:
            raise ValueError(
                f"cache '{self.folder}' must be built by one command at a time, and another one is at work; wait for "
                "it, or choose another folder."
            ) from error
        except OSError as error:
            what = "written" if self.folder.is_dir() else "made"
            raise ValueError(
                f"cache '{self.folder}' cannot be {what} ({why(error)}); choose another folder."
            ) from error
        try:
            yield
        finally:
            os.close(held)

    def _begin(self) -> None:
        self._keep_constants()
        self._write_manifest()

    def _finish(self) -> None:
        """The checksums of all processes into the manifest."""
        records = self._records()
        missing = len(set(self.units) - records.keys())
        self.manifest.shards = [records[unit] for unit in sorted(records)]
        self.manifest.complete = not missing
        self._write_manifest()
        if missing:
            raise RuntimeError(
                f"cache '{self.folder}' must be seen by all processes, and {missing} of {len(self.units)} shards are "
                "nowhere; choose a folder that all machines share, then run the same command again."
            )

    def _write_manifest(self) -> None:
        """With all that processes noted: their notes begin anew, so that none follows one that was cut short."""
        self.manifest.write(self.folder)
        for notes in self.folder.glob(_NOTES.format("*")):
            notes.unlink()

    def _records(self) -> dict[Unit, Shard]:
        """The shards that were written, by their manifest and by what processes noted since."""
        found = list(self.manifest.shards)
        for notes in sorted(self.folder.glob(_NOTES.format("*"))):
            lines = notes.read_text().splitlines(keepends=True)
            found += [Shard(**json.loads(line)) for line in lines if line.endswith("\n")]  # the last may be cut short
        return {(shard.epoch, shard.number): shard for shard in found}

    def _is_whole(self, shard: Shard | None) -> bool:
        if shard is None or size_fault(self.folder, shard):
            return False
        return sha256(self.folder / shard.name) == shard.sha256

    def _num_batches(self, unit: Unit) -> int:
        first = unit[1] * self.manifest.batches_per_shard
        return min(self.manifest.batches_per_shard, self.sampler.batches_per_epoch - first)

    def _build(self, todo: Sequence[Unit], display: Display) -> None:
        kept = self.folder / CONSTANTS
        constants = open_shard(kept) if kept.is_file() else {}
        constants = {name: value.to(self.accelerator.device) for name, value in constants.items()}
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Batches(self.sampler, todo, self.manifest.batches_per_shard),
            num_workers=self.settings.num_workers,
            generator=torch.Generator(),  # of its own, as that of `make_loader`
        )
        batches = iter(loader) if todo else iter(())
        for unit in todo:
            rows = []
            for batch in islice(batches, self._num_batches(unit)):
                rows.append(self._rows(batch, unit[0], constants))
                display.step()
            tensors = {part: torch.cat([row[part] for row in rows]) for part in rows[0]}
            self._write(self._keep, unit, tensors)

    def _keep(self, unit: Unit, tensors: Mapping[str, Tensor]) -> None:
        shard = write_shard(self.folder, *unit, tensors)
        with (self.folder / _NOTES.format(self.accelerator.process_index)).open("a") as notes:
            notes.write(json.dumps(asdict(shard)) + "\n")

    @torch.no_grad()
    def _rows(self, batch: Mapping[str, Tensor], epoch: int, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of a batch."""
        images, samples = batch["image"].to(self.accelerator.device), batch["sample_id"]
        if self.mixer is not None:
            labels = batch["label"].to(images.device)
            images, _ = self.mixer(images, labels, samples.to(images.device), epoch)
        with self._autocast():
            signals = self.teacher(images)
        rows = {SAMPLE_ID: samples}
        for key, request in self.requests.items():
            form, signal = self.forms[key], signals[request].float()
            bad = samples[~signal.flatten(1).isfinite().all(dim=1).cpu()].tolist()
            if bad:
                raise RuntimeError(
                    f"cache: {request.signal} of '{self.teacher.name}' must be finite, got NaN or infinity for samples "
                    f"{bad[:8]}; check the teacher, or use mixed_precision='no'."
                )
            if isinstance(form, Projected):
                signal = form.project(signal, constants[form.constant])
            rows |= {PART.format(key, part): value.cpu().contiguous() for part, value in form.encode(signal).items()}
        return rows

    def _autocast(self) -> AbstractContextManager:
        """The precision in which training would run the teacher."""
        return self.accelerator.autocast()

    @torch.no_grad()
    def _accuracy(self) -> dict[str, float] | None:
        settings = self.settings
        loader = make_loader(
            self.data.test,
            self.transform,
            batch_size=settings.batch_size,
            train=False,
            num_workers=settings.num_workers,
        )
        loader = self.accelerator.prepare(loader)
        predict = teacher_prediction(self.teacher, loader, len(self.data.classes))
        if predict is None:
            return None
        with self._autocast():
            return asdict(evaluate(predict, loader, self.accelerator))

    # Files

    def _keep_constants(self) -> None:
        """The classifier and the projections; those that rows were made with stay."""
        path = self.folder / CONSTANTS
        if self.manifest.constants and path.is_file() and sha256(path) == self.manifest.constants:
            return
        constants = {form.constant: form.draw() for form in self.forms.values() if isinstance(form, Projected)}
        if self.reads_head:
            head = self.teacher.classifier()
            constants |= {f"head.{name}": value.cpu() for name, value in head.state_dict().items()}
        if not constants:
            return
        from safetensors.torch import save_file

        with whole_file(path) as temporary:
            save_file(constants, temporary)
        digest = sha256(path)
        if self.manifest.constants not in ("", digest):
            raise ValueError(
                f"cache '{self.folder}': '{CONSTANTS}' was altered, and what is made anew is not what the rows were "
                "made with; remove the folder and build it again."
            )
        self.manifest.constants = digest

    def _write(self, write, *arguments: object) -> None:
        """A full or read-only disk in one sentence."""
        try:
            write(*arguments)
        except WRITE_ERRORS as error:
            whole = len(self._records())
            raise RuntimeError(
                f"cache '{self.folder}' cannot be written ({why(error)}): {whole} of {len(self.units)} shards are "
                "whole and kept; make room or give it write permission, then run the same command again."
            ) from error


class _Batches:
    """The batches of some shards, as the training loader has them."""

    def __init__(self, sampler: EpochBatchSampler, units: Sequence[Unit], batches_per_shard: int) -> None:
        self.sampler, self.units, self.batches_per_shard = sampler, units, batches_per_shard

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch, number in self.units:
            self.sampler.set_epoch(epoch, number * self.batches_per_shard)
            yield from islice(iter(self.sampler), self.batches_per_shard)
