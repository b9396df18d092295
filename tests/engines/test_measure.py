"""The stopwatch: who is called when; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json

import pytest

from engines import measure
from engines.measure import environment, interleave


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves ``clock[0]``, in seconds."""
    now = [100.0]
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    return now


def test_calls_take_turns() -> None:
    calls: list[str] = []
    timings = interleave(
        {name: (lambda name=name: calls.append(name)) for name in "abc"}, min_runs=5, min_seconds=0, warmup=2
    )
    assert calls == ["a", "b", "c"] * 7
    assert list(timings) == ["a", "b", "c"]
    assert {timing.runs for timing in timings.values()} == {5}, "warm-up is not counted"


def test_percentiles_are_of_each_callables_own_times(clock: list[float]) -> None:
    steps = iter(range(1, 101))

    def growing() -> None:
        clock[0] += next(steps) / 1000

    def steady() -> None:
        clock[0] += 0.007

    timings = interleave({"growing": growing, "steady": steady}, min_runs=100, min_seconds=0, warmup=0)
    assert timings["growing"].p50_ms == pytest.approx(50.5)
    assert timings["growing"].p99_ms == pytest.approx(99.01)
    assert (timings["steady"].p50_ms, timings["steady"].p99_ms) == pytest.approx((7, 7))


def test_slow_warmup_is_not_measured(clock: list[float]) -> None:
    durations = iter([5.0, 3.0] + [0.002] * 4)

    def call() -> None:
        clock[0] += next(durations)

    timing = interleave({"a": call}, min_runs=4, min_seconds=0, warmup=2)["a"]
    assert (timing.p99_ms, timing.runs) == (pytest.approx(2), 4)


def test_runs_until_the_time_is_up(clock: list[float]) -> None:
    def call() -> None:
        clock[0] += 0.25

    timings = interleave({"a": call, "b": call}, min_runs=2, min_seconds=3, warmup=1)
    assert {timing.runs for timing in timings.values()} == {6}
    assert interleave({"a": call}, min_runs=20, min_seconds=3, warmup=0)["a"].runs == 20


def test_an_error_of_a_callable_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 // 0})


def test_environment_can_be_written_down() -> None:
    found = environment()
    assert found == json.loads(json.dumps(found))
    assert found["cores"] >= 1 and found["processor"]
    assert found["versions"]["numpy"]
