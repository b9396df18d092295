"""What an import writes, and how imports add to one folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from compexport.errors import InputError
from exporter.checkpoint import DESCRIPTION
from exporter.importers.variator import import_variator
from tests import models
from tests.exporter.importers import official
from tests.exporter.importers.compare import (
    compare_encoders,
)
from tests.exporter.importers.official import Official, Sizes, Tensors


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_new_checkpoint(t5: Path, tmp_path: Path, sizes: Sizes, plugin_file: Callable[..., Path]) -> None:
    before, file = contents(t5), plugin_file(4)
    imported = import_variator(file, t5, tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert contents(t5) == before
    # Weights and tokenizer are those of the backbone, bit by bit; config.json differs in epsilon only.
    changed = {"config.json", DESCRIPTION, "variator-r4.safetensors"}
    assert {name: sha for name, sha in contents(out).items() if name not in changed} == {
        name: sha for name, sha in before.items() if name != "config.json"
    }
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (t5, out))
    assert old.pop("layer_norm_epsilon") == 1e-6 and new.pop("layer_norm_epsilon") == 1e-2
    assert old == new
    settings = json.loads((out / DESCRIPTION).read_text())["settings"]
    assert settings["pad"] == "official"
    assert settings["imported"]["layer_norm_epsilon"] == {"official": 1e-6, "config.json": 1e-2}
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    assert settings["imported"]["files"] == {"4": {"file": file.name, "sha256": sha, "tensors": 12, "lora": 0}}
    extra = sum(tensor.numel() for tensor in official.random_plugins(sizes, 4).values())
    assert (imported.ratio, imported.ratios, imported.tensors, imported.extra_params) == (4, [4], 12, extra)
    whole = transformers.T5ForConditionalGeneration.from_pretrained(t5).num_parameters()
    assert imported.extra_params_share == extra / whole
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_further_ratios_and_repeated_ones(t5: Path, tmp_path: Path, plugin_file: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    for ratio, there in [(4, [4]), (2, [2, 4]), (8, [2, 4, 8])]:
        assert import_variator(plugin_file(ratio), t5, out).ratios == there
    before = contents(out)
    assert import_variator(plugin_file(4, seed=5), t5, out).ratios == [2, 4, 8]
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} == {DESCRIPTION, "variator-r4.safetensors"}
    assert before.keys() == after.keys()
    files = json.loads((out / DESCRIPTION).read_text())["settings"]["imported"]["files"]
    assert set(files) == {"2", "4", "8"}
    # The checkpoint itself is a backbone whose epsilon needs no further change.
    assert import_variator(plugin_file(4, seed=5), out, out).ratios == [2, 4, 8]
    assert contents(out) == after


def test_an_interrupted_import_keeps_what_was_there(
    t5: Path, tmp_path: Path, plugin_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    out = tmp_path / "out"
    import_variator(plugin_file(4), t5, out)
    before, file = contents(out), plugin_file(4, seed=1)

    def half(tensors: Tensors, path: Path, *rest: Any, **options: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        import_variator(file, t5, out)
    assert contents(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", file.name}


def test_another_backbone_is_refused(t5: Path, tmp_path: Path, sizes: Sizes, plugin_file: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    import_variator(plugin_file(4), t5, out)
    before = contents(out)
    checkpoint = official.write(tmp_path / "b.pt", official.random_t5(sizes), official.random_plugins(sizes, 8))
    with pytest.raises(InputError, match="out: already there: expected a new folder, or a checkpoint of the same back"):
        import_variator(checkpoint, t5, out)
    with pytest.raises(InputError, match="already there"):
        import_variator(plugin_file(8), t5, t5)  # the backbone's own folder, whose epsilon would change
    assert contents(out) == before


def test_task_checkpoints_of_one_backbone_share_a_folder(t5: Path, tmp_path: Path, sizes: Sizes) -> None:
    """A checkpoint without plugins is a backbone; plugin files and task checkpoints of it add to its folder."""
    out, tensors = tmp_path / "out", official.random_t5(sizes)
    bare = tmp_path / "bare"  # nothing but configuration and tokenizer is read of the backbone
    shutil.copytree(t5, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    (bare / "label_words.json").write_text(json.dumps(models.LABEL_WORDS))
    (bare / "pytorch_model.bin").write_bytes(b"never opened")
    imported = import_variator(official.write(tmp_path / "backbone.pt", tensors), bare, out)
    assert (imported.ratio, imported.ratios, imported.extra_params) == (None, [], 0)
    assert (out / "label_words.json").is_file() and not (out / "pytorch_model.bin").exists()
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["T5ForConditionalGeneration"], "float32")
    plugins = {ratio: official.random_plugins(sizes, ratio) for ratio in (2, 4)}
    whole = official.write(tmp_path / "whole.pt", tensors, plugins[2])
    assert import_variator(whole, bare, out).ratios == [2]
    alone = official.write(tmp_path / "plugin.pkl", plugins[4])
    before = contents(out)
    with pytest.raises(InputError, match=f"got other weights, .*: --backbone {out} -o {out}$"):
        import_variator(alone, t5, out)
    assert contents(out) == before
    assert import_variator(alone, out, out).ratios == [2, 4]
    stored = official.as_stored(tensors)
    for ratio in (2, 4):
        compare_encoders(out, Official(stored | official.as_stored(plugins[ratio]), sizes, ratio), ratio)


def test_every_converted_tensor_has_a_place(t5: Path, tmp_path: Path, sizes: Sizes) -> None:
    """The stored weights are exactly those of transformers' model, the tied embedding once."""

    import_variator(official.write(tmp_path / "b.pt", official.random_t5(sizes)), t5, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    model = transformers.T5ForConditionalGeneration.from_pretrained(t5)
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    assert {name: tensor.shape for name, tensor in stored.items()} == expected
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
