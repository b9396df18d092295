"""Loading a model folder: weights, task, labels, pooling, tokenizer. safetensors only, never a pickle, no network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compexport.errors import InputError, describe
from engines.manifest import TEXT2TEXT, LabelWords, Task
from exporter.hosts import HOSTS, Host, host_of
from exporter.hosts.seq2seq import SEQ2SEQ_HOSTS, Seq2SeqHost
from exporter.hosts.shared import repeats, tie
from exporter.identity import LABEL_WORDS, backbone_sha256, has_tokenizer
from exporter.label_words import read_label_words
from exporter.official import require_plain_model
from exporter.sharing import FIELD

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
# Relative positions have no end; texts are cut here where the tokenizer's settings name no limit.
DEFAULT_MAX_LENGTH = 512
_NO_LIMIT = 1e29  # transformers writes 1e30 for "none"


@dataclass(frozen=True)
class Pooling:
    """How a sentence-transformers folder turns token vectors into one vector."""

    mode: str
    normalize: bool

    def __str__(self) -> str:
        return f"{self.mode}+normalize" if self.normalize else self.mode


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
        return _tokenizer_json(self.folder)


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
    _require_safetensors(folder)
    labels, words = _labels(folder, known, config)
    model = _load_model(folder, host.classes[known], host, known, attention)
    return Backbone(
        folder=folder,
        model=model,
        host=host,
        task=known,
        labels=labels,
        pooling=_pooling(folder) if known == "feature-extraction" else None,
        max_length=_max_length(folder, config, host),
        input_names=_input_names(config),
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
        return _input_names(self.config)

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
        return _tokenizer_json(self.folder)


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
    _require_safetensors(folder)
    model = _load_model(folder, host.class_name, None, "text2text-generation", attention)
    return Seq2Seq(
        folder=folder,
        model=model,
        host=host,
        max_length=_max_length(folder, config, HOSTS[config.model_type]),
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
        return read_label_words(folder, _tokenizer_json(folder), config)
    if task.endswith("classification"):
        return [config.id2label[i] for i in range(config.num_labels)], None
    return [], None


def _instead_of_a_model(folder: Path) -> str:
    if folder.is_file():
        return "a file"
    if not folder.is_dir():
        return "no such folder"
    return "a bundle" if (folder / "manifest.json").is_file() else "no config.json in it"


def load_config(folder: Path) -> Any:
    """``config.json`` of a model folder, as transformers reads it; InputError if there is none of a known kind."""
    if not (folder / "config.json").is_file():
        raise InputError(
            describe(
                f"{folder}: not a model",
                got=_instead_of_a_model(folder),
                expected="a Hugging Face folder (config.json, model.safetensors)",
            )
        )
    require_plain_model(folder)
    from transformers import AutoConfig

    raw = _read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise InputError(describe(f"{folder}/config.json: no model's", got=raw, expected="an object"))
    host_of(str(raw.get("model_type")), folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a class of its own for every field
        raise InputError(describe(f"{folder}/config.json: unreadable", got=_first_line(error))) from error
    if _layers(config) < 1:
        raise InputError(describe(f"{folder}/config.json: layers", got=_layers(config), expected="at least 1"))
    return config


def _layers(config: Any) -> int:
    return int(config.num_hidden_layers)


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


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("model*.safetensors")):
        return
    pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"}]
    raise InputError(
        describe(
            f"{folder}: no safetensors weights",
            got=f"the pickle {pickles[0]}" if pickles else "no weights",
            expected="model.safetensors",
            hint="pickles are never opened; write the model again with save_pretrained" if pickles else "",
        )
    )


def _load_model(folder: Path, class_name: str, host: Host | None, task: str, attention: str) -> nn.Module:
    """The model of a class of transformers; layers are tied where its ``host`` says that they are shared."""
    import transformers

    from exporter.quiet import quiet_transformers

    try:
        with quiet_transformers():
            model, found = getattr(transformers, class_name).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many kinds for a cut or foreign file
        raise InputError(describe(f"{folder}: cannot load the model", got=_first_line(error))) from error
    # transformers fills what the file lacks with random numbers; only the base model's pooler is never read.
    absent = set(found["missing_keys"])
    if host is not None:
        absent = _tie(folder, model, host, absent)
    missing = sorted(k for k in absent if task != "feature-extraction" or "pooler." not in k)
    if missing:
        got = f"no {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        hint = _how_to_complete(model, host, task, missing)
        raise InputError(describe(f"{folder}: weights are missing", got=got, expected=f"a {task} model", hint=hint))
    if task == "feature-extraction" and model.config.is_encoder_decoder:
        model = model.get_encoder()  # nobody reads the decoder
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def _how_to_complete(model: Any, host: Host | None, task: str, missing: list[str]) -> str:
    """What to do about weights that are ``missing``."""
    sharing = None if host is None else host.sharing
    if host is not None and sharing is not None and sharing.causal and sharing.stated(model.config) is None:
        layers = host.layers(host.encoder(model))
        if all(name.startswith(f"{name_of(layers, model)}.") for name in missing):
            return f'where layers are one, stored once, config.json must say so, like "{FIELD}": [{len(layers)}]'
    return "" if task == "feature-extraction" else f"fine-tune the model for {task} first"


def _tie(folder: Path, model: Any, host: Host, missing: set[str]) -> set[str]:
    """Tie a decoder's layers that are the same; what is still ``missing``. InputError where they are not as stated."""
    if host.sharing is None or not host.sharing.causal:
        return missing
    layers = host.layers(host.encoder(model))
    prefix = name_of(layers, model)
    try:
        places = {index: f"{prefix}.{index}." for index in repeats(layers, model.config)}
        absent = {index for index, place in places.items() if any(name.startswith(place) for name in missing)}
        left = {name for name in missing if not name.startswith(tuple(places.values()) or "\0")}
        if not left:
            tie(layers, model.config, absent)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return left


def name_of(part: nn.Module, model: nn.Module) -> str:
    """Where in ``model`` one of its modules is, as its tensors' names begin."""
    return next(name for name, module in model.named_modules() if module is part)


def _pooling(folder: Path) -> Pooling | None:
    """Read sentence-transformers' ``modules.json``: a Transformer, a Pooling, optionally a Normalize."""
    modules = folder / "modules.json"
    if not modules.exists():
        return None
    try:
        kinds = {str(entry["type"]).rsplit(".", 1)[-1]: str(entry["path"]) for entry in list(_read_json(modules))}
    except (TypeError, KeyError) as error:
        raise InputError(describe(f"{modules}: unreadable", got=_first_line(error), expected="modules")) from error
    if not kinds:
        raise InputError(describe(f"{modules}: unreadable", got="no modules", expected="a Transformer and a Pooling"))
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise InputError(
            describe(f"{modules}: unsupported module", got=", ".join(sorted(unknown)), expected="Pooling, Normalize")
        )
    if "Pooling" not in kinds:
        return None
    settings = _read_json(folder / kinds["Pooling"] / "config.json")
    return Pooling(_pooling_mode(settings, folder), "Normalize" in kinds)


def _pooling_mode(settings: dict[str, Any], folder: Path) -> str:
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_max_tokens": "max"}
    if isinstance(settings.get("pooling_mode"), str):
        modes = [settings["pooling_mode"]]
    else:
        modes = [names.get(key, key) for key, on in settings.items() if key.startswith("pooling_mode_") and on]
    if len(modes) != 1 or modes[0] not in names.values():
        raise InputError(
            describe(f"{folder}: unsupported pooling", got=", ".join(modes) or "none", expected="one of cls, mean, max")
        )
    return str(modes[0])


def _max_length(folder: Path, config: Any, host: Host) -> int:
    """The smallest limit that the folder names; without any, ``DEFAULT_MAX_LENGTH``."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [] if positions is None else [int(positions) - host.position_offset]
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = _read_json(folder / name).get(key) if (folder / name).exists() else None
        if limit and limit < _NO_LIMIT:
            limits.append(int(limit))
    return max(1, min(limits, default=DEFAULT_MAX_LENGTH))


def _input_names(config: Any) -> tuple[str, ...]:
    names = ("input_ids", "attention_mask")
    uses_types = config.model_type in {"albert", "bert", "electra"} and config.type_vocab_size > 1
    return (*names, "token_type_ids") if uses_types else names


def _tokenizer_json(folder: Path) -> str:
    path = folder / "tokenizer.json"
    if path.exists():
        return path.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        if not has_tokenizer(folder):
            raise FileNotFoundError("none of its files")  # transformers would make up an empty one
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:
        raise InputError(
            describe(f"{folder}: no usable tokenizer", got=_first_line(error), expected="tokenizer.json")
        ) from error
    return text


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(describe(f"{path}: unreadable", got=_first_line(error), expected="JSON")) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
