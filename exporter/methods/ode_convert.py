"""Models that share layers, as folders; and made of models that do not: the weights only, no training.

A shared layer starts as the mean of those that it stands for. With as many groups as layers that is each layer itself,
and the model computes what it did.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe
from exporter.backbone import Backbone, load_backbone, name_of
from exporter.checkpoint import copy_model
from exporter.hosts.shared import repeats, tie
from exporter.importers.folder import folder_near
from exporter.methods.ode import shared_host
from exporter.quiet import quiet_transformers
from exporter.sharing import CONVERTIBLE, FIELD

_TOKENIZERS = {"bert": "BertTokenizer", "gpt2": "GPT2Tokenizer"}
# ALBERT's part -> BERT's, inside a layer and around the layers; of a head, in the whole model.
_LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.dense": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
    "ffn": "intermediate.dense",
    "ffn_output": "output.dense",
    "full_layer_layer_norm": "output.LayerNorm",
}
_AROUND = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.LayerNorm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_HEADS = {
    "classifier": "classifier",
    "qa_outputs": "qa_outputs",
    "predictions.dense": "cls.predictions.transform.dense",
    "predictions.LayerNorm": "cls.predictions.transform.LayerNorm",
    "predictions.decoder": "cls.predictions.decoder",
}
_KINDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


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
    with quiet_transformers():
        hugging_face.save_pretrained(folder, state_dict=tensors)


def _names_of_repeats(model: Any) -> tuple[str, ...]:
    host = shared_host(model.config)
    layers = host.layers(host.encoder(model))
    prefix = name_of(layers, model)
    return tuple(f"{prefix}.{index}." for index in repeats(layers, model.config))


def shared_folder(folder: Path, output: Path, groups: int = 1, iterations: int | None = None) -> None:
    """Make a model that shares its layers of the unshared one in ``folder``: a new folder, tokenizer and all.

    ``iterations``, a multiple of ``groups``, are by default as many as the source has layers. ``output`` appears whole
    or not at all. InputError for sources that do not fit, and as ``load_backbone``.
    """
    backbone = load_backbone(folder)
    made = shared_from(_with_its_head(backbone), groups, iterations)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(describe(f"{output}: already there", expected="a new folder"))
    with folder_near(output) as staging:
        copy_model(folder, staging)
        for path in [*staging.glob("model*.safetensors*"), *staging.glob("*.index.json"), staging / "config.json"]:
            path.unlink(missing_ok=True)
        save_model(made, staging)
        _keep_tokenizer(backbone, staging)
        staging.chmod(0o755)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, output)


def _with_its_head(backbone: Backbone) -> nn.Module:
    """The model with the head that its folder names: also one for masked language, which no service has a use for."""
    architecture = str((backbone.config.architectures or ["Model"])[0])
    if not architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return backbone.model
    from transformers import AutoModelForMaskedLM

    with quiet_transformers():
        model: nn.Module = AutoModelForMaskedLM.from_pretrained(
            backbone.folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
        )
    return model.eval().requires_grad_(False)


def _keep_tokenizer(backbone: Backbone, folder: Path) -> None:
    """The source's tokenizer, by name: transformers would take that of the new kind of model."""
    (folder / "tokenizer.json").write_text(backbone.tokenizer_json, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings.setdefault("tokenizer_class", _TOKENIZERS[backbone.config.model_type])
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def shared_from(model: nn.Module, groups: int = 1, iterations: int | None = None) -> nn.Module:
    """A model of ``groups`` shared layers, run ``iterations`` times in all, from a BERT or a GPT-2; in eval mode.

    Head, embeddings and pooler are the source's; each group's layer is the mean of its share of the source's layers.
    Nothing is shared with ``model``. InputError for another kind, or counts that do not divide.
    """
    hugging_face: Any = model
    kind = str(hugging_face.config.model_type)
    if kind not in CONVERTIBLE:
        expected = " or ".join(CONVERTIBLE)
        raise InputError(
            describe("no shared model can be made of this architecture", got=repr(kind), expected=expected)
        )
    layers = int(hugging_face.config.num_hidden_layers)
    iterations = layers if iterations is None else iterations
    if not 1 <= groups <= layers:
        raise InputError(describe("groups of shared layers", got=groups, expected=f"1 to {layers}, the layers"))
    if iterations < groups or iterations % groups:
        raise InputError(describe("iterations of shared layers", got=iterations, expected=f"a multiple of {groups}"))
    with torch.random.fork_rng(), torch.no_grad():
        made = (_albert if kind == "bert" else _gpt2)(hugging_face, groups, iterations)
    return made.eval().requires_grad_(False)


def shares(layers: int, groups: int) -> list[range]:
    """Which of the source's layers each group stands for: in a row, and as many each as can be."""
    ends = [round(layers * number / groups) for number in range(groups + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def _albert(model: Any, groups: int, iterations: int) -> nn.Module:
    import transformers

    name = type(model).__name__
    if name.removeprefix("Bert") not in _KINDS:
        expected = ", ".join(f"Bert{one}" for one in _KINDS)
        raise InputError(describe("no shared model can be made of this head", got=name, expected=expected))
    config = _albert_config(model.config, groups, iterations)
    made = getattr(transformers, name.replace("Bert", "Albert", 1))(config)
    source, target = getattr(model, "bert", model), getattr(made, "albert", made)
    _copy(target, source, _AROUND)
    _copy(made, model, _HEADS)
    width = config.hidden_size
    target.encoder.embedding_hidden_mapping_in.weight.copy_(torch.eye(width))
    target.encoder.embedding_hidden_mapping_in.bias.zero_()
    for group, run in zip(target.encoder.albert_layer_groups, shares(len(source.encoder.layer), groups), strict=True):
        (layer,) = group.albert_layers
        parts = [source.encoder.layer[index] for index in run]
        for ours, theirs in _LAYER.items():
            layer.get_submodule(ours).load_state_dict(_mean(part.get_submodule(theirs) for part in parts))
    out: nn.Module = made
    return out


def _albert_config(config: Any, groups: int, iterations: int) -> Any:
    from transformers import AlbertConfig

    classifier = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    same = (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "max_position_embeddings",
        "type_vocab_size",
        "initializer_range",
        "layer_norm_eps",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "id2label",
        "label2id",
        "problem_type",
    )
    return AlbertConfig(
        **{field: getattr(config, field) for field in same},
        embedding_size=config.hidden_size,
        num_hidden_layers=iterations,
        num_hidden_groups=groups,
        inner_group_num=1,
        classifier_dropout_prob=classifier,
        attn_implementation=config._attn_implementation,
    )


def _gpt2(model: Any, groups: int, iterations: int) -> nn.Module:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = iterations
    setattr(config, FIELD, [iterations // groups] * groups)
    made = type(model)(config)
    source, target = getattr(model, "transformer", model), getattr(made, "transformer", made)
    _copy(target, source, {name: name for name in ("wte", "wpe", "ln_f")})
    _copy(made, model, {"lm_head": "lm_head"})
    for group, run in enumerate(shares(len(source.h), groups)):
        first = target.h[group * (iterations // groups)]
        first.load_state_dict(_mean(source.h[index] for index in run))
    tie(target.h, config, missing=range(iterations))
    out: nn.Module = made
    return out


def _copy(target: nn.Module, source: nn.Module, names: Mapping[str, str]) -> None:
    """Parts of ``source`` into those of ``target``, as far as it has them."""
    there = dict(target.named_modules())
    for ours, theirs in names.items():
        if ours in there:
            there[ours].load_state_dict(source.get_submodule(theirs).state_dict())


def _mean(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    states: Sequence[Mapping[str, Tensor]] = [module.state_dict() for module in modules]
    if len(states) == 1:
        return dict(states[0])
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
