"""Shared models made of unshared ones: what is kept, what is averaged, and what the folder holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compexport.errors import InputError
from exporter.backbone import Backbone, load_backbone
from exporter.methods.ode import SteppedModel, facts_of
from exporter.methods.ode_convert import save_model, shared_folder, shared_from, shares
from exporter.quiet import quiet_transformers
from tests import models
from tests.exporter.test_ode import feed_of


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """Four different layers."""
    config = transformers.GPT2Config(
        **{**models.SHARED["tiny-gpt2-shared"].config, "n_layer": 4, "shared_layers": None, "vocab_size": 320}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def outputs(model: Any, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**feed)
    first: torch.Tensor = found[0]
    return first


@pytest.mark.parametrize("task", [*models.HEAD_CLASSES, "masked"])
def test_with_a_group_per_layer_it_is_the_bert(task: str, tiny: Callable[..., Path]) -> None:
    """Property 6: with G = N nothing is shared, and nothing changes."""
    if task == "masked":
        config = transformers.BertConfig(**models.MODELS["tiny-bert"].config, vocab_size=300)
        source: Any = transformers.BertForMaskedLM(config).eval()
        source.set_attn_implementation("eager")
    else:
        source = load_backbone(tiny("tiny-bert-deep", task)).model
    made = shared_from(source, groups=source.config.num_hidden_layers)
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 50).long()}
    assert type(made).__name__ == type(source).__name__.replace("Bert", "Albert")
    torch.testing.assert_close(outputs(made, feed), outputs(source, feed), atol=1e-6, rtol=1e-5)
    assert facts_of(made).groups == (1,) * source.config.num_hidden_layers


def test_with_a_group_per_layer_it_is_the_gpt2(gpt2: Any) -> None:
    made = shared_from(gpt2, groups=4)
    ids = torch.randint(5, 300, (2, 7))
    with torch.no_grad():
        assert torch.equal(made(ids, use_cache=False).logits, gpt2(ids, use_cache=False).logits)
    assert facts_of(made).groups == (1, 1, 1, 1)


def test_layers_are_averaged_over_their_group(tiny: Callable[..., Path], gpt2: Any) -> None:
    bert: Any = load_backbone(tiny("tiny-bert-deep")).model
    made: Any = shared_from(bert, groups=2)
    layer = made.encoder.albert_layer_groups[1].albert_layers[0]
    sources = [bert.encoder.layer[index].attention.self.query.weight for index in (2, 3)]
    torch.testing.assert_close(layer.attention.query.weight, (sources[0] + sources[1]) / 2)
    assert facts_of(made).groups == (2, 2)

    made = shared_from(gpt2, groups=1, iterations=6)
    mean = torch.stack([block.mlp.c_fc.weight for block in gpt2.transformer.h]).mean(0)
    torch.testing.assert_close(made.transformer.h[0].mlp.c_fc.weight, mean)
    assert made.transformer.h[5].mlp.c_fc.weight is made.transformer.h[0].mlp.c_fc.weight
    assert facts_of(made).groups == (6,)
    assert not any(ours.data_ptr() == theirs.data_ptr() for ours in made.parameters() for theirs in gpt2.parameters())


def test_shares_of_layers() -> None:
    assert shares(12, 1) == [range(12)]
    assert shares(12, 5) == [range(0, 2), range(2, 5), range(5, 7), range(7, 10), range(10, 12)]
    assert shares(4, 4) == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]


@pytest.mark.parametrize(
    "groups, iterations, message",
    [
        (5, None, "groups of shared layers: got 5, expected 1 to 4, the layers"),
        (0, None, "groups of shared layers: got 0"),
        (3, None, "iterations of shared layers: got 4, expected a multiple of 3"),
        (2, 0, "iterations of shared layers: got 0, expected a multiple of 2"),
    ],
)
def test_counts_that_do_not_divide(gpt2: Any, groups: int, iterations: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shared_from(gpt2, groups, iterations)


def test_other_architectures_are_refused(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no shared model can be made of this architecture: got 'roberta', expected b"):
        shared_from(load_backbone(tiny("tiny-roberta")).model)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_made_of_a_bert(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, output = tiny("tiny-bert-deep"), tmp_path / "shared"
    shared_folder(source, output, groups=2, iterations=6)
    backbone = load_backbone(output)
    assert (backbone.config.model_type, backbone.task, backbone.num_layers) == ("albert", "feature-extraction", 6)
    assert facts_of(backbone).groups == (3, 3)
    assert str(backbone.pooling) == "mean+normalize"
    assert backbone.tokenizer_json == load_backbone(source).tokenizer_json
    assert backbone.input_names == load_backbone(source).input_names
    with pytest.raises(InputError, match="already there: expected a new folder"):
        shared_folder(source, output)
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_the_tokenizer_stays_that_of_the_source(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Of a folder with a vocabulary alone too, where transformers goes by the kind of model."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bert").mkdir(exist_ok=True)
        (tmp_path / "bert" / name).write_bytes((tiny() / name).read_bytes())
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(models.wordpiece_vocabulary()))
    shared_folder(tmp_path / "bert", tmp_path / "shared")
    assert load_backbone(tmp_path / "shared").tokenizer_json == load_backbone(tmp_path / "bert").tokenizer_json
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("shared", "bert"))
    assert ours(models.TEXTS)["input_ids"] == theirs(models.TEXTS)["input_ids"]
    assert ours.pad_token == theirs.pad_token


def test_a_pretraining_head_comes_along(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    config = transformers.BertConfig(**models.MODELS["tiny-bert"].config, vocab_size=300)
    with quiet_transformers():
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / name).write_bytes((tiny() / name).read_bytes())
    shared_folder(tmp_path / "bert", tmp_path / "shared")
    stored = load_file(tmp_path / "shared" / "model.safetensors")
    assert torch.equal(
        stored["predictions.dense.weight"],
        load_file(tmp_path / "bert" / "model.safetensors")["cls.predictions.transform.dense.weight"],
    )
    assert load_backbone(tmp_path / "shared").task == "feature-extraction"


def shared_gpt2(tiny: Callable[..., Path]) -> Backbone:
    return load_backbone(tiny("tiny-gpt2-shared", "text-generation"))


def test_a_decoder_is_stored_once_and_comes_back(tiny: Callable[..., Path], tmp_path: Path) -> None:
    backbone = shared_gpt2(tiny)
    stored = load_file(backbone.folder / "model.safetensors")
    assert {name.split(".")[2] for name in stored if name.startswith("transformer.h.")} == {"0"}
    assert backbone.params == sum(tensor.numel() for tensor in stored.values())
    save_model(backbone.model, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_a_decoder_stored_many_times_is_recognised(tiny: Callable[..., Path], tmp_path: Path) -> None:
    backbone, feed = shared_gpt2(tiny), feed_of(shared_gpt2(tiny))
    whole = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items() if name != "lm_head.weight"}
    config = transformers.GPT2Config.from_pretrained(backbone.folder)
    config.shared_layers = None
    plain = transformers.GPT2LMHeadModel(config)
    plain.load_state_dict({**whole, "lm_head.weight": whole["transformer.wte.weight"]})
    with quiet_transformers():
        plain.save_pretrained(tmp_path)
    again = load_backbone(tmp_path)
    assert facts_of(again).groups == (6,)
    assert again.params == backbone.params
    with torch.no_grad():
        assert torch.equal(*(SteppedModel(one)(**feed)[0] for one in (again, backbone)))

    plain.transformer.h[3].ln_1.weight.data += 1  # two groups, with one between that is neither's
    with quiet_transformers():
        plain.save_pretrained(tmp_path)
    assert facts_of(load_backbone(tmp_path)).groups == (3, 1, 2)


def test_a_decoder_that_shares_nothing_says_how_to_make_it(gpt2: Any, tmp_path: Path) -> None:
    with quiet_transformers():
        gpt2.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    with pytest.raises(
        InputError, match="shares no layers: got 4 different layers, .*compexport train ode MODEL --share 1 "
    ):
        SteppedModel(backbone)


def test_a_decoder_whose_one_layer_is_stored_once_must_say_so(gpt2: Any, tmp_path: Path) -> None:
    kept = {name: one for name, one in gpt2.state_dict().items() if ".h." not in name or ".h.0." in name}
    with quiet_transformers():
        gpt2.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(
        InputError, match=r'weights are missing: .* config.json must say so, like "shared_layers": \[4\]'
    ):
        load_backbone(tmp_path)


def test_a_decoder_that_says_more_than_it_holds(gpt2: Any, tmp_path: Path) -> None:
    """Stated groups of which the file holds different layers, or lacks the first."""
    gpt2.config.shared_layers = [2, 2]
    try:
        with quiet_transformers():
            gpt2.save_pretrained(tmp_path)
        with pytest.raises(InputError, match="layer 1 of a shared group: got other tensors, expected tensors equal to"):
            load_backbone(tmp_path)
    finally:
        gpt2.config.shared_layers = None
    stored = load_file(tmp_path / "model.safetensors")
    cut = ("transformer.h.1", "transformer.h.2")
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(cut)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"weights are missing: got no transformer.h.2.attn"):
        load_backbone(tmp_path)


@pytest.mark.parametrize("switch", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_blocks_that_are_another_function_in_every_layer(gpt2: Any, switch: str) -> None:
    config = transformers.GPT2Config(**{**gpt2.config.to_dict(), switch: True, "shared_layers": [4]})
    with pytest.raises(InputError, match=f"ode does not fit this GPT-2: got {switch} true, expected false"):
        facts_of(transformers.GPT2LMHeadModel(config))


def test_facts_of_an_untied_model_are_found_by_its_tensors(gpt2: Any) -> None:
    made: Any = transformers.GPT2LMHeadModel(gpt2.config)
    made.transformer.h[1] = made.transformer.h[0]  # the very module
    made.transformer.h[2].load_state_dict(made.transformer.h[0].state_dict())
    assert facts_of(made).groups == (3, 1)
