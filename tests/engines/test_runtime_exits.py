"""The runtime over a family with exits: points as members, thresholds by hand, and the clock between segments.

Profiles here are invented: a segment is said to take next to nothing, or an hour, so that no test waits for a time.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compexport.errors import CompexportError, InputError
from engines.backends import ort
from engines.bundle import Bundle
from engines.cascade import Cascade, Deadline
from engines.exit_rule import BATCH_MAXIMUM, ExitRule
from engines.manifest import ALL_EXITS
from engines.points import engine_of, point_name, segment_name
from engines.runtime import Runtime
from tests.engines.exits import EXITS, LAYERS, NAMES, C, feeds, make_bundle
from tests.engines.test_text import WORDS

R1, R4 = NAMES[1.0], NAMES[4.0]
POINT = point_name(R4, "2x")
RULE = ExitRule((0.2, 0.05))  # of the toy at ratio 4, lets some rows leave at each exit
QUICK_MS, HOUR_MS = 1e-4, 3.6e6
TEXTS = [" ".join(WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(1 + i % 9)) for i in range(24)]

Open = Callable[..., Runtime]


def profile(first_ms: float = QUICK_MS, later_ms: float = QUICK_MS) -> dict[str, Any]:
    """Batches 1 and 32, lengths 4 and 16."""
    times = {}
    for name in NAMES.values():
        times[name] = first_ms + 2 * later_ms
        times |= {segment_name(name, number): later_ms if number else first_ms for number in range(3)}
    rows = [
        {"variant": name, "batch": batch, "length": length, "p50_ms": ms, "p99_ms": ms, "runs": 9}
        for name, ms in times.items()
        for batch in (1, 32)
        for length in (4, 16)
    ]
    return {"device": ort.device_name({"threads": 1}), "backend": "ort", "threads": 1, "rows": rows}


def quality() -> dict[str, Any]:
    point = {"variant": R4, "rule": RULE.document(), "histogram": [0.6, 0.2, 0.2], "cut_values": [0.6, 0.7, 0.75]}
    return {
        "metric": "accuracy",
        "higher_is_better": True,
        "backbone_variant": R1,
        "variants": {R1: 0.9, R4: 0.8, POINT: 0.75},
        "points": {POINT: point},
        "exits": {name: {"values": [0.5, 0.6, last]} for name, last in ((R1, 0.9), (R4, 0.8))},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exits") / "bundle"
    make_bundle(path)
    return path


@pytest.fixture
def open_runtime(folder: Path, tmp_path: Path) -> Open:
    def make(table: dict[str, Any] | None = None, *, evaluated: bool = True, **options: Any) -> Runtime:
        copy = Path(shutil.copytree(folder, tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}"))
        bundle = Bundle.open(copy)
        if table is not None:
            bundle.save_profile(table["device"], table)
        if evaluated:
            bundle.save_quality(quality())
        return Runtime(bundle, threads=1, **options)

    return make


def exits_of(runtime: Runtime, **request: Any) -> list[tuple[int, str]]:
    return [(output["exit"], output["why"]) for output in runtime.run_batch(TEXTS, **request).outputs]


# --- members ------------------------------------------------------------------------------------------------------


def test_points_are_members(open_runtime: Open) -> None:
    runtime = open_runtime(profile())
    assert runtime.variants == (R1, R4, POINT)
    assert runtime.members.engines == (R1, R4)
    assert runtime.quality.variants == (R1, R4, POINT)
    assert {c.variant for c in runtime.select(budget_ms=5).candidates} == {R1, R4, POINT}
    assert open_runtime(evaluated=False).variants == (R1, R4)
    assert open_runtime(variants=[R4]).variants == (R4,)
    only = open_runtime(variants=[POINT])
    assert only.variants == (POINT,) and only("a film").variant == POINT


def test_a_point_by_name_leaves_by_its_own_rule(open_runtime: Open) -> None:
    runtime = open_runtime()
    batch = runtime.run_batch(TEXTS, variant=POINT)
    assert batch.variant == POINT and batch.met_budget
    by_hand = exits_of(runtime, variant=R4, rule=RULE)
    assert [(output["exit"], output["why"]) for output in batch.outputs] == by_hand
    assert len({layer for layer, _ in by_hand}) > 1, "the test means nothing when all leave together"
    assert exits_of(runtime, variant=R4) == [(LAYERS, "last")] * len(TEXTS)
    assert exits_of(runtime, ratio=4) == [(LAYERS, "last")] * len(TEXTS)


def test_order_is_restored(open_runtime: Open) -> None:
    runtime = open_runtime()
    together = runtime.run_batch(TEXTS, variant=POINT).outputs
    for text, output in zip(TEXTS, together, strict=True):
        (alone,) = runtime.run_batch([text], variant=POINT).outputs
        assert (alone["label"], alone["exit"], alone["why"]) == (output["label"], output["exit"], output["why"])
        assert list(alone["scores"].values()) == pytest.approx(list(output["scores"].values()), abs=1e-5)


def test_results_tell_their_exit(open_runtime: Open) -> None:
    runtime = open_runtime()
    result = runtime("a fine film", variant=R1, rule=ExitRule(9.0))
    assert (result.exit, result.why, result.output["exit"]) == (EXITS[0], "confident", EXITS[0])
    assert result.label in ("bad", "fair", "good")


def test_thresholds_by_hand(open_runtime: Open) -> None:
    runtime = open_runtime(variants=[R4])
    assert {layer for layer, _ in exits_of(runtime, rule=ExitRule(9.0))} == {EXITS[0]}
    assert {layer for layer, _ in exits_of(runtime, rule=ExitRule(-1))} == {LAYERS}
    together = exits_of(runtime, rule=ExitRule(0.5, mode=BATCH_MAXIMUM))
    assert len({layer for layer, _ in together}) == 1


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"rule": RULE}, f"exit thresholds need a variant: expected a ratio or a name: {R1}, {R4}"),
        ({"rule": RULE, "variant": POINT}, f"{POINT} has its own exit thresholds; name {R4} to set others"),
        ({"rule": ExitRule((0.1, 0.2, 0.3)), "variant": R4}, "exit thresholds do not fit: got 3 of them, expected 2"),
        ({"variant": f"{R4}@9x"}, f"unknown variant: got {R4}@9x, expected one of {R1}, {R4}, {POINT}"),
    ],
)
def test_requests_that_make_no_sense(open_runtime: Open, request_: dict[str, Any], match: str) -> None:
    runtime = open_runtime()
    with pytest.raises(InputError, match=match):
        runtime("a film", **request_)


def test_a_rule_where_only_a_point_is_in_use(open_runtime: Open) -> None:
    runtime = open_runtime(variants=[POINT])
    with pytest.raises(InputError, match="exit thresholds need a variant: expected .*no variant in use has exits"):
        runtime("a film", rule=ExitRule(0.5))


def test_roles_that_are_not_there(open_runtime: Open) -> None:
    runtime = open_runtime()
    with pytest.raises(InputError, match=f"{R4} has no such graph: got prefix-2, expected one of segment-0, "):
        runtime.open_role(R4, "prefix-2")
    runtime.open_role(POINT, ALL_EXITS).close()


def test_closing_while_a_cascade_runs(open_runtime: Open) -> None:
    runtime = open_runtime()
    cascade = runtime.session(R1)
    assert isinstance(cascade, Cascade)

    def closes(segment: int, rows: int) -> float:
        runtime.close()
        return 0.0

    with pytest.raises(CompexportError, match=f"{R1}: the engine is closed; load the bundle again"):
        cascade.run_exits(feeds(3), ExitRule(-1), Deadline(math.inf, closes))


def test_points_that_are_not_there(open_runtime: Open) -> None:
    with pytest.raises(InputError, match=f"unknown variant: got {R4}@9x"):
        open_runtime(variants=[f"{R4}@9x"])
    with pytest.raises(InputError, match="unknown variant: got costeff-r9-fp32@2x"):
        open_runtime(variants=["costeff-r9-fp32@2x"])


# --- time ---------------------------------------------------------------------------------------------------------


def test_a_budget_with_time_enough_goes_to_the_end(open_runtime: Open) -> None:
    runtime = open_runtime(profile())
    batch = runtime.run_batch(TEXTS, budget_ms=HOUR_MS)
    assert (batch.variant, batch.met_budget, batch.decision.stops_at) == (R1, True, None)
    assert {output["why"] for output in batch.outputs} == {"last"}


@pytest.mark.parametrize("request_", [{}, {"variant": R1}, {"ratio": 4}, {"variant": POINT}])
def test_a_budget_too_short_for_the_next_segment_answers_from_the_newest(
    open_runtime: Open, request_: dict[str, Any]
) -> None:
    runtime = open_runtime(profile(later_ms=HOUR_MS))
    batch = runtime.run_batch(TEXTS, budget_ms=HOUR_MS / 2, **request_)
    assert batch.decision.stops_at == EXITS[0] and batch.met_budget
    assert {output["exit"] for output in batch.outputs} == {EXITS[0]}
    # Without being told, it takes the point: cut at the first exit, that is measured to be best.
    expected = POINT if not request_ else request_.get("variant", R4)
    assert batch.variant == expected
    whys = {output["why"] for output in batch.outputs}
    assert whys == ({"out of time", "confident"} if expected == POINT else {"out of time"})
    first = runtime.run_batch(TEXTS, variant=engine_of(expected), rule=ExitRule(9.0))
    assert [output["label"] for output in first.outputs] == [output["label"] for output in batch.outputs]


def test_the_first_segment_always_runs(open_runtime: Open) -> None:
    runtime = open_runtime(profile(HOUR_MS, HOUR_MS))
    batch = runtime.run_batch(TEXTS, budget_ms=1.0, variant=R1)
    assert not batch.decision.met_budget
    assert {output["why"] for output in batch.outputs} == {"out of time"}


def test_time_waited_is_gone(open_runtime: Open) -> None:
    runtime = open_runtime(profile(later_ms=1e5))
    assert {why for _, why in exits_of(runtime, variant=R1, budget_ms=1e6)} == {"last"}
    assert {why for _, why in exits_of(runtime, variant=R1, budget_ms=1e6, waited_ms=9.5e5)} == {"out of time"}


def test_every_chunk_of_a_request_gets_its_first_segment(open_runtime: Open) -> None:
    runtime = open_runtime(profile(later_ms=HOUR_MS))
    batch = runtime.run_batch(TEXTS * 4, variant=R1, budget_ms=HOUR_MS)
    assert {(output["exit"], output["why"]) for output in batch.outputs} == {(EXITS[0], "out of time")}


def test_the_correction_makes_the_clock_strict(open_runtime: Open) -> None:
    """Segments said to need a second each fit into an hour, unless the machine is far slower than it was."""
    runtime = open_runtime(profile(later_ms=1e6))
    assert {why for _, why in exits_of(runtime, variant=R1, budget_ms=HOUR_MS)} == {"last"}
    now = runtime.correction._clock()
    runtime.correction._clock = lambda: now
    for _ in range(50):
        runtime.correction.observe(R1, 8.0, 1.0)
    assert runtime.correction.factor(R1) > 4.0
    assert {why for _, why in exits_of(runtime, variant=R1, budget_ms=HOUR_MS)} == {"out of time"}


@pytest.mark.parametrize(("share", "budget_ms", "why"), [(0.0, 1.5e5, "last"), (0.5, 1.5e5, "out of time")])
def test_the_margin_makes_the_clock_strict(open_runtime: Open, share: float, budget_ms: float, why: str) -> None:
    runtime = open_runtime(profile(later_ms=1e5))
    runtime._anytime.margin.lasting = share
    assert {one for _, one in exits_of(runtime, variant=R1, budget_ms=budget_ms)} == {why}


def test_the_margin_learns_from_what_could_have_ended_earlier(
    open_runtime: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, seen = open_runtime(profile(later_ms=1e6)), []
    monkeypatch.setattr(runtime._anytime.margin, "observe", lambda late: seen.append(late))
    exits_of(runtime, variant=R1)
    exits_of(runtime, variant=R1, budget_ms=1e3)  # stops at once
    assert seen == []
    exits_of(runtime, variant=R1, budget_ms=HOUR_MS)
    assert seen == [False]
    # As if the last segment, which was to take no time, had taken all there was.
    runtime.members._bundle.save_profile(profile()["device"], profile())
    slow = Runtime(runtime.bundle, threads=1)
    monkeypatch.setattr(slow._anytime.margin, "observe", lambda late: seen.append(late))
    monkeypatch.setattr(Deadline, "allows", lambda *_: True)
    exits_of(slow, variant=R1, budget_ms=1e-3)
    assert seen == [False, True]


def test_runs_are_observed_as_a_whole(open_runtime: Open) -> None:
    runtime = open_runtime(profile())
    runtime.run_batch(TEXTS, variant=POINT)
    assert runtime.correction.factor(R4) > 1.0, "hand-made times are far below what any machine takes"
    assert runtime.correction.factor(R1) < runtime.correction.factor(R4)


def test_without_measured_segments_a_budget_is_not_kept_but_said(
    open_runtime: Open, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = open_runtime()
    with pytest.raises(InputError, match="a budget needs a latency profile"):
        runtime("a film", budget_ms=5)
    with caplog.at_level(logging.WARNING):
        result = runtime("a film", budget_ms=1e-3, variant=R1)
        runtime.run_batch(TEXTS * 4, budget_ms=1e-3, variant=R1)
        runtime("a film", budget_ms=1e-3, variant=R4)
    assert (result.exit, result.why) == (LAYERS, "last")
    assert f"{R1}: its segments were not measured" in caplog.text and "compexport bench" in caplog.text
    said = [record.getMessage().partition(":")[0] for record in caplog.records if "segments" in record.getMessage()]
    assert said == [R1, R4], "once for each engine"
    assert runtime._anytime.margin.share == 0.0, "no earlier end would have mended it"


# --- the rest -----------------------------------------------------------------------------------------------------


def test_nan_logits_fail_the_request(tmp_path: Path) -> None:
    runtime = Runtime(make_bundle(tmp_path / "broken", broken=4), threads=1)
    with pytest.raises(CompexportError, match=f"{R1}: logits of exit 4 hold NaN or infinity"):
        runtime("a film", variant=R1)
    assert runtime("a film", variant=R1, rule=ExitRule(9.0)).exit == EXITS[0]


def test_all_exits_of_raw_texts(open_runtime: Open) -> None:
    runtime = open_runtime()
    session = runtime.open_role(R1, ALL_EXITS)
    outputs, lengths = runtime.run_raw(session, TEXTS[:5], ["logits", "margin"])
    assert outputs["logits"].shape == (5, LAYERS, C) and outputs["margin"].shape == (5, LAYERS)
    assert lengths == [len(text.split()) + 2 for text in TEXTS[:5]]
    assert np.isfinite(outputs["logits"]).all()
    session.close()
