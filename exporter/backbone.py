"""Loading a model folder: weights, task, labels, pooling, tokenizer. safetensors only, never a pickle, no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from compexport.errors import InputError, describe
from engines.manifest import TEXT2TEXT, LabelWords, Task
from exporter.hosts import HOSTS, Host, host_of
from exporter.hosts.seq2seq import SEQ2SEQ_HOSTS, Seq2SeqHost
from exporter.identity import LABEL_WORDS, backbone_sha256
from exporter.label_words import read_label_words
from exporter.model_folder import Pooling, input_names_of, load_config, max_length_of, read_pooling, tokenizer_text
from exporter.pretrained import load_model, name_of, require_safetensors

__all__ = [
    "TASKS",
    "Backbone",
    "Generation",
    "Pooling",
    "Seq2Seq",
    "load_backbone",
    "load_config",
    "load_seq2seq",
    "name_of",
]

# Suffix of the class named in config.json -> task.
TASKS: dict[str, Task] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "label-words",  # without the words, its encoder: feature-extraction
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
    "Model": "feature-extraction",
}


@dataclass(frozen=True)
class Backbone:
    """A loaded model folder. ``model`` is the Hugging Face model, in eval mode, fp32, never modified by us.

    (Layers of a decoder that are the same share their tensors, which changes nothing but the memory they take.)
    """

    folder: Path
    model: nn.Module
    host: Host
    task: Task
    labels: list[str]
    pooling: Pooling | None
    max_length: int
    input_names: tuple[str, ...]
    config: Any = field(repr=False)
    label_words: LabelWords | None = None

    @property
    def encoder(self) -> nn.Module:
        return self.host.encoder(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.host.layers(self.encoder)

    @property
    def hidden_size(self) -> int:
        return int(self._normalized.hidden_size)

    @property
    def num_layers(self) -> int:
        return int(self._normalized.num_layers)

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def _normalized(self) -> Any:
        from optimum.utils import NormalizedConfigManager

        return NormalizedConfigManager.get_normalized_config_class(self.config.model_type)(self.config)

    @cached_property
    def sha256(self) -> str:
        """The identity of the backbone."""
        return backbone_sha256(self.folder)

    @cached_property
    def tokenizer_json(self) -> str:
        """The fast tokenizer as text; converted from a slow one where the folder has no ``tokenizer.json``."""
        return tokenizer_text(self.folder)


def load_backbone(folder: str | Path, task: str | None = None, *, attention: str = "eager") -> Backbone:
    """Load a Hugging Face folder.

    ``task`` overrides what ``config.json`` says. ``attention`` is transformers' attention implementation: "eager"
    traces to plain MatMul and Softmax, "sdpa" is faster to train with.

    Raises InputError for a folder without a model, an unsupported architecture or task, or pickled weights.
    """
    folder = Path(folder)
    config = load_config(folder)
    host = host_of(config.model_type, folder)
    known = _known_task(task, host, folder) if task is not None else _task(config, host, folder)
    require_safetensors(folder)
    labels, words = _labels(folder, known, config)
    model = load_model(folder, host.classes[known], host, known, attention)
    return Backbone(
        folder=folder,
        model=model,
        host=host,
        task=known,
        labels=labels,
        pooling=read_pooling(folder) if known == "feature-extraction" else None,
        max_length=max_length_of(folder, config, host),
        input_names=input_names_of(config),
        config=config,
        label_words=words,
    )


@dataclass(frozen=True)
class Generation:
    """Token ids that steer generation: what the decoder starts from, what ends a text, and what is put in by force."""

    start: int
    eos: tuple[int, ...]
    pad: int
    forced_bos: int | None = None
    forced_eos: int | None = None


@dataclass(frozen=True)
class Seq2Seq:
    """A loaded encoder-decoder folder. ``model`` is the whole Hugging Face model, in eval mode, frozen, fp32.

    ``max_length``: the most tokens of a source text; the decoder of BART has as many positions, that of T5 no limit.
    """

    folder: Path
    model: Any
    host: Seq2SeqHost
    max_length: int
    generation: Generation
    config: Any = field(repr=False)

    @property
    def task(self) -> Task:
        return TEXT2TEXT

    @property
    def labels(self) -> list[str]:
        return []

    @property
    def pooling(self) -> None:
        return None

    @property
    def label_words(self) -> None:
        return None

    @property
    def input_names(self) -> tuple[str, ...]:
        return input_names_of(self.config)

    @property
    def hidden_size(self) -> int:
        return int(self.config.d_model)

    @property
    def num_layers(self) -> int:
        """Of both stacks."""
        return sum(len(self.host.layers_of(stack)) for stack in self.host.stacks(self.model))

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def sha256(self) -> str:
        """The identity of the model."""
        return backbone_sha256(self.folder)

    @cached_property
    def tokenizer_json(self) -> str:
        """The fast tokenizer as text; converted from a slow one where the folder has no ``tokenizer.json``."""
        return tokenizer_text(self.folder)


def load_seq2seq(folder: str | Path, *, attention: str = "eager") -> Seq2Seq:
    """Load an encoder-decoder folder for text2text-generation, both stacks of it; ``attention`` as of load_backbone.

    InputError as load_backbone, for architectures without a decoder, and where no token starts or ends a text.
    """
    folder = Path(folder)
    config = load_config(folder)
    host = SEQ2SEQ_HOSTS.get(config.model_type)
    if host is None:
        expected = f"one of {', '.join(sorted(SEQ2SEQ_HOSTS))}"
        raise InputError(
            describe(f"{folder}: no encoder-decoder model", got=repr(config.model_type), expected=expected)
        )
    require_safetensors(folder)
    model = load_model(folder, host.class_name, None, "text2text-generation", attention)
    return Seq2Seq(
        folder=folder,
        model=model,
        host=host,
        max_length=max_length_of(folder, config, HOSTS[config.model_type]),
        generation=_generation(folder, model),
        config=config,
    )


def _generation(folder: Path, model: Any) -> Generation:
    """From generation_config.json and, where that is silent, config.json."""

    def setting(name: str) -> Any:
        found = getattr(model.generation_config, name, None)
        return getattr(model.config, name, None) if found is None else found

    needed = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    missing = [name for name in needed if setting(name) is None]
    if missing:
        raise InputError(describe(f"{folder}/config.json: {missing[0]}", got="nothing", expected="a token id"))
    start, eos, pad = (setting(name) for name in needed)
    ends = tuple(int(token) for token in eos) if isinstance(eos, list | tuple) else (int(eos),)
    forced = setting("forced_eos_token_id")
    return Generation(
        start=int(start),
        eos=ends,
        pad=int(pad),
        forced_bos=setting("forced_bos_token_id"),
        forced_eos=forced[0] if isinstance(forced, list) else forced,
    )


def _labels(folder: Path, task: Task, config: Any) -> tuple[list[str], LabelWords | None]:
    if task == "label-words":
        return read_label_words(folder, tokenizer_text(folder), config)
    if task.endswith("classification"):
        return [config.id2label[i] for i in range(config.num_labels)], None
    return [], None


def _known_task(name: str, host: Host, folder: Path) -> Task:
    for task in host.classes:
        if task == name:
            return task
    raise InputError(describe(f"{folder}: unknown task", got=repr(name), expected=", ".join(host.classes)))


def _task(config: Any, host: Host, folder: Path) -> Task:
    architecture = str((config.architectures or ["Model"])[0])
    for suffix, task in TASKS.items():
        if architecture.endswith(suffix) and task in host.classes:
            wordless = task == "label-words" and not (folder / LABEL_WORDS).is_file()
            return "feature-extraction" if wordless else task
    if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return "feature-extraction"  # the pre-training head is of no use to a service
    suffixes = [suffix for suffix, task in TASKS.items() if task in host.classes]
    raise InputError(
        describe(f"{folder}: unsupported task head", got=architecture, expected=" or ".join(f"*{s}" for s in suffixes))
    )
