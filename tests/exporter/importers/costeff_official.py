"""The official COST-EFF network and its folder, written out once more from its description, in numpy and fp64.

Nothing here is shared with the code under test: no PyTorch module, one head and one sequence at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import erf
from torch import Tensor

from tests import models

Array = npt.NDArray[np.float64]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """A slender BERT. ``heads`` and ``neurons`` per layer; ``rank`` None: one word table."""

    heads: tuple[int, ...] = (2, 2, 2, 2)
    neurons: tuple[int, ...] = (20, 20, 20, 20)
    rank: int | None = 7
    classes: int = 2
    pooler_dense: bool = False
    hidden: int = 24
    head_width: int = 8
    wide: int = 50
    positions: int = 48
    vocab: int = len(models.wordpiece_vocabulary())

    @property
    def layers(self) -> int:
        return len(self.heads)

    @property
    def ratio(self) -> float:
        """Matrices of the layers: all of the BERT's ÷ those kept."""
        full = self.layers * (4 * self.hidden * self.hidden + 2 * self.hidden * self.wide)
        return full / sum(
            4 * self.hidden * self.head_width * a + 2 * self.hidden * f
            for a, f in zip(self.heads, self.neurons, strict=True)
        )


def random_tensors(sizes: Sizes, seed: int = 0) -> Tensors:
    """Every tensor of the official layout, none of them neutral."""
    d, made = sizes.hidden, {}
    generator = torch.Generator().manual_seed(seed)

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        made[f"{name}.weight"] = scale * torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def linear(name: str, rows: int, columns: int) -> None:
        matrix(name, rows, columns)
        made[f"{name}.bias"] = 0.2 * torch.randn(rows, generator=generator)

    def norm(name: str) -> None:
        made[f"{name}.weight"] = 1 + 0.3 * torch.randn(d, generator=generator)
        made[f"{name}.bias"] = 0.2 * torch.randn(d, generator=generator)

    if sizes.rank is None:
        matrix("bert.embeddings.word_embeddings", sizes.vocab, d, 4)
    else:
        matrix("bert.embeddings.word_embeddings1", sizes.vocab, sizes.rank, 2)
        matrix("bert.embeddings.word_embeddings2", d, sizes.rank)
    matrix("bert.embeddings.position_embeddings", sizes.positions, d)
    matrix("bert.embeddings.token_type_embeddings", 2, d)
    norm("bert.embeddings.LayerNorm")
    for layer, (heads, neurons) in enumerate(zip(sizes.heads, sizes.neurons, strict=True)):
        prefix, kept = f"bert.encoder.layer.{layer}", heads * sizes.head_width
        for name in ("query", "key", "value"):
            linear(f"{prefix}.attention.self.{name}", kept, d)
        linear(f"{prefix}.attention.output.dense", d, kept)
        norm(f"{prefix}.attention.output.LayerNorm")
        linear(f"{prefix}.intermediate.dense", neurons, d)
        linear(f"{prefix}.output.dense", d, neurons)
        norm(f"{prefix}.output.LayerNorm")
    for layer in range(sizes.layers - 1):
        linear(f"bert.encoder.highway.{layer}.classifier", sizes.classes, d)
        if sizes.pooler_dense:
            linear(f"bert.encoder.highway.{layer}.pooler.dense", d, d)
    if sizes.pooler_dense:
        linear("bert.pooler.dense", d, d)
    linear("classifier", sizes.classes, d)
    return made


def config(sizes: Sizes) -> dict[str, Any]:
    """``config.json`` as transformers 4.14 wrote it for the official class; label names only where they are not two."""
    kept = sizes.heads[0]
    document: dict[str, Any] = {
        "_name_or_path": "./models/TA_model/SST-2",
        "architectures": ["CosteffForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "emb_hidden_dim": -1 if sizes.rank is None else sizes.rank,
        "head_to_distill": [list(range(1, kept + 1))] * sizes.layers,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_mode": "concat",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.wide,
        "last_n_hidden": 1,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": sizes.positions,
        "model_type": "bert",
        "num_attention_heads": kept,
        "num_hidden_layers": sizes.layers,
        "output_hidden_states": True,
        "pad_token_id": 0,
        "pooler_dense": sizes.pooler_dense,
        "pooling_mode": "cls",
        "prun_hidden_size": kept * sizes.head_width,
        "prun_intermediate_size": sizes.neurons[0],
        "return_grad": False,
        "torch_dtype": "float32",
        "transformers_version": "4.14.1",
        "type_vocab_size": 2,
        "vocab_size": sizes.vocab,
    }
    if sizes.classes != 2:
        names = [f"class {i}" for i in range(sizes.classes)]
        document["id2label"] = {str(i): name for i, name in enumerate(names)}
        document["label2id"] = {name: i for i, name in enumerate(names)}
    return document


def write(folder: Path, sizes: Sizes, tensors: Tensors, document: Mapping[str, Any] | None = None) -> Path:
    """The folder as ``save_pretrained`` of the official code left it: a pickle, a slow tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(sizes) if document is None else document))
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in models.wordpiece_vocabulary()))
    tokenizer = {"do_lower_case": True, "model_max_length": sizes.positions, "tokenizer_class": "BertTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    special = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"mask_token": "[MASK]"}))
    (folder / "eval_results.txt").write_text("acc = 0.5\n")
    return folder


class Official:
    """The network's forward pass. Sequences are rows of ids with a mask of 0 and 1 and token types."""

    def __init__(self, tensors: Tensors, sizes: Sizes) -> None:
        self.sizes = sizes
        self.weights: dict[str, Array] = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def run(self, ids: Tensor, mask: Tensor, types: Tensor) -> tuple[list[Array], list[Array]]:
        """States after the embeddings and every layer [B,S,H], and the predictions of all exits [B,C]."""
        rows = [self._row(*(x.numpy() for x in row)) for row in zip(ids, mask, types, strict=True)]
        states = [np.stack([row[0][i] for row in rows]) for i in range(self.sizes.layers + 1)]
        logits = [np.stack([row[1][i] for row in rows]) for i in range(self.sizes.layers)]
        return states, logits

    def _row(self, ids: Any, mask: Any, types: Any) -> tuple[list[Array], list[Array]]:
        h = self._embed(ids, types)
        states, logits = [h], []
        for layer in range(self.sizes.layers):
            h = self._layer(layer, h, mask)
            states.append(h)
            last = layer == self.sizes.layers - 1
            logits.append(self._predict("" if last else f"bert.encoder.highway.{layer}.", h))
        return states, logits

    def _embed(self, ids: Any, types: Any) -> Array:
        w, base = self.weights, "bert.embeddings."
        if self.sizes.rank is None:
            words = w[f"{base}word_embeddings.weight"][ids]
        else:
            words = w[f"{base}word_embeddings1.weight"][ids] @ w[f"{base}word_embeddings2.weight"].T
        places = w[f"{base}position_embeddings.weight"][np.arange(len(ids))]
        return self._norm(f"{base}LayerNorm", words + places + w[f"{base}token_type_embeddings.weight"][types])

    def _layer(self, layer: int, h: Array, mask: Any) -> Array:
        prefix = f"bert.encoder.layer.{layer}."
        a = self._linear(f"{prefix}attention.output.dense", self._attend(prefix, layer, h, mask))
        a = self._norm(f"{prefix}attention.output.LayerNorm", h + a)
        x = self._linear(f"{prefix}intermediate.dense", a)
        gelu = x * 0.5 * (1 + erf(x / math.sqrt(2)))
        return self._norm(f"{prefix}output.LayerNorm", a + self._linear(f"{prefix}output.dense", gelu))

    def _attend(self, prefix: str, layer: int, h: Array, mask: Any) -> Array:
        q, k, v = (self._linear(f"{prefix}attention.self.{name}", h) for name in ("query", "key", "value"))
        width, mixed = self.sizes.head_width, []
        for head in range(self.sizes.heads[layer]):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width) + (1 - mask) * -10000.0
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        return np.concatenate(mixed, axis=1)

    def _predict(self, prefix: str, h: Array) -> Array:
        first = h[0]
        if self.sizes.pooler_dense:
            first = self._linear(f"{prefix or 'bert.'}pooler.dense", first)
        return self._linear(f"{prefix}classifier", np.tanh(first))

    def _linear(self, name: str, x: Array) -> Array:
        out: Array = x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]
        return out

    def _norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        out: Array = centred / np.sqrt(variance + 1e-12) * self.weights[f"{name}.weight"]
        return out + self.weights[f"{name}.bias"]


def exit_layer(logits: list[Array], tau: float) -> list[int]:
    """Per row, the first layer, counted from 1, whose entropy is below tau; the last without condition."""
    layers = []
    for row in zip(*logits, strict=True):
        taken = len(row)
        for layer, scores in enumerate(row[:-1], start=1):
            p = np.exp(scores - scores.max())
            p /= p.sum()
            if -np.sum(p * np.log(p)) < tau:
                taken = layer
                break
        layers.append(taken)
    return layers
