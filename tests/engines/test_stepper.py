"""Step engines: steps run in their order and size, sessions shared by all ratios, exits counted in steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calib.data import Examples
from calib.quality import evaluate
from compexport import latency
from compexport.api import quiet
from compexport.errors import BundleError
from engines.backends import ort
from engines.bundle import Bundle
from engines.bundle_reader import identity
from engines.cascade import Cascade
from engines.exit_rule import STATISTICS, ExitRule
from engines.members import Members
from engines.paths import segment_macs, segment_paths, whole_path
from engines.points import segment_name
from engines.runtime import Runtime
from engines.session import Session
from engines.stepper import Stepper, stepper
from tests.engines.exits import feeds
from tests.engines.steps import EXITS, HEADS, LABELS, NAMES, C, H, make_bundle, reference

TEXTS = ["a film", "who made it", "the quick brown fox", "Bob", "a quick film", "it", "who", "brown"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("steps") / "bundle", with_exits=False)


@pytest.fixture(scope="module")
def with_exits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("steps") / "bundle", with_exits=True)


@pytest.fixture(scope="module")
def cascades(with_exits: Bundle) -> Mapping[str, Session]:
    return ort.open_sessions(with_exits, threads=1)


@pytest.mark.parametrize("ratio", NAMES)
def test_every_step_runs_with_its_own_size(plain: Bundle, ratio: int) -> None:
    session = ort.open_sessions(plain, threads=1)[NAMES[ratio]]
    assert isinstance(session, Stepper)
    given = feeds(5)
    assert {spec.name for spec in session.inputs} == set(given), "the mask too, which the embedding does not read"
    found = session.run(given)
    assert list(found) == ["logits"]
    np.testing.assert_allclose(found["logits"], reference(given, ratio)[-1] @ HEADS["head"], atol=1e-4)


def test_ratios_share_their_sessions(plain: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_file = ort.open_file

    def counted(path: Path, **options: object) -> object:
        opened.append(path.name)
        return open_file(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ort, "open_file", counted)
    with Runtime(plain, threads=1) as runtime:
        for name in NAMES.values():
            assert runtime("a film", variant=name).label in LABELS
    assert sorted(opened) == [f"ode-{role}.onnx" for role in ("embed", "head", "step-0", "step-1")]


def test_a_ratio_means_the_graph_made_for_it(plain: Bundle) -> None:
    made = {NAMES[ratio].replace("-step", ""): {"ratio": ratio, "graphs": {"encoder": "ode-head"}} for ratio in NAMES}
    changed = {n: plain.manifest.variants[NAMES[int(f["ratio"])]].model_copy(update=f) for n, f in made.items()}  # type: ignore[call-overload]
    both = plain.manifest.model_copy(update={"variants": {**plain.manifest.variants, **changed}})
    bundle = Bundle(plain.path, both, identity(plain.path.lstat()))
    assert Members(bundle, "ort", "cpu", None).of_ratio(2) == "ode-r2-fp32"
    assert Members(bundle, "ort", "cpu", list(NAMES.values())).of_ratio(2) == NAMES[2]


@pytest.mark.parametrize("ratio", NAMES)
def test_exits_are_counted_in_steps(cascades: Mapping[str, Session], ratio: int) -> None:
    """Forced to leave at each exit in turn, every row has the head of that step."""
    cascade, given = cascades[NAMES[ratio]], feeds(6, seed=2)
    assert isinstance(cascade, Cascade) and cascade.exits == tuple(EXITS[ratio])
    states = reference(given, ratio)
    for number, step in enumerate(EXITS[ratio]):
        rule = ExitRule(tuple(9.0 if i == number else -1.0 for i in range(len(EXITS[ratio]) - 1)))
        run = cascade.run_exits(given, rule)
        assert run.exit_layer.tolist() == [step] * 6
        np.testing.assert_allclose(run.logits, states[step - 1] @ HEADS[f"head-{step}"], atol=1e-4)


def test_rows_leave_one_by_one(cascades: Mapping[str, Session]) -> None:
    cascade, given = cascades[NAMES[1]], feeds(16, seed=1)
    assert isinstance(cascade, Cascade)
    every = cascade.every_exit().run(given)
    assert {name: values.shape for name, values in every.items()} == {
        "logits": (16, 3, C),
        **dict.fromkeys(STATISTICS, (16, 3)),
    }
    thresholds = np.quantile(every["entropy"][:, :-1], 0.4, axis=0)
    run = cascade.run_exits(given, ExitRule(tuple(thresholds.tolist())))
    sure = every["entropy"][:, :-1] < thresholds
    left = [int(np.argmax(row)) if row.any() else 2 for row in sure]
    assert run.exit_layer.tolist() == [EXITS[1][number] for number in left] and len(set(left)) == 3
    np.testing.assert_allclose(run.logits, every["logits"][np.arange(16), left], atol=1e-4)


def test_paths_and_costs(plain: Bundle, with_exits: Bundle) -> None:
    names = {graph: graph for graph in with_exits.manifest.graphs}
    assert whole_path(plain.manifest.variants[NAMES[1]]) == [
        names[f"ode-{role}"] for role in ("embed", "step-0", "step-0", "step-1", "step-1", "head")
    ]
    assert segment_paths(with_exits.manifest.variants[NAMES[1]]) == [
        ["ode-embed", "ode-step-0", "ode-head-1"],
        ["ode-step-0", "ode-step-1", "ode-head-3"],
        ["ode-step-1", "ode-head-4"],
    ]
    assert segment_macs(with_exits.manifest, NAMES[1], 10) == [10_000 + C * H, 20_000 + C * H, 10_000 + C * H]
    assert segment_macs(plain.manifest, NAMES[2], 10) == [20_000 + C * H]


def test_step_engines_are_measured_evaluated_and_chosen(with_exits: Bundle) -> None:
    examples = Examples(TEXTS * 4, labels=["bad", "good"] * 16)
    with Runtime(with_exits, threads=1) as runtime:
        table = latency.measure(runtime, [1, 4], [4, 8], threads=1, min_runs=3, progress=quiet)
        runtime.bundle.save_profile(runtime.device, table)
        runtime.bundle.save_quality(evaluate(runtime, examples).table)
    assert {row["variant"] for row in table["rows"]} == {
        *NAMES.values(),
        *(segment_name(NAMES[ratio], number) for ratio, exits in EXITS.items() for number in range(len(exits))),
    }
    with Runtime(Bundle.open(with_exits.path), threads=1) as runtime:
        assert any("@" in name for name in runtime.variants)
        result = runtime("a quick film", budget_ms=1e4)
        assert result.exit in {1, 2, 3, 4} and result.why in {"confident", "last"}
        quality = runtime.bundle.quality()
        assert quality is not None and quality["exits"][NAMES[1]]["layers"] == EXITS[1]


@pytest.mark.parametrize(
    ("role", "lost", "match"),
    [
        ("embed", "hidden", "is no embed of a step engine: got .*; build the bundle again"),
        ("step-0", "attention_mask", "is no step-0 of a step engine: got dt, previous -> hidden"),
        ("head", "previous", "is no head of a step engine"),
    ],
)
def test_graphs_that_cannot_follow_each_other(plain: Bundle, role: str, lost: str, match: str) -> None:
    name, variant = next(iter(plain.manifest.variants.items()))
    graphs: dict[str, Any] = {
        graph: SimpleNamespace(
            **{
                side: [spec for spec in getattr(plain.manifest.graphs[graph], side) if (one, spec.name) != (role, lost)]
                for side in ("inputs", "outputs")
            }
        )
        for one, graph in variant.graphs.items()
    }
    with pytest.raises(BundleError, match=f"{name}: its graph {variant.graphs[role]} {match}"):
        stepper(name, variant, graphs)
