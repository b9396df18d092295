"""Models that share layers, as folders; and made of models that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from exporter.hosts.shared import repeats
from exporter.methods.ode import shared_host


def save_model(model: nn.Module, folder: Path) -> None:
    """Write a Hugging Face model of a host with sharing to ``folder``, without its tokenizer.

    Of a decoder whose configuration has ``shared_layers``, the file holds the first layer of each group; such a folder
    is for :func:`exporter.backbone.load_backbone`, since transformers alone would make up the others.
    """
    hugging_face: Any = model
    host = shared_host(hugging_face.config)
    assert host.sharing is not None
    left_out = _names_of_repeats(hugging_face) if host.sharing.causal else ()
    tensors = {name: one for name, one in model.state_dict().items() if not name.startswith(left_out or "\0")}
    hugging_face.save_pretrained(folder, state_dict=tensors)


def _names_of_repeats(model: Any) -> tuple[str, ...]:
    host = shared_host(model.config)
    layers = host.layers(host.encoder(model))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    return tuple(f"{prefix}.{index}." for index in repeats(layers, model.config))
