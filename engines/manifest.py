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
    "text2text-generation",
]
GENERATION: Final = "text-generation"
TEXT2TEXT: Final = "text2text-generation"


# The places in a template; every other brace stands for itself.
TEXT, TEXT_PAIR = "{text}", "{text_pair}"

Precision = Literal["fp32", "fp16", "bf16", "int8"]

# Roles of a variant's graphs, and the tensors that only graphs with exits have.
ENCODER, DECODER, ALL_EXITS = "encoder", "decoder", "all-exits"
# A model that reads one text and writes another has a decoder for its first step and one for each step after it.
DECODER_WITH_PAST: Final = "decoder-with-past"
# What a variant of a task that writes text has, neither more nor less; no other task's variant has any of a decoder.
WRITING_ROLES: Final[dict[str, set[str]]] = {
    GENERATION: {DECODER},
    TEXT2TEXT: {ENCODER, DECODER, DECODER_WITH_PAST},
}
# Those of a step engine: the graphs are the same for every number of steps, and the caller runs the loop.
EMBED, STEP, HEAD = "embed", "step", "head"
# A segment's output hidden states are the next one's input, under another name: in one graph, names are unique.
HIDDEN, PREVIOUS, ROWS = "hidden", "previous", "rows"
EXIT_OUTPUTS = ("logits", "entropy", "max_probability", "margin")
# The size of one step, which a step engine's graph reads; and what a decoder keeps of each step, key and value.
STEP_SIZE = "dt"
PAST, PRESENT = "past_key_values", "present"


# Folder of the model's own config.json and the like, which other tools want of a variant; nothing here reads them.
MODEL_SETTINGS: Final = "graphs/model"


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


def tile_cache_name(prefix: str, tile: int, stack: Literal["encoder", "decoder"], kind: Literal["key", "value"]) -> str:
    """That of a model that reads one text and writes another: of the text read (``stack`` "encoder") or written."""
    return f"{prefix}.{tile}.{stack}.{kind}"


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


class Rounding(Record):
    """What a precision below fp32 does to a model: PyTorch computing in it against PyTorch in fp32."""

    max_relative: float = Field(
        description="the largest difference of an output, divided by the largest magnitude that it has in fp32; of an "
        "exit's statistics the difference itself"
    )
    tolerance: float
    same_choice: float | None = Field(
        description="share of the logits' rows with the largest at the same place, ties aside; null without logits"
    )
    least_same_choice: float


class Parity(Record):
    """How a graph compared with PyTorch before it was written.

    Of a precision below fp32, ``max_abs`` is of the graph with all its types widened to fp32 against PyTorch in fp32
    with the same rounded weights, and ``rounding`` says what the precision itself does.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("rounding",)

    max_abs: float
    tolerance: float
    shapes: list[tuple[int, int]] = Field(description="(batch, sequence) of every comparison")
    rounding: Rounding | None = None


class Cost(Record):
    """Multiply-accumulates of one sequence of S tokens, padding included:

    ``fixed + per_token * S + per_group * m + per_pair * S * S + per_group_pair * m * m`` with the number of groups
    ``m = alone + ceil((S - alone) / group)``: the first ``alone`` tokens are a group each.

    A decoder that looks at another text, of n tokens, also takes ``per_source * n + per_source_pair * S * n``, S being
    the tokens that one run of it reads. ``per_source`` makes keys and values of the other text and is 0 where they are
    kept from before.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("alone", "per_group_pair", "per_source", "per_source_pair")

    fixed: int = 0
    per_token: int = 0
    per_group: int = 0
    group: int = Field(default=1, ge=1)
    alone: int = Field(default=0, ge=0)
    per_pair: int = 0
    per_group_pair: int = 0
    per_source: int = 0
    per_source_pair: int = 0

    def macs(self, length: int, source: int = 0) -> int:
        """MACs of one sequence of ``length`` tokens that looks at ``source`` tokens of another text."""
        groups = self.alone - (self.alone - length) // self.group
        return (
            self.fixed
            + self.per_token * length
            + self.per_group * groups
            + self.per_pair * length * length
            + self.per_group_pair * groups * groups
            + self.per_source * source
            + self.per_source_pair * length * source
        )

    def token_macs(self, past: int, source: int = 0) -> int:
        """MACs of one more token after ``past`` others that are kept, where no tokens are grouped.

        Of ``source`` tokens of another text, keys and values are kept too.
        """
        own = self.fixed + self.per_token + self.per_group + (self.per_pair + self.per_group_pair) * (past + 1)
        return own + self.per_source_pair * source


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
    A model that reads one text and writes another has "encoder", "decoder" (the first step of writing, which makes
    keys and values of what was read) and "decoder-with-past" (each step after it).
    A step engine has the roles "embed", "step" ("step-0", "step-1", … where ``steps`` has several groups) and "head",
    and with ``exits`` "head-2", … for each of them.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("exits", "steps", "assembly")

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
    assembly: dict[Literal["encoder", "decoder"], list[int]] | None = Field(
        default=None,
        description="for how many layers of the backbone each tile of a stack stands, in order. Absent where a variant "
        "is not assembled of modules",
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

    @field_validator("assembly")
    @classmethod
    def _whole_stacks(cls, assembly: dict[Any, list[int]] | None) -> dict[Any, list[int]] | None:
        sizes = [size for stack in (assembly or {}).values() for size in stack]
        if assembly is not None and not (len(assembly) == 2 and all(assembly.values()) and min(sizes) >= 1):
            raise ValueError(f"tile sizes from 1 on of an encoder and a decoder, not {assembly}")
        return assembly

    @model_validator(mode="after")
    def _roles(self) -> Variant:
        if self.assembly is not None and set(self.graphs) != WRITING_ROLES[TEXT2TEXT]:
            raise ValueError(f"assembly: belongs to a variant with the role {DECODER_WITH_PAST}")
        if self.exits is not None and (not self.exits or self.exits[0] < 1 or sorted(set(self.exits)) != self.exits):
            raise ValueError(f"exits: layers from 1 on, each once, in order, not {self.exits}")
        if self.is_stepper:
            self._require_step_roles()
        else:
            self._require_segment_roles()
        return self

    def _require_plain_roles(self) -> None:
        if set(self.graphs) not in ({ENCODER}, *WRITING_ROLES.values()):
            raise ValueError(
                f"graphs: a variant without exits has the role {ENCODER} or {DECODER} alone, or both and "
                f"{DECODER_WITH_PAST}"
            )

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
            self._require_plain_roles()
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


# The settings that ``Generation.defaults`` may hold, as ``generation_config.json`` names them, and what they are where
# it says nothing of them: the likeliest token each time, and nothing forbidden.
GENERATION_SETTINGS: Final[dict[str, Any]] = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
_ENDLESS: Final = 1 << 40


class Generation(Record):
    """What generating text needs to know of the model: where to begin, where to stop, how far it reaches.

    Of a model that reads one text and writes another, ``max_positions`` counts the tokens of either.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("decoder_start_ids", "forced_bos_id", "forced_eos_id", "defaults")

    eos_ids: list[int] = Field(description="a row ends with any of these; empty where only the length ends it")
    bos_id: int | None = Field(description="what an empty prompt begins with; null where the model has none")
    pad_id: int = Field(description="stands where the mask is 0")
    max_positions: int | None = Field(
        ge=1, description="tokens of a prompt and what follows it, at most; null where the model has no limit"
    )
    decoder_start_ids: list[int] = Field(
        default=[], description="what a model that reads one text and writes another begins to write with"
    )
    forced_bos_id: int | None = Field(default=None, description="the first token written, whatever the model says")
    forced_eos_id: int | None = Field(default=None, description="the last token of a text as long as may be")
    defaults: dict[str, Any] = Field(
        default={}, description="the model's own settings of generation_config.json, where they are not the usual ones"
    )

    @property
    def positions(self) -> int:
        """``max_positions``; where there is no limit, more than any text has."""
        return _ENDLESS if self.max_positions is None else self.max_positions

    @field_validator("defaults")
    @classmethod
    def _known_settings(cls, defaults: dict[str, Any]) -> dict[str, Any]:
        unknown = defaults.keys() - GENERATION_SETTINGS.keys()
        if unknown:
            raise ValueError(f"no setting of generation is named {min(unknown)}")
        return defaults


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


if __name__ == "__main__":
    import json

    print(json.dumps(Manifest.model_json_schema(), indent=2))
