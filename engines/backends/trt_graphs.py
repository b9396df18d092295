"""CUDA graphs of one plan on one lane: runs that come again are captured, and from then on replayed.

A graph repeats a run whose shapes and addresses were the same before: memory is handed out in an order that repeats
itself, so runs of one shape find their addresses again, and nothing has to be copied to fixed ones. Each graph has a
context of its own, since changing that of a captured run makes the graph undefined.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from compexport.errors import CompexportError
from engines.backends.cuda_lanes import Lane
from engines.backends.cuda_memory import DeviceLost
from engines.backends.trt_engine import Context

MOST_GRAPHS = 32  # of one plan on one lane
_MOST_WORTH = 8  # a graph that was used so often is worth no more than one that was used more often
_REMEMBERED = 256  # runs without a graph

# Everything that a run's work depends on but the contents of memory.
Key = tuple[Any, ...]


@dataclass(slots=True)
class _Captured:
    graph: int
    context: Context
    uses: int = 0


class Graphs:
    """Those of one lane, used by the thread that has it."""

    def __init__(self, lane: Lane, enabled: bool) -> None:
        """``enabled``: whether there are to be any."""
        self._lane, self._enabled = lane, enabled
        self._captured: OrderedDict[Key, _Captured] = OrderedDict()  # the longest unused first
        self._seen: OrderedDict[Key, int] = OrderedDict()  # how often a run came without a graph

    def replay(self, key: Key) -> bool:
        """Run again what is known of ``key``; False where there is no graph."""
        captured = self._captured.get(key)
        if captured is None:
            return False
        self._captured.move_to_end(key)
        captured.uses += 1
        self._lane.memory.launch(captured.graph, self._lane.stream)
        return True

    def wants(self, key: Key) -> bool:
        """Whether a run that is about to begin should be captured after it, in a context of its own."""
        if not self._enabled:
            return False
        count = self._seen.pop(key, 0)
        if count >= self._worth():
            return True
        self._seen[key] = count + 1
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def capture(self, key: Key, context: Context) -> None:
        """Write down what ``context`` has just run; an engine that cannot be captured runs without graphs."""
        try:
            self._captured[key] = _Captured(self._written_down(context), context)
        except DeviceLost:
            raise
        except CompexportError:
            self._enabled = False
            return
        if len(self._captured) > MOST_GRAPHS:
            self._lane.wait()
            _, oldest = self._captured.popitem(last=False)
            self._lane.memory.end_graph(oldest.graph)

    def drop(self) -> None:
        """End all of them; the lane is idle."""
        while self._captured:
            _, captured = self._captured.popitem()
            self._lane.memory.end_graph(captured.graph)

    def _worth(self) -> int:
        """How often a run must have come before it is captured; where a graph has to go for it, as often as that."""
        if len(self._captured) < MOST_GRAPHS:
            return 1
        return max(1, min(next(iter(self._captured.values())).uses, _MOST_WORTH))

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
