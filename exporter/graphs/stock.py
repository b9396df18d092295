"""What the Hugging Face model itself computes: the reference of ratio 1, whatever the method."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from exporter.backbone import Backbone
from exporter.methods import variator


def stock_outputs(backbone: Backbone, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the Hugging Face model as it is, pooled where the folder says so."""
    if backbone.label_words is not None:
        prefix = torch.tensor([backbone.label_words.decoder_input_ids] * len(tensors["input_ids"]))
        logits = backbone.model(**tensors, decoder_input_ids=prefix).logits
        return (logits[:, -1, backbone.label_words.word_ids],)
    outputs = backbone.model(**tensors)
    if backbone.task == "feature-extraction":
        hidden = outputs.last_hidden_state
        if backbone.pooling is None:
            return (hidden,)
        return hidden, variator.pool(hidden, tensors["attention_mask"], backbone)
    return tuple(outputs[name] for name in variator.output_names(backbone))
