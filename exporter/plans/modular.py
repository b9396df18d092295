"""Modular's plan: each stack of each assembly is a graph of its own, which assemblies with the same tiles share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compexport.errors import InputError, describe
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER, TEXT2TEXT, VARIANT_NAME, Variant
from exporter.checkpoint import plain_ratio
from exporter.identity import LABEL_WORDS, file_sha256
from exporter.methods.assembly import STACKS, Assembly, ModularFacts, Strategy, Tiling, assembly_for_ratio, runs
from exporter.methods.modular_settings import METHOD, ModularSettings
from exporter.plans.plan import Plan, PlannedGraph
from exporter.sharing import raw_config

if TYPE_CHECKING:
    from exporter.backbone import Seq2Seq
    from exporter.graphs.family import Family
    from exporter.methods.modular import ModularModel

Part = Literal["encoder", "first", "cached"]
GENERATION_CONFIG = "generation_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
MODEL_TYPES = ("t5", "bart", "mbart")
CALIBRATED = "calibrated"  # the strategy that takes what was chosen on data
USED = "used_sha256"  # in the settings of the variant of ratio 1
_LONGEST_NAME = 40  # of one stack's tiles, so that both fit into a variant's name


@dataclass(frozen=True)
class PlannedStack(PlannedGraph):
    """The encoder, the decoder's first step or its cached one, of these tiles; ``ratio`` is of no meaning."""

    part: Part
    tiling: Tiling


@dataclass(frozen=True)
class ModularPlan(Plan):
    """One base and its modules, and assemblies of them: for each ratio the one that ``strategy`` takes, and others.

    ``chosen``: the assemblies of ratios for which it does not. ``named``: more assemblies, by name. ``pairs``: variants
    also of every other pair of an encoder and a decoder that are built anyhow, which makes no more graphs. ``loaded``:
    base and modules, where a caller has read them already.
    """

    strategy: Strategy = "speed-first"
    chosen: Mapping[float, Assembly] = field(default_factory=dict)
    named: Mapping[str, Assembly] = field(default_factory=dict)
    pairs: bool = False
    loaded: ModularModel | None = field(default=None, compare=False)

    method: ClassVar[str] = METHOD
    tensors: ClassVar[str] = "modules"

    def trained(self, ratio: float) -> bool:
        """Whether there are modules, which serve all ratios."""
        return self.checkpoint is not None and self.checkpoint.method == METHOD

    def require_trained(self) -> None:
        """InputError for another task, where modules are missing that may not be random, and for misfit assemblies."""
        if self.task not in (None, TEXT2TEXT):
            raise InputError(describe(f"task of the method {METHOD}", got=repr(self.task), expected=TEXT2TEXT))
        super().require_trained()
        if (self.folder / "config.json").is_file() and self.named and not self.trained(1) and not self.untrained:
            raise InputError(describe(f"{self.folder}: named assemblies need modules", got="a bare model"))
        _ = self.assemblies

    # --- assemblies

    @cached_property
    def base(self) -> Seq2Seq:
        """The base, loaded."""
        from exporter.backbone import load_seq2seq

        return load_seq2seq(self.folder)

    @cached_property
    def facts_of_base(self) -> ModularFacts:
        """As the checkpoint records them; without modules the base is loaded for them. InputError as its loader."""
        if self.checkpoint is not None and self.trained(1):
            return ModularSettings.of(self.checkpoint).facts
        from exporter.methods.modular import facts_of

        return facts_of(self.base)

    @cached_property
    def assemblies(self) -> dict[str, Assembly]:
        """Name of every variant -> its assembly; InputError for one that does not fit, or a name that is taken."""
        facts = self.facts_of_base
        found = {self.variant(ratio): self.assembly(ratio) for ratio in self.ratios}
        for name, assembly in self.named.items():
            variant = f"{METHOD}-{name}-{self.precision}"
            if variant in found or not re.fullmatch(VARIANT_NAME, variant):
                hint = "letters, digits and . _ + -, and no name of a ratio"
                raise InputError(describe("name of an assembly", got=repr(name), hint=hint))
            found[variant] = assembly.require_fit(facts, f"assembly {name}")
        if self.pairs:
            found |= self._pairs(found)
        return found

    def assembly(self, ratio: float) -> Assembly:
        """That of one ratio; InputError where the layers are too few for it."""
        if ratio in self.chosen:
            return self.chosen[ratio].require_fit(self.facts_of_base, f"assembly of ratio {ratio:g}")
        return assembly_for_ratio(self.facts_of_base, ratio, self.strategy)

    def strategy_of(self, ratio: float) -> str:
        """What took the assembly of a ratio."""
        return CALIBRATED if ratio in self.chosen else self.strategy

    def ratio_of(self, variant: str) -> float:
        """The ratio that was asked for or, of other assemblies, theirs to four decimals."""
        for ratio in self.ratios:
            if variant == self.variant(ratio):
                return ratio
        return plain_ratio(round(self.assemblies[variant].ratio(self.facts_of_base), 4))

    def _pairs(self, found: Mapping[str, Assembly]) -> dict[str, Assembly]:
        encoders, decoders = (dict.fromkeys(one.stack(name) for one in found.values()) for name in STACKS)
        pairs = [Assembly(*pair) for pair in product(encoders, decoders)]
        known = set(found.values())
        return {
            f"{METHOD}-e{tiling_name(pair.encoder)}-d{tiling_name(pair.decoder)}-{self.precision}": pair
            for pair in pairs
            if pair not in known
        }

    # --- graphs

    def graphs(self) -> list[PlannedGraph]:
        parts = [part for variant in self.assemblies for part in self._parts(variant)]
        return list({part.name: part for part in parts}.values())

    def roles(self, ratio: float) -> dict[str, str]:
        return self.variants()[self.variant(ratio)]

    def variants(self) -> dict[str, dict[str, str]]:
        return {variant: {part.role: part.name for part in self._parts(variant)} for variant in self.assemblies}

    def _parts(self, variant: str) -> Iterator[PlannedStack]:
        assembly = self.assemblies[variant]
        encoder, decoder = tiling_name(assembly.encoder), tiling_name(assembly.decoder)
        ratio = self.ratio_of(variant)
        for role, name, label, part, tiling in (
            (ENCODER, f"e{encoder}", f"the encoder of {encoder}", "encoder", assembly.encoder),
            (DECODER, f"d{decoder}", f"the first step of decoder {decoder}", "first", assembly.decoder),
            (DECODER_WITH_PAST, f"d{decoder}-past", f"a step of decoder {decoder}", "cached", assembly.decoder),
        ):
            yield PlannedStack(f"{METHOD}-{name}", ratio, role, label, part, tiling)  # type: ignore[arg-type]

    def facts(self, graph: PlannedGraph) -> dict[str, object]:
        part = as_stack(graph)
        ones = set(part.tiling) == {1}
        return {
            "method": self.method,
            "part": part.part,
            "tiling": part.tiling,
            "modules": None if ones else self._modules_sha256,
        }

    @cached_property
    def _modules_sha256(self) -> str:
        trained = self.checkpoint is not None and self.trained(1)
        return self.checkpoint.sha256() if self.checkpoint and trained else f"untrained {self.seed}"

    @cached_property
    def used_sha256(self) -> dict[str, str]:
        """Hashes of the files that say how the graphs are used, and nothing of what they compute."""
        paths = [self.folder / name for name in (GENERATION_CONFIG, SPECIAL_TOKENS)]
        return {path.name: file_sha256(path) for path in paths if path.is_file()}

    def describes(self, variants: Mapping[str, Variant]) -> bool:
        """Whether the same chose for every ratio, and texts are written by the same files.

        What another one takes may have the same graphs, and other files leave them as they are.
        """
        return variants[self.variant(1)].settings.get(USED) == self.used_sha256 and all(
            variants[self.variant(ratio)].settings.get("strategy") == self.strategy_of(ratio)
            for ratio in self.ratios
            if ratio != 1
        )

    def load(self) -> Family[Any]:
        from exporter.graphs.modular import ModularFamily

        return ModularFamily.load(self)


def writes_from_text(folder: Path) -> bool:
    """Whether the model in ``folder`` reads one text to write another, and not to choose among label words."""
    raw = raw_config(folder)
    architectures = raw.get("architectures") or [""]
    generates = str(architectures[0]).endswith("ForConditionalGeneration")
    return generates and not (folder / LABEL_WORDS).is_file() and raw.get("model_type") in MODEL_TYPES


def as_stack(graph: PlannedGraph) -> PlannedStack:
    """``graph`` as what this plan makes."""
    assert isinstance(graph, PlannedStack)
    return graph


def tiling_name(tiling: Tiling) -> str:
    """Counts and sizes, ``2x1+5x2``; of a long list the number of tiles and a hash."""
    name = runs(tiling)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{len(tiling)}-{hashlib.sha256(repr(tiling).encode()).hexdigest()[:8]}"
