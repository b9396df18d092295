"""What ``manifest.json`` holds: the contract between the exporter, the runtimes and every later tool.

``docs/bundle.md`` is the prose specification; ``docs/manifest.schema.json`` is generated from these classes.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from engines.manifest.generation import GENERATION_SETTINGS, Generation
from engines.manifest.graph import Cost, Graph, Parity, Rounding, TensorSpec
from engines.manifest.record import Record
from engines.manifest.roles import (
    ALL_EXITS,
    DECODER,
    DECODER_WITH_PAST,
    EMBED,
    ENCODER,
    EXIT_OUTPUTS,
    HEAD,
    HIDDEN,
    PAST,
    PRESENT,
    PREVIOUS,
    ROWS,
    STEP,
    STEP_SIZE,
    WRITING_ROLES,
    cache_name,
    head_role,
    prefix_role,
    segment_role,
    step_role,
    tile_cache_name,
)
from engines.manifest.tasks import GENERATION, TEXT2TEXT, Task
from engines.manifest.texts import TEXT, TEXT_PAIR, LabelWords, Tokenizer
from engines.manifest.variant import VARIANT_NAME, Precision, Variant, backbones

__all__ = [
    # the whole, and its parts
    "Manifest",
    "Backbone",
    "Engine",
    "FileEntry",
    "Graph",
    "TensorSpec",
    "Parity",
    "Rounding",
    "Cost",
    "Variant",
    "Tokenizer",
    "LabelWords",
    "Generation",
    "Record",
    "FORMAT",
    # tasks, and what a family is told about them
    "Task",
    "GENERATION",
    "TEXT2TEXT",
    "Precision",
    "GENERATION_SETTINGS",
    "TEXT",
    "TEXT_PAIR",
    "VARIANT_NAME",
    "MODEL_SETTINGS",
    # roles of graphs
    "ALL_EXITS",
    "ENCODER",
    "DECODER",
    "DECODER_WITH_PAST",
    "WRITING_ROLES",
    "EMBED",
    "STEP",
    "HEAD",
    "segment_role",
    "prefix_role",
    "step_role",
    "head_role",
    # names of tensors
    "EXIT_OUTPUTS",
    "HIDDEN",
    "PREVIOUS",
    "ROWS",
    "STEP_SIZE",
    "PAST",
    "PRESENT",
    "cache_name",
    "tile_cache_name",
    # views
    "backbones",
    "engine_rows",
]

FORMAT: Final = 1

# Folder of the model's own config.json and the like, which other tools want of a variant; nothing here reads them.
MODEL_SETTINGS: Final = "graphs/model"


class Backbone(Record):
    """The model the family was made from."""

    name: str
    architecture: str
    model_type: str
    sha256: str
    params: int
    hidden_size: int
    layers: int


class FileEntry(Record):
    """Size and content hash of one file; the key in ``Manifest.files`` is its path in the bundle."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Engine(Record):
    """A graph built for one backend and device; valid for exactly that ``backend_version`` and ``device``."""

    graph: str = Field(description="key in the manifest's graphs")
    backend: str
    backend_version: str
    device: str
    path: str = Field(description="what the backend opens: a listed file or a folder of some, relative to the bundle")
    files: list[str] = Field(description="all files of this engine, relative to the bundle; each is in files")
    key: str = Field(description="hash of everything it was built from, for incremental rebuilds")
    settings: dict[str, Any] = Field(default={})


class Manifest(Record):
    """The whole of ``manifest.json``."""

    later_fields: ClassVar[tuple[str, ...]] = ("label_words", "generation")

    format: Literal[1] = FORMAT
    backbone: Backbone
    method: str
    task: Task
    labels: list[str] = Field(default=[])
    pooling: str | None = None
    tokenizer: Tokenizer | None = None
    label_words: LabelWords | None = None
    generation: Generation | None = None
    variants: dict[str, Variant]
    graphs: dict[str, Graph]
    engines: dict[str, Engine] = Field(default={})
    files: dict[str, FileEntry] = Field(
        description="every file of the bundle except manifest.json, manifest.sha256 and the measured tables"
    )
    versions: dict[str, str]
    command: str

    @model_validator(mode="after")
    def _words_for_labels(self) -> Manifest:
        words = self.label_words
        if (self.task == "label-words") != (words is not None):
            raise ValueError("label_words belong to the task label-words, and to no other")
        if words is not None and not len(words.words) == len(words.word_ids) == len(self.labels):
            raise ValueError(f"label_words: one word and one id for each of {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _generators_generate(self) -> Manifest:
        roles, generation = WRITING_ROLES.get(self.task), self.generation
        if (roles is None) != (generation is None):
            raise ValueError(f"generation belongs to the tasks {' and '.join(WRITING_ROLES)}, and to no other")
        if generation is not None and bool(generation.decoder_start_ids) != (self.task == TEXT2TEXT):
            raise ValueError(f"generation: decoder_start_ids belong to the task {TEXT2TEXT}, and to no other")
        for name, variant in self.variants.items():
            if roles is not None and set(variant.graphs) != roles:
                raise ValueError(f"{name}: a variant of the task {self.task} has the roles {', '.join(sorted(roles))}")
            if roles is None and DECODER in variant.graphs:
                raise ValueError(f"{name}: the role {DECODER} belongs to the tasks {' and '.join(WRITING_ROLES)}")
        return self

    @field_validator("variants")
    @classmethod
    def _plain_names(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        for name in variants:
            if not re.fullmatch(VARIANT_NAME, name):
                raise ValueError(f"a variant's name has at most 100 of A-Z a-z 0-9 . _ + -, not {ascii(name)[:100]}")
        return variants

    @model_validator(mode="after")
    def _exits_to_the_end(self) -> Manifest:
        for name, variant in self.variants.items():
            if variant.exits is not None and self.task != "sequence-classification":
                raise ValueError(f"{name}: exits belong to the task sequence-classification, not to {self.task}")
            depth, unit = variant.step_count, "step"
            if depth is None:
                depth, unit = self.backbone.layers, "layer"
            if variant.exits is not None and variant.exits[-1] != depth:
                raise ValueError(f"{name}: the last of exits {variant.exits} is not the last {unit}")
        return self


def engine_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """The engines of a bundle as the document of ``build`` shows them; sizes in bytes."""
    return [
        {
            "graph": engine.graph,
            "backend": engine.backend,
            "version": engine.backend_version,
            "device": engine.device,
            "path": engine.path,
            "size_bytes": sum(
                entry.size_bytes
                for path, entry in manifest.files.items()
                if path == engine.path or path.startswith(f"{engine.path}/")
            ),
        }
        for engine in manifest.engines.values()
    ]
