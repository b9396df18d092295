"""A member of the family as the manifest has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from engines.manifest.record import Record
from engines.manifest.roles import (
    ALL_EXITS,
    DECODER,
    DECODER_WITH_PAST,
    EMBED,
    ENCODER,
    HEAD,
    WRITING_ROLES,
    head_role,
    prefix_role,
    segment_role,
    step_role,
)
from engines.manifest.tasks import TEXT2TEXT

Precision = Literal["fp32", "fp16", "bf16", "int8"]

# "@" and "/" follow a variant's name in those of its points and segments (``engines.points``).
VARIANT_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"


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
    settings: dict[str, Any] = Field(default={})

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
