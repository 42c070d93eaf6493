from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

from kdvit import Distiller, Progress, Student, Teacher
from kdvit.losses import KD, DeiT, FitNet, Loss, TinyMIM, ViTKD
from tests import tiny

TOLERANCE = dict(rtol=1e-6, atol=1e-6)

# By hand: every published formula again, on what plain forward hooks of the test catch.


def caught(model: nn.Module, images: Tensor, *paths: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, outputs of the modules at these paths)."""
    values = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: values.__setitem__(path, out))
        for path in paths
    ]
    output = model(images)
    for handle in handles:
        handle.remove()
    return output, values


def kd_by_hand(student: nn.Module, teacher: nn.Module, loss: KD, images: Tensor) -> Tensor:
    with torch.no_grad():
        p = (teacher(images) / loss.temperature).softmax(1)
    q = (student(images) / loss.temperature).softmax(1)
    return loss.temperature**2 * (p * (p.log() - q.log())).sum() / len(images)


def deit_by_hand(student: nn.Module, teacher: nn.Module, loss: DeiT, images: Tensor) -> Tensor:
    _, values = caught(student, images, "head_dist")
    with torch.no_grad():
        decision = teacher(images).argmax(1)
    return -values["head_dist"].log_softmax(1).gather(1, decision[:, None]).mean()


def vitkd_by_hand(student: nn.Module, teacher: nn.Module, loss: ViTKD, images: Tensor) -> Tensor:
    paths = ("blocks.0", "blocks.1", "norm")
    _, ours = caught(student, images, *paths)
    with torch.no_grad():
        _, theirs = caught(teacher, images, *paths)
    ours, theirs = ([values[path][:, 1:] for path in paths] for values in (ours, theirs))
    batch, num_tokens, dim = theirs[2].shape
    mimic = sum(
        (linear(s) - t).square().sum() / batch for linear, s, t in zip(loss.shallow_projectors, ours[:2], theirs[:2])
    )
    kept = loss.noise.argsort(dim=1)[:, : num_tokens // 2]
    projected, total = loss.deep_projector(ours[2]), 0.0
    for image in range(batch):
        is_kept = torch.zeros(num_tokens, dtype=torch.bool)
        is_kept[kept[image]] = True
        filled = torch.where(is_kept[:, None], projected[image], loss.mask_token[0])
        generated = loss.generation(filled.T.reshape(1, dim, 4, 4))[0].flatten(1).T
        total = total + (generated - theirs[2][image])[~is_kept].square().sum()
    return loss.alpha * mimic + loss.beta * total / batch / loss.mask_ratio


def relation(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.transpose(-2, -1) / x.shape[-1] ** 0.5).softmax(-1)


def tinymim_by_hand(student: nn.Module, teacher: nn.Module, loss: TinyMIM, images: Tensor) -> Tensor:
    _, ours = caught(student, images, "blocks.1.attn.qkv")
    with torch.no_grad():
        _, theirs = caught(teacher, images, "blocks.1.attn.qkv")
    # (B, L, 3 * D) -> q, k, v of (B, H, L, d)
    parts = [x.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4) for x in (*ours.values(), *theirs.values())]
    (q_s, k_s, v_s), (q_t, k_t, v_t) = parts
    kl = 0.0
    for mine, other in ((relation(q_s, k_s), relation(q_t, k_t)), (relation(v_s, v_s), relation(v_t, v_t))):
        kl = kl + (other * (other.log() - mine.log())).sum(-1).mean()
    return kl


def fitnet_by_hand(student: nn.Module, teacher: nn.Module, loss: FitNet, images: Tensor) -> Tensor:
    _, ours = caught(student, images, "layer3")
    with torch.no_grad():
        _, theirs = caught(teacher, images, "layer2")
    hint = loss.norm(loss.conv(ours["layer3"])).clamp_min(0)
    return (hint - theirs["layer2"]).square().mean()


class SeededViTKD(ViTKD):
    """ViTKD whose mask is the same in every call."""

    name = "vitkd"
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(3))

    def forward(self, *signals: Tensor, **named: Tensor) -> dict[str, Tensor]:
        size = len(named["teacher_normed_patch_tokens"])
        return super().forward(*signals, **named, noise=self.noise[:size])

    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in super_inputs if name != "noise")


super_inputs = ViTKD().inputs()

BY_HAND: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    # name: (student, teacher, loss, the same by hand)
    "kd": (tiny.vit, lambda: tiny.vit(7, depth=3), lambda: KD(temperature=3.0), kd_by_hand),
    "deit": (tiny.distilled_vit, lambda: tiny.cnn(7), DeiT, deit_by_hand),
    "vitkd": (
        tiny.vit,
        lambda: tiny.vit(7, embed_dim=32),
        lambda: SeededViTKD(alpha=0.3, beta=0.2),
        vitkd_by_hand,
    ),
    "tinymim": (tiny.vit, lambda: tiny.vit(7, embed_dim=32, depth=3), lambda: TinyMIM(teacher_block=1), tinymim_by_hand),
    "fitnet": (tiny.cnn, lambda: tiny.cnn(7), lambda: FitNet(student_stage=3, teacher_stage=3), fitnet_by_hand),
}
BY_HAND["fitnet"] = (
    tiny.cnn,
    lambda: tiny.cnn(7),
    lambda: FitNet(student_stage=3, teacher_stage=2),
    fitnet_by_hand,
)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
