"""Models by name: every timm name, a folder that kdvit or timm saved, and the small teachers that kdvit ships."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdvit.deployment import CONFIG_KEY, DeployedStudent, deployment_config, load_deployed
from kdvit.signals import nearest

#: Shipped teachers: name -> what it is. Each is a folder beside this file, in timm's own format.
SHIPPED = {
    "fashion_mnist_cnn": "small CNN for 28x28 grey Fashion-MNIST, made by recipes/fashion_teacher_cnn.py",
    "fashion_mnist_vit": "small ViT for 28x28 grey Fashion-MNIST, made by recipes/fashion_teacher_vit.py",
}
_FOLDER = Path(__file__).parent / "pretrained"


def create_model(name: str, *, pretrained: bool = False, checkpoint: str | Path | None = None, **options) -> nn.Module:
    """Make a model by name.

    Args:
        name: a shipped teacher (`SHIPPED`, always with its weights), a folder with ``config.json`` and
            ``model.safetensors``, or any name of `timm.create_model` (also ``hf-hub:...``).
        pretrained: load the published weights of a timm name.
        checkpoint: a safetensors or ``weights_only`` torch file with the model's weights, loaded strictly.
        options: given to `timm.create_model` (``num_classes``, ``img_size``, ...).

    Raises:
        ValueError: unknown name or option, weights that cannot be had, or a checkpoint of another model.
    """
    import timm

    source = name
    if name in SHIPPED:
        source, pretrained = f"local-dir:{_FOLDER / name}", True
    elif (Path(name) / "config.json").is_file():
        if CONFIG_KEY in json.loads((Path(name) / "config.json").read_text()):
            return _deployed(name, checkpoint, options)
        source, pretrained = f"local-dir:{name}", True
    elif "/" in name and ":" not in name:
        raise ValueError(f"model folder '{name}' must hold config.json and model.safetensors; check the path.")
    elif ":" not in name and not timm.is_model(name.split(".")[0]):
        known = [*SHIPPED, *timm.list_models()]
        hint = nearest(name, known) or ";"
        raise ValueError(
            f"unknown model '{name}'{hint} `kdvit list models WORD` searches the {len(known)} known names."
        )
    try:
        model = timm.create_model(source, pretrained=pretrained, **options)
    except OSError as error:
        raise ValueError(
            f"model '{name}': its published weights could not be downloaded ({type(error).__name__}); connect to the "
            "network once, or give the weights as a file (--teacher-checkpoint FILE, checkpoint=)."
        ) from error
    except (RuntimeError, TypeError, AssertionError) as error:  # no published weights, unknown tag or option
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"model '{name}' cannot be made ({reason}); check its name, tag and options.") from error
    if checkpoint is not None:
        load_weights(model, checkpoint, name)
    return model


def _deployed(name: str, checkpoint: str | Path | None, options: Mapping[str, Any]) -> nn.Module:
    if checkpoint is not None or options:
        given = ", ".join([*options, *(["checkpoint"] if checkpoint is not None else [])])
        raise ValueError(
            f"model folder '{name}' holds a student that is deployed with its teacher's classifier: it must be made as "
            f"it was saved, got {given}; leave them out."
        )
    return load_deployed(name)


def load_weights(model: nn.Module, path: str | Path, name: str = "model") -> None:
    """Load a checkpoint strictly and without executing anything in it.

    The file may hold a bare state dict, or one under ``state_dict`` or ``model``, as training scripts save it.

    Raises:
        ValueError: no such file, not a checkpoint, or the checkpoint of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint '{path}' must be a file, and there is none; check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, which could run code" if found else f"it is damaged, {type(error).__name__}"
        raise ValueError(
            f"checkpoint '{path.name}' cannot be read ({reason}); give a safetensors file, or a torch file of tensors "
            "alone: torch.save(model.state_dict(), FILE)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not any(isinstance(value, torch.Tensor) for value in state.values()):
        held = f"a dict of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"checkpoint '{path.name}' must hold a state dict, bare or under 'state_dict' or 'model', got {held}; "
            "save model.state_dict() into it."
        )
    own = model.state_dict()
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != getattr(state[key], "shape", None)]
    if missing or unknown or shapes:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for keys, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if keys
        ]
        raise ValueError(
            f"checkpoint '{path.name}' must be one of '{name}', but of its weights {', '.join(parts)}; "
            "give the checkpoint of this model, or the model of this checkpoint."
        )
    model.load_state_dict(state)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, whose names of weights are its own."""
    return getattr(model, "_orig_mod", model)


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
    class_names: Sequence[str] = (),
    input_size: tuple[int, int, int] | None = None,
) -> None:
    """Save a model as timm does: ``model.safetensors`` and ``config.json``.

    ``kdvit.create_model(FOLDER)`` makes it again, and so does ``timm.create_model("local-dir:FOLDER",
    pretrained=True)``, but for a student that is deployed with its teacher's classifier. A model that timm did not make
    is saved as its weights alone.

    Args:
        model: the plain model, compiled or not.
        folder: made if missing.
        normalisation: (mean, std) of the images that it was trained on.
        class_names: names of its classes.
        input_size: (channels, height, width) of those images; a model that takes any size does not know it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    deployed = isinstance(model, DeployedStudent)
    plain = uncompiled(model.student.model if deployed else model)
    if hasattr(plain, "pretrained_cfg"):
        from timm.models import save_for_hf

        data_config = dict(zip(("mean", "std"), normalisation, strict=True)) if normalisation else {}
        if input_size is not None:
            data_config |= {"input_size": tuple(input_size), "test_input_size": tuple(input_size)}
        model_config = {"label_names": list(class_names)} if class_names else {}
        if deployed:
            model_config[CONFIG_KEY] = deployment_config(model)
        save_for_hf(plain, folder, safe_serialization=True, model_config=model_config, data_config=data_config)
    if deployed:
        from safetensors.torch import save_file

        weights = {name.replace("_orig_mod.", ""): x.contiguous() for name, x in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
    elif not hasattr(plain, "pretrained_cfg"):
        from safetensors.torch import save_model as save_safetensors

        save_safetensors(plain, folder / "model.safetensors")
    # safetensors writes files that only their owner may read; a student is for colleagues, too.
    (folder / "model.safetensors").chmod(0o644)
