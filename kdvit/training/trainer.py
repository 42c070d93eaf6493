"""The training loop, on Accelerate: one process or many, any precision, any losses."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdvit.cache.teacher import StoredTeacher
from kdvit.cost import device_name
from kdvit.data import ImageData, TransformSettings, make_loader
from kdvit.data.randomness import legacy_generator
from kdvit.distiller import Distiller, DistillerOutput
from kdvit.signals import Progress
from kdvit.taps.family import logits_of
from kdvit.training.accumulation import window_scale
from kdvit.training.checkpointing import enable_checkpointing
from kdvit.training.curves import draw_curves
from kdvit.training.display import Display
from kdvit.training.evaluation import Accuracy, evaluate
from kdvit.training.fidelity import teacher_prediction
from kdvit.training.gradient_share import gradient_share
from kdvit.training.held_out import HeldOut
from kdvit.training.identity import check_same, identity_of, summary_of
from kdvit.training.insight import sample_batch, write_insight
from kdvit.training.interruption import Interrupted, Interruption, obey_parent_alone
from kdvit.training.launch import autocast_alone, check_launch
from kdvit.training.preparation import (
    check_classes,
    check_stored,
    make_accelerator,
    make_mixer,
    make_optimizer,
    split_of,
    stronger,
    transform_for,
)
from kdvit.training.run_folder import RunFolder
from kdvit.training.settings import Training
from kdvit.training.trackers import finish_trackers, start_trackers, track
from kdvit.training.watch import Watch, check_weights
from kdvit.training.weights import weights_of
from kdvit.training.window import Window
from kdvit.wrappers import Teacher


@dataclass(frozen=True)
class Result:
    """What a run came to. Accuracies are in percent; None where there is no classifier to evaluate."""

    top1: float | None
    top5: float | None
    best_top1: float | None
    best_epoch: int | None
    teacher_top1: float | None
    num_steps: int
    seconds: float
    folder: Path


class Trainer:
    """Trains the student of a Distiller on a data set and leaves a run folder.

    Args:
        distiller: what to minimise; with ``teacher=None`` and no losses it is plain supervised training.
        data: from `kdvit.data.open_data`.
        settings: see `Training`.
        folder: the run folder, see `RunFolder`.
        transform: by default what the student's input size and normalisation ask for, see `transform_for`.
        second_transform: of the second view, where a loss reads one; by default ``transform`` with RandAugment.
        resume: go on with the run in ``folder`` from its last state, to the very same end.
        title: in front of the progress bar.
        quiet: show nothing.

    Raises:
        ValueError: classes of the data and the student differ, labels are out of range, an image is corrupt, the
            optimizer is unknown, the folder holds another run; all before the first batch.
        RuntimeError: a loss or the weights became NaN or infinite, images could not be loaded, the disk is full; the
            last good state is kept.
        Interrupted: SIGTERM or Ctrl-C; the state of the last step is saved.

    Example:
        ``Trainer(distiller, kdvit.data.open_data("fashion-mnist-sample"), Training(epochs=5), "runs/first").fit()``
    """

    def __init__(
        self,
        distiller: Distiller,
        data: ImageData,
        settings: Training,
        folder: str | Path,
        *,
        transform: TransformSettings | None = None,
        second_transform: TransformSettings | None = None,
        resume: bool = False,
        title: str = "train",
        quiet: bool = False,
    ) -> None:
        self.data, self.settings, self.title = data, settings, title
        check_classes(distiller, data)
        data.check(num_images=64)
        self.accelerator = make_accelerator(settings, folder)
        check_launch(self.accelerator, distiller)
        autocast_alone(self.accelerator)
        self.is_main = self.accelerator.is_main_process
        self.shows = self.is_main and not quiet
        self.transform = transform or transform_for(distiller.student)
        self.second_transform = None
        if distiller.reads_second_view:
            self.second_transform = second_transform or stronger(self.transform)
        elif second_transform is not None:
            raise ValueError("Trainer: second_transform must be left out, since no loss reads a second view; drop it.")
        self.folder = self._open_folder(folder, resume)
        self.plain = distiller
        self._prepare()
        self.note = self._load_state() if self.folder.resumes else ""

    def _open_folder(self, folder: str | Path, resume: bool) -> RunFolder:
        """The main process looks first; what it finds wrong, every process raises."""
        found: list[RunFolder | ValueError | None] = [None]
        if self.is_main:
            try:
                found = [RunFolder(folder, resume=resume, keep_states=self.settings.keep_states)]
            except ValueError as error:
                found = [error]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return found[0]

    def _prepare(self) -> None:
        from timm.scheduler import CosineLRScheduler

        settings, num_processes = self.settings, self.accelerator.num_processes
        train_split, held_out = split_of(self.plain, self.data.train, settings, num_processes)
        self.held_out = HeldOut(self.plain, held_out, settings, self.transform, self.accelerator)
        self.plain.allocate(len(train_split))
        load = partial(make_loader, batch_size=settings.batch_size, seed=settings.seed, transform=self.transform)
        train = load(
            train_split,
            train=True,
            num_workers=settings.num_workers,
            second_transform=self.second_transform,
            rows=self.plain.stored_rows,
            augmentation_epochs=self.plain.augmentation_epochs,
        )
        test = load(self.data.test, train=False, num_workers=settings.num_workers)
        if settings.grad_checkpointing:
            enable_checkpointing(self.plain.student.model, self.plain.student.name)
        if settings.compile:
            self.plain.compile()
        self.weights = weights_of(self.plain, settings, self.accelerator)
        optimizer = make_optimizer(self.plain, settings)
        train.worker_init_fn = test.worker_init_fn = obey_parent_alone
        self.order = train.batch_sampler
        self.distiller, self.optimizer, self.train_loader, self.test_loader = self.accelerator.prepare(
            self.plain, optimizer, train, test
        )
        self.weights.start()
        self.batches_per_epoch = len(self.train_loader)
        length = settings.length(self.batches_per_epoch)
        self.steps_per_epoch, self.total_steps, self.num_epochs = astuple(length)
        check_stored(self.plain, self.data, train_split, self.transform, settings, self.num_epochs)
        warmup_steps = min(round(settings.warmup_epochs * self.steps_per_epoch), self.total_steps // 2)
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=max(1, self.total_steps - 1 - warmup_steps),
            lr_min=settings.min_lr,
            warmup_t=warmup_steps,
            warmup_lr_init=settings.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
            cycle_decay=0.1,  # there is one cycle; but timm warns of 1.0 where the schedule is one step long
        )
        self.identity = identity_of(
            self.plain,
            self.data,
            train_split,
            settings,
            transform=self.transform,
            second_transform=self.second_transform,
            num_processes=num_processes,
        )
        self.mixer = make_mixer(settings, len(self.data.classes))
        #: Steps and epochs that are done, and batches of the epoch that is not.
        self.step = self.epoch = self.batch = 0
        #: Whether the last epoch's steps are done, but not its evaluation.
        self.in_evaluation = False
        #: (step, in_evaluation) of the newest state.
        self.saved: tuple[int, bool] | None = None
        self.seconds, self.started = 0.0, time.perf_counter()
        self.window, self.watch, self.interruption = Window(), Watch(), Interruption()
        self.teachers: list[Accuracy | None] | None = None
        self.accuracy: Accuracy | None = None
        self.best: tuple[float, int] | None = None

    @property
    def ema(self) -> nn.Module | None:
        """The average of the student's weights, where there is one."""
        return self.weights.ema

    @property
    def student(self) -> nn.Module:
        """The model that is evaluated and saved: the average of its weights where there is one."""
        return self.weights.student()

    # The run

    def fit(self) -> Result:
        """Train to the end and return what came out."""
        if self.is_main:
            self.folder.hold()
        try:
            return self._fit()
        finally:
            self.folder.release()
            for loader in (self.train_loader, self.test_loader):
                _end_processes(loader.base_dataloader)

    def _fit(self) -> Result:
        self.started = time.perf_counter() - self.seconds
        if self.teachers is None:
            self._begin()
        if self.is_main:
            self._write_summary(None)
        start_trackers(self.accelerator, vars(self.settings))
        display = Display(self.total_steps, first_step=self.step, title=self.title, show=self.shows)
        with self.interruption, display:
            if self.note:
                display.line(self.note)
            for teacher, accuracy in zip(self.plain.teachers, self.teachers, strict=True):
                if accuracy is not None:
                    display.line(f"teacher '{teacher.name}': {accuracy.top1:.2f} % top-1")
            try:
                self._train(display)
            except RuntimeError as error:  # that a loader process died is raised in the middle of anything
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise self._not_loaded(error) from error
        return self._finish()

    def _begin(self) -> None:
        """What comes before the first step of a run, and is not done again when it is resumed."""
        self.teachers = [self._evaluate_teacher(teacher) for teacher in self.plain.teachers]
        self.held_out.calibrate()
        self._save_state()  # a folder that cannot be written, or a full disk, shows before the first step

    def _train(self, display: Display) -> None:
        while self.in_evaluation or self.step < self.total_steps:
            if not self.in_evaluation:
                self._train_epoch(display)
                self.epoch, self.batch = self.epoch + 1, 0
            if self.epoch % self.settings.evaluate_epochs == 0 or self.step == self.total_steps:
                self.in_evaluation = True
                self.accuracy = self._evaluate_student(display)
            self.in_evaluation = False
            self._save_state()
            self.seconds = round(time.perf_counter() - self.started, 1)
            if self.is_main:
                self.folder.log_timing({"step": self.step, "seconds": self.seconds})
            self._stop_where_asked()

    def _train_epoch(self, display: Display) -> None:
        self.distiller.train()
        # The prepared loader keeps the start of the epoch that it is set to. Its processes share out these batches.
        self.order.set_epoch(self.epoch, self.batch * self.accelerator.num_processes)
        self.train_loader.set_epoch(self.epoch)
        self.held_out.start_epoch(self.epoch, self.batches_per_epoch)
        self.window.start_clock()
        for index, batch in enumerate(self._loaded(), start=self.batch):
            progress = self._progress(index)
            self._seed(index)
            with self.accelerator.accumulate(self.distiller):
                self.scheduler.step_update(self.step)
                images, labels = self._mixed(batch)
                context = {"sample_ids": batch["sample_id"], "progress": progress}
                if "second_image" in batch:
                    context["second_images"], _ = self._mixed(batch, "second_image")
                if self.accelerator.sync_gradients:  # once a step, also where a step is several batches
                    self.held_out.step(images, labels, self.optimizer.param_groups[0]["lr"], **context)
                with self.accelerator.autocast():
                    output = self.distiller(images, labels, **context, stored=batch.get("rows"))
                self._watch(output, batch["sample_id"])
                self._measure_shares(output)
                scale = window_scale(index, self.batches_per_epoch, self.settings.accumulation_steps)
                self.accelerator.backward(output.loss * scale)
                if self.accelerator.sync_gradients and self.settings.clip_norm is not None:
                    self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.settings.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.window.add(output, len(images) * self.accelerator.num_processes)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            self.batch = index + 1
            self.weights.update(self.step)
            logs = self.step % self.settings.log_steps == 0 or self.step == self.total_steps
            display.step(self._log(progress) if logs else None)
            if self.step == self.total_steps:
                break
            if self.batch < self.batches_per_epoch:  # else the state is saved, and asked for, after the evaluation
                if self.settings.save_steps is not None and self.step % self.settings.save_steps == 0:
                    self._save_state()
                self._stop_where_asked()
        self.window = Window()
        self.held_out.end_epoch()
        self._check_finite()  # before the student is saved

    def _seed(self, index: int) -> None:
        """What models and losses draw (dropout, masks) is a function of the seed and the place in the run."""
        draw = legacy_generator(self.settings.seed, self.epoch, index, self.accelerator.process_index)
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(int(draw.randint(2**31)))

    def _loaded(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the epoch; what goes wrong with an image is one sentence."""
        batches = iter(self.train_loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ValueError, RuntimeError, OSError) as error:
                raise self._not_loaded(error) from error
            yield batch

    def _not_loaded(self, error: Exception) -> RuntimeError:
        reason = str(error).strip().splitlines()[-1].rstrip(". ")  # a loader process hands its traceback on
        return RuntimeError(
            f"Trainer: images could not be loaded after step {self.step}: {reason}; "
            f"{self.folder.checkpoints.kept()}: mend this, then resume."
        )

    def _stop_where_asked(self) -> None:
        """Save and leave, where SIGTERM or Ctrl-C came; all processes at the same step."""
        number = self.interruption.number
        if self.accelerator.num_processes > 1:
            # Asking the others costs a round through the network, so not at every step.
            if self.step % self.settings.log_steps and self.batch:
                return
            number = int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())
        if not number:
            return
        if self.saved != (self.step, self.in_evaluation):
            self._save_state()
        raise Interrupted(
            self.interruption.number or number,
            f"stopped at step {self.step} of {self.total_steps}, and its state is saved in '{self.folder.path}'; "
            "resume to go on.",
        )

    def _mixed(self, batch: dict[str, Tensor], view: str = "image") -> tuple[Tensor, Tensor]:
        """Images and labels; the mixing of a batch is a function of its samples, so two views are mixed alike."""
        if self.mixer is None:
            return batch[view], batch["label"]
        return self.mixer(batch[view], batch["label"], batch["sample_id"], self.order.augmentation_epoch)

    def _progress(self, index: int) -> Progress:
        epoch = self.epoch + index / self.batches_per_epoch
        return Progress(self.step, epoch, self.total_steps, self.total_steps / self.steps_per_epoch)

    def _watch(self, output: DistillerOutput, sample_ids: Tensor) -> None:
        self.watch.add(self.step, output, sample_ids)
        # Reading a value stalls a GPU, so there many steps are looked at together.
        if self.accelerator.device.type == "cpu" or self.step % self.settings.log_steps == 0:
            self.watch.check(self._advice())

    def _measure_shares(self, output: DistillerOutput) -> None:
        """Where it is due, in every process: a loss that gathers the batch communicates in its backward pass."""
        every = self.settings.gradient_share_steps
        if every is None or not self.accelerator.sync_gradients or (self.step + 1) % every:
            return
        scaler = self.accelerator.scaler
        several = self.accelerator.num_processes > 1
        found = gradient_share(
            output.weighted,
            self.plain.student.parameters(),
            scale=scaler.get_scale() if scaler is not None else 1.0,
            average=partial(self.accelerator.reduce, reduction="mean") if several else None,
        )
        if self.is_main and found is not None:
            place = {"kind": "gradient", "step": self.step + 1}
            self.folder.log({**place, "gradient_share": found.share, "gradient_cosine": found.cosine})

    def _check_finite(self) -> None:
        self.watch.check(self._advice())
        check_weights(self.plain, self.step, self._advice())

    def _advice(self) -> str:
        kept = self.folder.checkpoints.kept()
        return f"{kept} in '{self.folder.path}'; lower lr, clip the gradient, or use mixed_precision='no'."

    def _log(self, progress: Progress) -> dict[str, float]:
        losses, loss, rate = self.window.close()
        epoch, lr = round(progress.epoch, 4), self.optimizer.param_groups[0]["lr"]
        if self.is_main:
            place = {"kind": "step", "step": self.step, "epoch": epoch}
            self.folder.log({**place, "lr": lr, "loss": loss, "losses": losses})
            seconds = round(time.perf_counter() - self.started, 1)
            self.folder.log_timing({"step": self.step, "seconds": seconds, "images_per_second": round(rate, 1)})
        track(self.accelerator, {"epoch": epoch, "lr": lr, "loss": loss, "losses": losses}, self.step)
        return losses

    # Evaluation

    def _evaluate(self, model: nn.Module, predict: Callable[[Tensor], Tensor]) -> Accuracy:
        was_training = model.training
        model.eval()
        with self.accelerator.autocast():
            accuracy = evaluate(predict, self._until_asked(), self.accelerator)
        model.train(was_training)
        return accuracy

    def _until_asked(self) -> Iterator[dict[str, Tensor]]:
        """The test batches; a stop need not wait for the last, which may take longer than a scheduler does."""
        for batch in self.test_loader:
            yield batch
            if self.in_evaluation:
                self._stop_where_asked()

    def _evaluate_student(self, display: Display) -> Accuracy | None:
        accuracy = None
        model, name = self.student, self.plain.student.name
        if self.plain.trains_classifier:
            if self.accelerator.num_processes > 1:  # statistics of BatchNorm differ: the main process's are saved
                for buffer in model.buffers():
                    broadcast(buffer)
            accuracy = self._evaluate(model, lambda images: logits_of(model(images), name))
            display.line(f"{self.title}: epoch {self.epoch}/{self.num_epochs}  top-1 {accuracy.top1:.2f} %")
        record = {"kind": "evaluation", "step": self.step, "epoch": self.epoch}
        if self.is_main and accuracy is not None:
            self.folder.log({**record, "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss})
            track(self.accelerator, {"test": {"top1": accuracy.top1, "top5": accuracy.top5}}, self.step)
        if accuracy is not None and (self.best is None or accuracy.top1 > self.best[0]):
            self.best = (accuracy.top1, self.epoch)
            self._save_student(model, "best")
        self._save_student(model, "student")
        return accuracy

    def _evaluate_teacher(self, teacher: Teacher | StoredTeacher) -> Accuracy | None:
        if isinstance(teacher, StoredTeacher):
            return Accuracy(**teacher.accuracy) if teacher.accuracy is not None else None
        predict = teacher_prediction(teacher, self.test_loader, len(self.data.classes))
        return self._evaluate(teacher, predict) if predict is not None else None

    # Files

    def _save_student(self, model: nn.Module, which: str) -> None:
        if self.is_main:
            self.folder.save_student(
                model,
                which,
                normalisation=(self.transform.mean, self.transform.std),
                class_names=self.data.classes,
                input_size=self.plain.student.input_size,
            )

    def _save_state(self) -> None:
        self._check_finite()
        self.saved = (self.step, self.in_evaluation)
        weights = self.weights.state_dict(self.optimizer)
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        self.folder.save_state(
            self.step,
            {
                "run": self.identity,
                **weights,
                "held_out": self.held_out.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "window": self.window.state_dict(),
                "step": self.step,
                "epoch": self.epoch,
                "batch": self.batch,
                "in_evaluation": self.in_evaluation,
                "teachers": [asdict(accuracy) if accuracy else None for accuracy in self.teachers],
                "accuracy": asdict(self.accuracy) if self.accuracy is not None else None,
                "best": self.best,
            },
        )

    def _load_state(self) -> str:
        """Take the earlier run's state; returns what the user should know of it."""
        state, note = self.folder.load_state()
        check_same(state["run"], self.identity, self.folder.path)
        try:
            self.weights.load_state_dict(state, self.optimizer)
        except RuntimeError as error:
            raise ValueError(
                f"Trainer: the student must be the one of the run in '{self.folder.path}', got one with other weights; "
                "resume it as it was started, or start another run in another folder."
            ) from error
        self.held_out.load_state_dict(state["held_out"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"], self.accelerator.device)
        for name in ("step", "epoch", "batch", "in_evaluation", "best"):
            setattr(self, name, state[name])
        self.saved = (self.step, self.in_evaluation)
        self.teachers = [Accuracy(**accuracy) if accuracy else None for accuracy in state["teachers"]]
        self.accuracy = Accuracy(**state["accuracy"]) if state["accuracy"] else None
        if self.is_main:
            self.seconds = self.folder.rewind(state["metrics_bytes"], self.step)
        return note

    def _write_summary(self, result: Result | None) -> None:
        self.folder.write_summary(
            result=result,
            settings=self.settings,
            transform=self.transform,
            second_transform=repr(self.second_transform),
            data=f"{self.data.name}, {len(self.data.train)} images",
            trained_images=len(self.train_loader.dataset),
            num_processes=self.accelerator.num_processes,
            **summary_of(self.plain),
            device=device_name(self.accelerator.device),
        )

    def _finish(self) -> Result:
        teacher = max(filter(None, self.teachers), key=lambda accuracy: accuracy.top1, default=None)
        result = Result(
            top1=self.accuracy.top1 if self.accuracy else None,
            top5=self.accuracy.top5 if self.accuracy else None,
            best_top1=self.best[0] if self.best else None,
            best_epoch=self.best[1] if self.best else None,
            teacher_top1=teacher.top1 if teacher else None,
            num_steps=self.step,
            seconds=self.seconds,
            folder=self.folder.path,
        )
        if self.is_main:
            self._write_summary(result)
            curves = self.folder.path / "curves.png"
            with self.folder.written(curves):
                draw_curves(self.folder.metrics(), curves, result.teacher_top1)
            if self.weights.are_whole:
                self._write_insight()
        finish_trackers(self.accelerator)
        self.accelerator.wait_for_everyone()
        return result

    def _write_insight(self) -> None:
        images, labels = sample_batch(self.data.test, self.transform)
        with self.folder.written(self.folder.path / "insight"):
            write_insight(
                self.plain,
                images,
                labels,
                self.data.classes,
                self.folder.path / "insight",
                mean=self.transform.mean,
                std=self.transform.std,
                model=self.student,
            )


def _end_processes(loader: DataLoader) -> None:
    """The persistent ones, which would live on until Python's garbage collector finds them, and then end slowly."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None
