"""TaT: every position of the teacher's map may learn from all positions of the student's."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from kdvit.losses.attending import attend, split_channels
from kdvit.losses.checks import built_width, choice, count, feature_pair, not_built
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv_norm
from kdvit.losses.resizing import RESIZES, match_grids
from kdvit.signals import Location, ModelInfo

QUERIES = ("student", "teacher")


@register("tat")
class TaT(Loss):
    """Rebuild the teacher's map from the student's positions, weighted by how alike the positions are.

    L = mean over all elements of (O - t)^2,  O_i = sum_j a_ij v_j,  a_ij = softmax_j(<q_i, t_j>)

    t is the teacher's map; q and v are the student's, each through a 3x3 convolution and BatchNorm to the teacher's
    width. i and j run over positions; the scores are not scaled. With ``query="teacher"`` the same positions of
    the teacher ask the student's: a_ij = softmax_j(<t_i, q_j>).

    Published: task weight 0.1 and this loss 0.2 from a student that is pretrained on the same images; AdamW with
    1.6e-3. From scratch, take task weight 1. For large maps (segmentation) the paper cuts maps into groups: not here.

    Args:
        num_heads: heads that the teacher's channels are cut into; divides its width. 1.
        query: "student", as released: the weights belong to the teacher's positions j and mix the student's values of
            those positions; "teacher", as the paper's text: each position of the teacher gathers the positions of the
            student that are like it.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student; negative counts from the end; or a
            module path. Last.
        teacher_stage: the same of the teacher.
        resize: where grids differ: "pool" averages the larger one; "bilinear", "bicubic" or "nearest" interpolate the
            student's to the teacher's.

    Inputs:
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teacher_feature_map: (B, D_t, h, w); the grids may differ.

    Returns:
        Scalar >= 0 in squared feature units; 0 where the rebuilt map equals the teacher's.

    Raises:
        ValueError: an option is unknown; num_heads does not divide the teacher's width; the inputs differ in B, or
            are not those above.
        TypeError: num_heads is no integer.
        RuntimeError: called before build.

    Source:
        Lin et al., Knowledge Distillation via the Target-aware Transformer, CVPR 2022,
        https://arxiv.org/abs/2205.10793. Checked against sihaoevery/TaT@a6cc329; differs in: other grids are resized
        (there, refused), and the paper's direction as an option.

    Example:
        >>> import torch
        >>> from kdvit.losses import TaT
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, teacher = torch.zeros(2, 3, 4, 4), torch.ones(2, 5, 4, 4)
        >>> loss = TaT()
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", student)),
        ...            ModelInfo.of(feature_map=SignalInfo.of("feature_map", teacher)))
        >>> loss(student, teacher).item()  # zeros stay zeros: (0 - 1)^2
        1.0
    """

    mismatch = Mismatch(
        width="3x3 convolutions to the teacher's", depth="one stage of each", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        num_heads: int = 1,
        query: str = "student",
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.num_heads = count(self, "num_heads", num_heads, "the published value is 1")
        self.query = choice(self, "query", query, QUERIES)
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.to_query: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        dim, self.dim = student["feature_map"].dim, teacher["feature_map"].dim
        if self.dim % self.num_heads:
            raise ValueError(
                f"TaT: num_heads must divide the teacher's width {self.dim}, got {self.num_heads}; "
                "the published value is 1."
            )
        self.to_query = conv_norm(dim, self.dim, 3, relu=False)
        self.to_value = conv_norm(dim, self.dim, 3, relu=False)

    def forward(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        if self.to_query is None:
            raise not_built(self)
        student, teacher = feature_pair(self, student_feature_map, teacher_feature_map)
        built_width(self, "teacher_feature_map", teacher, self.dim)
        student, teacher = match_grids(student, teacher, self.resize)
        asks, values, target = (
            split_channels(at_least_float32(x), self.num_heads)
            for x in (self.to_query(student), self.to_value(student), teacher)
        )
        query, key = (asks, target) if self.query == "student" else (target, asks)
        return F.mse_loss(attend(query, key, values, scale=1.0), target)
