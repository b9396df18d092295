"""A T5 of the original kind, the same for ModelCenter, and plugin files for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import models
from tests.exporter.importers import official
from tests.exporter.importers.official import Sizes, Tensors


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original T5, decoder and all, every weight of it random. Do not write into it."""
    return make_t5(tmp_path_factory.mktemp("t5") / "t5")


def make_t5(folder: Path, **changes: Any) -> Path:
    models.make("tiny-t5", folder, pooling=None)  # for its tokenizer
    sizes = Sizes()
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = {"d_model": sizes.hidden, "d_kv": sizes.head_width, "num_heads": sizes.heads, "d_ff": sizes.wide}
    config = transformers.T5Config(**{"vocab_size": vocab, "num_layers": sizes.layers, **shape, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = transformers.T5ForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer_norm" in name:
                    parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sizes(t5: Path) -> Sizes:
    return sizes_of(t5)


def sizes_of(t5: Path) -> Sizes:
    return replace(Sizes(), vocab=json.loads((t5 / "config.json").read_text())["vocab_size"])


@pytest.fixture(scope="session")
def backbone_tensors(t5: Path) -> Tensors:
    """The same backbone as ModelCenter would hold it, unrounded."""
    return official.modelcenter_from_t5(transformers.T5ForConditionalGeneration.from_pretrained(t5).state_dict())


@pytest.fixture
def plugin_file(tmp_path: Path, sizes: Sizes) -> Callable[..., Path]:
    """``plugin_file(4)``: a good plugin file, changed by ``change(tensors)`` where given."""

    def make(ratio: int, change: Callable[[Tensors], Any] = lambda tensors: None, seed: int = 0) -> Path:
        tensors = official.random_plugins(sizes, ratio, seed)
        change(tensors)
        return official.write(tmp_path / f"plugin-mux_{ratio}.pkl", tensors)

    return make
