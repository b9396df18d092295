"""What ``manifest.json`` holds: the contract between the exporter, the runtimes and every later tool.

``docs/bundle.md`` is the prose specification; ``docs/manifest.schema.json`` is generated from these classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

FORMAT: Final = 1

Task = Literal[
    "feature-extraction",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "label-words",
    "text-generation",
]
GENERATION: Final = "text-generation"


# The places in a template; every other brace stands for itself.
TEXT, TEXT_PAIR = "{text}", "{text_pair}"

Precision = Literal["fp32", "fp16", "bf16", "int8"]

# Roles of a variant's graphs, and the tensors that only graphs with exits have.
ENCODER, DECODER, ALL_EXITS = "encoder", "decoder", "all-exits"
# Those of a step engine: the graphs are the same for every number of steps, and the caller runs the loop.
EMBED, STEP, HEAD = "embed", "step", "head"
# A segment's output hidden states are the next one's input, under another name: in one graph, names are unique.
HIDDEN, PREVIOUS, ROWS = "hidden", "previous", "rows"
EXIT_OUTPUTS = ("logits", "entropy", "max_probability", "margin")
# The size of one step, which a step engine's graph reads; and what a decoder keeps of each step, key and value.
STEP_SIZE = "dt"
PAST, PRESENT = "past_key_values", "present"


# "@" and "/" follow a variant's name in those of its points and segments (``engines.points``).
VARIANT_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"


def segment_role(index: int) -> str:
    """The role of the graph that runs from exit number ``index`` - 1 to the next, counted from 0."""
    return f"segment-{index}"


def prefix_role(layer: int) -> str:
    """The role of the graph that runs from the ids to the exit after ``layer``, counted from 1."""
    return f"prefix-{layer}"


def step_role(group: int, groups: int) -> str:
    """The role of the graph of one step of shared layer number ``group``, from 0; of an only one, without number."""
    return STEP if groups == 1 else f"{STEP}-{group}"


def head_role(step: int) -> str:
    """The role of a step engine's exit head after ``step``, counted from 1."""
    return f"{HEAD}-{step}"


def cache_name(prefix: str, step: int, kind: Literal["key", "value"]) -> str:
    """The name of a decoder's cache entry: ``prefix`` PAST (input) or PRESENT (output), ``step`` counted from 0."""
    return f"{prefix}.{step}.{kind}"


class Record(BaseModel):
    """Base of all manifest entries: unknown keys are refused, values are not changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Written only where they say something, so that manifests that do not need them stay readable by older versions.
    later_fields: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = handler(self)
        for name in self.later_fields:
            if getattr(self, name) == type(self).model_fields[name].default:
                document.pop(name, None)
        return document


class FileEntry(Record):
    """Size and content hash of one file; the key in ``Manifest.files`` is its path in the bundle."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TensorSpec(Record):
    """A graph input or output. Dynamic axes are names ("batch", "sequence"), static ones numbers."""

    name: str
    dtype: str
    shape: list[int | str]


class Parity(Record):
    """How a graph compared with PyTorch before it was written."""

    max_abs: float
    tolerance: float
    shapes: list[tuple[int, int]] = Field(description="(batch, sequence) of every comparison")


class Cost(Record):
    """Multiply-accumulates of one sequence of S tokens, padding included:

    ``fixed + per_token * S + per_group * m + per_pair * S * S + per_group_pair * m * m`` with the number of groups
    ``m = alone + ceil((S - alone) / group)``: the first ``alone`` tokens are a group each.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("alone", "per_group_pair")

    fixed: int = 0
    per_token: int = 0
    per_group: int = 0
    group: int = Field(default=1, ge=1)
    alone: int = Field(default=0, ge=0)
    per_pair: int = 0
    per_group_pair: int = 0

    def macs(self, length: int) -> int:
        """MACs of one sequence of ``length`` tokens."""
        groups = self.alone - (self.alone - length) // self.group
        return (
            self.fixed
            + self.per_token * length
            + self.per_group * groups
            + self.per_pair * length * length
            + self.per_group_pair * groups * groups
        )

    def token_macs(self, past: int) -> int:
        """MACs of one more token after ``past`` others that are kept, where no tokens are grouped."""
        return self.fixed + self.per_token + self.per_group + (self.per_pair + self.per_group_pair) * (past + 1)


class Graph(Record):
    """One ONNX file. ``key`` is the hash of everything it was made from, for incremental rebuilds."""

    path: str = Field(description="the ONNX file, relative to the bundle")
    opset: int
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    cost: Cost
    parity: Parity
    key: str


class Variant(Record):
    """One member of the family. ``graphs`` maps a role to a graph.

    Without ``exits`` the role is "encoder", or "decoder" of a model that generates text. With them: "segment-0",
    "segment-1", …, one per entry of ``exits``, to be run one after the other; "all-exits", every layer's at once;
    "prefix-6" for those exits that were asked for alone.
    A step engine has the roles "embed", "step" ("step-0", "step-1", … where ``steps`` has several groups) and "head",
    and with ``exits`` "head-2", … for each of them.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("exits", "steps")

    method: str
    ratio: float = Field(ge=1)
    precision: Precision
    graphs: dict[str, str] = Field(description="role -> key in the manifest's graphs")
    params: int
    extra_params: int = Field(description="parameters this variant has besides the backbone's")
    flops_ratio: float = Field(description="FLOPs of the backbone divided by FLOPs of this variant")
    untrained: bool = False
    exits: list[int] | None = Field(
        default=None,
        description="layers, or of a variant with steps the steps, counted from 1, after which a segment ends; the "
        "last is the depth. Absent without exits",
    )
    steps: list[list[float]] | None = Field(
        default=None,
        description="the size of every step, per group of shared layers. Absent where no layer is shared",
    )
    settings: dict[str, Any] = {}

    @property
    def is_stepper(self) -> bool:
        """Whether the graphs are those of a step engine, to be run in a loop."""
        return EMBED in self.graphs

    @property
    def step_count(self) -> int | None:
        """The steps of all groups together; None where no layer is shared."""
        return None if self.steps is None else sum(map(len, self.steps))

    @field_validator("steps")
    @classmethod
    def _steps_forward(cls, steps: list[list[float]] | None) -> list[list[float]] | None:
        sizes = [size for group in steps or [] for size in group]
        if steps is not None and not (steps and all(steps) and all(0 < size < math.inf for size in sizes)):
            raise ValueError(f"at least one positive number in each group, not {steps}")
        return steps

    @model_validator(mode="after")
    def _roles(self) -> Variant:
        if self.exits is not None and (not self.exits or self.exits[0] < 1 or sorted(set(self.exits)) != self.exits):
            raise ValueError(f"exits: layers from 1 on, each once, in order, not {self.exits}")
        if self.is_stepper:
            self._require_step_roles()
        else:
            self._require_segment_roles()
        return self

    def _require_step_roles(self) -> None:
        if self.steps is None:
            raise ValueError(f"graphs: the role {EMBED} belongs to a variant with steps")
        groups = len(self.steps)
        expected = {EMBED, HEAD, *(step_role(group, groups) for group in range(groups))}
        expected |= {head_role(step) for step in self.exits or ()}
        if set(self.graphs) != expected:
            raise ValueError(f"graphs: a step engine of these steps has the roles {', '.join(sorted(expected))}")

    def _require_segment_roles(self) -> None:
        segments = {role for role in self.graphs if role.startswith("segment-")}
        if segments != {segment_role(index) for index in range(len(self.exits or ()))}:
            raise ValueError("graphs: one segment for each of exits, segment-0 first")
        if self.exits is None:
            if set(self.graphs) not in ({ENCODER}, {DECODER}):
                raise ValueError(f"graphs: a variant without exits has the role {ENCODER} or {DECODER} alone")
            return
        if ALL_EXITS not in self.graphs:
            raise ValueError(f"graphs: a variant with exits has the role {ALL_EXITS}")
        unknown = set(self.graphs) - segments - {ALL_EXITS} - {prefix_role(layer) for layer in self.exits}
        if unknown:
            raise ValueError(f"graphs: a variant with exits {self.exits} has no role {min(unknown)}")


def backbones(variants: Mapping[str, Variant]) -> list[str]:
    """The variants of ratio 1, the backbone itself first: beside it may stand a model trained with its exits.

    A step engine that computes the same comes after the graph made for it.
    """

    def later(name: str) -> tuple[bool, bool]:
        return variants[name].exits is not None, variants[name].is_stepper

    return sorted((name for name in variants if variants[name].ratio == 1), key=later)


class Engine(Record):
    """A graph built for one backend and device; valid for exactly that ``backend_version`` and ``device``."""

    graph: str = Field(description="key in the manifest's graphs")
    backend: str
    backend_version: str
    device: str
    path: str = Field(description="what the backend opens: a listed file or a folder of some, relative to the bundle")
    files: list[str] = Field(description="all files of this engine, relative to the bundle; each is in files")
    key: str = Field(description="hash of everything it was built from, for incremental rebuilds")
    settings: dict[str, Any] = {}


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


class Tokenizer(Record):
    """How text becomes ids. ``inputs`` are the graph inputs the tokenizer feeds, in their order."""

    path: str
    max_length: int
    pad_id: int
    pad_type_id: int = 0
    inputs: list[str]


class LabelWords(Record):
    """How a generating model classifies: the text stands in ``template``, and the word of a label scores for it.

    The graph's ``logits`` are those of ``word_ids``, one per label, after the decoder has read ``decoder_input_ids``.
    """

    words: list[str]
    word_ids: list[int] = Field(description="the first sub-token of each word")
    decoder_input_ids: list[int]
    template: str = Field(description="holds one {text} and at most one {text_pair}")

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, template: str) -> str:
        if template.count(TEXT) != 1 or template.count(TEXT_PAIR) > 1:
            raise ValueError(f"needs one {TEXT} and at most one {TEXT_PAIR}")
        return template


class Generation(Record):
    """What generating text needs to know of the model: where to begin, where to stop, how far it reaches."""

    eos_ids: list[int] = Field(description="a row ends with any of these; empty where only the length ends it")
    bos_id: int | None = Field(description="what an empty prompt begins with; null where the model has none")
    pad_id: int = Field(description="stands where the mask is 0")
    max_positions: int = Field(ge=1, description="tokens of a prompt and what follows it, at most")


class Backbone(Record):
    """The model the family was made from."""

    name: str
    architecture: str
    model_type: str
    sha256: str
    params: int
    hidden_size: int
    layers: int


class Manifest(Record):
    """The whole of ``manifest.json``."""

    later_fields: ClassVar[tuple[str, ...]] = ("label_words", "generation")

    format: Literal[1] = FORMAT
    backbone: Backbone
    method: str
    task: Task
    labels: list[str] = []
    pooling: str | None = None
    tokenizer: Tokenizer | None = None
    label_words: LabelWords | None = None
    generation: Generation | None = None
    variants: dict[str, Variant]
    graphs: dict[str, Graph]
    engines: dict[str, Engine] = {}
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
        if (self.task == GENERATION) != (self.generation is not None):
            raise ValueError(f"generation belongs to the task {GENERATION}, and to no other")
        for name, variant in self.variants.items():
            if (self.task == GENERATION) != (DECODER in variant.graphs):
                raise ValueError(f"{name}: the role {DECODER} belongs to the task {GENERATION}, and to no other")
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


if __name__ == "__main__":
    import json

    print(json.dumps(Manifest.model_json_schema(), indent=2))
