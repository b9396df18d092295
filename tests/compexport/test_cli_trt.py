"""``compexport build`` for TensorRT: recipes where it cannot build, what they hold, and how they are finished."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from compexport.errors import BundleError, DependencyError
from engines.backends import cuda, trt
from engines.backends.trt_plan import read_recipe
from engines.backends.trt_product import Product
from engines.bundle import Bundle
from engines.bundle_manifest import seal_of
from engines.bundle_reader import sha256_of
from tests.engines import trt_modules

Cli = Callable[..., Any]
RECIPES = "engines/trt-recipe"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's libraries and devices, whatever this one has."""
    monkeypatch.setattr("engines.backends.trt_product.find_spec", lambda name: None)
    monkeypatch.setattr(cuda, "devices", list)


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-bert", "sequence-classification")


def build(cli: Cli, model: Path, *options: str) -> Any:
    return cli("build", model, "--ratio", "2,4", "--untrained", "--backend", "trt", *options)


def test_recipes_instead_of_plans(cli: Cli, model: Path, bundle: Path, elsewhere: None) -> None:
    before = Bundle.open(bundle).manifest
    done = build(cli, model, "--batch", "1:2:4", "--length", "8:16:64", "--workspace-mib", "64", "--detailed", "--json")
    assert done.code == 0, done.err
    said = "tensorrt is missing; pip install 'compexport[tensorrt]'; recipes are written instead: where there is a GPU"
    assert f"compexport: warning: {said}, `compexport build --from-recipe BUNDLE` builds plans" in done.err
    engines = {(row["graph"], row["backend"]) for row in done.document["engines"]}
    # What was there for the processor stays.
    assert engines == {(graph, backend) for graph in ("r1", "r2", "r4") for backend in ("ort", "trt-recipe")}
    assert not list(bundle.rglob("*.plan"))
    opened = Bundle.open(bundle)
    assert not opened.verify()
    assert {n: g.key for n, g in opened.manifest.graphs.items()} == {n: g.key for n, g in before.graphs.items()}
    assert opened.manifest.versions["ort"] == before.versions["ort"]
    recipe = read_recipe(bundle / RECIPES / "r2.json")
    assert (recipe.product, recipe.minimum_version, recipe.onnx) == ("trt", "11.2", "graphs/r2.onnx")
    assert recipe.profiles[0]["input_ids"] == [[1, 8], [2, 16], [4, 64]]
    _check_trtexec((bundle / RECIPES / "r2.sh").read_text())
    tree = ast.parse((bundle / RECIPES / "r2.py").read_text())
    profiles = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PROFILES"
    )  # type: ignore[attr-defined]
    assert ast.literal_eval(profiles)[0]["input_ids"] == [(1, 8), (2, 16), (4, 64)]
    # Nothing is left to do.
    again = build(cli, model, "--batch", "1:2:4", "--length", "8:16:64", "--workspace-mib", "64", "--detailed")
    assert "writing recipes" not in again.err and again.code == 0
    assert said in again.err


def _check_trtexec(script: str) -> None:
    assert script.startswith("#!/bin/sh\n")
    words = shlex.split(script[script.index("exec ") :].replace("\\\n", ""))
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    for end, size in (("min", "1x8"), ("opt", "2x16"), ("max", "4x64")):
        (shapes,) = [word for word in words if word.startswith(f"--{end}Shapes=")]
        assert shapes == f"--{end}Shapes=" + ",".join(f"{name}:{size}" for name in inputs)
    assert "--timingCacheFile=timing.cache" in words
    assert words[:3] == ["exec", "trtexec", "--onnx=$here/../../graphs/r2.onnx"]
    assert {"--skipInference", "--memPoolSize=workspace:64", "--profilingVerbosity=detailed"} <= set(words)
    assert "--stripWeights" not in words


def test_all_builds_share_one_timing_cache(
    cli: Cli, model: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library, whose timings of a graph are its name."""
    trt_modules.write(tmp_path, "tensorrt", trt_modules.TIMING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(Product, "unavailable", lambda self: "")
    monkeypatch.setattr(Product, "version", lambda self: "11.4.0.106")
    monkeypatch.setattr(cuda, "devices", lambda: [cuda.Device(0, "some card", "sm89")])
    timings = bundle / "engines/trt-sm89/timing.cache"
    assert build(cli, model, "--level", "1").code == 0
    assert timings.read_text() == "r1 r2 r4 "
    manifest = Bundle.open(bundle).manifest
    own = [engine for engine in manifest.engines.values() if engine.backend == "trt"]
    assert len(own) == 3 and all("engines/trt-sm89/timing.cache" in engine.files for engine in own)
    # Other options are other plans, of which much the same is timed.
    kept = shutil.copytree(bundle, tmp_path / "kept")
    assert build(cli, model, "--level", "2").code == 0
    assert timings.read_text() == "r1 r2 r4 r1 r2 r4 "
    assert not Bundle.open(bundle).verify()
    assert build(cli, model, "--level", "2", "--recipe").code == 0
    done = cli("build", "--from-recipe", bundle)
    assert done.code == 0, done.err
    assert timings.read_text() == "r1 r2 r4 " * 3
    # One that the library refuses, or that is damaged, is begun anew.
    (kept / "engines/trt-sm89/timing.cache").write_text("damaged")
    assert build(cli, model, "--level", "3", "-o", str(kept)).code == 0
    assert (kept / "engines/trt-sm89/timing.cache").read_text() == "r1 r2 r4 "


def test_what_another_graph_throws_away_is_said(cli: Cli, model: Path, bundle: Path, elsewhere: None) -> None:
    """Not what stays, and not what this build makes anew."""
    done = build(cli, model, "--seed", "1")  # other random plugins
    assert done.code == 0, done.err
    assert "bundle holds 2 engine(s) of ort (cpu-" in done.err
    assert "which go: their graphs are replaced; build for these again" in done.err
    assert [e.graph for e in Bundle.open(bundle).manifest.engines.values() if e.backend == "ort"] == ["r1"]
    done = build(cli, model, "--seed", "2")
    assert done.code == 0 and "which go" not in done.err
    done = cli("build", model, "--ratio", "2,4", "--untrained", "--seed", "2")
    assert done.code == 0 and "which go" not in done.err


def test_recipes_with_plugins_register_them(cli: Cli, model: Path, bundle: Path, elsewhere: None) -> None:
    done = build(cli, model, "--recipe", "--plugins")
    assert done.code == 0, done.err
    assert read_recipe(bundle / RECIPES / "r2.json").options["plugins"] is True
    script = (bundle / RECIPES / "r2.py").read_text()
    ast.parse(script)
    assert "from engines.plugins import merge" in script and "\nmerge.register()\n" in script
    assert not (bundle / RECIPES / "r2.sh").exists()  # trtexec could not


def test_recipes_are_not_finished_where_they_cannot_be(cli: Cli, model: Path, bundle: Path, elsewhere: None) -> None:
    assert build(cli, model).code == 0
    kept = (bundle / "manifest.json").read_bytes()
    done = cli("build", "--from-recipe", bundle)
    assert done.code == 2
    assert done.error.startswith("the recipes cannot be finished here: got tensorrt is missing")
    assert (bundle / "manifest.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"graph": "r1"}, "the recipe of r2 is of another graph"),
        ({"graph": "../../../r2"}, "the recipe of r2 is of another graph"),
        ({"options": {"sparse": True}}, "the recipe of r1: options: got "),
        ({"options": {"batch": 8}}, "the recipe of r1: options: got "),
    ],
)
def test_recipes_that_say_something_else(
    cli: Cli, model: Path, bundle: Path, elsewhere: None, changed: dict[str, Any], message: str
) -> None:
    assert build(cli, model).code == 0
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    for graph in ("r2",) if "graph" in changed else ("r1", "r2", "r4"):
        path = f"{RECIPES}/{graph}.json"
        (bundle / path).write_text(json.dumps({**json.loads((bundle / path).read_text()), **changed}))
        entry = {"size_bytes": (bundle / path).stat().st_size, "sha256": sha256_of(bundle / path)}
        manifest["files"][path] = entry
    raw = json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(raw)
    (bundle / "manifest.sha256").write_bytes(seal_of(raw))
    done = cli("build", "--from-recipe", bundle)
    assert done.code == 2 and message in done.error


def test_a_recipe_is_no_engine(cli: Cli, model: Path, bundle: Path, elsewhere: None, monkeypatch: Any) -> None:
    assert build(cli, model).code == 0
    monkeypatch.setattr(Product, "unavailable", lambda self: "")
    monkeypatch.setattr(cuda, "devices", lambda: [cuda.Device(0, "some card", "sm89")])
    with pytest.raises(
        BundleError, match=r"no trt engine of r1: got a recipe; `compexport build --from-recipe .* here"
    ):
        trt.TRT.open_sessions(Bundle.open(bundle))
    done = cli("run", bundle, "--backend", "trt", "--text", "a film")
    there = (
        "got engines for ort, trt-recipe; choose --backend ort, or run `compexport build --from-recipe` with the bundle"
    )
    assert (done.code, done.error) == (2, f"variant variator-r1-fp32 has no engine for backend trt: {there}")
    # Another card; a build that names no precision would replace the bundle by one in fp32.
    manifest = Bundle.open(bundle).manifest
    halves = {name: one.model_copy(update={"precision": "fp16"}) for name, one in manifest.variants.items()}
    half = SimpleNamespace(path=bundle, manifest=manifest.model_copy(update={"variants": halves, "engines": {}}))
    with pytest.raises(BundleError, match="no trt engine of r1; .* `compexport build --backend trt --precision fp16`"):
        trt.TRT.checked_plan(cast(Bundle, half), "r1", cuda.devices()[0])


def test_nothing_else_is_said_beside_from_recipe(cli: Cli, bundle: Path) -> None:
    done = cli("build", "--from-recipe", bundle, "--target", "sm89", "--json")
    assert done.code == 2 and done.error == "--from-recipe goes with no other option: got --target"


def test_no_recipes(cli: Cli, bundle: Path) -> None:
    done = cli("build", "--from-recipe", bundle)
    assert done.code == 2 and "no recipes; `compexport build --backend trt --recipe` writes them" in done.error


def test_the_library_is_named_where_it_could_be_installed(cli: Cli, model: Path, elsewhere: None) -> None:
    done = cli("build", model, "--ratio", "2", "--untrained", "--backend", "trt-rtx")
    assert done.code == 2 and done.error == "tensorrt_rtx is missing; pip install 'compexport[rtx]'"
    with pytest.raises(DependencyError):
        trt.RTX.require()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "4:2:1"], "--batch: got '4:2:1', expected 1 <= smallest <= usual <= largest"),
        (["--length", "8:16:900"], "--length: got 8:16:900, expected at most 160 tokens"),
        (["--target", "ada"], "--target: got 'ada', expected compute capabilities like sm86,sm89"),
        (["--target", "sm89"], "--target: got the backend trt, expected trt-rtx"),
    ],
)
def test_options_that_are_refused(
    cli: Cli, model: Path, bundle: Path, elsewhere: None, options: list[str], message: str
) -> None:
    done = build(cli, model, *options)
    assert done.code == 2 and message in done.err.splitlines()[-1]


def test_options_of_plans_belong_to_plans(cli: Cli, model: Path, bundle: Path, tmp_path: Path) -> None:
    """Typed with another backend they are refused; a file may hold them for when they are meant."""
    plain = ["build", model, "--ratio", "2,4", "--untrained"]
    done = cli(*plain, "--detailed")
    assert done.code == 2 and done.error == "--detailed: got the backend ort, expected trt or trt-rtx"
    (tmp_path / "compexport.toml").write_text("[build]\nlength = [8, 16, 64]\nlevel = 2\n")
    assert cli(*plain).code == 0
    done = build(cli, model, "--recipe")
    assert done.code == 0, done.err
    options = json.loads((bundle / RECIPES / "r1.json").read_text())["options"]
    assert (options["length"], options["level"]) == ("8:16:64", 2)
    assert "recipes are written" not in done.err  # they were asked for
