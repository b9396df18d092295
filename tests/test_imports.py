"""Importing is cheap: a service that only answers requests never loads torch, and --help loads next to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE_MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "engines").rglob("*.py")
    if path.parts[-2:] != ("plugins", "kernels.py")  # is Triton's, and read only to be compiled
)
TRAINING = {
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "optimum",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "safetensors",
}
RUNTIMES = {"onnxruntime", "tokenizers"}
DRAWING = {"rich", "matplotlib", "pandas", "scipy"}


def loaded_after(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` of a fresh interpreter after ``code``."""
    probe = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_compexport_loads_nothing_heavy() -> None:
    loaded = loaded_after("import compexport")
    assert not loaded & (TRAINING | RUNTIMES | DRAWING | {"numpy", "pydantic", "typer"})


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    loaded = loaded_after("import compexport.cli")
    assert not loaded & (TRAINING | RUNTIMES | DRAWING | {"numpy", "pydantic"})


def test_importing_engines_loads_no_training_library_and_no_runtime() -> None:
    loaded = loaded_after("\n".join(f"import {name}" for name in ENGINE_MODULES))
    assert not loaded & (TRAINING | RUNTIMES | DRAWING)


@pytest.mark.parametrize("name", ["Bundle", "Runtime", "Result", "Decision", "load", "build", "bench", "evaluate"])
def test_public_names_load_no_training_library(name: str) -> None:
    assert not loaded_after(f"import compexport; compexport.{name}") & TRAINING


@pytest.mark.parametrize("name", ["exporter", "engines", "calib"])
def test_a_package_that_hides_ours_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", "import compexport"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"another package named '{name}' at {tmp_path / name} hides compexport's own" in last
