"""The backbone as teacher, and one student per ratio. Letters: B batch, S sequence length, H hidden size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from exporter.backbone import Backbone
from exporter.methods.variator import Plugins, VariatorEncoder


class Students(nn.Module):
    """The backbone and one student per ratio, which share all of it but their plugins."""

    def __init__(self, backbone: Backbone, plugins: Mapping[int, Plugins]) -> None:
        super().__init__()
        self.teacher = VariatorEncoder(backbone)
        self.plugins = nn.ModuleDict({str(ratio): one for ratio, one in plugins.items()})
        # Modules too: what an encoder keeps beside its weights moves with them. All that is trained is in ``plugins``.
        self.students = nn.ModuleDict({str(ratio): _student(backbone, one) for ratio, one in plugins.items()})

    def train(self, mode: bool = True) -> Students:
        """Stay in eval mode: the backbone's dropout would blur what is to be learnt, plugins have none."""
        return super().train(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        ratios: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Hidden states [B,S,H] of embeddings and every layer: the teacher's, and of all or some students by ratio."""
        feeds = (input_ids, attention_mask, token_type_ids)
        with torch.no_grad():
            teacher = list(self.teacher(*feeds, keep_states=True).hidden_states)
        students = {
            int(ratio): list(student(*feeds, keep_states=True).hidden_states)
            for ratio, student in self.students.items()
            if ratios is None or int(ratio) in ratios
        }
        return teacher, students


def _student(backbone: Backbone, plugins: Plugins) -> VariatorEncoder:
    student = VariatorEncoder(backbone)
    student.attach(plugins)
    return student
