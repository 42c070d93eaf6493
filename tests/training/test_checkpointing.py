"""Activation checkpointing of the student: blocks run twice, and nothing else changes."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

from kdvit import Distiller
from kdvit.training.checkpointing import enable_checkpointing
from tests import tiny

LOSSES = {
    "logits": ["dkd"],
    "tokens and normed tokens": ["vitkd"],
    "queries, keys and values": ["tinymim", "minilm"],
    "an attention map": ["attndistill"],
    "feature maps with a projector": ["fitnet", "cwd"],
    "the student twice": ["psd"],
}


def hugging_face(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=tiny.NUM_CLASSES,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.ViTForImageClassification(config)


#: student: (its model, a module inside its first block).
STUDENTS = {
    "ViT": (lambda: tiny.vit(proj_drop_rate=0.1, drop_path_rate=0.2), "blocks.0.attn"),
    "transformers": (hugging_face, r"vit\..*0\.attention"),  # its name depends on the version
}


def step(student: str, wanted: list, checkpointing: bool) -> tuple[dict, dict, int, list]:
    """(losses, gradients, forward passes inside the first block, what the taps still hold before the backward pass)."""
    make, inside = STUDENTS[student]
    model = make()
    torch.manual_seed(0)
    distiller = Distiller(tiny.vit(7, embed_dim=32), model, wanted).train()
    if checkpointing:
        enable_checkpointing(model)
    passes: list[int] = []
    watched = next(module for name, module in model.named_modules() if re.fullmatch(inside, name))
    watched.register_forward_pre_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)  # of dropout, which a block that runs again draws again
    out = distiller(tiny.images(), tiny.labels())
    caught = distiller.student._reader.taps.caught
    out.loss.backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return out.losses, gradients, len(passes), caught.values


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_stay_what_they_were(name, student):
    if student == "transformers" and name == "the student twice":
        pytest.skip("PSD reads logits of every patch, which this family does not give")
    plain, again = step(student, LOSSES[name], False), step(student, LOSSES[name], True)
    assert again[2] == 2 * plain[2] > 0, "the blocks run once more"
    assert plain[3] is again[3] is None, "and the taps are closed by then"
    assert plain[1].keys() == again[1].keys() and len(plain[1]) > 10
    for found, expected in ((again[0], plain[0]), (again[1], plain[1])):
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=key)


@pytest.mark.parametrize(
    "make", [tiny.plain, lambda: timm.create_model("convit_tiny", depth=1, embed_dim=8)], ids=["a plain module", "timm"]
)
def test_models_without_it_are_refused(make):
    with pytest.raises(ValueError) as caught:
        enable_checkpointing(make(), "small")
    assert str(caught.value) == (
        "Training: grad_checkpointing must be False for 'small', which cannot recompute its blocks; leave it out, or "
        "save memory by a smaller batch_size with accumulation_steps."
    )


def test_a_compiled_model_is_reached():
    model = tiny.vit()
    enable_checkpointing(torch.compile(model, backend="eager"))
    assert model.grad_checkpointing
