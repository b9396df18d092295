"""What an import refuses: one line that names the tensor, nothing written, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compexport.errors import InputError
from exporter.importers.variator import import_variator
from tests.exporter.importers import official
from tests.exporter.importers.official import Sizes, Tensors


@pytest.fixture
def refusal(t5: Path, tmp_path: Path) -> Callable[..., str]:
    """Import what must be refused; gives the one line after checking that nothing was written."""

    def refuse(file: Path, backbone: Path = t5) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as caught:
            import_variator(file, backbone, tmp_path / "refused")
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
        return str(caught.value)

    return refuse


W_IN, W_OUT = "mux_layer.1.demux_adapter.w_in.weight", "mux_layer.0.demux_adapter.w_out.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(W_IN), f"{W_IN}: got nothing, expected [64, 48]"),
        (lambda t: t.update({W_IN: torch.zeros(64, 47)}), f"{W_IN}: got [64, 47], expected [64, 48]"),
        (lambda t: t.update({W_IN: t[W_IN].T}), f"{W_IN}: got [48, 64], expected [64, 48]"),
        (
            lambda t: t.update({"mux_layer.1.mux_layer.weight": torch.zeros(4, 72)}),
            "mux_layer.1.mux_layer.weight: got [4, 72], expected [4, 96]",
        ),
        (
            lambda t: t.update({"mux_layer.1.mux_layer.bias": torch.zeros(2)}),
            "mux_layer.1.mux_layer.bias: got [2], expected [4]",
        ),
        (
            lambda t: t.update({"mux_layer.0.mux_layer.bias": torch.zeros(3)}),
            "mux_layer.0.mux_layer.weight: got [4, 96], expected [3, 72]",
        ),
        (
            lambda t: t.update({"mux_layer.0.mux_layer.gain": torch.zeros(1)}),
            "mux_layer.0.mux_layer.gain: got [1], expected no such tensor",
        ),
        (lambda t: t.update({"epoch": torch.zeros(1)}), "unknown tensor: got epoch, expected mux_layer"),
        (
            lambda t: t.update({"mux_layer.2.mux_layer.bias": torch.zeros(4)}),
            "made for another backbone: got 3 layers of hidden size 24, expected 2 of 24",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("mux_layer.1.")],
            "made for another backbone: got 1 layers of hidden size 24, expected 2 of 24",
        ),
        (
            lambda t: t.update({W_OUT: torch.zeros(32)}),
            "made for another backbone: got 2 layers of hidden size 32, expected 2 of 24",
        ),
        (lambda t: t.pop("mux_layer.0.mux_layer.bias"), "mux_layer.0.mux_layer.bias: got nothing, expected a vector"),
        (
            lambda t: t.update({"mux_layer.0.mux_layer.bias": torch.zeros(())}),
            "mux_layer.0.mux_layer.bias: got [], expected a vector",
        ),
        (
            lambda t: t.update({"mux_layer.0.mux_layer.bias": torch.zeros(1)}),
            "tokens merged into one: got 1, expected 2 or more",
        ),
        (lambda t: t[W_OUT].fill_(float("nan")), f"{W_OUT}: got NaN or infinity, expected finite values"),
        (lambda t: t[W_OUT].fill_(1e30), f"{W_OUT}: got NaN or infinity"),  # beyond fp16
    ],
)
def test_layout(
    refusal: Callable[..., str], plugin_file: Callable[..., Path], change: Callable[[Tensors], Any], message: str
) -> None:
    file = plugin_file(4, change)
    assert f"{file}: {message}" in refusal(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("t5.decoder.layers.1.cross_att.self_attention.project_k.weight"),
            "t5.decoder.layers.1.cross_att.self_attention.project_k.weight: got nothing, expected [30, 24]",
        ),
        (
            lambda t: t.update({"t5.output_projection.weight": torch.zeros(8, 24)}),
            "t5.output_projection.weight: got [8, 24], expected no such tensor",
        ),
        (
            lambda t: t.update({"t5.input_embedding.weight": torch.zeros(9, 24)}),
            "t5.input_embedding.weight: got [9, 24], expected [",
        ),
        (
            lambda t: t.update({"t5.position_bias_enc.relative_attention_bias": torch.zeros(3, 32)}),
            "t5.position_bias_enc.relative_attention_bias: got [3, 32], expected [32, 3]",
        ),
        (
            lambda t: t.pop("project_v_lora_dec.1.lora_B"),
            "project_v_lora_dec.1.lora_B: got nothing, expected [30, 16]",
        ),
        (
            lambda t: t.update({"project_q_lora.0.lora_A": torch.zeros(8, 24)}),
            "project_q_lora.0.lora_A: got [8, 24], expected [16, 24]",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("t5.")],
            "t5.decoder.layers.0.cross_att.layernorm_before_attention.weight: got nothing, expected [24]",
        ),
        (lambda t: t.update({"module.t5.x": torch.zeros(1)}), "unknown tensor: got module.t5.x"),
    ],
)
def test_layout_of_task_checkpoints(
    refusal: Callable[..., str], tmp_path: Path, sizes: Sizes, change: Callable[[Tensors], Any], message: str
) -> None:
    tensors = official.random_t5(sizes) | official.random_plugins(sizes, 4) | official.random_lora(sizes)
    change(tensors)
    file = official.write(tmp_path / "best_model.pt", tensors)
    assert f"{file}: {message}" in refusal(file)


def test_the_root_is_no_output(t5: Path, plugin_file: Callable[..., Path]) -> None:
    for root in ("/", "/.."):
        with pytest.raises(InputError, match="is the root of the file system: expected a folder in it"):
            import_variator(plugin_file(4), t5, root)


class Payload:
    """What a pickle may do when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_malicious_pickle_runs_nothing(refusal: Callable[..., str], tmp_path: Path, sizes: Sizes) -> None:
    trap = tmp_path / "trap"
    tensors = official.random_plugins(sizes, 4)
    torch.save({**tensors, "mux_layer.9": Payload(trap)}, tmp_path / "zip.pkl")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({**tensors, "x": Payload(trap)}))
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Payload(trap)))
    (tmp_path / "system.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(trap).encode() + b"'\ntR.")
    for name in ("zip.pkl", "plain.pkl", "bare.pkl", "system.pkl"):
        line = refusal(tmp_path / name)
        assert f"{tmp_path / name}: not a file of tensors: got a" in line
        assert "expected what torch.save makes of a dict" in line
        assert not trap.exists()
    assert "a pickle that calls posix.mkdir, expected" in refusal(tmp_path / "zip.pkl")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 2000, -1, -40])
def test_a_cut_file(refusal: Callable[..., str], plugin_file: Callable[..., Path], keep: int) -> None:
    file = plugin_file(4)
    file.write_bytes(file.read_bytes()[:keep])
    assert f"{file}: not a file of tensors: got a" in refusal(file)


@pytest.mark.parametrize("data", [b"hello\n", b"{}", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x00" * 4096])
def test_no_pickle_at_all(refusal: Callable[..., str], tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pkl").write_bytes(data)
    assert "x.pkl: not a file of tensors: got a" in refusal(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "not a file of tensors: got list, expected a dict of tensors by name"),
        (torch.zeros(2), "not a file of tensors: got Tensor"),
        ({}, "not a file of tensors: got an empty one"),
        ({"model": {"mux_layer.0.mux_layer.bias": torch.zeros(2)}}, "model: got dict, expected a tensor"),
        ({"mux_layer.0.x": 3}, "mux_layer.0.x: got int, expected a tensor"),
        ({3: torch.zeros(2)}, "key 3: got int, expected a name"),
        ({"mux_layer.0.x": torch.zeros(2, dtype=torch.int64)}, "got strided, cpu, int64, expected a dense floating"),
        ({"mux_layer.0.x": torch.zeros(2, dtype=torch.complex64)}, "got strided, cpu, complex64"),
        ({"mux_layer.0.x": torch.eye(3).to_sparse()}, "got sparse_coo, cpu, float32"),
        ({"mux_layer.0.x": torch.zeros(2, device="meta")}, "got strided, meta, float32"),
        ({"mux_layer.0.x": torch.zeros(1).expand(1 << 40)}, "got fewer values than its shape says"),
    ],
)
def test_other_contents(refusal: Callable[..., str], tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pkl")
    line = refusal(tmp_path / "x.pkl")
    assert line.startswith(f"{tmp_path / 'x.pkl'}: ") and message in line


def test_no_such_file(refusal: Callable[..., str], tmp_path: Path) -> None:
    assert "x.pkl: no such file: expected a plugin file or a task checkpoint" in refusal(tmp_path / "x.pkl")
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"feed_forward_proj": "gated-gelu"},
            "not the original T5: got gated-gelu, expected relu and a tied embedding",
        ),
        ({"tie_word_embeddings": False}, "not the original T5: got an untied embedding"),
        (
            {"layer_norm_epsilon": 1e-5},
            "layer_norm_epsilon: got 1e-05, expected 1e-06, as the official T5 has, or 0.01",
        ),
    ],
)
def test_backbones_that_are_not_the_official_kind(
    refusal: Callable[..., str],
    t5: Path,
    tmp_path: Path,
    plugin_file: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
) -> None:
    folder, file = tmp_path / "backbone", plugin_file(4)
    shutil.copytree(t5, folder)
    config = json.loads((folder / "config.json").read_text())
    for derived in ("scale_decoder_outputs", "is_gated_act", "dense_act_fn"):
        config.pop(derived, None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert f"{folder}: {message}" in refusal(file, folder)


def test_other_architectures_and_damaged_backbones(
    refusal: Callable[..., str], t5: Path, tiny: Callable[..., Path], tmp_path: Path, plugin_file: Callable[..., Path]
) -> None:
    file = plugin_file(4)
    assert "official plugins are for T5: got 'bert', expected a T5 folder" in refusal(file, tiny("tiny-bert"))
    assert "not a model: got no such folder" in refusal(file, tmp_path / "nowhere")
    shutil.copytree(t5, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no safetensors weights" in refusal(file, tmp_path / "bare")
