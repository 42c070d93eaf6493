"""OFD: the teacher's maps in front of their ReLU, without what the ReLU takes away anyhow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kdvit.losses.checks import built_width, choice, not_built, paired
from kdvit.losses.latch import Latch
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.map_pairs import map_pairs
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

#: With a smaller share of negative values than this, the margin is -3 standard deviations.
_FEW = 1e-3


def batch_norm_margin(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """The margin (D,) of each channel behind a BatchNorm: E[x | x < 0] of a normal distribution of its bias and weight.

    The published margin of `OFD`: ``OFD(margins=[batch_norm_margin(norm) for norm in norms])``, with the last BatchNorm
    in front of the ReLU of each stage. Where a channel is negative with probability 0.001 or less, -3 times its
    deviation.

    Example:
        >>> [round(x, 4) for x in batch_norm_margin(nn.BatchNorm2d(2)).tolist()]  # -sqrt(2 / pi)
        [-0.7979, -0.7979]
    """
    if norm.weight is None:
        mean, deviation = torch.zeros(norm.num_features).double(), torch.ones(norm.num_features).double()
    else:
        mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    ratio = mean / deviation.clamp_min(1e-12)
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    expected = mean - deviation * density / share.clamp_min(_FEW)
    return torch.where(share > _FEW, expected, -3 * deviation).float()


@register("ofd")
class OFD(Loss):
    """Pull maps of the student in front of the ReLU towards the teacher's, but for values that the ReLU takes away.

    L = sum_l 2^-(L - l) / B * sum over elements with s > t or t > 0 of (s - t)^2,
    s = BatchNorm(Conv1x1(student_l)), t = max(teacher_l, m_l), l = 1..L from shallow to deep

    m < 0 is a margin per channel of the teacher, E[x | x < 0]: a negative value of the teacher asks the student only to
    be below it ("margin ReLU"). It is measured on held-out images, or given. Of models whose stages do not end in a
    ReLU, such as a ViT, the feature map itself is read; this is our extension.

    Published: task weight 1 and this loss 1e-3 (CIFAR-100) or 1e-4 (ImageNet), small because it is a sum; the end of
    every stage; the teacher's BatchNorm uses batch statistics, while kdvit's teachers are in eval mode.

    Args:
        margins: one per stage, each with one number <= 0 per channel of the teacher: tensors or lists, such as the
            published ones of `batch_norm_margin`; None: measured by `calibrate` before training.
        student_stages: stages or blocks of the student, from shallow to deep; an index, a share of the depth, or a
            module path.
        teacher_stages: as many of the teacher, pair by pair.
        resize: where the grids differ, "pool": the larger is average-pooled to the smaller; "bilinear", "bicubic",
            "nearest": the student's map is interpolated to the teacher's grid. The teacher's after the margin.

    Inputs:
        student_pre_activation: one (B, D_s, h, w) per stage.
        teacher_pre_activation: one (B, D_t, h, w) per stage.

    Returns:
        Scalar >= 0 in squared feature units, summed over positions and channels; 0 where s equals t, or both are
        not positive and s is below t.

    Raises:
        ValueError: margins are positive, not finite, or not one per stage and channel; resize is unknown; the lists
            of stages differ in length; inputs differ in B, or the teacher's have another width than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, section 3,
        https://arxiv.org/abs/1904.01866. Checked against clovaai/overhaul-distillation@76344a8; differs in: 1/B and
        not its constants; measured margins; grids may differ; a teacher in eval mode.

    Example:
        >>> import torch
        >>> from kdvit.losses import OFD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(1, 8, 1, 3), torch.tensor([2.0, 0.0, -1.0]).view(1, 1, 1, 3)
        >>> loss = OFD(margins=[[-0.5]], student_stages=(-1,), teacher_stages=(-1,))
        >>> loss.build(ModelInfo.of(pre_activation=(SignalInfo.of("pre_activation", student),)),
        ...            ModelInfo.of(pre_activation=(SignalInfo.of("pre_activation", teacher),)))
        >>> loss((student,), (teacher,)).item()  # s = 0, t = (2, 0, -1/2): 2^2 + 0 + (1/2)^2
        4.25
    """

    mismatch = Mismatch(
        width="the 1x1 convolution ends in the teacher's", depth="pairs of stages", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        margins: Sequence[Tensor | Sequence[float]] | None = None,
        student_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        teacher_stages: Sequence[Location] = (0.25, 0.5, 0.75, 1.0),
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.student_stages, self.teacher_stages = paired(
            self, "student_stages", student_stages, "teacher_stages", teacher_stages
        )
        self.resize = choice(self, "resize", resize, RESIZES)
        self.margins = None if margins is None else self._checked(margins)
        self.connectors: nn.ModuleList | None = None
        self.calibrated = Latch()
        if margins is not None:
            self.calibrate = None

    def locations(self) -> Mapping[str, Sequence[Location]]:
        return {"student_pre_activation": self.student_stages, "teacher_pre_activation": self.teacher_stages}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        student_maps, teacher_maps = student["pre_activation"], teacher["pre_activation"]
        self.connectors = nn.ModuleList(_connector(s.dim, t.dim) for s, t in zip(student_maps, teacher_maps))
        for index, info in enumerate(teacher_maps):
            margin = torch.zeros(info.dim) if self.margins is None else torch.tensor(self.margins[index])
            if len(margin) != info.dim:
                raise ValueError(
                    f"OFD: margins[{index}] must have D={info.dim} numbers for '{info.model}' at '{info.location}', "
                    f"got {len(margin)}; give one per channel."
                )
            self.register_buffer(f"margin_{index}", margin)
        self.calibrated.set(False)  # what was found for another teacher does not count

    def needs_calibration(self) -> bool:
        return self.margins is None and not self.calibrated

    @torch.no_grad()
    def calibrate(self, teacher_pre_activation: tuple[Tensor, ...]) -> None:
        """Measure E[x | x < 0] of every channel: one (N, D_t, h, w) per stage, of held-out images."""
        if self.connectors is None:
            raise not_built(self)
        for index, (teacher, _) in enumerate(
            map_pairs(self, self.teacher_stages, teacher_pre_activation, teacher_pre_activation, "pre_activation")
        ):
            if not teacher.numel() or not teacher.isfinite().all():
                raise ValueError(
                    "OFD: teacher_pre_activation must be finite and not empty; check the calibration images."
                )
            getattr(self, f"margin_{index}").copy_(_measured_margin(teacher))
        self.calibrated.set()

    def forward(self, student_pre_activation: tuple[Tensor, ...], teacher_pre_activation: tuple[Tensor, ...]) -> Tensor:
        if self.connectors is None:
            raise not_built(self)
        terms = []
        pairs = map_pairs(self, self.student_stages, student_pre_activation, teacher_pre_activation, "pre_activation")
        for index, (connector, (student, teacher)) in enumerate(zip(self.connectors, pairs, strict=True)):
            margin = getattr(self, f"margin_{index}")
            built_width(self, "teacher_pre_activation", teacher, margin[None].shape[1])
            teacher = teacher.maximum(margin[:, None, None].to(teacher.dtype))
            student, teacher = match_grids(student, teacher, self.resize)
            student = at_least_float32(connector(student))
            counts = (student > teacher) | (teacher > 0)
            deeper_stages = len(pairs) - 1 - index
            terms.append(((student - teacher) * counts).square().sum() / 2**deeper_stages)
        return torch.stack(terms).sum() / len(student_pre_activation[0])

    def _checked(self, margins: Sequence[Tensor | Sequence[float]]) -> tuple[tuple[float, ...], ...]:
        try:
            rows = [torch.as_tensor(margin, dtype=torch.float32).detach().cpu() for margin in margins]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"OFD: margins must be one list of numbers per stage, got {margins!r}; or pass None to measure them."
            ) from error
        if len(rows) != len(self.teacher_stages):
            raise ValueError(
                f"OFD: margins must be as many as teacher_stages, got {len(rows)} for {len(self.teacher_stages)}; "
                "they are paired in order."
            )
        for index, row in enumerate(rows):
            if row.ndim != 1 or not row.isfinite().all() or (row > 0).any():
                raise ValueError(
                    f"OFD: margins[{index}] must be finite numbers <= 0, one per channel, got {row.tolist()}; "
                    "None measures them."
                )
        return tuple(tuple(row.tolist()) for row in rows)


def _connector(dim: int, out_dim: int) -> Projector:
    connector = conv_norm(dim, out_dim, 1, relu=False)
    nn.init.normal_(connector[0].weight, std=math.sqrt(2 / out_dim))  # as released
    return connector


def _measured_margin(feature_map: Tensor) -> Tensor:
    """E[x | x < 0] of each channel of (N, D, h, w); -3 standard deviations where next to nothing is negative."""
    rows = feature_map.transpose(0, 1).flatten(1)
    num_negative = (rows < 0).sum(dim=1)
    expected = rows.clamp_max(0).sum(dim=1) / num_negative.clamp_min(1)
    return torch.where(num_negative > _FEW * rows.shape[1], expected, -3 * rows.std(dim=1, correction=0))
