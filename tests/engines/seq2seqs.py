"""Tiny models that read one text and write another, as engines: their three graphs, named as in ``docs/bundle.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from engines.backends import ort
from engines.bundle import Bundle
from engines.manifest import (
    DECODER,
    DECODER_WITH_PAST,
    ENCODER,
    PAST,
    PRESENT,
    TEXT2TEXT,
    Cost,
    Generation,
    Tokenizer,
    tile_cache_name,
)
from engines.seq2seq import Seq2SeqGenerator
from exporter.methods.modular_cache import guard_cache
from exporter.methods.modular_steps import CachedStep, EncoderPass, FirstStep
from tests.engines import toys
from tests.engines.test_text import save_tokenizer

V, PAD, EOS = 90, 0, 1
STEPS = (("decoder", "key"), ("decoder", "value"), ("encoder", "key"), ("encoder", "value"))


def t5(**changes: Any) -> Any:
    """Weights such that texts differ, and hardly ever say the same again."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 3, "num_decoder_layers": 2}
    sizes |= {"tie_word_embeddings": False}  # else every token is followed by itself
    config = T5Config(vocab_size=V, **sizes, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS, **changes)
    louder = {"SelfAttention.r": 2.0, "SelfAttention": 3.0, "shared": 3.0}
    return _made(T5ForConditionalGeneration, config, 9, 1.5, louder)


def bart(**changes: Any) -> Any:
    """As ``t5``; forty positions, and a start token that is no padding."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 2, "decoder_layers": 3}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}
    special = {"decoder_start_token_id": 2, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 3}
    special |= {"forced_eos_token_id": None, "init_std": 0.5, "tie_word_embeddings": False}
    config = BartConfig(vocab_size=V, **sizes, **heads, **special, **changes)
    return _made(BartForConditionalGeneration, config, 5, 1.0, {"decoder.embed_positions": 4.0})


def _made(kind: Any, config: Any, seed: int, scale: float, louder: dict[str, float]) -> Any:
    """``louder``: by how much more than ``scale`` weights whose name holds a text speak."""
    model = kind(config).eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                factor = next((factor for text, factor in louder.items() if text in name), 1.0)
                parameter.normal_(std=scale * factor / parameter.shape[1] ** 0.5)
    return model


def export(model: Any, folder: Path) -> Seq2SeqGenerator:
    """The three graphs of ``model``, traced and opened."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    if model.config.model_type == "bart":
        tiles, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    else:
        tiles = model.config.num_decoder_layers
    guard_cache(model.get_decoder(), tiles, "tiny", "tiny")
    hidden = model.config.d_model
    width = getattr(model.config, "d_kv", hidden // heads)
    ids, mask = torch.ones(3, 7, dtype=torch.long), torch.ones(3, 7, dtype=torch.long)
    target, states = torch.ones(3, 2, dtype=torch.long), torch.ones(3, 7, hidden)
    past = [torch.ones(3, heads, 5 if stack == "decoder" else 7, width) for _ in range(tiles) for stack, _ in STEPS]
    source, written = {0: "batch", 1: "encoder_sequence"}, {0: "batch", 1: "decoder_sequence"}
    grown = {"decoder": {0: "batch", 2: "past"}, "encoder": {0: "batch", 2: "encoder_sequence"}}
    kept = [(tile, stack, kind) for tile in range(tiles) for stack, kind in STEPS]
    presents = [tile_cache_name(PRESENT, *one) for one in kept]  # type: ignore[arg-type]
    pasts = [tile_cache_name(PAST, *one) for one in kept]  # type: ignore[arg-type]
    own = [name for name in presents if ".decoder." in name]
    _export(
        EncoderPass(model),
        (ids, mask),
        (source, source),
        folder / "encoder.onnx",
        ["input_ids", "attention_mask"],
        ["last_hidden_state"],
    )
    _export(
        FirstStep(model),
        (target, states, mask),
        (written, source, source),
        folder / "first.onnx",
        ["input_ids", "encoder_hidden_states", "encoder_attention_mask"],
        ["logits", *presents],
    )
    _export(
        CachedStep(model),
        (target[:, :1], mask, *past),
        ({0: "batch"}, source, tuple(grown[stack] for _, stack, _ in kept)),
        folder / "cached.onnx",
        ["input_ids", "encoder_attention_mask", *pasts],
        ["logits", *own],
    )
    return open_generator(folder, generation_of(model))


GRAPHS = ("encoder", "first", "cached")


def make_bundle(folder: Path, traced: Path, model: Any, ends: Sequence[int]) -> Bundle:
    """What ``export`` wrote to ``traced``, into ``folder`` with engines. ``ends``: tokens that end a text."""
    models = {name: (onnx.load(traced / f"{name}.onnx"), Cost()) for name in GRAPHS}
    roles = dict(zip((ENCODER, DECODER, DECODER_WITH_PAST), GRAPHS, strict=True))
    return toys.make_bundle(
        folder,
        models,
        {"modular-r1-fp32": toys.variant("modular", 1, roles)},
        model_type=model.config.model_type,
        layers=3,
        hidden_size=16,
        tokenizer=Tokenizer(path="tokenizer.json", max_length=32, pad_id=PAD, inputs=["input_ids", "attention_mask"]),
        save_tokenizer=save_tokenizer,
        method="modular",
        task=TEXT2TEXT,
        generation=generation_of(model).model_copy(update={"eos_ids": list(ends)}),
    )


def _export(
    module: nn.Module, given: tuple[Tensor, ...], axes: Sequence[Any], path: Path, inputs: list[str], outputs: list[str]
) -> None:
    from exporter.trace import quiet_export

    with torch.no_grad(), quiet_export():
        program = torch.onnx.export(
            module,
            given,
            dynamo=True,
            dynamic_shapes=tuple(axes),
            input_names=inputs,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def generation_of(model: Any) -> Generation:
    """What its configuration says."""
    limit = getattr(model.config, "max_position_embeddings", None)
    start = model.config.decoder_start_token_id
    return Generation(eos_ids=[EOS], bos_id=None, pad_id=PAD, max_positions=limit, decoder_start_ids=[start])


def open_generator(
    folder: Path, generation: Generation, threads: int = 1, provider: str = "cpu", memory: str = "cpu"
) -> Seq2SeqGenerator:
    """The graphs of a folder; with another ``provider`` in bound sessions over ``memory``."""
    sessions: list[ort.OrtSession] = []
    for name in ("encoder", "first", "cached"):
        inner = ort.open_file(folder / f"{name}.onnx", threads=threads, optimised=False)
        specs: Any = SimpleNamespace(
            inputs=ort.tensor_specs(inner.get_inputs()), outputs=ort.tensor_specs(inner.get_outputs())
        )
        path = folder / f"{name}.onnx"
        if provider == "cpu":
            sessions.append(ort.OrtSession(name, specs, inner))
        else:
            sessions.append(ort.open_bound(name, specs, path, threads=threads, provider=provider, memory=memory))
    return Seq2SeqGenerator("tiny", *sessions, generation)


def texts(batch: int, longest: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random texts of random lengths, each with an end, ids and mask [B, n], padded on the right."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, longest + 1, batch)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, random.integers(4, V, mask.shape), PAD)
    ids[np.arange(batch), lengths - 1] = EOS
    return ids, mask
