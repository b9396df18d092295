"""One step of training modules: a random assembly beside the base that it stands for.

Letters: B batch, S source tokens, T target tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calib.modular.schedule import draw, generator_of
from exporter.methods.assembly import STACKS, Assembly
from exporter.methods.modular import ModularModel


class Lesson(nn.Module):
    """A base and its modules on the same batch; only modules are trained.

    An assembly's modules are in training mode, whose dropout is the base's own; the base's layers never are.
    """

    def __init__(self, modular: ModularModel) -> None:
        super().__init__()
        self.modular = modular
        # Beside the modules and not among them: an assembly has no tensor of its own.
        self.bases = [modular.assemble(Assembly.base(modular.facts), observed=True)]

    def forward(self, assembly: Assembly, labels: Tensor, **batch: Tensor) -> tuple[Any, Any]:
        """Outputs of the assembly and of the base on input_ids, attention_mask [B,S] and labels [B,T]."""
        base = self.bases[0]
        batch["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
        wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
        with torch.no_grad():
            theirs = base(**batch, **wanted)
        return self.assembled(assembly)(**batch, **wanted), theirs

    def assembled(self, assembly: Assembly) -> Any:
        """The assembly, its modules as they are when they learn."""
        made = self.modular.assemble(assembly, observed=True)
        for name, stack in zip(STACKS, self.modular.host.stacks(made), strict=True):
            for size, tile in zip(assembly.stack(name), self.modular.host.layers_of(stack), strict=True):
                tile.train(size > 1)
        return made

    def draw(self, probability: float, seed: int, step: int) -> Assembly:
        """The assembly of a step: both stacks on their own."""
        tilings = {}
        for name in STACKS:
            facts = self.modular.facts.stack(name)
            tilings[name] = draw(facts.layers, facts.granularities, probability, generator_of(seed, step, name))
        return Assembly(**tilings)
