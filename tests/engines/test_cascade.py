"""The cascade on real engines of hand-made graphs: who leaves where, in which order, and what is refused."""

from __future__ import annotations

import itertools
import math
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import CompexportError, InputError
from engines.backends import ort
from engines.bundle import Bundle
from engines.cascade import Cascade, Deadline
from engines.exit_rule import BATCH_MAXIMUM, STATISTICS, ExitRule
from engines.paths import whole_path
from tests.engines.exits import EXITS, LAYERS, NAMES, C, feeds, make_bundle, row

NAME = NAMES[1.0]
RULES = [ExitRule(0.5), ExitRule((0.3, 0.8)), ExitRule(0.9, "max_probability"), ExitRule(0.6, "margin")]
RULES += [ExitRule(0.5, temperatures=(2.0, 0.5))]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("exits") / "bundle")


@pytest.fixture(scope="module")
def cascade(bundle: Bundle) -> Cascade:
    session = ort.open_sessions(bundle, [NAME], threads=1)[NAME]
    assert isinstance(session, Cascade)
    return session


@pytest.fixture(scope="module")
def every(bundle: Bundle) -> ort.OrtSession:
    graph = bundle.manifest.variants[NAME].graphs["all-exits"]
    return ort.open_graphs(bundle, [graph], threads=1)[graph]


def test_running_to_the_end_gives_the_last_exit(cascade: Cascade, every: ort.OrtSession) -> None:
    given_feeds = feeds(9)
    whole = cascade.run(given_feeds)
    layers = every.run(given_feeds)
    assert set(whole) == {"logits", *STATISTICS}
    for name, values in whole.items():
        np.testing.assert_allclose(values, layers[name][:, -1], atol=1e-5)
    run = cascade.run_exits(given_feeds, ExitRule(-1))
    assert run.exit_layer.tolist() == [LAYERS] * 9 and run.why == ["last"] * 9
    assert np.array_equal(run.logits, whole["logits"])
    assert [rows for rows, _ in run.segments] == [9, 9, 9]


@pytest.mark.parametrize("statistic", STATISTICS)
def test_chained_segments_are_the_all_exits_graph(cascade: Cascade, every: ort.OrtSession, statistic: str) -> None:
    """Forced to leave at each exit in turn, every row has that layer's logits."""
    given_feeds = feeds(7, seed=3)
    layers = every.run(given_feeds)["logits"]
    always = 9.0 if statistic == "entropy" else 0.0
    for number, layer in enumerate(EXITS[:-1]):
        rule = ExitRule(tuple(always if i == number else -1.0 for i in range(len(EXITS) - 1)), statistic)
        run = cascade.run_exits(given_feeds, rule)
        assert run.exit_layer.tolist() == [layer] * 7 and run.why == ["confident"] * 7
        np.testing.assert_allclose(run.logits, layers[:, layer - 1], atol=1e-5)


def test_above_the_largest_entropy_everyone_leaves_first(cascade: Cascade) -> None:
    given_feeds = feeds(20)
    above = cascade.run_exits(given_feeds, ExitRule(math.log(C) + 1e-3))
    assert above.exit_layer.tolist() == [EXITS[0]] * 20
    assert [rows for rows, _ in above.segments] == [20]


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1.2), st.floats(0, 0.5), st.integers(1, 40), st.integers(0, 5))
def test_a_higher_threshold_never_makes_a_row_leave_later(
    cascade: Cascade, threshold: float, more: float, batch: int, seed: int
) -> None:
    given_feeds = feeds(batch, seed)
    lower, higher = (cascade.run_exits(given_feeds, ExitRule(t)).exit_layer for t in (threshold, threshold + more))
    assert (higher <= lower).all()


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("rule", RULES)
def test_a_batch_answers_as_its_rows_alone(cascade: Cascade, rule: ExitRule, batch: int) -> None:
    given_feeds = feeds(batch, seed=batch)
    together = cascade.run_exits(given_feeds, rule)
    alone = [cascade.run_exits(row(given_feeds, index), rule) for index in range(batch)]
    assert together.exit_layer.tolist() == [one.exit_layer[0] for one in alone]
    assert together.why == [one.why[0] for one in alone]
    np.testing.assert_allclose(together.logits, np.concatenate([one.logits for one in alone]), rtol=1e-5, atol=1e-5)


def test_rows_leave_at_the_exit_that_the_all_exits_graph_says(cascade: Cascade, every: ort.OrtSession) -> None:
    given_feeds = feeds(64, seed=1)
    run = cascade.run_exits(given_feeds, ExitRule((0.3, 0.7)))
    entropy = every.run(given_feeds)["entropy"][:, [layer - 1 for layer in EXITS]]
    expected = np.where(entropy[:, 0] < 0.3, EXITS[0], np.where(entropy[:, 1] < 0.7, EXITS[1], EXITS[2]))
    assert run.exit_layer.tolist() == expected.tolist()
    assert len(set(expected)) == len(EXITS), "the test means nothing when all leave together"
    kept = [64, int((expected > EXITS[0]).sum()), int((expected > EXITS[1]).sum())]
    assert [rows for rows, _ in run.segments] == kept
    assert [why == "last" for why in run.why] == (expected == LAYERS).tolist()


def test_batch_maximum_lets_nobody_leave_before_the_least_sure(cascade: Cascade, every: ort.OrtSession) -> None:
    for seed in range(8):
        given_feeds = feeds(3, seed)
        entropy = every.run(given_feeds)["entropy"][:, [layer - 1 for layer in EXITS]].max(axis=0)
        run = cascade.run_exits(given_feeds, ExitRule(0.9, mode=BATCH_MAXIMUM))
        left_at = next((number for number in range(2) if entropy[number] < 0.9), 2)
        assert run.exit_layer.tolist() == [EXITS[left_at]] * 3


def test_exits_are_those_of_the_manifest(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", exits=(LAYERS,))
    cascade = ort.open_sessions(bundle, [NAME], threads=1)[NAME]
    assert isinstance(cascade, Cascade)
    run = cascade.run_exits(feeds(4), ExitRule(9.0))
    assert run.exit_layer.tolist() == [LAYERS] * 4 and run.why == ["last"] * 4
    assert len(whole_path(bundle.manifest.variants[NAME])) == 1


# --- time ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass by one each time they are read."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def __call__(self) -> float:
        return float(next(self.ticks))


@pytest.mark.parametrize(("end_s", "layer"), [(-5.0, 2), (0.9, 2), (1.0, 4), (1.9, 4), (2.0, 6), (99.0, 6)])
def test_the_newest_exit_answers_when_the_next_would_be_late(
    cascade: Cascade, every: ort.OrtSession, end_s: float, layer: int
) -> None:
    """Each segment needs a second, and the clock is read at 0 and 1 s: before the second and the third."""
    given_feeds = feeds(6)
    run = cascade.run_exits(given_feeds, ExitRule(-1), Deadline(end_s, lambda segment, rows: 1000.0, Clock()))
    assert run.exit_layer.tolist() == [layer] * 6
    assert run.why == ["last" if layer == LAYERS else "out of time"] * 6
    np.testing.assert_allclose(run.logits, every.run(given_feeds)["logits"][:, layer - 1], atol=1e-5)


def test_what_left_before_keeps_its_answer_when_time_runs_out(cascade: Cascade) -> None:
    given_feeds = feeds(40, seed=1)
    asked: list[tuple[int, int]] = []

    def needs_ms(segment: int, rows: int) -> float:
        asked.append((segment, rows))
        return 0.0 if segment < 2 else math.inf

    free = cascade.run_exits(given_feeds, ExitRule(0.5))
    cut = cascade.run_exits(given_feeds, ExitRule(0.5), Deadline(1e9, needs_ms, lambda: 0.0))
    assert asked == [(number, rows) for number, (rows, _) in enumerate(free.segments)][1:]
    sure = free.exit_layer < LAYERS
    assert 0 < sure.sum() < 40
    assert np.array_equal(cut.logits[sure], free.logits[sure])
    assert cut.exit_layer[~sure].tolist() == [EXITS[1]] * int((~sure).sum())
    assert [why == "out of time" for why in cut.why] == (~sure).tolist()


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_empty_batch(cascade: Cascade) -> None:
    empty = {name: values[:0] for name, values in feeds(1).items()}
    for run in (lambda: cascade.run_exits(empty, ExitRule(0.5)), lambda: cascade.run(empty)):
        with pytest.raises(InputError, match=r"input input_ids: got int64\[0, \d+\], expected .* none empty"):
            run()


def test_rules_that_do_not_fit(cascade: Cascade) -> None:
    with pytest.raises(InputError, match="exit thresholds do not fit: got 3 of them, expected 2"):
        cascade.run_exits(feeds(2), ExitRule((0.1, 0.2, 0.3)))


@pytest.mark.parametrize("threshold", [-1, 0.5, 9.0])
@pytest.mark.parametrize("mode", ["per-row", "batch-maximum"])
def test_nan_logits_fail_the_request_and_never_leave(tmp_path: Path, threshold: float, mode: str) -> None:
    bundle = make_bundle(tmp_path / "bundle", broken=2)
    cascade = ort.open_sessions(bundle, [NAME], threads=1)[NAME]
    assert isinstance(cascade, Cascade)
    match = f"{NAME}: logits of exit 2 hold NaN or infinity: got row 0, 1, 2"
    with pytest.raises(CompexportError, match=match):
        cascade.run_exits(feeds(3), ExitRule(threshold, mode=mode))


def test_nan_behind_the_last_row_that_left_is_not_met(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", broken=LAYERS)
    cascade = ort.open_sessions(bundle, [NAME], threads=1)[NAME]
    assert isinstance(cascade, Cascade)
    assert cascade.run_exits(feeds(3), ExitRule(9.0)).exit_layer.tolist() == [2, 2, 2]
    with pytest.raises(CompexportError, match="of exit 6 hold"):
        cascade.run_exits(feeds(3), ExitRule(-1))


# --- sharing and timing -------------------------------------------------------------------------------------------


def test_many_threads_run_one_cascade(cascade: Cascade) -> None:
    inputs = [feeds(12, seed) for seed in range(4)]
    expected = [cascade.run_exits(one, ExitRule(0.5)) for one in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(25):
            run = cascade.run_exits(inputs[number], ExitRule(0.5))
            if run.exit_layer.tolist() != expected[number].exit_layer.tolist():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_each_segment_can_be_called_alone_and_again(cascade: Cascade) -> None:
    calls = cascade.segment_calls(feeds(5))
    assert len(calls) == len(EXITS)
    for call in (*calls, *reversed(calls)):
        outputs, held = call()  # type: ignore[misc]
        assert outputs["logits"].shape == (5, C)
        assert set(held) <= {"hidden"}
