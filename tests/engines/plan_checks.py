"""Every kind of variant, run from plans and by ONNX Runtime on the same bundle: over doubles, and on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engines.backends import ort
from engines.beam import Beams
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.causal import CausalGenerator
from engines.exit_rule import ExitRule
from engines.options import Options
from engines.sampling import Sampling
from tests.engines import decoders, exits, steps

SAMPLED = Options(10, sampling=Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7))
BEAMS = Options(10, beams=Beams(num_beams=3, num_return_sequences=2))
WAYS = {"greedy": Options(10), "beams": BEAMS, "sampled": SAMPLED}
BUNDLES: dict[str, Any] = {
    "exits": exits.make_bundle,
    "steps": lambda folder: steps.make_bundle(folder, with_exits=False),
    "steps with exits": lambda folder: steps.make_bundle(folder, with_exits=True),
    "decoders": lambda folder: decoders.make_bundle(folder, ratios=(1, 2)),
    "decoders that keep halves": lambda folder: decoders.make_bundle(folder, ratios=(2,), kept="float16"),
}
ENCODERS, CASCADES = ("exits", "steps", "steps with exits"), ("exits", "steps with exits")


def close_all(sessions: dict[str, Any]) -> None:
    for session in sessions.values():
        session.close()


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=tolerance, err_msg=name)


def check_variants(bundle: Bundle, backend: Any, tolerance: float) -> None:
    """Each variant to its end, in several shapes, of which one comes again."""
    expected, found = ort.open_sessions(bundle, threads=1), backend.open_sessions(bundle)
    assert found.keys() == expected.keys() == bundle.manifest.variants.keys()
    for name in found:
        for batch in (1, 5, 3, 5, 5):
            feeds = exits.feeds(batch, seed=batch)
            same(found[name].run(feeds), expected[name].run(feeds), tolerance)
    close_all(found)


def check_exits(bundle: Bundle, backend: Any, tolerance: float) -> None:
    """Rows leave where they leave with ONNX Runtime, those aside that are as near to a threshold as they may differ."""
    expected, found = ort.open_sessions(bundle, threads=1), backend.open_sessions(bundle)
    left = set()
    for name, cascade in found.items():
        other = expected[name]
        assert isinstance(cascade, Cascade) and isinstance(other, Cascade)
        for seed, threshold in enumerate((0.3, 0.6, 0.9)):
            feeds, rule = exits.feeds(7, seed), ExitRule(threshold)
            entropies = other.every_exit().run(feeds)["entropy"]
            assert np.abs(entropies - threshold).min() > tolerance, "choose another seed"
            run, wanted = cascade.run_exits(feeds, rule), other.run_exits(feeds, rule)
            np.testing.assert_allclose(run.logits, wanted.logits, atol=tolerance)
            assert (run.exit_layer.tolist(), run.why) == (wanted.exit_layer.tolist(), wanted.why)
            left |= set(run.exit_layer.tolist())
        feeds = exits.feeds(4)
        same(cascade.every_exit().run(feeds), other.every_exit().run(feeds), tolerance)
        for call in cascade.segment_calls(feeds):
            call()
    assert len(left) > 2
    close_all(found)


def generators(bundle: Bundle, backend: Any) -> tuple[dict[str, CausalGenerator], dict[str, Any]]:
    """By variant, and their sessions."""
    generation, sessions = bundle.manifest.generation, backend.open_sessions(bundle)
    assert generation is not None
    return {name: CausalGenerator(name, session, generation) for name, session in sessions.items()}, sessions


def check_logits(bundle: Bundle, backend: Any, tolerance: float) -> None:
    """Of padded prompts, and of two tokens after them, with rows that change places in between."""
    ids, mask = decoders.prompts(5)
    expected, _ = generators(bundle, ort)
    found, sessions = generators(bundle, backend)
    for name in found:
        logits = []
        for generator in (found[name], expected[name]):
            last, cache = generator.read_prompt(ids, mask)
            rows = np.array([3, 3, 0, 4])
            cache = generator._take(cache, rows)
            one, cache = generator.read(ids[rows, -1:], np.ones((4, 1), np.int64), cache)
            two, cache = generator.read(ids[rows, -2:-1], np.ones((4, 1), np.int64), cache)
            logits.append((last, one, two))
        for one, other in zip(*logits, strict=True):
            np.testing.assert_allclose(one, other, atol=tolerance)
        del cache
    close_all(sessions)


def check_texts(bundle: Bundle, backend: Any, way: str) -> None:
    """Padded prompts, rows that end at different times, beams that change places: token by token."""
    ids, mask = decoders.prompts(5)
    expected, _ = generators(bundle, ort)
    found, sessions = generators(bundle, backend)
    for name in found:
        texts = found[name].generate(ids, mask, options=WAYS[way])
        wanted = expected[name].generate(ids, mask, options=WAYS[way])
        for one, other in zip(texts, wanted, strict=True):
            assert [text.tokens for text in (one, *one.others)] == [text.tokens for text in (other, *other.others)]
        assert len({tuple(one.tokens) for one in texts}) > 1
    close_all(sessions)


def make(name: str, folder: Path) -> Bundle:
    """One of BUNDLES."""
    made: Bundle = BUNDLES[name](folder)
    return made
