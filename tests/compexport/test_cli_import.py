"""``compexport import``, and the whole way from official files to answers."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from tokenizers import Tokenizer

from tests.compexport.conftest import TEXTS
from tests.exporter.importers import official
from tests.exporter.importers import test_theseus as theseus
from tests.exporter.importers.compare import whole_groups
from tests.exporter.importers.conftest import make_t5, sizes_of
from tests.exporter.importers.official import Official, Sizes
from tests.models import LABEL_WORDS

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("t5") / "t5")


@pytest.fixture(scope="module")
def sizes(t5: Path) -> Sizes:
    return sizes_of(t5)


def test_document(cli: Cli, t5: Path, sizes: Sizes, tmp_path: Path) -> None:
    file = official.write(tmp_path / "plugin.pkl", official.random_plugins(sizes, 4))
    done = cli("import", "variator", file, "--backbone", t5, "--json")
    document = done.document
    extra = sum(tensor.numel() for tensor in official.random_plugins(sizes, 4).values())
    assert {key: document[key] for key in ("method", "output", "ratio", "ratios", "extra_params", "tensors")} == {
        "method": "variator",
        "output": "imported",
        "ratio": 4,
        "ratios": [4],
        "extra_params": extra,
        "tensors": 12,
    }
    assert 0 < document["extra_params_share"] < 1
    assert (document["backbone"], document["backbone_from_file"], document["lora"]) == (str(t5), False, 0)
    assert document["layer_norm_epsilon"] == 0.01
    # What changed about the backbone is said.
    assert done.error.startswith("warning: imported/config.json has layer_norm_epsilon 0.01 instead of 1e-06")
    assert (tmp_path / "imported" / "variator-r4.safetensors").is_file()


def test_people_get_a_table(cli: Cli, t5: Path, sizes: Sizes, tmp_path: Path) -> None:
    parts = official.random_t5(sizes), official.random_plugins(sizes, 2), official.random_lora(sizes)
    file = official.write(tmp_path / "best_model.pt", *parts)
    done = cli("import", "variator", file, "--backbone", t5, "-o", "out")
    count = sum(map(len, parts))
    assert done.code == 0
    assert f"out: {count} tensors imported" in done.out
    assert "backbone from this file; ratios there now: 2" in done.out
    assert "LoRA updates merged into 8 matrices" in done.out
    bare = official.write(tmp_path / "backbone.pt", official.random_t5(sizes))
    assert "ratios there now: none" in cli("import", "variator", bare, "--backbone", t5, "-o", "bare").out


def test_options_from_the_file(cli: Cli, t5: Path, sizes: Sizes, tmp_path: Path) -> None:
    file = official.write(tmp_path / "plugin.pkl", official.random_plugins(sizes, 2))
    (tmp_path / "compexport.toml").write_text(f'[import]\nbackbone = "{t5}"\noutput = "from-file"\n')
    assert cli("import", "variator", file, "--json").document["output"] == "from-file"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["variator", "evil.pkl"], "evil.pkl: not a file of tensors: got a pickle that calls posix.system"),
        (["variator", "text.pkl"], "text.pkl: not a file of tensors: got a"),
        (["variator", "none.pkl"], "none.pkl: no such file"),
        (["variator", "odd.pkl"], "odd.pkl: unknown tensor: got x, expected mux_layer"),
        (["variator", "wrong.pkl"], "wrong.pkl: made for another backbone: got 2 layers of hidden size 16"),
        (["modular", "text.pkl"], "unknown method: got modular, expected variator or costeff or theseus"),
        (["variator"], "Missing argument 'FILE'"),
    ],
)
def test_refused(cli: Cli, t5: Path, sizes: Sizes, tmp_path: Path, arguments: list[str], message: str) -> None:
    torch.save({"x": Evil()}, tmp_path / "evil.pkl")
    (tmp_path / "text.pkl").write_text("no pickle")
    official.write(tmp_path / "odd.pkl", {**official.random_plugins(sizes, 2), "x": torch.zeros(1)})
    official.write(tmp_path / "wrong.pkl", official.random_plugins(Sizes(hidden=16), 2))
    before = listing(tmp_path)
    done = cli("import", *arguments, "--backbone", t5)
    assert done.code == 2 and not done.out
    assert message in done.error
    assert listing(tmp_path) == before


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("touch pwned",))


def test_without_a_backbone(cli: Cli) -> None:
    done = cli("import", "variator", "x.pkl")
    assert done.code == 2 and "variator plugins need a backbone: expected --backbone MODEL" in done.error


@pytest.mark.slow
def test_from_official_files_to_answers(cli: Cli, t5: Path, sizes: Sizes, tmp_path: Path) -> None:
    """A task checkpoint, then plugin files of its backbone: the engines answer as the official network does."""
    backbone = official.random_t5(sizes) | official.random_lora(sizes)
    plugins = {ratio: official.random_plugins(sizes, ratio) for ratio in (2, 4, 8)}
    model = tmp_path / "t5"
    shutil.copytree(t5, model)
    (model / "label_words.json").write_text(json.dumps(LABEL_WORDS))
    file = official.write(tmp_path / "best_model.pt", backbone, plugins[2])
    assert cli("import", "variator", file, "--backbone", model, "-o", "out").code == 0
    for ratio in (4, 8):
        file = official.write(tmp_path / f"mux_{ratio}.pkl", plugins[ratio])
        assert cli("import", "variator", file, "--backbone", "out", "-o", "out").code == 0
    built = cli("build", "out", "--ratio", "2,4,8", "--json")
    assert built.code == 0, built.err
    assert [row["ratio"] for row in built.document["variants"]] == [1, 2, 4, 8]
    assert all(row["parity_max_abs"] <= 1e-4 for row in built.document["variants"])
    assert not any(variant["untrained"] for variant in cli("inspect", "--json").document["variants"].values())
    arguments = [argument for text in TEXTS for argument in ("--text", text)]
    for ratio, tensors in plugins.items():
        outputs = cli("run", *arguments, "--ratio", ratio, "--json").document["outputs"]
        network = Official(official.as_stored(backbone | tensors), sizes, ratio)
        scores = [[output["scores"][label] for label in LABEL_WORDS["labels"]] for output in outputs]
        assert max(row[0] for row in scores) - min(row[0] for row in scores) > 0.1  # they do depend on the text
        assert_allclose(scores, official_scores(network, Tokenizer.from_file(str(t5 / "tokenizer.json"))), atol=1e-4)


def official_scores(network: Official, tokenizer: Tokenizer) -> torch.Tensor:
    """Probabilities of the label words after the prefix [2, <extra_id_0>], at the scale of Hugging Face's logits."""
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    encoded = tokenizer.encode_batch([LABEL_WORDS["template"].replace("{text}", text) for text in TEXTS])
    ids, mask = (torch.tensor([getattr(row, key) for row in encoded]) for key in ("ids", "attention_mask"))
    assert network.ratio is not None
    ids, mask = whole_groups(ids, mask, network.ratio)
    prefix = torch.tensor([[2, tokenizer.token_to_id("<extra_id_0>")]]).expand(len(ids), -1)
    logits = network.logits(prefix, network.encode(ids, mask)[-1], mask)[:, -1]
    words = [tokenizer.encode(word, add_special_tokens=False).ids[0] for word in LABEL_WORDS["words"]]
    return torch.softmax(logits[:, words] * 100 * network.sizes.hidden**-0.5, dim=-1)


def test_theseus_becomes_a_plain_model(cli: Cli, tmp_path: Path) -> None:
    folder = theseus.write(tmp_path / "theseus")
    done = cli("import", "theseus", folder, "--json")
    digest = hashlib.sha256((folder / "pytorch_model.bin").read_bytes()).hexdigest()
    params, tensors = done.document.pop("params"), done.document.pop("tensors")
    assert params > tensors > 0
    assert done.document == {
        "method": "theseus",
        "output": "imported",
        "task": "sequence-classification",
        "layers": 3,
        "replaced": 6,
        "span": 2,
        "source_sha256": digest,
    }
    out = cli("import", "theseus", folder, "-o", "again").out
    assert f"again: {tensors} tensors imported" in out and "a plain model for sequence-classification" in out
    done = cli("import", "theseus", folder, "--backbone", "again", "-o", "third")
    assert done.code == 2 and "--backbone: got again, expected none for theseus" in done.error
