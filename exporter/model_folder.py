"""What a model folder says beside its weights: configuration, pooling, tokenizer. No network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compexport.errors import InputError, describe
from exporter.hosts import Host, host_of
from exporter.identity import has_tokenizer
from exporter.official import require_plain_model

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
        raise InputError(describe(f"{folder}/config.json: unreadable", got=first_line(error))) from error
    if _layers(config) < 1:
        raise InputError(describe(f"{folder}/config.json: layers", got=_layers(config), expected="at least 1"))
    return config


def _layers(config: Any) -> int:
    return int(config.num_hidden_layers)


def read_pooling(folder: Path) -> Pooling | None:
    """Read sentence-transformers' ``modules.json``: a Transformer, a Pooling, optionally a Normalize."""
    modules = folder / "modules.json"
    if not modules.exists():
        return None
    try:
        kinds = {str(entry["type"]).rsplit(".", 1)[-1]: str(entry["path"]) for entry in list(_read_json(modules))}
    except (TypeError, KeyError) as error:
        raise InputError(describe(f"{modules}: unreadable", got=first_line(error), expected="modules")) from error
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


def max_length_of(folder: Path, config: Any, host: Host) -> int:
    """The smallest limit that the folder names; without any, ``DEFAULT_MAX_LENGTH``."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [] if positions is None else [int(positions) - host.position_offset]
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        limit = _read_json(folder / name).get(key) if (folder / name).exists() else None
        if limit and limit < _NO_LIMIT:
            limits.append(int(limit))
    return max(1, min(limits, default=DEFAULT_MAX_LENGTH))


def input_names_of(config: Any) -> tuple[str, ...]:
    names = ("input_ids", "attention_mask")
    uses_types = config.model_type in {"albert", "bert", "electra"} and config.type_vocab_size > 1
    return (*names, "token_type_ids") if uses_types else names


def tokenizer_text(folder: Path) -> str:
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
            describe(f"{folder}: no usable tokenizer", got=first_line(error), expected="tokenizer.json")
        ) from error
    return text


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(describe(f"{path}: unreadable", got=first_line(error), expected="JSON")) from error


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
