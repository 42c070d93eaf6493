"""PromptKD: a student that learns to speak to the teacher's class vectors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import adopted_head, built_width, feature_pair, flag, logit_pair, not_built, number
from kdvit.losses.kd import kl_rows
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import BatchNorm1d, Projector
from kdvit.signals import ModelInfo

EPS = 1e-6  # keeps a zero feature finite


@register("promptkd")
class PromptKD(Loss):
    """Pull what the teacher's classifier says to the student's projected feature towards the teacher's logits.

    L = T^2 / (B * C) * sum_i KL(softmax(teacher_i / T) || softmax(z_i / T)),
    z = logit_scale * W(n(Linear(ReLU(BatchNorm(Linear(student))))))

    W is the teacher's classifier, frozen: in CLIP the text embeddings of the classes, here its last layer. n scales a
    feature to length 1 with normalize, else leaves it as it is. The mean is over images and classes, as released:
    C times smaller than KD's. The projector and a frozen copy of W are deployed with the student, whose own classifier
    plays no part.

    Published: no task loss, this loss 1000 (200 for some of its data sets), for a CLIP student that is frozen but for
    visual prompts, which are not part of this loss; images without labels.

    Args:
        temperature: T > 0. 1.
        normalize: whether the feature is scaled to length 1 in front of the classifier. CLIP: True; a classifier
            that was trained on raw features: False.
        logit_scale: > 0. CLIP: 100, the exponential of its learnt scale, unless W holds it; else 1.

    Inputs:
        student_pooled: (B, D_s), what the student's classifier sees, or a CLIP student's image feature.
        teacher_logits: (B, C), raw; of CLIP with its scale.
        teacher_pooled: (B, D_t), what the teacher's classifier sees; for its width alone.
        teacher_head: the teacher's classifier, (B, D_t) -> (B, C).

    Returns:
        Scalar >= 0 in nats * T^2 / C; 0 where both distributions are equal.

    Raises:
        ValueError: a number is out of its range; the logits differ in B or C; teacher_pooled has another width than
            in build; the batches differ.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build, or predict before adopt_head.

    Source:
        Li et al., PromptKD: Unsupervised Prompt Distillation for Vision-Language Models, CVPR 2024,
        https://arxiv.org/abs/2403.02781. Checked against zhengli97/PromptKD@ec244f7; differs in: no bias before
        BatchNorm; without normalize and logit_scale, which are the defaults, for classifiers that are not CLIP's.

    Example:
        >>> import torch
        >>> from kdvit.losses import PromptKD
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> student, pooled = torch.rand(2, 8), torch.rand(2, 16)
        >>> loss = PromptKD()
        >>> loss.build(ModelInfo.of(pooled=SignalInfo.of("pooled", student)),
        ...            ModelInfo.of(pooled=SignalInfo.of("pooled", pooled)))
        >>> teacher = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()  # probabilities 3/4 and 1/4
        >>> value = loss(student, teacher, pooled, lambda x: 0 * x[:, :2])  # a classifier that cannot tell
        >>> round(value.item(), 4)  # (3/4 ln(3/2) + 1/4 ln(1/2)) / 2 classes
        0.0654
    """

    mismatch = Mismatch(width="two-layer projector")
    #: The deployed student has the one that it was made with.
    fixed_options = ("logit_scale",)

    def __init__(self, temperature: float = 1.0, normalize: bool = False, logit_scale: float = 1.0) -> None:
        super().__init__()
        self.temperature = number(self, "temperature", temperature, "> 0", "1.0 leaves the logits as they are")
        self.normalize = flag(self, "normalize", normalize)
        self.logit_scale = number(self, "logit_scale", logit_scale, "> 0", "1.0 leaves the logits as they are")
        self.projector: Projector | None = None
        self.head: nn.Linear | None = None

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.dim = teacher["pooled"].dim
        self.projector = Projector(
            nn.Linear(student["pooled"].dim, self.dim, bias=False),
            BatchNorm1d(self.dim),
            nn.ReLU(),
            nn.Linear(self.dim, self.dim),
        )

    def forward(
        self,
        student_pooled: Tensor,
        teacher_logits: Tensor,
        teacher_pooled: Tensor,
        teacher_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if self.projector is None:
            raise not_built(self)
        feature_pair(self, student_pooled, teacher_pooled, "student_pooled", "teacher_pooled", axes="B, D")
        built_width(self, "teacher_pooled", teacher_pooled, self.dim)
        student, teacher = logit_pair(self, self._logits(student_pooled, teacher_head), teacher_logits)
        rows = kl_rows(student / self.temperature, teacher / self.temperature)
        return self.temperature**2 * rows.mean() / student.shape[1]

    def predict(self, student_pooled: Tensor) -> Tensor:
        """The logits (B, C) of the deployed student."""
        if self.projector is None:
            raise not_built(self)
        head = adopted_head(self)
        return self._logits(student_pooled, lambda x: head(x.to(head.weight.dtype)))

    def _logits(self, student_pooled: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        feature = at_least_float32(self.projector(student_pooled))
        feature = F.normalize(feature, dim=1, eps=EPS) if self.normalize else feature
        return self.logit_scale * head(feature).to(feature.dtype)
