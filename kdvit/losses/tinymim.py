"""TinyMIM: relations between tokens inside one attention block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from kdvit.losses.checks import choice, count, same_batch, same_grid
from kdvit.losses.loss import Loss, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.relations import relation_kl, split_heads
from kdvit.signals import Location, ModelInfo

RELATIONS = ("qk", "vv", "qq", "kk")
_SIGNALS = {"q": "query", "k": "key", "v": "value"}


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
        relations = (relations,) if isinstance(relations, str) else tuple(relations)
        self.relations = tuple(choice(self, "relations", relation, RELATIONS) for relation in relations)
        if not relations or len(set(relations)) < len(relations):
            raise ValueError(f"TinyMIM: relations must be one or more different ones, got {relations}; list each once.")
        self.num_relation_heads = num_relation_heads
        if num_relation_heads is not None:
            count(self, "num_relation_heads", num_relation_heads, "None keeps the heads of the models")
        self.num_dropped = {"student": 0, "teacher": 0}  # prefix tokens, set by build

    def inputs(self) -> tuple[str, ...]:
        signals = dict.fromkeys(_SIGNALS[letter] for relation in self.relations for letter in relation)
        return tuple(f"{side}_{signal}" for side in ("student", "teacher") for signal in signals)

    def locations(self) -> Mapping[str, Location]:
        blocks = {"student": self.student_block, "teacher": self.teacher_block}
        return {name: blocks[name.partition("_")[0]] for name in self.inputs()}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        self.num_dropped = {"student": 0, "teacher": 0}
        for signal, s in student.signals.items():
            t = teacher[signal]
            if s.num_prefix_tokens != t.num_prefix_tokens:
                self.num_dropped = {"student": s.num_prefix_tokens, "teacher": t.num_prefix_tokens}
            same_grid(self, s, t)
            self._check(s.shape, t.shape)

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
            "student": {"q": student_query, "k": student_key, "v": student_value},
            "teacher": {"q": teacher_query, "k": teacher_key, "v": teacher_value},
        }
        for name in self.inputs():
            side, _, signal = name.partition("_")
            if given[side][signal[0]] is None:
                raise TypeError(f"TinyMIM: {name} must be given for relations {self.relations}; pass it by name.")
        terms = {}
        for relation in self.relations:
            student, teacher = ([given[side][letter] for letter in relation] for side in ("student", "teacher"))
            same_batch(self, "student", student[0], "teacher", teacher[0])
            self._check(student[0].shape[1:], teacher[0].shape[1:])
            operands = (*self._operands("student", *student), *self._operands("teacher", *teacher))
            terms[relation] = relation_kl(*operands)
        return terms

    def _operands(self, side: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The two sides of a relation's scores, the first one scaled; (B, H, L, d) each."""
        x, y = (self._heads(at_least_float32(z[:, :, self.num_dropped[side] :])) for z in (x, y))
        if side == "teacher":
            x, y = x.detach(), y.detach()
        return x * x.shape[-1] ** -0.5, y

    def _heads(self, x: Tensor) -> Tensor:
        return x if self.num_relation_heads is None else split_heads(x, self.num_relation_heads)

    def _check(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        """Refuse two shapes (H, L, d) whose relations cannot be compared."""
        if self.num_relation_heads is None and student[0] != teacher[0]:
            raise ValueError(
                f"TinyMIM: student must have as many heads as the teacher, got {student[0]} and {teacher[0]}; "
                "pass num_relation_heads to re-split both."
            )
        dims = student[0] * student[2], teacher[0] * teacher[2]
        if self.num_relation_heads is not None and any(dim % self.num_relation_heads for dim in dims):
            raise ValueError(
                f"TinyMIM: num_relation_heads must divide both widths {dims[0]} and {dims[1]}, got "
                f"{self.num_relation_heads}; their greatest common divisor is {math.gcd(*dims)}."
            )
        num_tokens = student[1] - self.num_dropped["student"], teacher[1] - self.num_dropped["teacher"]
        if num_tokens[0] != num_tokens[1]:
            raise ValueError(
                f"TinyMIM: student must have as many tokens as the teacher, got {num_tokens[0]} and {num_tokens[1]}; "
                "choose image and patch sizes that give the same grid, and call build where prefix tokens differ."
            )
