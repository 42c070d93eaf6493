"""MiniLM: relations between tokens in the last attention block, through relation heads that any two models share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdvit.losses.checks import choice, count, number
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.relations import (
    check_given,
    check_relations,
    dropped_prefix,
    known_relations,
    relation_inputs,
    relation_kl,
    relation_operands,
)
from kdvit.signals import Location, ModelInfo

HEADS = ("auto", "model")
#: Published for teachers of width 768, and the width of such a head in the narrowest published student, 384 / 48.
MAX_HEADS, MIN_HEAD_DIM = 48, 8


@register("minilm")
class MiniLM(Loss):
    """Pull the relations between tokens in one block of the student towards the teacher's, in heads that both share.

    L = sum over relations xy of weight_xy * mean over B, heads and rows of KL(R_t || R_s),
    R = softmax(x y^T / sqrt(d)) over keys

    x and y are the concatenated heads of query, key or value, cut into A relation heads of width d = D / A (MiniLM
    v2), so that neither widths nor heads need to agree. MiniLM v1, the attention distribution and the relation of the
    values in the models' own heads, is ``MiniLM(relations=("qk", "vv"), weights=(1, 1), num_relation_heads="model")``.
    Prefix tokens take part where both models have as many, and are left out on both sides where not.

    Published: no task loss, this loss 1, for pretraining on text; then fine-tuning with labels.

    Args:
        student_block: block of the student; negative counts from the end; or a module path. Last.
        teacher_block: block of the teacher. Last for a teacher of 12 blocks; an upper middle one for a larger teacher:
            20 (of 0 to 23), a share of 0.875.
        relations: any of "qk", "vv", "qq", "kk". v2: ("qq", "kk", "vv"); v1: ("qk", "vv").
        weights: one >= 0 per relation; None: all the same, and 1 together (v2).
        num_relation_heads: A, a divisor of both widths. v2: 48 for a width of 768, 64 for 1024. "auto": the most that
            divide both widths, up to 48 and at least 8 wide, which is 48 for the published pairs of 768. "model": the
            models' heads (v1), which must then be as many.

    Inputs:
        student_query, student_key, student_value: (B, H, P+N, d) each, as the attention product uses them; only those
            of ``relations`` are read.
        teacher_query, teacher_key, teacher_value: the same of the teacher.
        mask: for direct callers, (B, L), true for the tokens of an image (or text) that count, out of the L that
            take part; every image is averaged over its own.

    Returns:
        ``{relation: scalar}``, each >= 0 in nats, weights included; 0 where the relations are equal.

    Raises:
        ValueError: relations are unknown, double or none; weights are not one each; num_relation_heads does not divide
            both widths, or is "model" where the heads differ; the grids or token numbers differ; a mask of another
            shape, or without a token for some image.
        TypeError: a number is of the wrong kind; an input is missing.

    Source:
        Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
        Transformers, ACL 2021 Findings, https://arxiv.org/abs/2012.15828; v1: Wang et al., MiniLM, NeurIPS 2020,
        https://arxiv.org/abs/2002.10957. The authors released models, but no training code. Checked
        against bloomberg/minilmv2.bb@0d78e20, a third party's; differs in: prefix tokens of different number; queries
        and keys are taken behind a norm or a rotation, where a model has one.

    Example:
        >>> import torch
        >>> from kdvit.losses import MiniLM
        >>> x = torch.tensor([[[[2.0], [0.0]]]])  # two tokens, one head of width 1: scores [[4, 0], [0, 0]]
        >>> loss = MiniLM(relations=("vv",))
        >>> loss(student_value=x, teacher_value=x)["vv"].item()
        0.0
        >>> round(loss(student_value=0 * x, teacher_value=x)["vv"].item(), 4)  # row 0: 0.6031 nats; row 1: 0
        0.3015
    """

    mismatch = Mismatch(
        width="relation heads that divide both widths",
        heads="re-split into relation heads",
        depth="one block of each model",
        grid="refused",
    )

    def __init__(
        self,
        student_block: Location = -1,
        teacher_block: Location = -1,
        relations: Sequence[str] = ("qq", "kk", "vv"),
        weights: Sequence[float] | None = None,
        num_relation_heads: int | str = "auto",
    ) -> None:
        super().__init__()
        self.student_block = student_block
        self.teacher_block = teacher_block
        self.relations = known_relations(self, relations)
        self.weights = weights
        if weights is not None:
            if not isinstance(weights, Sequence):
                raise TypeError(f"MiniLM: weights must be a sequence, got {weights!r}; give one number per relation.")
            self.weights = tuple(number(self, "weights", w, ">= 0", "0 switches a relation off") for w in weights)
            if len(self.weights) != len(self.relations):
                raise ValueError(
                    f"MiniLM: weights must be one per relation, got {len(self.weights)} for {self.relations}; "
                    "None weighs them equally."
                )
        if isinstance(num_relation_heads, str):
            self.num_relation_heads: int | str = choice(self, "num_relation_heads", num_relation_heads, HEADS)
        else:
            advice = "'auto' finds a divisor of both widths"
            self.num_relation_heads = count(self, "num_relation_heads", num_relation_heads, advice)
        self.num_dropped = {"student": 0, "teacher": 0}  # prefix tokens, set by build

    def inputs(self) -> tuple[str, ...]:
        return relation_inputs(self.relations)

    def locations(self) -> Mapping[str, Location]:
        blocks = {"student": self.student_block, "teacher": self.teacher_block}
        return {name: blocks[name.partition("_")[0]] for name in self.inputs()}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.num_dropped = dropped_prefix(self, student, teacher)
        for signal, info in student.signals.items():
            shapes = info.shape, teacher[signal].shape
            check_relations(self, *shapes, self._num_heads(*shapes), self.num_dropped)

    def forward(
        self,
        *,
        student_query: Tensor | None = None,
        student_key: Tensor | None = None,
        student_value: Tensor | None = None,
        teacher_query: Tensor | None = None,
        teacher_key: Tensor | None = None,
        teacher_value: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        given = {
            "student_query": student_query,
            "student_key": student_key,
            "student_value": student_value,
            "teacher_query": teacher_query,
            "teacher_key": teacher_key,
            "teacher_value": teacher_value,
        }
        check_given(self, given, self.relations)
        first = self.inputs()[0].removeprefix("student_")  # the shapes of query, key and value are the same
        num_heads = self._num_heads(given[f"student_{first}"].shape[1:], given[f"teacher_{first}"].shape[1:])
        weights = self.weights or (1 / len(self.relations),) * len(self.relations)
        terms = {}
        for relation, weight in zip(self.relations, weights, strict=True):
            operands = relation_operands(self, relation, given, num_heads, self.num_dropped)
            terms[relation] = weight * (relation_kl(*operands) if mask is None else self._masked(operands, mask))
        return terms

    def _num_heads(self, student: Sequence[int], teacher: Sequence[int]) -> int | None:
        """Relation heads for two shapes (H, L, d); None keeps those of the models."""
        if self.num_relation_heads == "model":
            return None
        if self.num_relation_heads != "auto":
            return self.num_relation_heads
        dims = student[0] * student[2], teacher[0] * teacher[2]
        most = max(1, min(MAX_HEADS, min(dims) // MIN_HEAD_DIM))
        return next(n for n in range(most, 0, -1) if math.gcd(*dims) % n == 0)

    def _masked(self, operands: tuple[Tensor, ...], mask: Tensor) -> Tensor:
        """The mean over images of what the tokens that count give; they differ in number."""
        wanted = operands[0].shape[0], operands[0].shape[2]
        if mask.shape != wanted or not mask.bool().any(dim=1).all():
            raise ValueError(
                f"MiniLM: mask must have shape {wanted} and a token that counts in every row, got "
                f"{tuple(mask.shape)} with {int(mask.bool().any(-1).sum())} such rows; leave out the prefix tokens "
                "that do not take part."
            )
        images = [[x[i : i + 1, :, row] for x in operands] for i, row in enumerate(mask.bool())]
        return torch.stack([relation_kl(*image) for image in images]).mean()
