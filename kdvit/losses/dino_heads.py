"""DINOHeads: the student's prototype scores under the trained heads of a frozen self-supervised teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit.losses.checks import (
    built_width,
    choice,
    count,
    feature_pair,
    flag,
    not_built,
    number,
    several_positions,
)
from kdvit.losses.dense import token_grid
from kdvit.losses.frozen import Frozen
from kdvit.losses.gathering import gather_batch
from kdvit.losses.loss import SECOND_VIEW, Loss, Mismatch, register
from kdvit.losses.precision import at_least_float32
from kdvit.losses.prototype_head import PrototypeHead
from kdvit.losses.relations import gram_distance
from kdvit.losses.resizing import RESIZES, resize
from kdvit.signals import Location, ModelInfo, map_to_tokens, tokens_to_map

GRAM_NEGATIVES = ("keep", "clamp", "clamp_teacher")


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int, gather: bool = False) -> Tensor:
    """Probabilities (R, K) of teacher logits (R, K) that use all prototypes alike, over the rows of all processes.

    In turn, every prototype's share of the rows, and every row, are scaled to sum 1; rows last.
    """
    logs = logits / temperature
    for _ in range(iterations):
        shares = logs.logsumexp(dim=0)
        if gather:
            shares = gather_batch(shares[None]).logsumexp(dim=0)
        logs = logs - shares
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()


def crops_cross_entropy(
    student_logits: Tensor, teacher_probs: Tensor, temperature: float, ignore_diagonal: bool
) -> Tensor:
    """Mean cross-entropy of every student crop (S, B, K) to every teacher crop (T, B, K) of an image.

    With ``ignore_diagonal`` a student's crop is not compared with the teacher's same one.
    """
    logs = (student_logits / temperature).log_softmax(dim=-1)
    with torch.autocast(logs.device.type, enabled=False):
        pairs = -torch.einsum("sbk,tbk->st", logs, teacher_probs) / logs.shape[1]
    if not ignore_diagonal:
        return pairs.mean()
    same = torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(same, 0).sum() / (pairs.numel() - min(pairs.shape))


def patches_cross_entropy(student_logits: Tensor, teacher_probs: Tensor, temperature: float, shares: Tensor) -> Tensor:
    """Cross-entropy of patches (R, K), each counted by its share (R,)."""
    rows = -(teacher_probs * (student_logits / temperature).log_softmax(dim=-1)).sum(dim=-1)
    return (rows * shares).sum()


def cosine_gram_distance(student: Tensor, teacher: Tensor, negatives: str, over_batch: bool) -> Tensor:
    """Mean squared difference of the cosines between patches: (B, N, D_s), (B, N, D_t)."""
    x, y = (F.normalize(z.flatten(0, 1) if over_batch else z, dim=-1) for z in (student, teacher))
    if negatives == "keep":
        return gram_distance(x, y)
    with torch.autocast(x.device.type, enabled=False):
        s, t = x @ x.transpose(-2, -1), y @ y.transpose(-2, -1)
    s = s.clamp(min=0) if negatives == "clamp" else torch.where((s < 0) & (t < 0), 0, s)
    return F.mse_loss(s, t.clamp(min=0))


@register("dino_heads")
class DINOHeads(Loss):
    """Pull the student's scores against prototypes, of images and of patches, towards those of a frozen DINO teacher.

    L = cls_weight * mean over images i and crops a, b of H(p_ib, softmax(h_s(student class token_ia) / T_s))
      + patch_weight * mean over images, crops and chosen patches n of H(q_n, softmax(g_s(student patch_n) / T_s))
      + gram_weight * mean over pairs of patches of (cos(student_n, student_m) - cos(teacher_n, teacher_m))^2

    H(p, q) = -sum_k p_k log q_k. p, q = sinkhorn(teacher's head / T_t): softmax, made to use all prototypes alike over
    the batch. The teacher's heads are those that it was trained with, and frozen; the student's are new, with as many
    prototypes. With two views a and b are different ones, with one view the same. The student's patches are its map,
    interpolated to the teacher's grid and LayerNormed here.

    A part of the patches, drawn anew for every image, takes part in the second term; the student sees whole images.
    No labels.

    Published: no task loss, this loss 1, beside 0.1 * KoLeo (not here) and terms of small crops (not here); AdamW, 1M
    steps; heads of 8192 / 512 / 262144 (class token) and 4096 / 384 / 98304 (patches).

    Args:
        cls_head: the teacher's trained head for the class token, (B, D_t) -> (B, K), such as a `PrototypeHead` with
            its weights loaded. It is frozen. None only where cls_weight is 0, or nothing is trained.
        patch_head: the same for patches.
        cls_weight: weight >= 0 of the first term. 1.
        patch_weight: weight >= 0 of the second term. 1.
        gram_weight: weight >= 0 of the third term. 0; 1 for Gram anchoring.
        views: 2: two augmentations of every image, which predict each other; 1: the batch's one.
        student_temperature: T_s > 0. 0.1.
        teacher_temperature: T_t > 0. 0.07, after a warm-up from 0.04.
        sinkhorn_iterations: 3.
        mask_ratio: share of the patches in the second term, in (0, 1). 0.3; released: 0.1 to 0.5 in half of the images,
            in blocks.
        gram_negatives: negative cosines are kept with "keep", as configured; 0 in both models with "clamp"; with
            "clamp_teacher" 0 in the teacher, and in the student where both are negative.
        gram_over: pairs of patches of the "batch", as configured, in B * N * B * N numbers, or of each "image".
        hidden_dim: width inside the student's heads. 2048.
        bottleneck_dim: width in front of their last layer. 256.
        student_stage: stage (CNN, hierarchical) or block (ViT) of the student's patches; or a share of the depth or a
            module path. Last.
        resize: how the student's map comes to another grid: "bilinear", "bicubic", "nearest" or "pool".
        gather: False: prototypes are balanced, and pairs of patches taken, over this process's batch; True: over the
            batches of all processes, as released (pairs of patches there: one process).

    ``generator`` (attribute, None for torch's global one, which alone torch.compile can trace) draws the patches;
    ``forward(..., noise=u)`` with u (B, views, N) in [0, 1) fixes them: the smallest values of a row take part.

    Inputs:
        student_pooled: (B, D_s), what the classifier sees.
        student_feature_map: (B, D_s', h, w).
        teacher_normed_cls_token: (B, D_t), after the final norm, as its head was trained.
        teacher_normed_patch_tokens: (B, N, D_t), after the final norm, without prefix tokens.
        second_student_pooled, second_student_feature_map, second_teacher_normed_cls_token,
            second_teacher_normed_patch_tokens: the same of the second view.

    Returns:
        ``{"cls", "patch", "gram"}`` without terms of weight 0, scalars >= 0, weights included; the first two in nats
        and at least the entropy of the teacher's probabilities, the third in squared cosines, 0 for equal ones.

    Raises:
        ValueError: a number is out of its range; views, gram_negatives, gram_over or resize is unknown; a head is
            missing, does not take the teacher's width or has no scores; all weights are 0; inputs differ in B, or
            from build in D; the grid of the teacher is not known; pairs within an image where a model's grid is 1x1.
        TypeError: an argument is of the wrong kind; a head is no module; an input is missing.
        RuntimeError: called before build.

    Source:
        Siméoni et al., DINOv3, 2025, https://arxiv.org/abs/2508.10104. Checked against facebookresearch/dinov3@6876159;
        differs in: no small crops and no KoLeo; patches drawn one by one, as many for every image; "clamp_teacher"
        clamps the student too (there, a branch that is never reached); any student.

    Example:
        >>> import torch
        >>> from kdvit.losses import DINOHeads
        >>> from kdvit.signals import ModelInfo, SignalInfo
        >>> x, patches = torch.ones(1, 2), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # two patches at right angles
        >>> flat = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)  # two equal ones
        >>> loss = DINOHeads(cls_weight=0.0, patch_weight=0.0, gram_weight=1.0, views=1)
        >>> loss.build(ModelInfo.of(feature_map=SignalInfo.of("feature_map", flat)), ModelInfo.of(
        ...     normed_patch_tokens=SignalInfo.of("normed_patch_tokens", patches, grid=(1, 2))))
        >>> terms = loss(student_feature_map=flat, teacher_normed_patch_tokens=patches)
        >>> round(terms["gram"].item(), 4)  # cosines 1, 1, 1, 1 against 1, 0, 0, 1
        0.5
    """

    mismatch = Mismatch(
        width="the student has heads of its own",
        depth="the pooled features and one stage",
        grid="the student's map is interpolated to the teacher's",
    )
    #: The heads that are made follow from them.
    fixed_options = ("cls_weight", "patch_weight", "gram_weight")

    def __init__(
        self,
        cls_head: nn.Module | None = None,
        patch_head: nn.Module | None = None,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        gram_weight: float = 0.0,
        views: int = 2,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        sinkhorn_iterations: int = 3,
        mask_ratio: float = 0.3,
        gram_negatives: str = "keep",
        gram_over: str = "batch",
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_stage: Location = -1,
        resize: str = "bilinear",
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.frozen = nn.ModuleDict()
        for part, head in (("cls", cls_head), ("patch", patch_head)):
            if isinstance(head, nn.Module):
                self.frozen[part] = Frozen(head)
            elif head is not None:
                raise TypeError(
                    f"DINOHeads: {part}_head must be an nn.Module, got {head!r}; pass a PrototypeHead with the "
                    "teacher's weights."
                )
        self.cls_weight = number(self, "cls_weight", cls_weight, ">= 0", "0 switches the term off")
        self.patch_weight = number(self, "patch_weight", patch_weight, ">= 0", "0 switches the term off")
        self.gram_weight = number(self, "gram_weight", gram_weight, ">= 0", "0 switches the term off")
        if not (cls_weight or patch_weight or gram_weight):
            raise ValueError("DINOHeads: weights must be > 0 for some term, got 0 for all; give one a weight.")
        self.views = count(self, "views", views, "2 for pairs of views, 1 for single ones")
        if views > 2:
            raise ValueError(f"DINOHeads: views must be 1 or 2, got {views}; there is no third view.")
        self.student_temperature = number(
            self, "student_temperature", student_temperature, "> 0", "the published value is 0.1"
        )
        self.teacher_temperature = number(
            self, "teacher_temperature", teacher_temperature, "> 0", "the published value is 0.07"
        )
        self.sinkhorn_iterations = count(self, "sinkhorn_iterations", sinkhorn_iterations, "the published number is 3")
        self.mask_ratio = number(self, "mask_ratio", mask_ratio, "in (0, 1)", "0.3 is a third of the patches")
        self.gram_negatives = choice(self, "gram_negatives", gram_negatives, GRAM_NEGATIVES)
        self.gram_over = choice(self, "gram_over", gram_over, ("batch", "image"))
        self.hidden_dim = count(self, "hidden_dim", hidden_dim, "the published width is 2048")
        self.bottleneck_dim = count(self, "bottleneck_dim", bottleneck_dim, "the published width is 256")
        self.student_stage = student_stage
        self.resize = choice(self, "resize", resize, RESIZES)
        self.gather = flag(self, "gather", gather)
        self.generator: torch.Generator | None = None
        self.heads: nn.ModuleDict | None = None

    @property
    def cls_head(self) -> nn.Module | None:
        """What the constructor was given; a property, because a submodule would train with the student."""
        return self.frozen["cls"].module if "cls" in self.frozen else None

    @property
    def patch_head(self) -> nn.Module | None:
        return self.frozen["patch"].module if "patch" in self.frozen else None

    @property
    def _reads_patches(self) -> bool:
        return bool(self.patch_weight or self.gram_weight)

    def inputs(self) -> tuple[str, ...]:
        first = (
            *(("student_pooled", "teacher_normed_cls_token") if self.cls_weight else ()),
            *(("student_feature_map", "teacher_normed_patch_tokens") if self._reads_patches else ()),
        )
        return first + tuple(f"{SECOND_VIEW}{name}" for name in first) if self.views == 2 else first

    def locations(self) -> Mapping[str, Location]:
        return {"student_feature_map": self.student_stage} if self._reads_patches else {}

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        heads, self.dims = {}, {}
        if self.cls_weight:
            self.dims["cls"] = teacher["normed_cls_token"].dim
            heads["cls"] = self._student_head("cls", student["pooled"].dim)
        if self._reads_patches:
            tokens, dim = teacher["normed_patch_tokens"], student["feature_map"].dim
            self.dims["patch"], self.grid = tokens.dim, token_grid(self, tokens)
            self.norm = nn.LayerNorm(dim)
            if self.gram_weight and self.gram_over == "image":
                several_positions(self, [(student["feature_map"].grid, self.grid)])
            if self.patch_weight:
                heads["patch"] = self._student_head("patch", dim)
        self.heads = nn.ModuleDict(heads)

    def _student_head(self, part: str, dim: int) -> PrototypeHead:
        """A new head with as many prototypes as the teacher's."""
        if part not in self.frozen:
            raise ValueError(
                f"DINOHeads: {part}_head must be given, got None; pass the head that the teacher was trained with, or "
                f"{part}_weight=0."
            )
        try:
            scores = self._teacher_logits(part, self._blank(part))
        except RuntimeError as error:
            raise ValueError(
                f"DINOHeads: {part}_head must take the teacher's D={self.dims[part]}, got {error}; pass the head that "
                "the teacher was trained with."
            ) from error
        if scores.ndim != 2 or scores.shape[1] < 2:
            raise ValueError(
                f"DINOHeads: {part}_head must give scores (B, K) for K >= 2 prototypes, got {tuple(scores.shape)}; "
                "pass the head with its last layer."
            )
        return PrototypeHead(dim, scores.shape[1], self.hidden_dim, self.bottleneck_dim)

    def _blank(self, part: str) -> Tensor:
        parameter = next(self.frozen[part].module.parameters(), torch.zeros(()))
        return torch.zeros(1, self.dims[part], device=parameter.device)

    def forward(
        self,
        *,
        student_pooled: Tensor | None = None,
        student_feature_map: Tensor | None = None,
        teacher_normed_cls_token: Tensor | None = None,
        teacher_normed_patch_tokens: Tensor | None = None,
        second_student_pooled: Tensor | None = None,
        second_student_feature_map: Tensor | None = None,
        second_teacher_normed_cls_token: Tensor | None = None,
        second_teacher_normed_patch_tokens: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if self.heads is None:
            raise not_built(self)
        given = {
            "student_pooled": (student_pooled, second_student_pooled),
            "student_feature_map": (student_feature_map, second_student_feature_map),
            "teacher_normed_cls_token": (teacher_normed_cls_token, second_teacher_normed_cls_token),
            "teacher_normed_patch_tokens": (teacher_normed_patch_tokens, second_teacher_normed_patch_tokens),
        }
        for name in self.inputs():
            if given[name.removeprefix(SECOND_VIEW)][name.startswith(SECOND_VIEW)] is None:
                raise TypeError(f"DINOHeads: {name} must be given for views={self.views}; pass it by name.")
        given = {name: views[: self.views] for name, views in given.items()}
        terms = {}
        if self.cls_weight:
            pairs = zip(given["student_pooled"], given["teacher_normed_cls_token"], strict=True)
            terms["cls"] = self.cls_weight * self._cls([self._cls_pair(*pair) for pair in pairs])
        if self._reads_patches:
            pairs = zip(given["student_feature_map"], given["teacher_normed_patch_tokens"], strict=True)
            student, teacher = (torch.cat(side) for side in zip(*(self._patch_pair(*pair) for pair in pairs)))
            if self.patch_weight:
                terms["patch"] = self.patch_weight * self._patches(student, teacher, noise)
            if self.gram_weight:
                terms["gram"] = self.gram_weight * self._gram(student, teacher)
        return terms

    def _cls_pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = feature_pair(self, student, teacher, "student_pooled", "teacher_normed_cls_token", "B, D")
        built_width(self, "teacher_normed_cls_token", teacher, self.dims["cls"])
        return student, teacher

    def _patch_pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D_s) and (B, N, D_t) of one view."""
        built_width(self, "teacher_normed_patch_tokens", teacher, self.dims["patch"], axis=-1)
        teacher = tokens_to_map(teacher, self.grid)
        student, teacher = feature_pair(self, student, teacher, teacher_name="teacher_normed_patch_tokens")
        tokens = map_to_tokens(resize(student, self.grid, self.resize))
        return at_least_float32(self.norm(tokens.to(self.norm.weight.dtype))), map_to_tokens(teacher)

    def _cls(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        student = torch.stack([self._student_logits("cls", x) for x, _ in pairs])  # (views, B, K)
        teacher = torch.cat([self._teacher_logits("cls", x) for _, x in pairs])
        probs = self._sinkhorn(teacher).view_as(student)
        return crops_cross_entropy(student, probs, self.student_temperature, ignore_diagonal=self.views == 2)

    def _patches(self, student: Tensor, teacher: Tensor, noise: Tensor | None) -> Tensor:
        rows, num_patches, _ = student.shape  # one row per view and image
        if noise is None:
            device = student.device if self.generator is None else self.generator.device
            noise = torch.rand(rows, num_patches, generator=self.generator, device=device).to(student.device)
        else:
            if noise.shape != (rows // self.views, self.views, num_patches):
                raise ValueError(
                    f"DINOHeads: noise must have shape {(rows // self.views, self.views, num_patches)}, got "
                    f"{tuple(noise.shape)}; give a number for every patch of every view."
                )
            noise = noise.transpose(0, 1).flatten(0, 1)  # (B, views, N) -> (views * B, N)
        num_chosen = max(1, round(self.mask_ratio * num_patches))
        chosen = noise.topk(num_chosen, dim=1, largest=False).indices
        chosen = chosen + num_patches * torch.arange(rows, device=chosen.device)[:, None]
        student, teacher = (x.flatten(0, 1)[chosen.flatten()] for x in (student, teacher))
        probs = self._sinkhorn(self._teacher_logits("patch", teacher))
        shares = torch.full_like(probs[:, 0], 1 / len(probs))
        return patches_cross_entropy(self._student_logits("patch", student), probs, self.student_temperature, shares)

    def _gram(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.gather:
            student, teacher = gather_batch(student), gather_batch(teacher)
        return cosine_gram_distance(student, teacher, self.gram_negatives, self.gram_over == "batch")

    def _sinkhorn(self, logits: Tensor) -> Tensor:
        return sinkhorn(logits, self.teacher_temperature, self.sinkhorn_iterations, self.gather)

    def _student_logits(self, part: str, x: Tensor) -> Tensor:
        head = self.heads[part]
        return at_least_float32(head(x.to(head.last_layer.weight.dtype)))

    @torch.no_grad()
    def _teacher_logits(self, part: str, x: Tensor) -> Tensor:
        frozen = self.frozen[part]
        parameter = next(frozen.module.parameters(), x)
        return at_least_float32(frozen(x.to(parameter.dtype)))
