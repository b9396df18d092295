"""One step of training modules: a random assembly beside the base that it stands for.

Letters: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from calib.modular.schedule import draw, generator_of
from exporter.methods.assembly import STACKS, Assembly
from exporter.methods.modular import ModularModel

KEPT = 256  # assemblies, of a few hundred kilobytes each


class Lesson(nn.Module):
    """A base and its modules on the same batch; only modules are trained.

    An assembly's modules are in training mode, whose dropout is the base's own; the base's layers never are.
    """

    def __init__(self, modular: ModularModel) -> None:
        super().__init__()
        self.modular = modular
        # Functions and no parts of this one: an assembly has no tensor of its own. Putting one together takes a fifth
        # of a step of a small model, and the same ones come again.
        self.base = cache(lambda: modular.assemble(Assembly.base(modular.facts), observed=True))
        self.assembled = lru_cache(KEPT)(self._assembled)

    def forward(self, assembly: Assembly, labels: Tensor, **batch: Tensor) -> tuple[Any, Any]:
        """Outputs of the assembly and of the base on input_ids, attention_mask [B,S] and labels [B,T]."""
        base = self.base()
        batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
        with torch.no_grad():
            theirs = base(**batch, **wanted)
        return self._learning(assembly)(**batch, **wanted), theirs

    def _assembled(self, assembly: Assembly) -> Any:
        return self.modular.assemble(assembly, observed=True)

    def _learning(self, assembly: Assembly) -> Any:
        """The assembly, its modules as they are when they learn."""
        made = self.assembled(assembly)
        for name, stack in zip(STACKS, self.modular.host.stacks(made), strict=True):
            for size, tile in zip(assembly.stack(name), self.modular.host.layers_of(stack), strict=True):
                tile.train(self.training and size > 1)
        return made

    def draw(self, probability: float, seed: int, step: int) -> Assembly:
        """The assembly of a step: both stacks on their own."""
        tilings = {}
        for name in STACKS:
            facts = self.modular.facts.stack(name)
            tilings[name] = draw(facts, probability, generator_of(seed, step, name))
        return Assembly(**tilings)
