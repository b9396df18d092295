"""Exit heads of models run in steps: a classifier after every step but the last, whose head is the model's own.

What COST-EFF's exits are (``exporter.methods.costeff``), after steps instead of layers: they read the first token and
the mean of all real ones. Letters: B batch, S sequence length, H hidden size, C classes, n steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe
from exporter.methods.costeff import mean_of
from exporter.methods.stored import loaded_exactly


class ExitHead(nn.Module):
    """h [B,S,H] after a step, mask [B,S] of 0 and 1 -> logits [B,C]."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        self.pooler = nn.ModuleDict({"dense": nn.Linear(2 * hidden, hidden)})
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, h: Tensor, attention_mask: Tensor) -> Tensor:
        read = torch.cat((h[:, 0], mean_of(h, attention_mask)), dim=-1)
        out: Tensor = self.classifier(torch.tanh(self.pooler["dense"](read)))
        return out


class ExitHeads(nn.Module):
    """The heads after steps 1 to n - 1, whose names in a checkpoint are ``exits.{step}.…``."""

    def __init__(self, n: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.exits = nn.ModuleDict({str(step): ExitHead(hidden, classes) for step in range(1, n)})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], n: int, hidden: int, classes: int, origin: str) -> ExitHeads:
        """From a checkpoint's tensors; InputError names what does not fit ``n`` steps of this model."""
        steps = {name.split(".")[1] for name in tensors if name.startswith("exits.") and name.count(".") > 1}
        expected = {str(step) for step in range(1, n)}
        if steps != expected:
            got = ", ".join(sorted(steps)) or "none"
            raise InputError(describe(f"{origin}: heads after steps", got=got, expected=f"each of 1 to {n - 1}"))
        return loaded_exactly(cls(n, hidden, classes), tensors, origin)

    def after(self, step: int) -> ExitHead:
        """The head after ``step``, counted from 1."""
        head = self.exits[str(step)]
        assert isinstance(head, ExitHead)
        return head
