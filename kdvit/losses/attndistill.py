"""AttnDistill: the class token's embedding, and where its last attention looks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.branches import initialise
from kdvit.losses.checks import choice, count, flag, not_built, number, same_batch, same_grid
from kdvit.losses.loss import Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.projectors import Projector
from kdvit.losses.resizing import RESIZES, resize
from kdvit.signals import Grid, Location, ModelInfo

#: An attention is kept in this range, so that its logarithm is finite.
LEAST, MOST = 1e-5, 0.996
MAX_LAYERS = 4


@register("attndistill")
class AttnDistill(Loss):
    """Pull the student's class token, through an MLP, and the class token's attention towards the teacher's.

    L = cls_weight * mean over elements of (LayerNorm(MLP(student)) - teacher)^2
      + attention_weight / B * sum over images, heads and keys of KL(a_t || a_s)

    a is the class token's row of an attention, over its own key and those of the patches, kept in [1e-5, 0.996] and
    scaled to sum 1. Where the patch grids differ, the teacher's patch part is resized to the student's grid and scaled
    to the mass that it had. Where the heads differ, they become one: a = softmax(sum over heads of log a_h / T). Other
    prefix tokens count where both models have as many; where not, their keys are left out and the rest scaled to sum 1.
    The MLP has LayerNorm in front and GELU in between; it is not exported.

    Published: no task loss, this loss 1; self-supervised students, 800 epochs, accumulated batches of 4096. The scripts
    set the defaults here; those of the command line are attention_weight 20, temperature 20.

    Args:
        cls_weight: weight >= 0 of the embedding.
        attention_weight: weight >= 0 of the attention.
        num_layers: linear layers of the MLP, 1 to 4: D -> 2D -> D -> 2D -> D_t, the last one always to D_t.
        temperature: T > 0, for the heads that become one. 10; the number of heads gives their geometric mean.
        aggregate: whether the heads become one. None: where the models' heads differ.
        resize: where the patch grids differ: "bicubic" (published), "bilinear", "nearest" or "pool".
        student_block: block of the student, of whose end the class token is read too. Last.
        teacher_block: block of the teacher whose attention is read. Last.

    Inputs:
        student_cls_token: (B, D_s), behind the block, un-normed.
        teacher_normed_cls_token: (B, D_t), after the final norm.
        student_cls_attention: (B, H, P+N), probabilities.
        teacher_cls_attention: (B, H, P+N), probabilities.

    Returns:
        ``{"cls", "attention"}``, scalars >= 0, weights included: squared feature units, and nats; attention is 0 where
        the attentions are equal.

    Raises:
        ValueError: a number is out of its range; aggregate is False where the heads differ; inputs of another shape
            than in build.
        TypeError: an argument is of the wrong kind.
        RuntimeError: called before build.

    Source:
        Wang et al., Attention Distillation: self-supervised vision transformer students need more guidance, BMVC 2022,
        https://arxiv.org/abs/2210.00944. Checked against wangkai930418/attndistill@5a5f4e9; differs in: attention is
        kept in its range before the logarithm of the heads too (there, bicubic values below 0 become NaN and the batch
        is skipped); an MLP of less than 4 layers ends at the teacher's width (there, it must by chance); any number of
        prefix tokens, any grid (there: 1, square).

    Example:
        >>> import torch
        >>> from kdvit.losses import AttnDistill
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> token, student = torch.ones(1, 4), torch.tensor([[[0.5, 0.5]]])  # one head, one patch
        >>> teacher = torch.tensor([[[0.75, 0.25]]])
        >>> def info(signal, attention):
        ...     row = SignalInfo.of("cls_attention", attention, num_prefix_tokens=1, grid=(1, 1))
        ...     return ModelInfo.of(**{signal: SignalInfo.of(signal, token), "cls_attention": row})
        >>> loss = AttnDistill(attention_weight=1.0)
        >>> loss.build(info("cls_token", student), info("normed_cls_token", teacher))
        >>> round(loss(token, token, student, teacher)["attention"].item(), 4)  # 0.75 ln(1.5) + 0.25 ln(0.5)
        0.1308
    """

    mismatch = Mismatch(
        width="an MLP that ends at the teacher's",
        heads="merged into one where they differ",
        depth="one block of each model",
        grid="the teacher's attention is resized",
    )

    def __init__(
        self,
        cls_weight: float = 1.0,
        attention_weight: float = 0.1,
        num_layers: int = 4,
        temperature: float = 10.0,
        aggregate: bool | None = None,
        resize: str = "bicubic",
        student_block: Location = -1,
        teacher_block: Location = -1,
    ) -> None:
        super().__init__()
        self.cls_weight = number(self, "cls_weight", cls_weight, ">= 0", "0 switches the embedding off")
        self.attention_weight = number(self, "attention_weight", attention_weight, ">= 0", "0 switches it off")
        self.num_layers = count(self, "num_layers", num_layers, "the published MLP has 4")
        if num_layers > MAX_LAYERS:
            raise ValueError(f"AttnDistill: num_layers must be 1 to 4, got {num_layers}; the published MLP has 4.")
        self.temperature = number(self, "temperature", temperature, "> 0", "the number of heads gives their mean")
        self.aggregate = None if aggregate is None else flag(self, "aggregate", aggregate)
        self.resize = choice(self, "resize", resize, RESIZES)
        self.student_block = student_block
        self.teacher_block = teacher_block
        self.projector: Projector | None = None

    def locations(self) -> Mapping[str, Location]:
        return {
            "student_cls_token": self.student_block,
            "student_cls_attention": self.student_block,
            "teacher_cls_attention": self.teacher_block,
        }

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        s, t = student["cls_attention"], teacher["cls_attention"]
        if None in (s.grid, t.grid):
            same_grid(self, s, t)  # refuses, and says whose is not known
        self.num_prefix_tokens = {"student": s.num_prefix_tokens, "teacher": t.num_prefix_tokens}
        self.num_kept = s.num_prefix_tokens if s.num_prefix_tokens == t.num_prefix_tokens else 1
        self.grids: dict[str, Grid] = {"student": s.grid, "teacher": t.grid}
        self.num_heads = {"student": s.num_heads, "teacher": t.num_heads}
        self.merges_heads = s.num_heads != t.num_heads if self.aggregate is None else self.aggregate
        if not self.merges_heads and s.num_heads != t.num_heads:
            raise ValueError(
                f"AttnDistill: aggregate must be True or None for heads that differ, got {self.aggregate} for "
                f"{s.num_heads} and {t.num_heads}; None merges them."
            )
        dim, out_dim = student["cls_token"].dim, teacher["normed_cls_token"].dim
        dims = [*(dim, 2 * dim, dim, 2 * dim)[: self.num_layers], out_dim]
        layers: list[nn.Module] = [nn.LayerNorm(dim, eps=1e-6), nn.Linear(*dims[:2])]
        for pair in zip(dims[1:], dims[2:]):
            layers += [nn.GELU(), nn.Linear(*pair)]
        self.projector = Projector(*layers, nn.LayerNorm(out_dim, eps=1e-6)).apply(initialise)

    def forward(
        self,
        student_cls_token: Tensor,
        teacher_normed_cls_token: Tensor,
        student_cls_attention: Tensor,
        teacher_cls_attention: Tensor,
    ) -> dict[str, Tensor]:
        if self.projector is None:
            raise not_built(self)
        rows = {"student_cls_attention": student_cls_attention, "teacher_cls_attention": teacher_cls_attention}
        for name, x in {"teacher_normed_cls_token": teacher_normed_cls_token, **rows}.items():
            same_batch(self, "student_cls_token", student_cls_token, name, x)
        embedding = at_least_float32(self.projector(student_cls_token))
        target = at_least_float32(teacher_normed_cls_token.detach())
        if embedding.shape != target.shape:
            raise ValueError(
                f"AttnDistill: teacher_normed_cls_token must have shape {tuple(embedding.shape)}, got "
                f"{tuple(target.shape)}; build the loss for these models."
            )
        student = self._distribution("student", student_cls_attention)
        teacher = self._distribution("teacher", teacher_cls_attention.detach())
        return {
            "cls": self.cls_weight * F.mse_loss(embedding, target),
            "attention": self.attention_weight * F.kl_div(student.log(), teacher, reduction="sum") / len(student),
        }

    def _distribution(self, side: str, attention: Tensor) -> Tensor:
        """(B, H, P+N) of a model -> (B, H or 1, K), comparable with the other model's."""
        height, width = self.grids[side]
        num_prefix = self.num_prefix_tokens[side]
        wanted = (self.num_heads[side], num_prefix + height * width)
        if attention.shape[1:] != wanted:
            raise ValueError(
                f"AttnDistill: {side}_cls_attention must have shape (B, {wanted[0]}, {wanted[1]}), got "
                f"{tuple(attention.shape)}; build the loss for these models and this image size."
            )
        attention = at_least_float32(attention)
        prefix, patches = attention[..., : self.num_kept], attention[..., num_prefix:]
        if self.num_kept < num_prefix:
            mass = (prefix.sum(-1, keepdim=True) + patches.sum(-1, keepdim=True)).clamp_min(LEAST)
            prefix, patches = prefix / mass, patches / mass
        if self.grids["student"] != self.grids[side]:
            resized = resize(patches.unflatten(-1, (height, width)), self.grids["student"], self.resize).flatten(-2)
            mass = 1 - prefix.sum(-1, keepdim=True)
            patches = resized * (mass / resized.sum(-1, keepdim=True).clamp_min(LEAST))
        attention = torch.cat([prefix, patches], dim=-1)
        if self.merges_heads:
            logs = attention.clamp_min(LEAST).log().sum(dim=1, keepdim=True)
            attention = (logs / self.temperature).softmax(dim=-1)
        attention = attention.clamp(LEAST, MOST)
        return attention / attention.sum(dim=-1, keepdim=True)
