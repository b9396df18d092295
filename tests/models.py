"""Tiny named models with random weights, saved as ordinary Hugging Face folders with a real tokenizer.

``make("tiny-bert", folder)`` is all a test needs; the ``tiny`` fixture of ``conftest.py`` makes each folder only once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HIDDEN = 32
LAYERS = 2
HEADS = 4
FFN = 64
MAX_LENGTH = 160  # tokens, special ones included
LABELS = {
    "sequence-classification": ["negative", "positive"],
    "token-classification": ["O", "PER", "LOC"],
    "label-words": ["negative", "positive"],
}
# The labels' words are among ``TEXTS``, so every tokenizer has a first sub-token for each.
LABEL_WORDS = {
    "labels": LABELS["label-words"],
    "words": [" waste", " loved"],
    "template": "the film: {text} it was <extra_id_0>",
}
HEAD_CLASSES = {
    "feature-extraction": "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
T5_CLASSES = {"feature-extraction": "EncoderModel", "label-words": "ForConditionalGeneration"}
BART_CLASSES = {"feature-extraction": "Model", "label-words": "ForConditionalGeneration"}
TEXTS = [
    "a fine film with a quiet heart",
    "the plot is thin and the actors look bored",
    "we loved every minute of it",
    "Return the value of the named option, or the default.",
    "opens a file and reads it line by line",
    "what a waste of two hours!",
    "the camera moves slowly over the old town",
    "an error is raised when the path does not exist",
]


@dataclass(frozen=True)
class Tiny:
    """One named model: the prefix of its transformers classes, its config values, and its kind of tokenizer.

    ``classes``: task -> the rest of the class name.
    """

    prefix: str
    config: dict[str, Any]
    tokenizer: Callable[[], Any]
    classes: dict[str, str] = field(default_factory=lambda: HEAD_CLASSES)


def wordpiece_vocabulary() -> list[str]:
    """The lines of a ``vocab.txt``: letters, their continuations and the words of ``TEXTS``."""
    letters = [chr(code) for code in range(33, 127)]
    words = sorted({word for text in TEXTS for word in text.lower().replace(",", "").split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters), *words]
    return list(dict.fromkeys(tokens))


def _wordpiece() -> Any:
    """A BERT tokenizer of that vocabulary."""
    from tokenizers import BertWordPieceTokenizer

    return BertWordPieceTokenizer(vocab={token: i for i, token in enumerate(wordpiece_vocabulary())})


def _byte_level() -> Any:
    """A RoBERTa tokenizer: byte-level BPE with a few merges learnt from ``TEXTS``."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing

    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(TEXTS, vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def _byte_level_bare() -> Any:
    """GPT-2's kind: the same pieces, and no token around a text; ``</s>`` is 2, ``<pad>`` 1."""
    from tokenizers import processors

    tokenizer = _byte_level()
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _unigram() -> Any:
    """A T5 tokenizer: pieces with a score each, ``</s>`` at the end, no token types, sentinels as the last ids."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import Unigram

    letters = [chr(code) for code in range(33, 127)]
    words = sorted({"\u2581" + word for text in TEXTS for word in text.replace(",", "").split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(piece, -3.0) for piece in words] + [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"])
    ends = [("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", special_tokens=ends)
    return tokenizer


_SIZES = {
    "initializer_range": 0.2,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": MAX_LENGTH,
}
_BART_SIZES = {
    "init_std": 0.2,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN,
    "max_position_embeddings": MAX_LENGTH,
    "scale_embedding": True,
}
# Sixteen buckets up to distance 40: the 128 tokens of a parity check reach beyond the last of them.
_T5_SIZES = {
    "d_model": HIDDEN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "d_kv": HIDDEN // HEADS,
    "d_ff": FFN,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 40,
}
MODELS = {
    "tiny-bert": Tiny("Bert", _SIZES, _wordpiece),
    # RoBERTa numbers positions from pad_token_id + 1, so its table is two rows longer than its limit.
    "tiny-roberta": Tiny(
        "Roberta",
        {**_SIZES, "max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1, "pad_token_id": 1},
        _byte_level,
    ),
    "tiny-distilbert": Tiny(
        "DistilBert",
        {
            "initializer_range": 0.2,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": FFN,
            "max_position_embeddings": MAX_LENGTH,
        },
        _wordpiece,
    ),
    "tiny-electra": Tiny("Electra", {**_SIZES, "embedding_size": 16}, _wordpiece),
    "tiny-t5": Tiny("T5", _T5_SIZES, _unigram, T5_CLASSES),
    # Version 1.1: a gated FFN. Heads as wide together as no other part, so that no two sizes can be mixed up.
    "tiny-t5-gated": Tiny(
        "T5",
        {**_T5_SIZES, "d_kv": 12, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _unigram,
        T5_CLASSES,
    ),
    "tiny-bart": Tiny("Bart", _BART_SIZES, _byte_level, BART_CLASSES),
    # Pre-norm, with a norm at the end.
    "tiny-mbart": Tiny("MBart", {**_BART_SIZES, "decoder_start_token_id": 0}, _byte_level, BART_CLASSES),
}
# Models whose layers are one layer many times; method ``ode`` alone fits them.
_ALBERT_SIZES = {
    **_SIZES,
    "num_hidden_layers": 6,
    "embedding_size": 16,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
SHARED = {
    "tiny-albert": Tiny("Albert", _ALBERT_SIZES, _wordpiece),
    "tiny-albert-groups": Tiny(
        "Albert",
        {**_ALBERT_SIZES, "num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
        _wordpiece,
    ),
    "tiny-gpt2-shared": Tiny(
        "GPT2",
        {
            "initializer_range": 0.2,
            "n_embd": HIDDEN,
            "n_layer": 6,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": MAX_LENGTH,
            "shared_layers": [6],
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        _byte_level_bare,
        {"text-generation": "LMHeadModel"},
    ),
}
# The same architectures, deep enough for exits: between two layers there is one, between four there are three.
DEEPER = {"tiny-bert-deep": Tiny("Bert", {**_SIZES, "num_hidden_layers": 4}, _wordpiece)}
# Encoder-decoders of twelve narrow layers each, for modules of 2, 3, 4 and 6 layers.
_TEXT_TO_TEXT = {"text2text-generation": "ForConditionalGeneration"}
_T5_DEEP = {**_T5_SIZES, "d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 12, "decoder_start_token_id": 0}
_BART_DEEP = {
    **_BART_SIZES,
    "d_model": 16,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
}
SEQ2SEQ = {
    "tiny-t5-twelve": Tiny("T5", _T5_DEEP, _unigram, _TEXT_TO_TEXT),
    "tiny-t5-gated-twelve": Tiny(
        "T5",
        {**_T5_DEEP, "d_kv": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _unigram,
        _TEXT_TO_TEXT,
    ),
    "tiny-bart-twelve": Tiny("Bart", _BART_DEEP, _byte_level, _TEXT_TO_TEXT),
    "tiny-mbart-twelve": Tiny("MBart", {**_BART_DEEP, "decoder_start_token_id": 0}, _byte_level, _TEXT_TO_TEXT),
}
# The same, no deeper than graphs need to be checked: modules of 2 and 4 layers.
_FOUR = {"T5": {"num_layers": 4}, "Bart": {"encoder_layers": 4, "decoder_layers": 4}}
_FOUR["MBart"] = _FOUR["Bart"]
SHALLOW_SEQ2SEQ = {
    name.replace("twelve", "four"): replace(tiny, config={**tiny.config, **_FOUR[tiny.prefix]})
    for name, tiny in SEQ2SEQ.items()
}
# As deep as makes a difference, where graphs are only there to be run.
SHALLOWEST = {"tiny-t5-pair": Tiny("T5", {**_T5_DEEP, "num_layers": 2}, _unigram, _TEXT_TO_TEXT)}


def make(
    name: str, folder: Path, task: str = "feature-extraction", *, pooling: str | None = "mean", seed: int = 0
) -> Path:
    """Write the model ``name`` for ``task`` to ``folder`` as Hugging Face saves it, and return ``folder``.

    ``pooling`` ("mean", "cls" or None) adds what a sentence-transformers folder says; feature-extraction only.
    """
    import torch
    import transformers

    tiny = {**MODELS, **DEEPER, **SHARED, **SEQ2SEQ, **SHALLOW_SEQ2SEQ, **SHALLOWEST}[name]
    tokenizer = tiny.tokenizer()
    config = getattr(transformers, f"{tiny.prefix}Config")(**{"vocab_size": tokenizer.get_vocab_size(), **tiny.config})
    if (labels := LABELS.get(task)) and task != "label-words":
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.prefix + tiny.classes[task])(config)
    _save_model(model, folder)
    _save_tokenizer(tokenizer, folder)
    if task == "label-words":
        (folder / "label_words.json").write_text(json.dumps(LABEL_WORDS))
    if task == "feature-extraction" and pooling is not None:
        _save_pooling(folder, pooling)
    return folder


def _save_model(model: Any, folder: Path) -> None:
    if not hasattr(model.config, "shared_layers"):
        model.save_pretrained(folder)
        return
    from exporter.methods.ode_convert import save_model

    save_model(model, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_max_length": MAX_LENGTH, "tokenizer_class": "PreTrainedTokenizerFast"}
    ids = {token: tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>")}
    settings |= {"pad_token": next(token for token, index in ids.items() if index is not None)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _save_pooling(folder: Path, pooling: str) -> None:
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps(
            {
                "word_embedding_dimension": HIDDEN,
                "pooling_mode_cls_token": pooling == "cls",
                "pooling_mode_mean_tokens": pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            }
        )
    )
