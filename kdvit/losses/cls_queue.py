"""ClsQueue: where an image stands among many others, as the teacher's global embeddings see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, count, feature_pair, flag, not_built, number
from kdvit.losses.gathering import gather_batch
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.signals import ModelInfo

#: As released: fewer than so many training images, so long a queue.
QUEUE_SIZES = {50: 16, 100: 32, 250: 64, 500: 128, 1000: 256, 2000: 512, 4000: 1024, 10_000: 2048, 20_000: 4096}
LONGEST_QUEUE = 8192


class TeacherQueue(nn.Module):
    """The teacher's latest embeddings, of all processes; zeros until it is full.

    Args:
        size: rows; None: `LONGEST_QUEUE` until `allocate` tells the number of training images.
        dim: width.

    Example:
        >>> queue = TeacherQueue(3, 1)
        >>> queue(torch.tensor([[1.0], [2.0]]), remember=True).flatten().tolist()
        [1.0, 2.0, 0.0]
        >>> queue(torch.tensor([[5.0]]), remember=False).flatten().tolist()
        [5.0, 1.0, 2.0]
    """

    def __init__(self, size: int | None, dim: int) -> None:
        super().__init__()
        self.follows_data = size is None
        self.register_buffer("rows", torch.zeros(LONGEST_QUEUE if size is None else size, dim))

    def allocate(self, num_samples: int) -> None:
        """Make the queue as long as the release does for so many training images, unless its size was given."""
        if self.follows_data:
            size = next((size for limit, size in QUEUE_SIZES.items() if num_samples < limit), LONGEST_QUEUE)
            self.rows = self.rows.new_zeros(size, self.rows.shape[1])

    @torch.no_grad()
    def forward(self, embeddings: Tensor, remember: bool) -> Tensor:
        """The queue with these (B, D) in front, as long as before: (size, D). With ``remember`` it stays so."""
        if remember:
            embeddings = gather_batch(embeddings)
        rows = torch.cat([embeddings, self.rows.to(embeddings.dtype)])[: len(self.rows)]
        if remember:
            self.rows.copy_(rows)
        return rows


def linear_head(student_dim: int, teacher_dim: int) -> Projector:
    """A linear layer that is there for equal widths too, drawn as the release does."""
    layer = nn.Linear(student_dim, teacher_dim)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    return Projector(layer)


def unit(x: Tensor) -> Tensor:
    """Embeddings of length 1, in float32 at least."""
    return F.normalize(at_least_float32(x), dim=-1)


def queue_kl(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean over images of KL(softmax(t Q^T / T) || softmax(s Q^T / T)) over the rows of the queue Q."""
    with torch.autocast(student.device.type, enabled=False):
        return kl_rows(student @ queue.T / temperature, teacher @ queue.T / temperature).mean()


@register("cls_queue")
class ClsQueue(Loss):
    """Pull the student's similarities to many images, by its global embedding, towards the teacher's.

    L = mean_i KL(softmax(t_i Q^T / T) || softmax(s_i Q^T / T)),  t = l2(teacher),  s = l2(Lin(student))

    Q is a queue of the teacher's embeddings t of the latest images, those of the batch in front; it has rows of zeros
    until it is full. One queue, equal in all processes, holds what all of them have seen, so the loss of several
    processes is that of one with the joined batch. No labels: it fits pretraining by a self-supervised teacher.

    Published: no task loss, this loss 1; 1 mixup weight per batch from U(0, 1), seen alike by both models; gradient
    clipped at 1; LARS 1.8 at batch 1536, or AdamW 5e-4.

    Args:
        temperature: T > 0. 0.07.
        queue_size: rows of the queue; None: by the number of training images, from 16 (below 50 images) over 2048
            (below 10000) to 8192 (from 20000 on), as released.
        normed_teacher: False: the teacher's pooled features, what its classifier sees, for any model; True: its class
            token after the final norm, as released, where a ViT pools otherwise.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher.
        teacher_normed_cls_token: (B, D_t), in its place with normed_teacher.

    Returns:
        Scalar >= 0 in nats; 0 where the similarities are equal.

    Raises:
        ValueError: a number is out of its range; inputs differ in B, or from build in D.
        TypeError: an argument is of the wrong kind; no teacher's embedding is given.
        RuntimeError: called before build.

    Source:
        LightlyTrain, Distillation (v1), https://github.com/lightly-ai/lightly-train.
        Checked against lightly-ai/lightly-train@8f5a75c; differs in: one queue (there, one per process); of a ViT
        student what its classifier sees (there, the mean of its patch tokens: a ViT with global_pool="avg").

    Example:
        >>> import torch
        >>> from kdvit.losses import ClsQueue
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> info = ModelInfo.of(pooled=SignalInfo.of("pooled", student))
        >>> loss = ClsQueue(temperature=1.0, queue_size=2)
        >>> loss.build(info, info)
        >>> _ = loss.head[0].weight.data.copy_(torch.eye(2)), loss.head[0].bias.data.zero_()
        >>> round(loss(student, teacher).item(), 4)  # scores (1, 0) and (0, 0): 0.7311 ln 1.4621 + 0.2689 ln 0.5379
        0.1109
    """

    mismatch = Mismatch(width="a linear layer, also where they are equal", depth="the pooled features")

    def __init__(self, temperature: float = 0.07, queue_size: int | None = None, normed_teacher: bool = False) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "the published value is 0.07")
        self.queue_size = queue_size
        if queue_size is not None:
            count(self, "queue_size", queue_size, "None follows the number of training images")
        self.normed_teacher = flag(self, "normed_teacher", normed_teacher)
        self.queue: TeacherQueue | None = None

    def inputs(self) -> tuple[str, ...]:
        return ("student_pooled", f"teacher_{self._teacher_signal}")

    @property
    def _teacher_signal(self) -> str:
        return "normed_cls_token" if self.normed_teacher else "pooled"

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.teacher_dim = teacher[self._teacher_signal].dim
        self.head = linear_head(student["pooled"].dim, self.teacher_dim)
        self.queue = TeacherQueue(self.queue_size, self.teacher_dim)

    def allocate(self, num_samples: int) -> None:
        if self.queue is None:
            raise not_built(self)
        self.queue.allocate(num_samples)

    def forward(
        self,
        student_pooled: Tensor,
        teacher_pooled: Tensor | None = None,
        teacher_normed_cls_token: Tensor | None = None,
    ) -> Tensor:
        if self.queue is None:
            raise not_built(self)
        name = f"teacher_{self._teacher_signal}"
        teacher = teacher_normed_cls_token if self.normed_teacher else teacher_pooled
        if teacher is None:
            raise TypeError(
                f"ClsQueue: {name} must be given for normed_teacher={self.normed_teacher}; pass it by name."
            )
        student, teacher = feature_pair(self, student_pooled, teacher, "student_pooled", name, "B, D")
        built_width(self, name, teacher, self.teacher_dim)
        teacher = unit(teacher)
        queue = self.queue(teacher, remember=self.training)
        return queue_kl(unit(self.head(student)), teacher, queue, self.temperature)
