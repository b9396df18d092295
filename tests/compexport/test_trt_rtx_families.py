"""Families as real TensorRT-RTX plans, compiled here without a GPU, and what becomes of them in a bundle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compexport.errors import BundleError, CompexportError, InputError
from engines.backends import cuda, trt
from engines.bundle import Bundle
from tests.compexport.rtx_families import FOLDER, MARKS, Built, require_equal_bytes, require_plans

pytestmark = MARKS
BUILDS = [(family, precision) for family in ("variator", "label-words", "costeff") for precision in ("fp32", "fp16")]
BUILDS += [(family, "bf16") for family in ("variator", "costeff")]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Built:
    return Built(tmp_path_factory.mktemp("rtx"), tiny)


@pytest.mark.parametrize(("family", "precision"), BUILDS)
def test_every_graph_becomes_a_plan(bundles: Built, family: str, precision: str) -> None:
    assert {len(record.profiles) for record in require_plans(bundles(family, precision), precision)} == {1}


@pytest.mark.parametrize(
    ("family", "precision", "graph"),
    [("variator", "fp32", "r2"), ("variator", "bf16", "r4"), ("costeff", "fp16", "costeff-r2-s1")],
)
def test_a_second_build_gives_the_same_bytes(
    bundles: Built, tmp_path: Path, family: str, precision: str, graph: str
) -> None:
    require_equal_bytes(bundles(family, precision), graph, tmp_path)


def test_recipes_are_finished_by_ourselves_and_by_polygraphy(
    bundles: Built, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """As plans they are what a build without recipes makes."""
    from compexport import api
    from engines.backends.trt_options import PlanOptions, Range

    direct = bundles("variator")
    bundle = tmp_path / "bundle"
    shutil.copytree(direct, bundle)
    plans = PlanOptions(batch=Range(1, 2, 4), length=Range(4, 16, 40), recipe=True)
    model = tiny("tiny-bert", "sequence-classification")
    api.build_document(model, ratios=[2, 4], untrained=True, output=bundle, backend="trt-rtx", plans=plans)
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    # The machine with the GPU has the bundle alone, and neither torch nor the model.
    code = "import sys; sys.modules['torch'] = None; from compexport.cli import main; sys.exit(main(sys.argv[1:]))"
    done = _python("-c", code, "build", "--from-recipe", bundle, "--json")
    assert done.returncode == 0, done.stderr
    backends = {(row["graph"], row["backend"]) for row in json.loads(done.stdout)["engines"]}
    assert backends == {(graph, name) for graph in ("r1", "r2", "r4") for name in ("trt-rtx", "trt-rtx-recipe")}
    opened = Bundle.open(bundle)
    assert not opened.verify()
    expected = Bundle.open(direct).manifest.files
    for graph in ("r1", "r2", "r4"):
        plan = f"{FOLDER}/{graph}.plan"
        assert opened.manifest.files[plan] == expected[plan]
    if find_spec("polygraphy") is None:
        pytest.skip("polygraphy is not installed (make test-trt)")
    theirs = tmp_path / "r2.plan"
    done = _python(bundle / "engines/trt-rtx-recipe/r2.py", theirs)
    assert done.returncode == 0, done.stderr
    assert theirs.stat().st_size > 0.5 * opened.manifest.files[f"{FOLDER}/r2.plan"].size_bytes
    assert not list((bundle / "engines/trt-rtx-recipe").glob("*.sh"))


def _python(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": root},
    )


def test_plans_are_checked_before_they_are_opened(
    bundles: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundles("variator"))
    ada, hopper = cuda.Device(0, "an RTX card", "sm89"), cuda.Device(0, "another", "sm90")
    path, record = trt.RTX.checked_plan(bundle, "r2", ada)
    assert path == bundle.path / FOLDER / "r2.plan" and record.version == trt.RTX.version()
    with pytest.raises(BundleError, match=r"got a plan for sm86, sm89, sm120, expected one for sm90 \(another\)"):
        trt.RTX.checked_plan(bundle, "r2", hopper)
    with pytest.raises(BundleError, match=r"no trt engine of r2; build it here with `compexport build --backend trt`"):
        trt.TRT.checked_plan(bundle, "r2", ada)
    monkeypatch.setattr(type(trt.RTX), "version", lambda self: "1.8.0.1")
    with pytest.raises(BundleError, match=r"got a plan of version 1\.7.*, expected 1.8.0.1, which is installed"):
        trt.RTX.checked_plan(bundle, "r2", ada)


def test_a_build_that_is_interrupted_leaves_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C while a plan is compiled: the compiler's process ends, and there is no bundle."""
    from compexport import api

    seen: list[float] = []

    def interrupt(message: str, done: float | None = None, total: float | None = None) -> None:
        if message.startswith("building r2 with TensorRT-RTX") and done is not None and total == 1.0:
            seen.append(done)
            if done > 0:
                raise KeyboardInterrupt

    model = tiny("tiny-bert", "sequence-classification")
    options: dict[str, Any] = {"ratios": [2], "untrained": True, "backend": "trt-rtx"}
    with pytest.raises(KeyboardInterrupt):
        api.build_document(model, output=tmp_path / "bundle", progress=interrupt, **options)
    assert 0 < seen[-1] <= 1
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert not _children()


def _children() -> list[str]:
    """Command lines of this process's living children that build plans."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and "trt_build" in command:
            found.append(command)
    return found


def test_a_failed_plan_leaves_the_bundle_as_it_was(
    bundles: Built, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compexport import api
    from engines.backends.trt_options import PlanOptions

    bundle = tmp_path / "bundle"
    shutil.copytree(bundles("variator"), bundle)
    before = (bundle / "manifest.json").read_bytes()
    model = tiny("tiny-bert", "sequence-classification")
    options: dict[str, Any] = {"ratios": [2], "untrained": True, "backend": "trt-rtx"}
    with pytest.raises(InputError, match=r"--target: TensorRT-RTX 1.* does not know it: got sm90, expected one of"):
        api.build_document(model, output=bundle, plans=PlanOptions(targets=("sm90",)), **options)
    monkeypatch.setattr("engines.backends.trt.require_targets", lambda *asked: None)
    with pytest.raises(CompexportError, match=r"r1.onnx: TensorRT-RTX 1.* cannot build it: got no compute capability"):
        api.build_document(model, output=bundle, plans=PlanOptions(targets=("sm90",)), **options)
    assert (bundle / "manifest.json").read_bytes() == before
