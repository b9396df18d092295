"""Runs captured as CUDA graphs: one launch for all kernels of a run that comes again in the same shapes.

What ONNX Runtime does and asks for, with the pull requests of microsoft/onnxruntime that say so:

- A graph reads and writes the addresses of the run that was captured (#9978, #10859). So each set of shapes has buffers
  of its own, and what goes in or out is copied.
- A session holds several, told apart by the run option ``gpu_graph_id``; with -1 a run is neither captured nor replayed
  (#19636). The first run of an id runs more than once inside, for memory to be allocated, before it is captured.
- Captured graphs belong to the thread that ran them (#9978), and runs of a session with graphs must not overlap
  (#10423). So runs take turns; another thread captures for itself, into the same buffers.
- Scratch memory of a captured run is free for later runs of its session, and a replay writes it again. So nothing that
  such a session allocated may outlive a run: what is held is copied out before the next one.

An id is never used for other buffers, because a provider may ignore that a graph is released (#28260). Shapes are
captured when they come for the second time, and are never padded to others: what is asked for decides the numbers, not
what happens to be captured.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from compexport.errors import CompexportError, describe
from engines.backends.ort_library import first_line
from engines.backends.ort_rows import rows_taken
from engines.backends.ort_run import run_bound
from engines.backends.ort_values import BFLOAT16, array_of, copied, empty_value
from engines.session import Array, Held

MOST_GRAPHS = 16  # of one session
REMEMBERED = 256  # sets of shapes, to know them when they come again
SKIP = -1  # the id of runs that are neither captured nor replayed
_log = logging.getLogger(__name__)

Key = tuple[Any, ...]
Room = tuple[tuple[int, ...], int]  # a tensor's shape and ONNX element type


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Buffers for one set of shapes, bound, and the id of the graph that was captured over them."""

    inputs: dict[str, Held]
    outputs: dict[str, Held]
    binding: Any
    graph_id: int
    options: Any


class Captures:
    """All captured runs of one ``onnxruntime.InferenceSession`` that was made with CUDA graphs. Threads take turns."""

    def __init__(self, name: str, inner: Any, memory: str, plain: Callable[[], Any], most: int = MOST_GRAPHS) -> None:
        """``name``: for messages. ``plain``: makes the session again without graphs, for when a capture fails."""
        self._name, self._memory, self._plain, self._most = name, memory, plain, most
        self._inner: Any = inner
        self._lock = threading.Lock()
        self._ids = count(1)
        self._capturing = True
        self._seen: OrderedDict[Key, dict[str, Room]] = OrderedDict()
        self._buckets: OrderedDict[Key, _Bucket] = OrderedDict()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._buckets)

    def run(
        self,
        given: Mapping[str, Held],
        sources: Mapping[str, Array | Held],
        outputs: Sequence[str],
        hold: Sequence[str],
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """Run once on OrtValues, wherever they are; ``outputs`` as arrays, those of ``hold`` on the device.

        ``sources``: what to copy for each of ``given``, ``stored`` arrays or OrtValues on the device.
        """
        with self._lock:
            if self._inner is None:
                raise CompexportError(describe(f"{self._name}: the engine is closed", hint="load the bundle again"))
            key = (tuple((name, *value.shape()) for name, value in sorted(given.items())), *sorted({*outputs, *hold}))
            bucket = self._bucket(key, given) if self._capturing else None
            if bucket is not None:
                values = self._replayed(bucket, sources)
                if values is not None:
                    return self._fetched(values, outputs), {name: copied(values[name], self._memory) for name in hold}
            return self._uncaptured(key, given, outputs, hold)

    def close(self) -> None:
        """Give all back, after the run that is under way."""
        with self._lock:
            while self._buckets:
                self._drop_oldest()
            self._inner = None

    def _uncaptured(
        self, key: Key, given: Mapping[str, Held], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Held]]:
        """As ``run``; remembers what came out."""
        values = run_bound(self._inner, given, outputs, hold, self._memory, _options(SKIP))
        self._seen[key] = {name: (tuple(value.shape()), value.element_type()) for name, value in values.items()}
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        arrays = {name: np.array(array_of(values[name])) for name in outputs}
        return arrays, {name: copied(values[name], self._memory) for name in hold}

    def _bucket(self, key: Key, given: Mapping[str, Held]) -> _Bucket | None:
        """The buffers of these shapes; None when they are new."""
        if key in self._buckets:
            self._buckets.move_to_end(key)
            return self._buckets[key]
        if key not in self._seen:
            return None
        if len(self._buckets) >= self._most:
            self._drop_oldest()
        rooms = self._seen.pop(key)
        inputs = {name: empty_value(value.shape(), value.element_type(), self._memory) for name, value in given.items()}
        outputs = {name: empty_value(shape, number, self._memory) for name, (shape, number) in rooms.items()}
        binding = self._inner.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        graph_id = next(self._ids)
        self._buckets[key] = _Bucket(inputs, outputs, binding, graph_id, _options(graph_id))
        return self._buckets[key]

    def _replayed(self, bucket: _Bucket, sources: Mapping[str, Array | Held]) -> dict[str, Held] | None:
        """The outputs' buffers after a run; None if it could not be captured, and then no run will be."""
        for name, source in sources.items():
            bucket.inputs[name].update_inplace(source)
        try:
            self._inner.run_with_iobinding(bucket.binding, bucket.options)
        except Exception as error:
            self._give_up(error)
            return None
        return bucket.outputs

    def _give_up(self, error: Exception) -> None:
        """Go on without graphs, in a new session: what a failed capture leaves of the old one nobody says."""
        say_refused(self._name, error)
        self._capturing = False
        self._buckets.clear()
        self._inner = self._plain()

    def _drop_oldest(self) -> None:
        _, bucket = self._buckets.popitem(last=False)
        self._inner.release_captured_graph(bucket.graph_id)

    def _fetched(self, values: Mapping[str, Held], names: Sequence[str]) -> dict[str, Array]:
        """Arrays of their own: the next run writes the buffers again."""
        return {name: np.array(array_of(self._here(values[name]))) for name in names}

    def _here(self, value: Held) -> Held:
        """A value that ``array_of`` takes."""
        if value.element_type() != BFLOAT16:
            return value
        return rows_taken(value, np.arange(value.shape()[0]), self._memory, "cpu")


def say_refused(name: str, error: BaseException) -> None:
    """That a session runs without CUDA graphs, and why: what ONNX Runtime or CUDA said, without where it said so."""
    text = first_line(error)
    found = re.search(r"CUDA failure \d+: [^;]*|(?<=requested by the user).*", text)
    _log.warning("%s: runs without CUDA graphs; got %s", name, found.group().strip() if found else text)


def _options(graph_id: int) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
