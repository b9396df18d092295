"""One plan on one lane: its contexts, its buffers, and how a run is put together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

import numpy as np
import numpy.typing as npt

from compexport.errors import CompexportError, InputError, describe
from engines.backends.cuda_lanes import Lane
from engines.backends.cuda_pool import Block
from engines.backends.trt_engine import Context, Plan
from engines.backends.trt_graphs import Graphs, Key
from engines.backends.trt_profiles import Profile
from engines.backends.trt_tensors import HeldTensor, as_array, item_bytes, runs_of, stored
from engines.manifest import PAST, TensorSpec
from engines.session import Array

_ALIGNMENT = 256  # bytes between the beginnings of outputs that come out together
_REMEMBERED = 256  # shapes of inputs, with those of the outputs
_BUFFER_MOST = 1 << 26  # bytes of a buffer for the largest shapes of a profile; a larger one is as large as needed


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
        # A past grows with every token, so that no run would come again.
        grows = any(name.startswith(f"{PAST}.") for name in self._inputs)
        self._graphs = Graphs(lane, cuda_graphs and not grows and not plan.aliases)

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
        """The lane was given work with these values: memory of other lanes may be handed out again only after it."""
        others = [value for value in values if value.block.pool is not self._lane.pool]
        if others:
            moment = self._lane.moment()
            for value in others:
                value.block.place.users[self._lane.stream] = moment

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
        return as_array(room.bytes[: len(rows) * row_bytes], (len(rows), width), value.dtype)

    def scratch_moved(self) -> None:
        """As ``cuda_lanes.Tenant``: graphs wrote down where scratch memory was."""
        self._graphs.drop()

    def close(self) -> None:
        """As ``cuda_lanes.Tenant``."""
        self._contexts.clear()
        self._buffers.clear()
        self._graphs.drop()

    # --- where tensors lie

    def _fed(self, name: str, array: Array) -> Block:
        """A copy of an array on the device, once the stream is there."""
        spec, lane = self._inputs[name], self._lane
        raw = stored(array, spec.dtype)
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
            self._made[key] = (context.outputs, context.scratch_bytes)
            if len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
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
        if self._graphs.replay(key):
            return
        # One that is to be captured gets a context of its own, and runs in it first: what shapes change is then done.
        again = self._graphs.wants(key)
        context = self._plan.context(number, self._lane.stream) if again else self._context(number)
        context.shape(shapes, list(self._outputs))
        context.place(addresses, scratch)
        context.enqueue(self._lane.stream)
        if again:
            self._graphs.capture(key, context)

    def _fetched(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]) -> dict[str, Array]:
        """Outputs as arrays of this process, which waits for them."""
        if not shapes:
            return {}
        lane, sizes = self._lane, {name: self._size(name, shape) for name, shape in shapes.items()}
        starts = dict(zip(sizes, accumulate(map(_aligned, sizes.values()), initial=0), strict=False))
        # One piece for all: asking for a second one may wait for the stream, and then the first is handed out again.
        room = lane.staging.room(sum(map(_aligned, sizes.values())))
        for name, size in sizes.items():
            lane.memory.download(room.address + starts[name], addresses[name], size, lane.stream)
        lane.wait()
        return {
            name: as_array(room.bytes[starts[name] :][: sizes[name]], shape, self._outputs[name].dtype)
            for name, shape in shapes.items()
        }


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _within(shape: Sequence[int], low: Sequence[int], high: Sequence[int]) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))
