"""Tiny backbones, their traces and bundles, each made once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from exporter import family
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import save_checkpoint
from exporter.methods.variator import VariatorPlugins
from tests.traces import Traces, remember_translations

RATIOS = (2, 4)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def _remembered_translations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_translations(patch)
        yield


@pytest.fixture(scope="session")
def backbone(tiny: Callable[..., Path]) -> Callable[..., Backbone]:
    """``backbone("tiny-bert", "question-answering")``: loaded once, never modified."""
    loaded: dict[tuple[str, str], Backbone] = {}

    def get(name: str = "tiny-bert", task: str = "feature-extraction") -> Backbone:
        if (name, task) not in loaded:
            loaded[name, task] = load_backbone(tiny(name, task))
        return loaded[name, task]

    return get


def random_plugins(backbone: Backbone, ratio: int, pad: str = "masked", width: int = 5, seed: int = 0) -> Any:
    """Plugins whose every tensor matters: biases and corrections are as large as the rest."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plugins = VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, width, pad)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in plugins.parameters():
                parameter.normal_(std=0.3)
    return plugins.eval()


@pytest.fixture(scope="session")
def official_of(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[..., Backbone]) -> Callable[..., Path]:
    """``official_of("tiny-t5")``: a checkpoint with plugins of pad mode "official". Do not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, task: str = "feature-extraction") -> Path:
        if (name, task) not in made:
            loaded = backbone(name, task)
            folder = tmp_path_factory.mktemp("official") / "checkpoint"
            plugins = {ratio: random_plugins(loaded, ratio, "official").state_dict() for ratio in RATIOS}
            save_checkpoint(folder, loaded.folder, "variator", {"pad": "official"}, plugins)
            made[name, task] = folder
        return made[name, task]

    return get


@pytest.fixture(scope="session")
def official(official_of: Callable[..., Path]) -> Path:
    """The checkpoint of tiny-bert with plugins of pad mode "official"."""
    return official_of("tiny-bert")


@pytest.fixture(scope="session")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Callable[..., Path],
    official_of: Callable[..., Path],
    trace_memory: Traces,
) -> Callable[..., Path]:
    """``built("tiny-bert")``: a bundle of ratios 1, 2, 4, made once per session. Do not write into it.

    Its plugins are untrained, or with ``pad="official"`` those of ``official_of``.
    """
    made: dict[tuple[str, str, str], Path] = {}

    def get(name: str = "tiny-bert", task: str = "feature-extraction", pad: str = "masked") -> Path:
        if (name, task, pad) not in made:
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            model = tiny(name, task) if pad == "masked" else official_of(name, task)
            with pytest.MonkeyPatch.context() as patch:
                trace_memory.replace(patch)
                family.build(model, RATIOS, folder, untrained=pad == "masked")
            made[name, task, pad] = folder
        return made[name, task, pad]

    return get


@pytest.fixture(scope="session")
def template(built: Callable[..., Path], backbone: Callable[..., Backbone], trace_memory: Traces) -> onnx.ModelProto:
    """The trace of tiny-bert from which its bundle's graphs were bound. Do not change it."""
    built("tiny-bert")
    wanted = (backbone().sha256, "feature-extraction", "masked", 2, "", "torch.float32")
    return next(model for key, model in trace_memory.made.items() if key[: len(wanted)] == wanted)
