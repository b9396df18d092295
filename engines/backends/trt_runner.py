"""One plan on one lane: its contexts, its buffers, and CUDA graphs of what is run again and again.

A graph repeats a run whose shapes and addresses were the same before: memory is handed out in an order that repeats
itself, so runs of one shape find their addresses again, and nothing has to be copied to fixed ones. Each graph has a
context of its own, since changing that of a captured run makes the graph undefined.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, InputError, describe
from engines.backends.cuda_lanes import Lane
from engines.backends.cuda_memory import DeviceLost
from engines.backends.cuda_pool import Block, Moment
from engines.backends.trt_engine import Context, Plan
from engines.backends.trt_profiles import Profile
from engines.manifest import PAST, TensorSpec
from engines.session import Array

MOST_GRAPHS = 32  # of one plan on one lane
_MOST_WORTH = 8  # a graph that was used so often is worth no more than one that was used more often
_REMEMBERED = 256  # runs, to know them when they come again
_BUFFER_MOST = 1 << 26  # bytes of a buffer for the largest shapes of a profile; a larger one is as large as needed
_BYTES = {"bfloat16": 2}

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """A tensor on the device. ``ready``: the moment from which it is whole for other lanes; None: it is."""

    shape: tuple[int, ...]
    dtype: str
    block: Block
    lane: Lane
    ready: Moment | None

    @property
    def size_bytes(self) -> int:
        """Of its elements."""
        return prod(self.shape) * item_bytes(self.dtype)


@dataclass(slots=True)
class _Captured:
    graph: int
    context: Context
    uses: int = 0


class Runner:
    """Used by the thread that has the lane."""

    def __init__(
        self,
        plan: Plan,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        profiles: Sequence[Profile],
        lane: Lane,
        cuda_graphs: bool,
    ) -> None:
        self._plan, self._profiles, self._lane = plan, profiles, lane
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = {spec.name: spec for spec in outputs}
        self._contexts: dict[int, Context] = {}
        self._buffers: dict[str, Block] = {}
        self._made: OrderedDict[Key, tuple[dict[str, tuple[int, ...]], int]] = OrderedDict()
        self._seen: OrderedDict[Key, int] = OrderedDict()  # how often, of runs without a graph
        self._graphs: OrderedDict[Key, _Captured] = OrderedDict()
        # A past grows with every token, so that no run would come again.
        grows = any(name.startswith(f"{PAST}.") for name in self._inputs)
        self._capturing = cuda_graphs and not grows and not plan.aliases

    def run(
        self, feeds: Mapping[str, Array], held: Mapping[str, HeldTensor], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, HeldTensor]]:
        """As ``engines.session.HoldingSession.run_held``."""
        shapes = {name: (feeds[name] if name in feeds else held[name]).shape for name in self._inputs}
        number = self._profile_of(shapes)
        blocks = {name: self._fed(name, array) for name, array in feeds.items()}
        blocks |= {name: self.joined(value) for name, value in held.items()}
        made, scratch_bytes = self._known(number, shapes)
        kept = {name: self._kept(name, made[name], blocks) for name in hold}
        for name, shape in made.items():
            blocks[name] = kept[name] if name in kept else self._output(number, name, shape, blocks)
        addresses = {name: blocks[name].address for name in (*self._inputs, *self._outputs)}
        try:
            self._execute(number, shapes, addresses, self._lane.scratch(scratch_bytes))
        finally:
            self.used(held.values())
        found = self._fetched({name: made[name] for name in outputs}, addresses)
        ready = self._lane.moment() if hold and not outputs else None
        values = {
            name: HeldTensor(made[name], self._outputs[name].dtype, block, self._lane, ready)
            for name, block in kept.items()
        }
        return found, values

    def joined(self, value: HeldTensor) -> Block:
        """Memory of a value, which the lane's work from now on finds whole."""
        if not value.block.pool.is_open:
            raise CompexportError(describe(f"{self._plan.name}: what is held belongs to engines that are closed"))
        if value.lane is not self._lane and value.ready is not None:
            self._lane.after(value.ready)
        return value.block

    def used(self, values: Iterable[HeldTensor]) -> None:
        """The lane was given work with these values: those of other lanes may be handed out again only after it."""
        others = [value for value in values if value.lane is not self._lane]
        if others:
            moment = self._lane.moment()
            for value in others:
                value.block.place.users.append(moment)

    def take_rows(self, value: HeldTensor, rows: npt.NDArray[np.int64]) -> HeldTensor:
        """These rows of a value, in this order, copied on the device."""
        row_bytes = value.size_bytes // max(1, value.shape[0])
        source = self.joined(value).address
        block = self._lane.pool.take(len(rows) * row_bytes)
        for place, first, count in runs_of(rows):
            target = block.address + place * row_bytes
            self._lane.memory.copy(target, source + first * row_bytes, count * row_bytes, self._lane.stream)
        self.used([value])
        return HeldTensor((len(rows), *value.shape[1:]), value.dtype, block, self._lane, self._lane.moment())

    def fetch_rows(self, value: HeldTensor, rows: npt.NDArray[np.int64]) -> Array:
        """These rows of a value's last axis, as an array."""
        lane, width = self._lane, value.shape[-1]
        row_bytes = width * item_bytes(value.dtype)
        source = self.joined(value).address
        room = lane.staging.room(len(rows) * row_bytes)
        for place, first, count in runs_of(rows):
            target = room.address + place * row_bytes
            lane.memory.download(target, source + first * row_bytes, count * row_bytes, lane.stream)
        self.used([value])
        lane.wait()
        return _as_array(room.bytes[: len(rows) * row_bytes], (len(rows), width), value.dtype)

    def scratch_moved(self) -> None:
        """As ``cuda_lanes.Tenant``: graphs wrote down where scratch memory was."""
        self._drop_graphs()

    def close(self) -> None:
        """As ``cuda_lanes.Tenant``."""
        self._contexts.clear()
        self._buffers.clear()
        self._drop_graphs()

    # --- where tensors lie

    def _fed(self, name: str, array: Array) -> Block:
        """A copy of an array on the device, once the stream is there."""
        spec, lane = self._inputs[name], self._lane
        raw = _stored(array, spec.dtype)
        if name in self._plan.aliases.values():
            block = lane.pool.take(raw.nbytes)  # an output will lie there, which may be held
        else:
            largest = max(prod(profile[name][2]) for profile in self._profiles) * item_bytes(spec.dtype)
            block = self._buffer(name, raw.nbytes, largest)
        lane.memory.upload(block.address, lane.staging.put(raw), raw.nbytes, lane.stream)
        return block

    def _kept(self, name: str, shape: tuple[int, ...], inputs: Mapping[str, Block]) -> Block:
        """A place for an output that is held."""
        given = self._plan.aliases.get(name)
        return inputs[given] if given else self._lane.pool.take(self._size(name, shape))

    def _output(self, number: int, name: str, shape: tuple[int, ...], inputs: Mapping[str, Block]) -> Block:
        """A place for an output that is not held."""
        if given := self._plan.aliases.get(name):
            return inputs[given]
        return self._buffer(name, self._size(name, shape), self._context(number).largest_output(name))

    def _buffer(self, name: str, size: int, largest: int) -> Block:
        """The place of a tensor from run to run, at once large enough for all shapes where that is not much."""
        there = self._buffers.get(name)
        if there is None or there.place.size < size:
            self._buffers.pop(name, None)
            self._buffers[name] = there = self._lane.pool.take_up_to(largest if largest <= _BUFFER_MOST else 0, size)
        return there

    def _size(self, output: str, shape: tuple[int, ...]) -> int:
        return prod(shape) * item_bytes(self._outputs[output].dtype)

    # --- runs

    def _profile_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        for number, profile in enumerate(self._profiles):
            if all(_within(shapes[name], low, high) for name, (low, _, high) in profile.items()):
                return number
        raise self._outside(shapes)

    def _outside(self, shapes: Mapping[str, tuple[int, ...]]) -> InputError:
        """Says of the first tensor that fits no profile what would; where each fits one, of all."""
        ranges = {name: [(p[name][0], p[name][2]) for p in self._profiles] for name in shapes}
        alone = [n for n, shape in shapes.items() if not any(_within(shape, *between) for between in ranges[n])]
        named = alone[:1] or list(shapes)
        got = ", ".join(f"{name} {list(shapes[name])}" for name in named)
        count = len(self._profiles)
        expected = " or ".join(
            ", ".join("{} {} to {}".format(name, *ranges[name][number]) for name in named) for number in range(count)
        )
        hint = "build the plan for these shapes with --batch and --length"
        return InputError(
            describe(f"{self._plan.name}: shapes outside the plan", got=got, expected=expected, hint=hint)
        )

    def _known(self, number: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], int]:
        """Shapes of the outputs, and the scratch memory that it takes."""
        key = (number, *shapes.values())
        if key not in self._made:
            context = self._context(number)
            context.shape(shapes, list(self._outputs))
            _remember(self._made, key, (context.outputs, context.scratch_bytes))
        return self._made[key]

    def _context(self, number: int) -> Context:
        if number not in self._contexts:
            self._contexts[number] = self._plan.context(number, self._lane.stream)
        return self._contexts[number]

    def _execute(
        self,
        number: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
    ) -> None:
        key = (number, *shapes.values(), *addresses.values(), scratch)
        if captured := self._graphs.get(key):
            self._graphs.move_to_end(key)
            captured.uses += 1
            self._lane.memory.launch(captured.graph, self._lane.stream)
            return
        again = self._capturing and self._seen.get(key, 0) >= self._worth()
        # One that is to be captured gets a context of its own, and runs in it first: what shapes change is then done.
        context = self._plan.context(number, self._lane.stream) if again else self._context(number)
        context.shape(shapes, list(self._outputs))
        context.place(addresses, scratch)
        context.enqueue(self._lane.stream)
        if again:
            self._capture(key, context)
        elif self._capturing:
            _remember(self._seen, key, self._seen.pop(key, 0) + 1)

    def _worth(self) -> int:
        """How often a run must have come before it is captured; where a graph has to go for it, as often as that."""
        if len(self._graphs) < MOST_GRAPHS:
            return 1
        return max(1, min(next(iter(self._graphs.values())).uses, _MOST_WORTH))

    def _capture(self, key: Key, context: Context) -> None:
        """Write a run down, to be launched when it comes again; an engine that cannot be captured runs without."""
        try:
            self._graphs[key] = _Captured(self._written_down(context), context)
        except DeviceLost:
            raise
        except CompexportError:
            self._capturing = False
            return
        if len(self._graphs) > MOST_GRAPHS:
            self._lane.wait()
            _, oldest = self._graphs.popitem(last=False)
            self._lane.memory.end_graph(oldest.graph)

    def _written_down(self, context: Context) -> int:
        memory, stream = self._lane.memory, self._lane.stream
        memory.begin_capture(stream)
        try:
            context.enqueue(stream)
        except CompexportError:
            with suppress(CompexportError):
                memory.end_graph(memory.end_capture(stream))
            raise
        return memory.end_capture(stream)

    def _drop_graphs(self) -> None:
        while self._graphs:
            _, captured = self._graphs.popitem()
            self._lane.memory.end_graph(captured.graph)

    def _fetched(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> dict[str, Array]:
        """Outputs as arrays of this process, which waits for them."""
        lane, rooms = self._lane, {}
        for name, shape in shapes.items():
            rooms[name] = lane.staging.room(self._size(name, shape))
            lane.memory.download(rooms[name].address, addresses[name], self._size(name, shape), lane.stream)
        if rooms:
            lane.wait()
        return {
            name: _as_array(rooms[name].bytes[: self._size(name, shape)], shape, self._outputs[name].dtype)
            for name, shape in shapes.items()
        }


def item_bytes(dtype: str) -> int:
    """Of one element; NumPy has no bfloat16."""
    return _BYTES.get(dtype) or np.dtype(dtype).itemsize


def runs_of(rows: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Rows that follow each other, as copies: (place of the first in the result, its number, how many)."""
    if not len(rows):
        return []
    starts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist()]
    ends = [*starts[1:], len(rows)]
    return [(start, int(rows[start]), end - start) for start, end in zip(starts, ends, strict=True)]


def _stored(array: Array, dtype: str) -> Array:
    """As the device has it: bfloat16 is the upper half of a float32, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return array
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _as_array(stored: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An array of its own from bytes; halves become float32."""
    if dtype == "bfloat16":
        return (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    array = stored.view(dtype).reshape(shape)
    return array.astype(np.float32) if dtype == "float16" else array.copy()


def _within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _remember(known: OrderedDict[Key, Any], key: Key, value: Any) -> None:
    known[key] = value
    if len(known) > _REMEMBERED:
        known.popitem(last=False)
