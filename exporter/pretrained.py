"""The weights of a model folder as a model of transformers: safetensors only, never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from compexport.errors import InputError, describe
from exporter.hosts import Host
from exporter.hosts.shared import repeats, tie
from exporter.model_folder import first_line
from exporter.sharing import FIELD


def require_safetensors(folder: Path) -> None:
    if any(folder.glob("model*.safetensors")):
        return
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    raise InputError(
        describe(
            f"{folder}: no safetensors weights",
            got=f"the pickle {pickles[0]}" if pickles else "no weights",
            expected="model.safetensors",
            hint="pickles are never opened; write the model again with save_pretrained" if pickles else "",
        )
    )


def load_model(folder: Path, class_name: str, host: Host | None, task: str, attention: str) -> nn.Module:
    """The model of a class of transformers; layers are tied where its ``host`` says that they are shared."""
    import transformers

    from exporter.quiet import quiet_transformers

    try:
        with quiet_transformers():
            model, found = getattr(transformers, class_name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds for a cut or foreign file
        raise InputError(describe(f"{folder}: cannot load the model", got=first_line(error))) from error
    # transformers fills what the file lacks with random numbers; only the base model's pooler is never read.
    absent = set(found["missing_keys"])
    if host is not None:
        absent = _tie(folder, model, host, absent)
    missing = sorted(k for k in absent if task != "feature-extraction" or "pooler." not in k)
    if missing:
        got = f"no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        hint = _how_to_complete(model, host, task, missing)
        raise InputError(describe(f"{folder}: weights are missing", got=got, expected=f"a {task} model", hint=hint))
    if task == "feature-extraction" and model.config.is_encoder_decoder:
        model = model.get_encoder()  # nobody reads the decoder
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def _how_to_complete(model: Any, host: Host | None, task: str, missing: list[str]) -> str:
    """What to do about weights that are ``missing``."""
    sharing = None if host is None else host.sharing
    if host is not None and sharing is not None and sharing.causal and sharing.stated(model.config) is None:
        layers = host.layers(host.encoder(model))
        if all(name.startswith(f"{name_of(layers, model)}.") for name in missing):
            return f'where layers are one, stored once, config.json must say so, like "{FIELD}": [{len(layers)}]'
    return "" if task == "feature-extraction" else f"fine-tune the model for {task} first"


def _tie(folder: Path, model: Any, host: Host, missing: set[str]) -> set[str]:
    """Tie a decoder's layers that are the same; what is still ``missing``. InputError where they are not as stated."""
    if host.sharing is None or not host.sharing.causal:
        return missing
    layers = host.layers(host.encoder(model))
    prefix = name_of(layers, model)
    try:
        places = {index: f"{prefix}.{index}." for index in repeats(layers, model.config)}
        absent = {index for index, place in places.items() if any(name.startswith(place) for name in missing)}
        left = {name for name in missing if not name.startswith(tuple(places.values()) or "\0")}
        if not left:
            tie(layers, model.config, absent)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return left


def name_of(part: nn.Module, model: nn.Module) -> str:
    """Where in ``model`` one of its modules is, as its tensors' names begin."""
    return next(name for name, module in model.named_modules() if module is part)
