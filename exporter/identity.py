"""What a graph is made from, as hashes: decides whether a rebuild may reuse it. Needs no torch, so a rebuild with
nothing to do takes no time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path

# Files beside the weights that change what a graph computes or how its inputs are made.
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
_MEANING = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *VOCABULARIES,
    "modules.json",
    "sentence_bert_config.json",
)
LABEL_WORDS = "label_words.json"
_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript")


def backbone_sha256(folder: Path) -> str:
    """Identity of a backbone: its weights and the files that give them meaning."""
    digest = hashlib.sha256()
    names = [*_MEANING, *sorted(p.relative_to(folder).as_posix() for p in folder.glob("*_Pooling/config.json"))]
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name}\0".encode() + (folder / name).read_bytes())
    for path in sorted(folder.glob("model*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def has_tokenizer(folder: Path) -> bool:
    """Whether any of the files is there that a tokenizer is made of."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *VOCABULARIES))


def label_words_sha256(folder: Path) -> str | None:
    """Hash of the label words; no part of the backbone's identity, since plugins fit whatever the words are."""
    path = folder / LABEL_WORDS
    return file_sha256(path) if path.is_file() else None


def file_sha256(path: Path) -> str:
    """Content hash of one file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def code_sha256() -> str:
    """Hash of the exporter's own source: other code may make other graphs."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that take part in tracing; a missing one is left out."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def graph_key(**facts: object) -> str:
    """One hash of everything a graph depends on; ``facts`` are this graph's own."""
    document = {"code": code_sha256(), "libraries": library_versions(), **facts}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
