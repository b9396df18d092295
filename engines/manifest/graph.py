"""A graph as the manifest has it: its tensors, what it costs, how it compared with PyTorch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from engines.manifest.record import Record


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
