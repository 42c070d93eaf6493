"""The training loop, on Accelerate: one process or many, any precision, any losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn

from kdvit.cost import device_name
from kdvit.data import BatchMixer, ImageData, TransformSettings, check_labels, make_loader
from kdvit.data.randomness import legacy_generator
from kdvit.distiller import Distiller, DistillerOutput
from kdvit.losses.loss import split_input
from kdvit.schedules import Schedule
from kdvit.signals import CLASS_SIGNALS, Progress
from kdvit.taps.family import logits_of
from kdvit.training.curves import draw_curves
from kdvit.training.display import Display
from kdvit.training.evaluation import Accuracy, evaluate
from kdvit.training.held_out import HeldOut
from kdvit.training.preparation import make_accelerator, make_optimizer, stronger, transform_for
from kdvit.training.run_folder import RunFolder
from kdvit.training.settings import Training
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
        resume: go on with the run in ``folder`` from its last whole epoch.
        title: in front of the progress bar.
        quiet: show nothing.

    Raises:
        ValueError: classes of the data and the student differ, labels are out of range, an image is corrupt, the
            optimizer is unknown, the folder holds another run; all before the first batch.
        RuntimeError: a loss or the weights became NaN or infinite.

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
        self._check_classes(distiller)
        data.check(num_images=64)
        self.accelerator = make_accelerator(settings)
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

    def _check_classes(self, distiller: Distiller) -> None:
        if distiller.num_classes is None:
            return
        if distiller.num_classes != len(self.data.classes):
            raise ValueError(
                f"Trainer: data '{self.data.name}' has {len(self.data.classes)} classes but student "
                f"'{distiller.student.name}' has {distiller.num_classes}; make the student with "
                f"num_classes={len(self.data.classes)}."
            )
        for split in (self.data.train, self.data.test):
            check_labels(split, distiller.num_classes)

    def _open_folder(self, folder: str | Path, resume: bool) -> RunFolder:
        """The main process looks first; what it finds wrong, every process raises."""
        found: list[RunFolder | ValueError | None] = [None]
        if self.is_main:
            try:
                found = [RunFolder(folder, resume=resume)]
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
        self.held_out, train_split = HeldOut.of(self.plain, self.data.train, settings, self.transform, self.accelerator)
        self.plain.allocate(len(train_split))
        if settings.batch_size * num_processes > len(train_split):
            raise ValueError(
                f"Training: batch_size must be at most the {len(train_split)} training images over "
                f"{num_processes} process(es), got {settings.batch_size}; use smaller batches."
            )
        load = partial(make_loader, batch_size=settings.batch_size, seed=settings.seed, transform=self.transform)
        train = load(train_split, train=True, num_workers=settings.num_workers, second_transform=self.second_transform)
        test = load(self.data.test, train=False, num_workers=settings.num_workers)
        optimizer = make_optimizer(self.plain, settings)
        self.distiller, self.optimizer, self.train_loader, self.test_loader = self.accelerator.prepare(
            self.plain, optimizer, train, test
        )
        self.steps_per_epoch = math.ceil(len(self.train_loader) / settings.accumulation_steps)
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.num_epochs = math.ceil(self.total_steps / self.steps_per_epoch)
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
        self.mixer = self._mixer()
        self.ema = self._ema()
        self.step = self.epoch = 0
        self.seconds = 0.0
        self.accuracy: Accuracy | None = None
        self.best: tuple[float, int] | None = None
        self.unchecked: list[tuple[int, Tensor, dict[str, Tensor], Tensor]] = []

    def _mixer(self) -> BatchMixer | None:
        settings = self.settings
        if not (settings.mixup_alpha or settings.cutmix_alpha or settings.label_smoothing):
            return None
        return BatchMixer(
            settings.mixup_alpha,
            settings.cutmix_alpha,
            num_classes=len(self.data.classes),
            label_smoothing=settings.label_smoothing,
            seed=settings.seed,
        )

    def _ema(self) -> nn.Module | None:
        if self.settings.ema_decay is None:
            return None
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.plain.deployable, decay=self.settings.ema_decay, use_warmup=True)

    @property
    def student(self) -> nn.Module:
        """The model that is evaluated and saved: the average of its weights where there is one."""
        return self.ema.module if self.ema is not None else self.plain.deployable

    # The run

    def fit(self) -> Result:
        """Train to the end and return what came out."""
        started = time.perf_counter() - self.seconds
        teachers = [self._evaluate_teacher(teacher) for teacher in self.plain.teachers]
        self.held_out.calibrate()
        if self.is_main:
            self.folder.drop_metrics_after(self.step)
            self._write_summary(None)
        display = Display(self.total_steps, first_step=self.step, title=self.title, show=self.shows)
        with display:
            if self.note:
                display.line(self.note)
            for teacher, accuracy in zip(self.plain.teachers, teachers, strict=True):
                if accuracy is not None:
                    display.line(f"teacher '{teacher.name}': {accuracy.top1:.2f} % top-1")
            while self.step < self.total_steps:
                self._train_epoch(display)
                self.epoch += 1
                if self.epoch % self.settings.evaluate_epochs == 0 or self.step == self.total_steps:
                    self.accuracy = self._evaluate_student(display)
                self.seconds = time.perf_counter() - started
                self._save_state()
        return self._finish(max(filter(None, teachers), key=lambda accuracy: accuracy.top1, default=None))

    def _train_epoch(self, display: Display) -> None:
        self.distiller.train()
        self.train_loader.set_epoch(self.epoch)
        self.held_out.start_epoch(self.epoch, len(self.train_loader))
        window = Window()
        for index, batch in enumerate(self.train_loader):
            progress = self._progress(index)
            # What models and losses draw (dropout, masks) is a function of the seed and the place in the run.
            draw = legacy_generator(self.settings.seed, self.epoch, index, self.accelerator.process_index)
            torch.manual_seed(int(draw.randint(2**31)))
            with self.accelerator.accumulate(self.distiller):
                self.scheduler.step_update(self.step)
                images, labels = self._mixed(batch)
                context = {"sample_ids": batch["sample_id"], "progress": progress}
                if "second_image" in batch:
                    context["second_images"], _ = self._mixed(batch, "second_image")
                if self.accelerator.sync_gradients:  # once a step, also where a step is several batches
                    self.held_out.step(images, labels, self.optimizer.param_groups[0]["lr"], **context)
                output = self.distiller(images, labels, **context)
                self._watch(output, batch["sample_id"])
                self.accelerator.backward(output.loss)
                if self.accelerator.sync_gradients and self.settings.clip_norm is not None:
                    self.accelerator.clip_grad_norm_(self.distiller.parameters(), self.settings.clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            window.add(output, len(images) * self.accelerator.num_processes)
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            if self.ema is not None:
                self.ema.update(self.plain.deployable, step=self.step)
            logs = self.step % self.settings.log_steps == 0 or self.step == self.total_steps
            display.step(self._log(window, progress) if logs else None)
            if self.step == self.total_steps:
                break
        self._check_finite()
        self._check_weights()

    def _mixed(self, batch: dict[str, Tensor], view: str = "image") -> tuple[Tensor, Tensor]:
        """Images and labels; the mixing of a batch is a function of its samples, so two views are mixed alike."""
        if self.mixer is None:
            return batch[view], batch["label"]
        return self.mixer(batch[view], batch["label"], batch["sample_id"], self.epoch)

    def _progress(self, index: int) -> Progress:
        epoch = self.epoch + index / len(self.train_loader)
        return Progress(self.step, epoch, self.total_steps, self.total_steps / self.steps_per_epoch)

    def _watch(self, output: DistillerOutput, sample_ids: Tensor) -> None:
        self.unchecked.append((self.step, output.loss.detach(), output.losses, sample_ids))
        # Reading a value stalls a GPU, so there many steps are looked at together.
        if self.accelerator.device.type == "cpu" or self.step % self.settings.log_steps == 0:
            self._check_finite()

    def _check_finite(self) -> None:
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked or torch.stack([loss for _, loss, _, _ in unchecked]).isfinite().all():
            return
        step, loss, losses, sample_ids = next(row for row in unchecked if not row[1].isfinite())
        bad = [name for name, value in losses.items() if not value.isfinite()] or ["the weighted sum"]
        raise RuntimeError(
            f"Trainer: {', '.join(bad)} became {loss.item()} at step {step} (samples {sample_ids.tolist()[:8]} ...); "
            f"{self._advice()}"
        )

    def _check_weights(self) -> None:
        """A gradient may be NaN where its loss is not; such weights must not replace the last good state."""
        for name, parameter in self.plain.named_parameters():
            if not parameter.isfinite().all():
                raise RuntimeError(
                    f"Trainer: the weights became NaN or infinite before step {self.step} (first: {name}); "
                    f"{self._advice()}"
                )

    def _advice(self) -> str:
        return (
            f"the last whole epoch, if there was one, is kept in '{self.folder.path}'; lower lr, clip the gradient, "
            "or use mixed_precision='no'."
        )

    def _log(self, window: Window, progress: Progress) -> dict[str, float]:
        losses, loss, rate = window.close()
        lr = self.optimizer.param_groups[0]["lr"]
        if self.is_main:
            self.folder.log(
                {"kind": "step", "step": self.step, "epoch": round(progress.epoch, 4), "lr": lr, "loss": loss,
                 "losses": losses, "images_per_second": round(rate, 1)}
            )  # fmt: skip
        return losses

    # Evaluation

    def _evaluate(self, model: nn.Module, predict: Callable[[Tensor], Tensor]) -> Accuracy:
        was_training = model.training
        model.eval()
        with self.accelerator.autocast():
            accuracy = evaluate(predict, self.test_loader, self.accelerator)
        model.train(was_training)
        return accuracy

    def _evaluate_student(self, display: Display) -> Accuracy | None:
        accuracy = None
        if self._trains_classifier():
            model, name = self.student, self.plain.student.name
            if self.accelerator.num_processes > 1:  # statistics of BatchNorm differ: the main process's are saved
                for buffer in model.buffers():
                    broadcast(buffer)
            accuracy = self._evaluate(model, lambda images: logits_of(model(images), name))
            display.line(f"{self.title}: epoch {self.epoch}/{self.num_epochs}  top-1 {accuracy.top1:.2f} %")
        record = {"kind": "evaluation", "step": self.step, "epoch": self.epoch}
        if self.is_main and accuracy is not None:
            self.folder.log({**record, "top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss})
        if accuracy is not None and (self.best is None or accuracy.top1 > self.best[0]):
            self.best = (accuracy.top1, self.epoch)
            self._save_student("best")
        self._save_student("student")
        return accuracy

    def _trains_classifier(self) -> bool:
        """Whether accuracy means anything: a feature-only objective leaves the classifier as it was."""
        read = [split_input(name) for loss in self.plain.losses.values() for name in loss.inputs()]
        reads_logits = any(side == "student" and signal in CLASS_SIGNALS for side, signal in read)
        brings_one = self.plain.deployable is not self.plain.student.model
        return self.plain.task_loss is not None or reads_logits or brings_one

    def _evaluate_teacher(self, teacher: Teacher) -> Accuracy | None:
        batch = next(iter(self.test_loader))["image"][:1]
        try:
            if teacher.predict(batch).shape[1] != len(self.data.classes):
                return None  # a teacher of other classes: its accuracy on these is not defined
        except TypeError:  # a backbone without a classifier
            return None
        return self._evaluate(teacher, teacher.predict)

    # Files

    def _save_student(self, which: str) -> None:
        if self.is_main:
            normalisation = (self.transform.mean, self.transform.std)
            self.folder.save_student(self.student, which, normalisation, self.data.classes)

    def _save_state(self) -> None:
        if not self.is_main:
            return
        scaler = self.accelerator.scaler
        self.folder.save_state(
            {
                "run": self._identity(),
                "distiller": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "held_out": self.held_out.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "step": self.step,
                "epoch": self.epoch,
                "seconds": self.seconds,
                "accuracy": asdict(self.accuracy) if self.accuracy is not None else None,
                "best": self.best,
            }
        )

    def _load_state(self) -> str:
        """Take the earlier run's state; returns what the user should know of it."""
        state, note = self.folder.load_state()
        for name, value in self._identity().items():
            if state["run"].get(name) != value:
                raise ValueError(
                    f"Trainer: {name} must be {state['run'].get(name)!r} as in the run in '{self.folder.path}', got "
                    f"{value!r}; resume it as it was started, or start another run in another folder."
                )
        try:
            self.plain.load_state_dict(state["distiller"])
        except RuntimeError as error:
            raise ValueError(
                f"Trainer: the student must be the one of the run in '{self.folder.path}', got one with other weights; "
                "resume it as it was started, or start another run in another folder."
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.held_out.load_state_dict(state["held_out"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.seconds, self.best = (state[key] for key in ("step", "epoch", "seconds", "best"))
        self.accuracy = Accuracy(**state["accuracy"]) if state["accuracy"] else None
        return note

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        free = ("evaluate_epochs", "log_steps", "num_workers")
        return {
            **{name: value for name, value in vars(self.settings).items() if name not in free},
            "num_processes": self.accelerator.num_processes,
            "data": f"{self.data.name}, {len(self.data.train)} images",
            "trained_images": len(self.train_loader.dataset),
            "second_transform": repr(self.second_transform),
            "student": self.plain.student.name,
            "teacher": " + ".join(teacher.name for teacher in self.plain.teachers) or None,
            "losses": {name: repr(loss) for name, loss in self.plain.losses.items()},
            "weights": {
                name: repr(w) if isinstance(w, Schedule) else "function" if callable(w) else w
                for name, w in self.plain.weights.items()
            },
        }

    def _write_summary(self, result: Result | None) -> None:
        self.folder.write_summary(
            result=result,
            settings=self.settings,
            transform=self.transform,
            **{name: value for name, value in self._identity().items() if name not in vars(self.settings)},
            device=device_name(self.accelerator.device),
        )

    def _finish(self, teacher: Accuracy | None) -> Result:
        result = Result(
            top1=self.accuracy.top1 if self.accuracy else None,
            top5=self.accuracy.top5 if self.accuracy else None,
            best_top1=self.best[0] if self.best else None,
            best_epoch=self.best[1] if self.best else None,
            teacher_top1=teacher.top1 if teacher else None,
            num_steps=self.step,
            seconds=round(self.seconds, 1),
            folder=self.folder.path,
        )
        if self.is_main:
            self._write_summary(result)
            draw_curves(self.folder.metrics(), self.folder.path / "curves.png", result.teacher_top1)
        self.accelerator.wait_for_everyone()
        return result
