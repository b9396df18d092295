"""Small models that write texts, for training from random weights: spelling to phonemes, English to German.

Both have tokenizers that are made from the training data, and end every text with ``</s>``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPECIAL = [PAD, EOS, UNK]  # ids 0, 1, 2
MAX_LENGTH = 64
BPE_TOKENS = 4000


@dataclass(frozen=True)
class Size:
    """Layers of both stacks, width of the residual stream and of the feed-forward networks, heads."""

    encoder: int = 12
    decoder: int = 12
    hidden: int = 64
    ffn: int = 256
    heads: int = 4


def spelling_tokenizer(pairs: Sequence[tuple[str, str]]) -> Tokenizer:
    """One token for a letter of the source and for a phoneme of the target, told apart by their case."""
    letters = sorted({letter for source, _ in pairs for letter in source})
    phonemes = sorted({phoneme for _, target in pairs for phoneme in target.split()})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters, *phonemes])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    alone = pre_tokenizers.Split(_one_of(letters), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), alone])
    return _ended(tokenizer)


def _one_of(letters: Sequence[str]) -> Any:
    from tokenizers import Regex

    return Regex("[" + "".join(letters) + "]")


def translation_tokenizer(pairs: Sequence[tuple[str, str]]) -> Tokenizer:
    """Byte-level BPE of both languages together."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=BPE_TOKENS, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for pair in pairs for text in pair], trainer)
    return _ended(tokenizer)


def _ended(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {EOS}", special_tokens=[(EOS, SPECIAL.index(EOS))])
    return tokenizer


def t5(tokens: int, size: Size) -> Any:
    """A T5 (v1.0) without dropout: there is more data than it can take in."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=tokens,
        num_layers=size.encoder,
        num_decoder_layers=size.decoder,
        d_model=size.hidden,
        d_kv=size.hidden // size.heads,
        d_ff=size.ffn,
        num_heads=size.heads,
        dropout_rate=0.0,
        decoder_start_token_id=SPECIAL.index(PAD),
    )
    return T5ForConditionalGeneration(config)


def mbart(tokens: int, size: Size) -> Any:
    """A BART whose layers normalise first, as mBART's do: twelve of BART's own learn too slowly from random weights."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    config = MBartConfig(
        vocab_size=tokens,
        encoder_layers=size.encoder,
        decoder_layers=size.decoder,
        d_model=size.hidden,
        encoder_ffn_dim=size.ffn,
        decoder_ffn_dim=size.ffn,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        max_position_embeddings=MAX_LENGTH,
        dropout=0.1,
        scale_embedding=True,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(EOS),
        eos_token_id=SPECIAL.index(EOS),
        decoder_start_token_id=SPECIAL.index(EOS),
        forced_eos_token_id=SPECIAL.index(EOS),
    )
    return MBartForConditionalGeneration(config)


def make(
    folder: Path,
    model: Callable[[int, Size], Any],
    tokenizer: Callable[[Sequence[tuple[str, str]]], Tokenizer],
    pairs: Sequence[tuple[str, str]],
    size: Size,
    seed: int = 0,
) -> Path:
    """Write a model of random weights, drawn by ``seed``, with a tokenizer made from ``pairs``."""
    import torch

    made = tokenizer(pairs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model(made.get_vocab_size(), size).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH}
    settings |= {"pad_token": PAD, "eos_token": EOS, "unk_token": UNK}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def shrunk(base: Path, folder: Path, model: Callable[[int, Size], Any], size: Size) -> Path:
    """A model of fewer layers, which start as evenly spaced ones of ``base``: "shrink" of shrink and fine-tune.

    Shleifer and Rush 2020 (arXiv 2010.13002): the first layer, the last, and between them every so many.
    """
    import shutil

    from exporter.backbone import load_seq2seq

    found = load_seq2seq(base)
    smaller = model(found.config.vocab_size, size)
    smaller.load_state_dict(found.model.state_dict(), strict=False)  # what is outside of the layers
    for stack, whole in zip(found.host.stacks(smaller), found.host.stacks(found.model), strict=True):
        layers, theirs = found.host.layers_of(stack), found.host.layers_of(whole)
        for layer, number in zip(layers, spaced(len(theirs), len(layers)), strict=True):
            layer.load_state_dict(theirs[number].state_dict())
    smaller.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder / name)
    return folder


def spaced(layers: int, kept: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    return [0] if kept == 1 else [round(number * (layers - 1) / (kept - 1)) for number in range(kept)]
