"""Tiny families of every method as real TensorRT-RTX plans, and what must be true of each."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engines.backends.trt_build import Request
from engines.backends.trt_plan import PlanRecord, read_record
from engines.backends.trt_process import PlanProcess
from engines.bundle import Bundle

MARKS = [
    pytest.mark.trt,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (make test-trt)"),
]
FOLDER = "engines/trt-rtx-sm86-sm89-sm120"
TARGETS = ["sm86", "sm89", "sm120"]
_WRITER = "text2text-generation"
# Assemblies beside those of ratios, with tiles of one and two layers at the front and at the back.
_TILINGS = {"front": {"encoder": [2, 1, 1], "decoder": [2, 2]}, "back": {"encoder": [2, 2], "decoder": [1, 1, 2]}}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "variator": ("tiny-bert", "sequence-classification", {"ratios": [2, 4], "untrained": True}),
    "label-words": ("tiny-t5", "label-words", {"ratios": [2], "untrained": True}),
    "costeff": (
        "tiny-bert",
        "sequence-classification",
        {"ratios": [2], "untrained": True, "method": "costeff", "exits": [1, 2], "prefix": True},
    ),
    "ode": ("tiny-albert", "sequence-classification", {"ratios": [2], "engine": True}),
    "decoder": ("tiny-gpt2-shared", "text-generation", {"ratios": [2]}),
    "modular-t5": ("tiny-t5-four", _WRITER, {"ratios": [2], "untrained": True, "strategy": "speed-first"}),
    "modular-bart": ("tiny-bart-four", _WRITER, {"ratios": [2], "untrained": True, "strategy": "speed-first"}),
    "tilings": ("tiny-t5-four", _WRITER, {"ratios": [1], "untrained": True, "tilings": _TILINGS}),
}


class Built:
    """``built("ode", "fp16")``: a bundle of real plans for short texts, built once. Do not write into it."""

    def __init__(self, folder: Path, tiny: Callable[..., Path]) -> None:
        self._folder, self._tiny = folder, tiny
        self._made: dict[tuple[str, str], Path] = {}

    def __call__(self, family: str, precision: str = "fp32") -> Path:
        if (family, precision) not in self._made:
            self._made[family, precision] = self._build(family, precision)
        return self._made[family, precision]

    def _build(self, family: str, precision: str) -> Path:
        from compexport import api
        from engines.backends.trt_options import PlanOptions, Range

        name, task, options = FAMILIES[family]
        given = dict(options)
        plans = PlanOptions(batch=Range(1, 2, 4), length=Range(4, 16, 40))
        steps = api.Steps(engine=given.pop("engine", False))
        more = None
        if tilings := given.pop("tilings", None):
            more = self._folder / f"{family}.json"
            more.write_text(json.dumps(tilings))
        assemblies = api.Assemblies(strategy=given.pop("strategy", None), more=more)
        target = self._folder / f"{family}-{precision}"
        given |= {"plans": plans, "steps": steps, "assemblies": assemblies, "precision": precision}
        api.build_document(self._tiny(name, task), output=target, backend="trt-rtx", **given)
        return target


def require_plans(folder: Path, precision: str) -> list[PlanRecord]:
    """A plan for every graph, whole and of that graph, in the precision that was asked for; their records."""
    bundle = Bundle.open(folder)
    assert not bundle.verify()
    manifest = bundle.manifest
    assert {variant.precision for variant in manifest.variants.values()} == {precision}
    assert {engine.graph for engine in manifest.engines.values()} == manifest.graphs.keys()
    records = []
    for engine in manifest.engines.values():
        assert (engine.backend, engine.device) == ("trt-rtx", ",".join(TARGETS))
        record = read_record(bundle.path / FOLDER / f"{engine.graph}.json")
        graph = manifest.graphs[engine.graph]
        assert record.plugins == [] and record.graph_key == graph.key
        assert (record.inputs, record.outputs) == (graph.inputs, graph.outputs)
        assert record.sha256 == manifest.files[engine.path].sha256
        records.append(record)
        print(f"{engine.graph} {precision}: {record.size_bytes} bytes in {record.build_seconds} s")
    return records


def require_equal_bytes(folder: Path, graph: str, elsewhere: Path) -> None:
    """A second build of a graph's plan, in another folder whose path is longer, gives the same bytes."""
    again = elsewhere / "of another length" / "bundle"
    shutil.copytree(folder, again)
    record = read_record(again / FOLDER / f"{graph}.json")
    plan = again / FOLDER / f"{graph}.plan"
    plan.unlink()
    request = Request("tensorrt_rtx", str(again / f"graphs/{graph}.onnx"), str(plan), record.profiles, TARGETS)
    PlanProcess(request, "TensorRT-RTX").run()
    assert hashlib.sha256(plan.read_bytes()).hexdigest() == record.sha256
