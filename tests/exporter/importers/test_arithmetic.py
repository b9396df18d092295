"""After an import our network computes what the official one did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from exporter.backbone import Backbone, load_backbone
from exporter.importers.modelcenter import t5_from_modelcenter
from exporter.importers.variator import import_variator, plugin_shapes, plugins_from_official
from exporter.methods.variator import VariatorEncoder, VariatorPlugins
from tests.exporter.importers import official
from tests.exporter.importers.compare import (
    compare_encoders,
    compare_logits,
    encoder_error,
    error,
    loaded,
    padded,
    whole_groups,
)
from tests.exporter.importers.official import Official, Sizes, Tensors

RATIOS = (2, 4, 8)


class InDouble(TorchFunctionMode):
    """Lets transformers' T5 compute in fp64 where it would go to fp32 on its own: variance of norms, softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to and torch.float32 in args:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def doubled(backbone: Backbone, plugins: Tensors | None, sizes: Sizes) -> VariatorEncoder:
    """Our encoder in fp64 around the backbone's modules."""
    backbone.model.double()
    variator = VariatorEncoder(backbone)
    if plugins is not None:
        origin = "official"
        attached = VariatorPlugins.from_tensors(plugins, sizes.hidden, sizes.layers, "official", origin).double()
        attached.load_state_dict(plugins)  # from_tensors goes through fp32
        variator.attach(attached)
    return variator


@pytest.mark.parametrize("ratio", [None, *RATIOS])
def test_each_block_in_fp64(t5: Path, tmp_path: Path, sizes: Sizes, ratio: int | None) -> None:
    """Norms, attention, plugin and feed-forward of every layer, converted in fp64, from the same input: 1e-10."""
    tensors = official.random_t5(sizes) | official.random_lora(sizes)
    plugins = official.random_plugins(sizes, ratio) if ratio else {}
    theirs = Official(tensors | plugins, sizes, ratio)
    config = transformers.T5Config.from_pretrained(t5)
    weights = t5_from_modelcenter(tensors, config, tmp_path)
    assert {weight.dtype for weight in weights.values()} == {torch.float64}
    backbone = load_backbone(with_epsilon(t5, tmp_path / "t5"))
    backbone.model.double().load_state_dict(encoder_part(backbone, weights))
    converted = plugins_from_official(plugins, sizes.hidden, sizes.layers, tmp_path) if ratio else None
    ours = doubled(backbone, converted, sizes)
    ids, mask = whole_groups(*padded(sizes), ratio or 1)
    rows = slice(None) if ratio else mask.bool()  # without plugins the padded rows differ, and reach nothing
    states = theirs.encode(ids, mask)
    with InDouble(), torch.no_grad():
        assert error(ours.embed(ids) / 100, states[0]) <= 1e-10
        bias = ours.attention_bias(mask.double())
        for layer in range(sizes.layers):
            out = ours.run_layer(layer, states[layer] * 100, bias, mask.double()) / 100
            assert error(out[rows], states[layer + 1][rows]) <= 1e-10
        whole = ours(ids, mask).last_hidden_state
        assert error(whole[rows], states[-1][rows]) <= 1e-10


def with_epsilon(t5: Path, folder: Path, epsilon: float = 1e-2) -> Path:
    shutil.copytree(t5, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": epsilon}))
    return folder


def encoder_part(backbone: Backbone, weights: Tensors) -> Tensors:
    """The weights that a loaded encoder has, under its names."""
    wanted = backbone.model.state_dict().keys()
    tied = {f"{prefix}embed_tokens.weight": weights["shared.weight"] for prefix in ("", "encoder.")}
    known = weights | tied | {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    return {name: known[name] for name in wanted}


@pytest.mark.parametrize("ratio", RATIOS)
def test_plugin_file_on_a_hugging_face_t5(
    t5: Path, tmp_path: Path, sizes: Sizes, backbone_tensors: Tensors, ratio: int
) -> None:
    """The whole encoder in fp32, fp16 file to padded inputs of all kinds: 1e-4."""
    plugins = official.random_plugins(sizes, ratio)
    import_variator(official.write(tmp_path / "plugin.pkl", plugins), t5, tmp_path / "out")
    theirs = Official(backbone_tensors | official.as_stored(plugins), sizes, ratio)
    compare_encoders(tmp_path / "out", theirs, ratio)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_task_checkpoint(t5: Path, tmp_path: Path, sizes: Sizes, ratio: int, lora: bool) -> None:
    """Backbone, plugins and LoRA from one file: encoder states, and logits up to their constant factor."""
    parts = [official.random_t5(sizes), official.random_plugins(sizes, ratio)]
    parts += [official.random_lora(sizes)] if lora else []
    file = official.write(tmp_path / "best_model.pt", *parts)
    imported = import_variator(file, t5, tmp_path / "out")
    assert imported.lora == (4 * sizes.layers if lora else 0) and imported.backbone_from_file
    stored = {name: tensor for part in parts for name, tensor in official.as_stored(part).items()}
    theirs = Official(stored, sizes, ratio)
    compare_encoders(tmp_path / "out", theirs, ratio)
    compare_logits(tmp_path / "out", theirs, ratio)


def test_counts_and_shapes_of_the_two_published_files() -> None:
    """k = 4 on base and large."""
    for hidden, layers, per_layer, tensors in [(768, 12, 160_580, 72), (1024, 24, 214_084, 144)]:
        shapes = plugin_shapes(hidden, layers, 4, 64)
        assert len(shapes) == tensors
        numels = [torch.Size(shape).numel() for shape in shapes.values()]
        assert sum(numels) == layers * per_layer
    base = plugin_shapes(768, 12, 4, 64)
    assert base["mux_layer.11.mux_layer.weight"] == (4, 3072)
    assert base["mux_layer.0.demux_adapter.w_in.weight"] == (64, 1536)
    assert base["mux_layer.0.demux_adapter.w_out.weight"] == (768, 64)


class TestTheComparisonNotices:
    """Every step of the conversion, left out, is an error well above what the comparison allows."""

    @pytest.fixture
    def imported(self, t5: Path, tmp_path: Path, sizes: Sizes) -> Path:
        import_variator(official.write(tmp_path / "p.pkl", official.random_plugins(sizes, 4)), t5, tmp_path / "out")
        return tmp_path / "out"

    @pytest.fixture
    def theirs(self, backbone_tensors: Tensors, sizes: Sizes) -> Official:
        return Official(backbone_tensors | official.as_stored(official.random_plugins(sizes, 4)), sizes, 4)

    def test_nothing_changed(self, imported: Path, theirs: Official) -> None:
        assert encoder_error(imported, theirs, 4) <= 1e-4

    @pytest.mark.parametrize("name", ["w_in.weight", "w_out.weight", "w_out.bias"])
    def test_scale(self, imported: Path, theirs: Official, sizes: Sizes, name: str) -> None:
        edit_plugins(imported, lambda key, t: unscaled(t, name, sizes) if key.endswith(f"demux_adapter.{name}") else t)
        assert encoder_error(imported, theirs, 4) > 1e-2

    def test_scale_of_the_half_that_reads_x(self, imported: Path, theirs: Official, sizes: Sizes) -> None:
        edit_plugins(imported, lambda key, t: t / 100 if key.endswith("w_in.weight") else t)
        assert encoder_error(imported, theirs, 4) > 1e-2

    def test_epsilon(self, imported: Path, theirs: Official) -> None:
        variator = loaded(imported, 4)
        for module in variator.modules():
            if hasattr(module, "variance_epsilon"):
                assert module.variance_epsilon == 1e-2
                module.variance_epsilon = 1e-6
        ids, mask = padded(theirs.sizes)
        expected = theirs.encode(*whole_groups(ids, mask, 4))[-1][:, : ids.shape[1]]
        with torch.no_grad():
            assert error(variator(ids, mask).last_hidden_state, expected) > 1e-3

    def test_masked_rows(self, imported: Path, theirs: Official, monkeypatch: pytest.MonkeyPatch) -> None:
        variator = loaded(imported, 4)
        object.__setattr__(variator.backbone, "host", replace(variator.backbone.host, skips_padded_rows=False))
        ids, mask = padded(theirs.sizes)
        expected = theirs.encode(*whole_groups(ids, mask, 4))[-1][:, : ids.shape[1]]
        with torch.no_grad():
            out = variator(ids, mask).last_hidden_state
        real = mask.bool()
        assert error(out[real], expected[real]) > 1e-3


def unscaled(tensor: Tensor, name: str, sizes: Sizes) -> Tensor:
    if name != "w_in.weight":
        return tensor / 100
    return torch.cat([tensor[:, : sizes.hidden] * 100, tensor[:, sizes.hidden :]], dim=1)


def edit_plugins(folder: Path, change: Callable[[str, Tensor], Tensor], ratio: int = 4) -> None:

    path = folder / f"variator-r{ratio}.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(path).items()}, path)
