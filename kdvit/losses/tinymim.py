"""TinyMIM: relations between tokens inside one attention block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from kdvit.losses.checks import count
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


@register("tinymim")
class TinyMIM(Loss):
    """Pull the relations between tokens in one block of the student towards those in one block of the teacher.

    L = sum over relations xy of mean over B, heads and rows of KL(R_t || R_s),  R = softmax(x y^T / sqrt(d)) over keys

    The sum inside the KL is over keys. The prefix tokens take part where both models have as many, and are left out
    on both sides (before the softmax) where not. Widths may differ; each model divides by its own sqrt(d).

    Published: no task loss, this loss 1, for 100 to 300 epochs of pretraining, then fine-tuning with labels.

    Args:
        student_block: block of the student; negative counts from the end; or a module path. Last.
        teacher_block: block of the teacher; blocks behind it need not run. ViT-L: 17 (of 0 to 23); ViT-B: last.
        relations: any of "qk", "vv", "qq", "kk". Released: ("qk", "vv").
        num_relation_heads: re-split the concatenated heads of both models into this many (MiniLM-v2), for models
            whose heads differ; None keeps the models' heads.

    Inputs:
        student_query, student_key, student_value: (B, H, P+N, d) each, as the attention product uses them; only those
            of ``relations`` are read.
        teacher_query, teacher_key, teacher_value: the same of the teacher.

    Returns:
        ``{relation: scalar}``, each >= 0 in nats; 0 where the relations are equal.

    Raises:
        ValueError: relations are unknown, double or none; the heads differ and num_relation_heads is None, or it does
            not divide both widths; the grids or token numbers differ.
        TypeError: num_relation_heads is no integer; an input is missing.

    Source:
        Ren et al., TinyMIM: An Empirical Study of Distilling MIM Pre-trained Models, CVPR 2023, section 3.2,
        https://arxiv.org/abs/2301.01296; re-splitting: Wang et al., MiniLMv2, ACL 2021 Findings,
        https://arxiv.org/abs/2012.15828. Checked against OliverRensu/TinyMIM@d084705; differs in: nothing with equal
        heads and prefix tokens (there, others fail).

    Example:
        >>> import torch
        >>> from kdvit.losses import TinyMIM
        >>> x = torch.tensor([[[[2.0], [0.0]]]])  # two tokens, one head of width 1: scores [[4, 0], [0, 0]]
        >>> TinyMIM(relations=("vv",))(student_value=x, teacher_value=x)["vv"].item()
        0.0
        >>> loss = TinyMIM(relations=("vv",))(student_value=0 * x, teacher_value=x)["vv"]
        >>> round(loss.item(), 4)  # row 0: 0.9820 ln(0.9820 / 0.5) + 0.0180 ln(0.0180 / 0.5); row 1: 0
        0.3015
    """

    mismatch = Mismatch(
        width="any: tokens are compared with each other",
        heads="refused, or re-split by num_relation_heads",
        depth="one block of each",
        grid="refused",
    )

    def __init__(
        self,
        student_block: Location = -1,
        teacher_block: Location = -1,
        relations: Sequence[str] = ("qk", "vv"),
        num_relation_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.student_block = student_block
        self.teacher_block = teacher_block
        self.relations = known_relations(self, relations)
        self.num_relation_heads = num_relation_heads
        if num_relation_heads is not None:
            count(self, "num_relation_heads", num_relation_heads, "None keeps the heads of the models")
        self.num_dropped = {"student": 0, "teacher": 0}  # prefix tokens, set by build

    def inputs(self) -> tuple[str, ...]:
        return relation_inputs(self.relations)

    def locations(self) -> Mapping[str, Location]:
        blocks = {"student": self.student_block, "teacher": self.teacher_block}
        return {name: blocks[name.partition("_")[0]] for name in self.inputs()}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.num_dropped = dropped_prefix(self, student, teacher)
        for signal, info in student.signals.items():
            check_relations(self, info.shape, teacher[signal].shape, self.num_relation_heads, self.num_dropped)

    def forward(
        self,
        *,
        student_query: Tensor | None = None,
        student_key: Tensor | None = None,
        student_value: Tensor | None = None,
        teacher_query: Tensor | None = None,
        teacher_key: Tensor | None = None,
        teacher_value: Tensor | None = None,
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
        return {
            relation: relation_kl(*relation_operands(self, relation, given, self.num_relation_heads, self.num_dropped))
            for relation in self.relations
        }
