"""The graphs of assemblies: for each tiling of a stack one, in which modules stand for the layers that they replace.

Letters: B batch, n source tokens, t target tokens, p target tokens read before, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from engines.manifest import GENERATION_SETTINGS, Cost, Generation, Variant
from exporter import parity
from exporter.backbone import Seq2Seq
from exporter.graphs.family import REPORTED_LENGTH, Family, Run
from exporter.graphs.modular_eager import joined_outputs
from exporter.graphs.modular_feeds import decoder_feeds
from exporter.graphs.modular_join import joined
from exporter.graphs.modular_trace import TRANSPOSED, Pieces
from exporter.methods.assembly import STACKS, Assembly, cost
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import load_modular, untrained_modular
from exporter.methods.modular_steps import CachedStep, EncoderPass, FirstStep
from exporter.plans import PlannedGraph
from exporter.plans.modular import GENERATION_CONFIG, SPECIAL_TOKENS, USED, ModularPlan, Part, PlannedStack, as_stack
from exporter.precision import Arithmetic, computing, tensor_of, wide
from exporter.weights import WeightsFile, stored_places

_log = logging.getLogger(__name__)

REPORTED_TOKENS = 32  # new tokens, after REPORTED_LENGTH that are read, for which FLOPs ratios are quoted
_PARTS: dict[Part, Callable[[Any], nn.Module]] = {"encoder": EncoderPass, "first": FirstStep, "cached": CachedStep}
_SETTINGS = ("config.json", "tokenizer_config.json", SPECIAL_TOKENS)
# What else a generation_config.json says, which changes no token.
_NO_CHOICE = {"_from_model_config", "return_dict_in_generate", "transformers_version", "use_cache"}
_NO_CHOICE |= {f"output_{what}" for what in ("attentions", "hidden_states", "logits", "scores")}


class ModularFamily(Family[Seq2Seq]):
    """One base with its modules, and the assemblies of a plan."""

    def __init__(self, plan: ModularPlan, model: ModularModel) -> None:
        super().__init__(plan, model.source)
        self.assembled = plan
        self.modular = model
        self._pieces: Pieces | None = None
        self._arithmetics: dict[Arithmetic, ModularModel] = {}

    @classmethod
    def load(cls, plan: ModularPlan) -> ModularFamily:
        """Load base and modules; InputError as their loaders raise."""
        if plan.trained(1):
            return cls(plan, plan.loaded or load_modular(plan.folder))
        return cls(plan, untrained_modular(plan.base, plan.seed))

    # --- graphs

    def model(self, graph: PlannedGraph, weights: WeightsFile) -> onnx.ModelProto:
        if self._pieces is None:
            self._pieces = Pieces(self._in(computing(self.plan.precision)), weights.move_out)
        return joined(self._pieces, as_stack(graph).part, as_stack(graph).tiling)

    def _module(self, part: PlannedStack) -> nn.Module:
        """The part by PyTorch: of nothing but layers, the base itself as transformers made it."""
        return _PARTS[part.part](self._assembled(part)).eval()

    def _assembled(self, part: PlannedStack) -> Any:
        base = Assembly.base(self.modular.facts)
        if part.part == "encoder":
            assembly = Assembly(part.tiling, base.decoder)
        else:
            assembly = Assembly(base.encoder, part.tiling)
        return self.modular.base if assembly == base else self.modular.assemble(assembly)

    def check_weights(self, graphs: Sequence[Path]) -> None:
        """Every tensor of the base and of the modules is stored at most once, however many graphs use it."""
        modular = self._in(computing(self.plan.precision))
        tensors = {**modular.base.state_dict(), **modular.module_tensors()}
        places: dict[str, set[tuple[int, int]]] = {}
        for stored, where in stored_places(graphs).items():
            if (name := stored.removesuffix(TRANSPOSED)) in tensors:  # and not what was computed while tracing
                places.setdefault(name, set()).update(where)
        for name, where in places.items():
            if len(where) > 1:
                raise ValueError(f"{name} is stored {len(where)} times, as {sorted(where)}")
        known = sum(tensors[name].numel() * tensors[name].element_size() for name in places)
        found = sum(length for _, length in set().union(*places.values()))
        if found > known:
            raise ValueError(f"the tensors of tiles take {found} bytes, but have {known}")

    # --- parity

    def feeds(self, graph: PlannedGraph) -> list[parity.Arrays]:
        part = as_stack(graph)
        if part.part == "encoder":
            return self.id_feeds(2)
        return decoder_feeds(self.modular, self._assembled(part), self.max_length(), cached=part.part == "cached")

    def by_pytorch(self, graph: PlannedGraph, arithmetic: Arithmetic) -> Run:
        """By transformers' own code where that may run, otherwise by the modules that are traced."""
        part = as_stack(graph)
        if arithmetic.is_stock:
            return _runner(cache(lambda: arithmetic.of(self._module(part))), arithmetic)
        modular = cache(lambda: self._in(arithmetic))

        def run(feed: parity.Arrays) -> list[np.ndarray]:
            with torch.inference_mode():
                return _arrays(joined_outputs(modular(), part.part, part.tiling, _tensors(feed, arithmetic)))

        return run

    def _in(self, arithmetic: Arithmetic) -> ModularModel:
        """Base and modules in this arithmetic, one copy for all graphs; those in float64 are rare and large."""
        if arithmetic in self._arithmetics:
            return self._arithmetics[arithmetic]
        made = arithmetic.of(self.modular, self.modular.host.shrink)
        return made if arithmetic.dtype == torch.float64 else self._arithmetics.setdefault(arithmetic, made)

    # --- records for the manifest

    def cost(self, graph: PlannedGraph) -> Cost:
        part, facts = as_stack(graph), self.modular.facts
        tiles = len(part.tiling)
        if part.part == "encoder":
            stack = facts.encoder
            per_token = 4 * stack.hidden * stack.inner + stack.feed_forward
            return Cost(per_token=tiles * per_token, per_pair=tiles * 2 * stack.inner)
        stack = facts.decoder
        per_token = 6 * stack.hidden * stack.inner + stack.feed_forward
        pair = tiles * 2 * stack.inner
        return Cost(
            per_token=tiles * per_token + stack.hidden * facts.vocabulary,
            per_pair=pair,
            per_source=tiles * 2 * stack.hidden * stack.inner if part.part == "first" else 0,
            per_source_pair=pair,
        )

    def variant(self, ratio: float) -> Variant:
        return self.variants()[self.plan.variant(ratio)]

    def variants(self) -> dict[str, Variant]:
        return {name: self._variant(name, assembly) for name, assembly in self.assembled.assemblies.items()}

    def _variant(self, name: str, assembly: Assembly) -> Variant:
        facts, ratio = self.modular.facts, self.assembled.ratio_of(name)
        base, own = (
            cost(facts, one).generation(REPORTED_LENGTH, REPORTED_TOKENS) for one in (Assembly.base(facts), assembly)
        )
        modules = sum(
            facts.stack(stack).layer_params * sum(size > 1 for size in assembly.stack(stack)) for stack in STACKS
        )
        chosen: dict[str, object] = {}
        if name == self.plan.variant(ratio):
            chosen = (
                {USED: self.assembled.used_sha256} if ratio == 1 else {"strategy": self.assembled.strategy_of(ratio)}
            )
        return Variant(
            method=self.plan.method,
            ratio=ratio,
            precision=self.plan.precision,
            graphs=self.plan.variants()[name],
            params=cost(facts, assembly).params,
            extra_params=modules,
            flops_ratio=base / own,
            untrained=bool(modules) and not self.plan.trained(ratio),
            assembly={name: list(assembly.stack(name)) for name in STACKS},
            settings={**chosen, "layers": [len(assembly.encoder), len(assembly.decoder)]},
        )

    def write_settings(self, folder: Path) -> None:
        """Configurations as transformers reads them, and what says how the tokenizer is used."""
        folder.mkdir()
        for name in _SETTINGS:
            if (self.plan.folder / name).is_file():
                shutil.copyfile(self.plan.folder / name, folder / name)
        self.backbone.model.generation_config.to_json_file(folder / GENERATION_CONFIG)

    def generation(self) -> Generation:
        given = self.backbone.generation
        settings = self.backbone.model.generation_config.to_diff_dict()
        own = {name for name in settings if not name.endswith("_token_id")} - _NO_CHOICE
        if unknown := sorted(own - GENERATION_SETTINGS.keys()):
            _log.warning("%s: engines generate without %s", self.plan.folder / GENERATION_CONFIG, ", ".join(unknown))
        chosen = {name: settings[name] for name in GENERATION_SETTINGS if settings.get(name) is not None}
        return Generation(
            eos_ids=list(given.eos),
            bos_id=None,
            pad_id=given.pad,
            max_positions=getattr(self.backbone.config, "max_position_embeddings", None),
            decoder_start_ids=[given.start],
            forced_bos_id=given.forced_bos,
            forced_eos_id=given.forced_eos,
            defaults={name: value for name, value in chosen.items() if value != GENERATION_SETTINGS[name]},
        )


def _runner(made: Callable[[], nn.Module], arithmetic: Arithmetic) -> Run:
    """A module over arrays, in the order in which a feed names them."""

    def run(feed: parity.Arrays) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = made()(*_tensors(feed, arithmetic).values())
        return _arrays([outputs] if isinstance(outputs, Tensor) else outputs)

    return run


def _tensors(feed: parity.Arrays, arithmetic: Arithmetic) -> dict[str, Tensor]:
    return {name: tensor_of(array, arithmetic.dtype) for name, array in feed.items()}


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [wide(tensor).numpy() for tensor in tensors]
