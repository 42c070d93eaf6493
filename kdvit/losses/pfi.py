"""PFI: imitate the teacher's features where the predictions differ."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdvit.losses.checks import built_width, choice, feature_pair, not_built, same_classes
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector, conv1x1
from kdvit.losses.resizing import RESIZES, match_grids, resize
from kdvit.signals import Location, ModelInfo

PREDICTIONS = ("probabilities", "logits")


@register("pfi")
class PFI(Loss):
    """Pull the student's feature map towards the teacher's, most where their predictions at a position differ.

    L = mean over B and positions of p * f,  p = mean_c (y_s - y_t)^2,  f = mean_D (A(student) - teacher)^2

    y are the probabilities (or the logits) of the classifier at every position, A is a 1x1 convolution where the
    widths differ. The gradient flows through p too: the loss shrinks as well where the predictions come together.
    p is averaged, or repeated, where the maps are of another stage and grid than the predictions.

    Published: for detectors, over the levels of a feature pyramid, beside rank mimicking (another loss) and the task
    loss; here the classifier's own level. The weights are not known to us: task weight 1 and this loss 1.

    Args:
        predictions: what is compared: "probabilities", so that p is at most 2 / C and an offset that all logits of a
            position share counts for nothing; or "logits", as in third-party code: keep those out of float16.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student's map; negative counts from the end; or
            a module path. Last.
        teacher_stage: the same of the teacher.
        resize: where grids differ: "pool" averages the larger one; "bilinear", "bicubic" or "nearest" interpolate the
            student's to the teacher's.

    Inputs:
        student_dense_logits: (B, C, h, w), raw.
        teacher_dense_logits: (B, C, h, w), raw; the grids may differ.
        student_feature_map: (B, D_s, h, w); of a ViT its patch tokens on their grid.
        teacher_feature_map: (B, D_t, h, w); the grids may differ.

    Returns:
        Scalar >= 0 in squared probabilities (or logits) times squared feature units; 0 where at every position the
        predictions or the features are equal.

    Raises:
        ValueError: an option is unknown; inputs differ in B or C, or are not those above.
        RuntimeError: called before build.

    Source:
        Li et al., Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
        Imitation, AAAI 2022, https://arxiv.org/abs/2112.04840; no official code; from the paper. Third-party files
        agree on the formula; some compare logits, one sigmoid scores. Our choice: a classifier's softmax at every
        position in the place of a detector's class scores.

    Example:
        >>> import torch
        >>> from kdvit.losses import PFI
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> logits, features = torch.zeros(1, 2, 1, 1), torch.zeros(1, 3, 1, 1)
        >>> info = ModelInfo.of(dense_logits=SignalInfo.of("dense_logits", logits),
        ...                     feature_map=SignalInfo.of("feature_map", features))
        >>> loss = PFI("logits")
        >>> loss.build(info, info)
        >>> loss(logits, logits + 2, features, features + 3).item()  # 2^2 * 3^2
        36.0
    """

    mismatch = Mismatch(
        width="1x1 convolution where they differ", depth="one stage of each", grid="the larger is average-pooled"
    )

    def __init__(
        self,
        predictions: str = "probabilities",
        student_stage: Location = -1,
        teacher_stage: Location = -1,
        resize: str = "pool",
    ) -> None:
        super().__init__()
        self.predictions = choice(self, "predictions", predictions, PREDICTIONS)
        self.student_stage = student_stage
        self.teacher_stage = teacher_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.projector: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage, "teacher_feature_map": self.teacher_stage}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self._same_classes(student["dense_logits"].dim, teacher["dense_logits"].dim)
        self.dim = teacher["feature_map"].dim
        self.projector = conv1x1(student["feature_map"].dim, self.dim)

    def forward(
        self,
        student_dense_logits: Tensor,
        teacher_dense_logits: Tensor,
        student_feature_map: Tensor,
        teacher_feature_map: Tensor,
    ) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        names = "student_dense_logits", "teacher_dense_logits"
        logits = feature_pair(self, student_dense_logits, teacher_dense_logits, *names, "B, C, h, w")
        self._same_classes(logits[0].shape[1], logits[1].shape[1])
        maps = feature_pair(self, student_feature_map, teacher_feature_map)
        feature_pair(self, logits[0], maps[0], "student_dense_logits", "student_feature_map")  # of one batch
        built_width(self, "teacher_feature_map", maps[1], self.dim)

        if self.predictions == "probabilities":
            logits = tuple(x.softmax(dim=1) for x in logits)
        predictions = _difference(*match_grids(*logits, self.resize))
        features, target = match_grids(*maps, self.resize)
        features = _difference(at_least_float32(self.projector(features)), target)
        # Pooling to a larger grid repeats, so that p stays >= 0 and keeps its mean.
        return (resize(predictions, tuple(features.shape[2:]), "pool") * features).mean()

    def _same_classes(self, student: int, teacher: int) -> None:
        same_classes(self, student, teacher, "student_dense_logits", "teacher_dense_logits")


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference over channels: (B, D, h, w) twice -> (B, 1, h, w)."""
    return (x - y).square().mean(dim=1, keepdim=True)
