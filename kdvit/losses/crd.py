"""CRD: tell the teacher's embedding of the same image from those of many others."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import built_width, count, feature_pair, flag, not_built, number, same_batch
from kdvit.losses.first_order import refuse_second_derivative
from kdvit.losses.gathering import gather_batch
from kdvit.losses.labels import hard_labels
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.signals import ModelInfo

EPS = 1e-7
#: Rows of a memory that are looked up at once, per image, where this many are less than the scores take.
MIN_CHUNK = 64
#: What a memory holds until the number of images is known: enough for a rehearsal.
UNALLOCATED = 2
UNKNOWN = -1


@register("crd")
class CRD(Loss):
    """Pull the student's embedding of an image to the teacher's of the same, and push it from those of others.

    L = mean_i (c(s_i, teacher memory) + c(t_i, student memory)),
    c(f, memory) = -log(h_i / (h_i + K/n + eps)) - sum_{k=1..K} log((K/n) / (h_k + K/n + eps)),
    h_j = exp(<f, memory_j> / T) / Z

    s and t are linear projections of both models' pooled features, of length 1. A memory has a row for each of the n
    training images: the embedding from when the image was last seen, moved by every visit, memory_i <- l2(m * memory_i
    + (1 - m) * f_i). i is the image itself, the k are K others. Z = n * mean exp(<f, memory_j> / T) of the first
    training batch, one for each memory, and stays. No gradient enters a memory or Z: the second term trains the
    teacher's projection alone.

    The memories, Z and the labels seen are buffers (2 * n * dim numbers), equal in all processes: what is written
    is gathered. Negatives are drawn with replacement among the images that are not known to have the image's label.
    Mixed images (mixup, CutMix) are remembered as the images that their ids name, however little of those is in them.

    Published: task weight 1 and this loss 0.8, without KD (0 * KD; CRD + KD: 1 * KD at T 4 beside); CIFAR-100, 240
    epochs, batch 64.

    Args:
        dim: width of the embeddings. 128.
        num_negatives: K. 16384, of CIFAR-100's 50000 images; fewer for small data.
        temperature: T > 0. 0.07.
        momentum: m in [0, 1) of the memories. 0.5.
        num_samples: n, the number of training images, at least 2; None: `allocate` tells it, which the `kdvit.Trainer`
            calls.
        other_labels: True: negatives are not known to have the image's label ("exact"); False: any other image is
            a negative ("relax"), and labels are not read.

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the negatives;
    ``forward(..., negatives=index)`` with index (B, K) of sample ids fixes them.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        teacher_pooled: (B, D_t), the same of the teacher.
        sample_ids: (B,) integers, the image's place in the training data, 0 to n - 1.
        labels: (B,) class indices, or (B, C) soft labels, whose largest counts; with other_labels alone.
        student_logits: (B, C), for the shape of labels; without a gradient; with other_labels alone.

    Returns:
        ``{"student": first term, "teacher": second term}``, scalars >= 0 in nats. Both are small where an image's
        own row is much nearer than the negatives'; neither has a fixed value where the models are equal.

    Raises:
        ValueError: a number is out of its range; inputs differ in B or from build in D; sample_ids are not below n;
            labels fit neither (B,) nor (B, C); allocate got more images than num_samples.
        TypeError: an argument is of the wrong kind; labels of shape (B,) are no integers.
        RuntimeError: called before build; trained while n is not known.

    Source:
        Tian et al., Contrastive Representation Distillation, ICLR 2020, Eq. 17 to 20,
        https://arxiv.org/abs/1910.10699. Checked against HobbitLong/RepDistiller@b84f547; differs in: negatives are
        drawn here (there, by the data loader, of labels known beforehand: here a label is known once it was seen), and
        memories of several processes are equal.

    Example:
        >>> import torch
        >>> from kdvit.losses import CRD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> x = torch.ones(1, 3)
        >>> info = ModelInfo.of(pooled=SignalInfo.of("pooled", x))
        >>> loss = CRD(num_negatives=2, num_samples=2, other_labels=False)
        >>> loss.build(info, info)
        >>> _ = loss.student_memory.zero_(), loss.teacher_memory.zero_()
        >>> terms = loss(x, x, torch.tensor([0]), negatives=torch.tensor([[1, 1]]))
        >>> round(terms["student"].item(), 4)  # h = 1 / Z = 1 / 2, K / n = 1: -ln(0.5 / 1.5) - 2 ln(1 / 1.5)
        1.9095
    """

    mismatch = Mismatch(width="linear projections of both", depth="the pooled features")
    replicated = ("student_memory", "teacher_memory", "seen_labels")

    def __init__(
        self,
        dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        num_samples: int | None = None,
        other_labels: bool = True,
    ) -> None:
        super().__init__()
        self.dim = count(self, "dim", dim, "128 is the published width")
        self.num_negatives = count(self, "num_negatives", num_negatives, "16384 is the published number")
        self.temperature = number(self, "temperature", temperature, "> 0", "the published value is 0.07")
        self.momentum = number(self, "momentum", momentum, ">= 0", "the published value is 0.5")
        if momentum >= 1:
            raise ValueError(f"CRD: momentum must be < 1, got {momentum}; with 1 the memories would never change.")
        self.num_samples = num_samples
        if num_samples is not None and count(self, "num_samples", num_samples, "give that of training images") < 2:
            raise ValueError(f"CRD: num_samples must be >= 2, got {num_samples}; one image has none to differ from.")
        self.other_labels = flag(self, "other_labels", other_labels)
        self.generator: torch.Generator | None = None
        self.student_head: nn.Module | None = None
        self.allocated = False

    def inputs(self) -> tuple[str, ...]:
        labelled = ("labels", "student_logits") if self.other_labels else ()
        return ("student_pooled", "teacher_pooled", "sample_ids", *labelled)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.teacher_dim = teacher["pooled"].dim
        self.student_head = Projector(nn.Linear(student["pooled"].dim, self.dim))
        self.teacher_head = Projector(nn.Linear(self.teacher_dim, self.dim))
        self._make_memories(self.num_samples or UNALLOCATED)
        self.allocated = self.num_samples is not None

    def allocate(self, num_samples: int) -> None:
        """Make the memories for as many training images; those of ``num_samples=`` stay."""
        if self.student_head is None:
            raise not_built(self)
        if self.num_samples is not None:
            if num_samples > self.num_samples:
                raise ValueError(
                    f"CRD: num_samples must be at least the {num_samples} training images, got {self.num_samples}; "
                    "leave it out."
                )
            return
        self._make_memories(count(self, "num_samples", num_samples, "give that of training images"))
        self.allocated = True

    def _make_memories(self, num_samples: int) -> None:
        weight = self.student_head[0].weight
        bound = (self.dim / 3) ** -0.5  # rows of about length 1
        generator = torch.Generator().manual_seed(0)  # alike in all processes
        for side in ("student", "teacher"):
            rows = torch.empty(num_samples, self.dim).uniform_(-bound, bound, generator=generator)
            self.register_buffer(f"{side}_memory", rows.to(weight))
        self.register_buffer("seen_labels", torch.full((num_samples,), UNKNOWN, device=weight.device))
        # log Z for embeddings of the student and of the teacher; infinite until the first training batch.
        self.register_buffer("log_z", torch.full((2,), math.inf, dtype=weight.dtype, device=weight.device))

    def forward(
        self,
        student_pooled: Tensor,
        teacher_pooled: Tensor,
        sample_ids: Tensor,
        labels: Tensor | None = None,
        student_logits: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.student_head is None:
            raise not_built(self)
        if self.training and not self.allocated:
            raise RuntimeError(
                "CRD: the memories must be allocated before training; train with kdvit.Trainer, pass num_samples=, or "
                "call allocate(number of training images)."
            )
        student, teacher = feature_pair(
            self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", "B, D"
        )
        built_width(self, "teacher_pooled", teacher, self.teacher_dim)
        self._check_ids(student, sample_ids)
        if self.other_labels:
            labels = self._labels(labels, student_logits, student)
        negatives = self._draw(sample_ids, labels) if negatives is None else negatives.long()
        if negatives.shape != (len(student), self.num_negatives):
            raise ValueError(
                f"CRD: negatives must have shape {(len(student), self.num_negatives)}, got {tuple(negatives.shape)}; "
                "give num_negatives sample ids for each image."
            )
        index = torch.cat([sample_ids.long()[:, None], negatives], dim=1)

        s, t = (
            F.normalize(at_least_float32(head(x)), dim=1)
            for head, x in ((self.student_head, student), (self.teacher_head, teacher))
        )
        with torch.no_grad(), torch.autocast(s.device.type, enabled=False):
            # An embedding is compared with what is remembered of the other model.
            pairs = ((s, self.teacher_memory), (t, self.student_memory))
            scores = [_dots(x, memory, index) / self.temperature for x, memory in pairs]
            log_z = self._normaliser(scores)
            terms = [self._contrast(*pair, index, x - z) for pair, x, z in zip(pairs, scores, log_z, strict=True)]
            if self.training:
                self._remember(s, t, sample_ids.long(), labels, log_z)
        values = [_WithGradient.apply(x, *term) for x, term in zip((s, t), terms, strict=True)]
        return {"student": values[0], "teacher": values[1]}

    def _contrast(self, x: Tensor, memory: Tensor, index: Tensor, log_h: Tensor) -> tuple[Tensor, Tensor]:
        """Value of one direction, and its gradient with respect to the embeddings x."""
        noise = self.num_negatives / len(memory)
        log_c = math.log(noise + EPS)
        own, others = log_h[:, :1], log_h[:, 1:]
        value = F.softplus(log_c - own).sum() + F.softplus(others - log_c).sum()
        value = value / len(x) + self.num_negatives * (log_c - math.log(noise))
        pull = torch.cat([-(log_c - own).sigmoid(), (others - log_c).sigmoid()], dim=1)
        return value, _weighted_rows(pull, memory, index) / (len(x) * self.temperature)

    def _normaliser(self, scores: list[Tensor]) -> Tensor:
        """log Z of both directions: what was found in the first training batch, or would be in this one."""
        log_means = torch.stack([x.logsumexp(dim=(0, 1)) - math.log(x.numel()) for x in scores])
        if self.training:
            log_means = gather_batch(log_means[None])
            log_means = log_means.logsumexp(dim=0) - math.log(len(log_means))
        found = log_means + math.log(len(self.student_memory))
        return torch.where(self.log_z.isinf(), found, self.log_z)

    def _remember(self, s: Tensor, t: Tensor, sample_ids: Tensor, labels: Tensor | None, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        sample_ids = gather_batch(sample_ids)
        # An image that is there twice is remembered once, by its mean: the order of writing must not matter.
        same = (sample_ids[:, None] == sample_ids).to(s.dtype)
        same = same / same.sum(dim=1, keepdim=True)
        for memory, x in ((self.student_memory, s), (self.teacher_memory, t)):
            moved = self.momentum * memory[sample_ids] + (1 - self.momentum) * (same @ gather_batch(x))
            memory.index_copy_(0, sample_ids, F.normalize(moved, dim=1).to(memory.dtype))
        if labels is not None:
            self.seen_labels.index_copy_(0, sample_ids, gather_batch(labels))

    def _draw(self, sample_ids: Tensor, labels: Tensor | None) -> Tensor:
        """Sample ids (B, K) of images that are not known to have the label, or that are simply others."""
        num_samples, device = len(self.seen_labels), sample_ids.device
        if labels is None:
            order = torch.arange(num_samples, device=device)
            first, excluded = sample_ids, torch.ones_like(sample_ids)
        else:
            # Sorted by label, the images of one label are a block, which is left out.
            known, order = self.seen_labels.index_copy(0, sample_ids.long(), labels).sort()
            first = torch.searchsorted(known, labels)
            excluded = torch.searchsorted(known, labels, right=True) - first
        shape = (len(sample_ids), self.num_negatives)
        place = device if self.generator is None else self.generator.device
        drawn = torch.randint(2**62, shape, generator=self.generator, device=place).to(device)
        drawn = drawn % (num_samples - excluded).clamp(min=1)[:, None]
        drawn = drawn + torch.where(drawn >= first[:, None], excluded[:, None], 0)
        return order[drawn.clamp(max=num_samples - 1)]  # one label alone leaves nothing to draw: any image then

    def _labels(self, labels: Tensor | None, logits: Tensor | None, student: Tensor) -> Tensor:
        if labels is None or logits is None:
            raise TypeError(
                "CRD: labels and student_logits must be given with other_labels=True; pass both, or other_labels=False."
            )
        same_batch(self, "student_pooled", student, "student_logits", logits)
        return hard_labels(self, labels, logits)

    def _check_ids(self, student: Tensor, sample_ids: Tensor) -> None:
        if sample_ids.is_floating_point():
            raise TypeError(f"CRD: sample_ids must be integers, got {sample_ids.dtype}; pass sample_ids.long().")
        if sample_ids.ndim != 1:
            raise ValueError(
                f"CRD: sample_ids must have shape (B,), got {tuple(sample_ids.shape)}; give one per image."
            )
        same_batch(self, "student_pooled", student, "sample_ids", sample_ids)
        # Reading values of a CUDA tensor would stall the GPU on every step; there, indexing itself complains.
        if sample_ids.device.type != "cpu" or torch.compiler.is_compiling() or not len(sample_ids):
            return
        low, high = int(sample_ids.min()), int(sample_ids.max())
        if low < 0 or high >= len(self.seen_labels):
            raise ValueError(
                f"CRD: sample_ids must be in 0..{len(self.seen_labels) - 1}, got {low}..{high}; "
                "allocate the memories for all training images."
            )


def _chunks(index: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Columns to look up at once: their rows (B, chunk, dim) take no more room than the scores (B, 1 + K)."""
    return index.split(max(index.shape[1] // dim, MIN_CHUNK), dim=1)


def _rows(index: Tensor, memory: Tensor) -> Tensor:
    return at_least_float32(F.embedding(index, memory))


def _dots(x: Tensor, memory: Tensor, index: Tensor) -> Tensor:
    """<x_i, memory_j> for the j of row i: (B, D), (n, D), (B, M) -> (B, M)."""
    parts = [(_rows(part, memory) @ x[:, :, None]).squeeze(2) for part in _chunks(index, x.shape[1])]
    return torch.cat(parts, dim=1)


def _weighted_rows(weights: Tensor, memory: Tensor, index: Tensor) -> Tensor:
    """sum_j weights_ij * memory_j: (B, M), (n, D), (B, M) -> (B, D)."""
    total = weights.new_zeros(len(index), memory.shape[1])
    parts = _chunks(index, memory.shape[1])
    for part, share in zip(parts, weights.split(parts[0].shape[1], dim=1), strict=True):
        total = total + (share[:, None] @ _rows(part, memory)).squeeze(1)
    return total


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to x is known: found in forward, because the memory changes before backward
    and a copy of the rows that were looked up would be dim times as large as the scores."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("CRD")
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None
