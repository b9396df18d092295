"""The merge kernels: run by Triton's interpreter on the CPU against the eager operators, compiled for every card."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compexport.errors import CompexportError, InputError
from engines.plugins import ptx
from engines.plugins.ptx import KernelShape
from exporter import ops

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: make test-trt"
)
NAMES = {op.name: op.torch_name.split("::")[1] for op in ops.OPS}
# Largest difference from the eager operator in float64, on the same rounded inputs, relative to the largest value: a
# few roundings of the result, and of the codes between the two products of TokenSplit.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What Triton's interpreter makes of the kernels, on the CPU."""
    path = tmp_path_factory.mktemp("interpreted") / "rows.json"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("kernel_child.py"), path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return answer


@pytest.mark.trt
@needs_triton
@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_kernel_is_the_eager_operator(interpreted: dict[str, Any], op: ops.Op, kind: str) -> None:
    rows = [row for row in interpreted["rows"] if row["op"] == op.name and row["kind"] == kind]
    assert len(rows) >= 9
    spacing = torch.finfo(getattr(torch, kind)).eps
    for row in rows:
        assert row["same"], row
        scale = max(1.0, row["largest"])
        assert row["worst"] <= TOLERANCE[kind] * scale, row
        assert row["worst"] <= row["eager_worst"] + 4 * spacing * scale, row  # no worse than eager in this type


@pytest.mark.trt
@needs_triton
def test_masked_kernel_ignores_what_the_mask_hides(interpreted: dict[str, Any]) -> None:
    assert interpreted["hidden"] == {"unchanged": True, "zero": True}


# --- compiled ---------------------------------------------------------------------------------------------------------


def _assembled(code: ptx.Compiled, folder: Path) -> str:
    """What NVIDIA's assembler, part of Triton, says of the PTX; it fails on an error."""
    import triton

    target = re.search(r"\.target (\w+)", code.ptx)
    assert target is not None
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = int(re.sub(r"\D", "", target[1])) >= 100 and (tools / "ptxas-blackwell").exists()
    path = folder / "kernel.ptx"
    path.write_text(code.ptx, encoding="utf-8")
    command = [tools / ("ptxas-blackwell" if newer else "ptxas"), "-v", f"-arch={target[1]}", path, "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile in this run, not take what an earlier one left in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


BUILDS = [
    *((name, "float16", capability) for name in NAMES.values() for capability in (80, 90, 100, 120)),
    *((name, kind, 80) for name in NAMES.values() for kind in ("float32", "bfloat16")),
]


@pytest.mark.trt
@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(("operator", "kind", "capability"), BUILDS)
def test_kernel_compiles_and_assembles(operator: str, kind: str, capability: int, tmp_path: Path) -> None:
    code = ptx.compiled(operator, kind, KernelShape(4, 96, 24), capability)
    inputs = next(len(op.inputs) for op in ops.OPS if NAMES[op.name] == operator)
    assert code.name == operator and code.parameters == inputs + len(ptx.SIZES) + 1
    assert code.shared_bytes <= ptx.SHARED_BYTES and code.threads == 128
    own_alone = "a" if capability >= 90 else ""  # what ``ptx.capability_for`` goes by
    assert re.search(rf"\.target sm_{capability}{own_alone}\b", code.ptx)
    major, minor = divmod(ptx.CAPABILITIES[capability], 10)
    assert f".version {major}.{minor}" in code.ptx
    stored = re.search(r"(\d+) bytes spill stores", _assembled(code, tmp_path))
    # Without matrix units, which know no float32, all partial sums are in registers; a few do not fit.
    assert stored is not None and int(stored[1]) <= (64 if kind == "float32" else 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("token_merge", "float16", KernelShape(4, 64), 75), "merge kernels: got sm75, expected one of sm80"),
        (("token_merge", "int8", KernelShape(4, 64), 80), "merge kernels: got int8, expected one of float32"),
        (("token_merge", "float16", KernelShape(64, 64), 80), "got ratio 64, width 0, expected ratios to 32"),
        (("token_split", "float16", KernelShape(2, 64, 300), 80), "got ratio 2, width 300"),
    ],
)
def test_kernel_that_there_is_not(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        ptx.compiled(*arguments)


ENTRY = """.version 8.6
.visible .entry merge(
    .param .u64 .ptr .global .align 16 merge_param_0,
    .param .u32 merge_param_1,
    .param .u64 .ptr .global .align 1 merge_param_2
)
.reqntid 128
{
    ld.param.b64 %rd1, [merge_param_0];
    ld.param.b32 %r1, [merge_param_1];
    ret;
}
"""


def test_parameters_that_nothing_reads_are_dropped() -> None:
    code = ptx.without_last_parameters(ENTRY, 2)
    assert re.findall(r"\.param .*(merge_param_\d)", code) == ["merge_param_0", "merge_param_1"]
    assert code.endswith(ENTRY[ENTRY.index(")\n") :])
    assert len(re.findall(r"merge_param_2", ptx.without_last_parameters(ENTRY, 3))) == 1


@pytest.mark.parametrize(
    ("code", "kept", "says"),
    [
        (ENTRY, 1, "got one that reads merge_param_1"),
        (ENTRY, 5, "got 3 parameters, expected 5 at least"),
        (".version 8.6", 1, "got no entry"),
    ],
)
def test_parameters_that_cannot_be_dropped(code: str, kept: int, says: str) -> None:
    with pytest.raises(CompexportError, match=says):
        ptx.without_last_parameters(code, kept)
