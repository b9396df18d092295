"""Real plans of small graphs, compiled by TensorRT-RTX without a GPU: what is built, and what is refused how."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import onnx
import onnx.parser
import pytest

from compexport.errors import CompexportError
from engines.backends.trt_build import Request
from engines.backends.trt_process import PlanProcess
from engines.backends.trt_profiles import Profile
from tests.engines import fake_trt
from tests.engines.null_core import unknown_names

pytestmark = [
    pytest.mark.trt,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (make test-trt)"),
]
HEAD = '<ir_version: 10, opset_import: ["" : 20, "compexport" : 1]>\n'
SUM = HEAD + "g (float[B,N] x, float[B,N] z) => (float[B,N] y) { y = Add(x, z) }"
BOTH: Profile = {"x": [[1, 4], [2, 8], [4, 16]], "z": [[1, 4], [2, 8], [4, 16]]}


def request(folder: Path, model: str, profiles: list[Profile], **options: object) -> Request:
    """A build of ``model`` for one card; its plan goes to ``folder``."""
    onnx.save(onnx.parser.parse_model(model), folder / "g.onnx")
    asked = {"targets": ["sm89"], **options}
    return Request("tensorrt_rtx", str(folder / "g.onnx"), str(folder / "g.plan"), profiles, **asked)  # type: ignore[arg-type]


def refusal(folder: Path, model: str, profiles: list[Profile], **options: object) -> str:
    with pytest.raises(CompexportError) as caught:
        PlanProcess(request(folder, model, profiles, **options), "TensorRT-RTX").run()
    assert not (folder / "g.plan").exists()
    line = str(caught.value)
    assert line.startswith("g.onnx: TensorRT-RTX cannot build it: got ") and "\n" not in line
    return line


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_name_that_we_use_is_there() -> None:
    import tensorrt_rtx

    assert unknown_names(tensorrt_rtx) == []
    assert fake_trt.differences(tensorrt_rtx) == []


def test_a_plan_is_built_the_same_again(tmp_path: Path) -> None:
    hashes = set()
    for _ in range(2):
        built = PlanProcess(request(tmp_path, SUM, [BOTH]), "TensorRT-RTX").run()
        hashes.add(sha256(tmp_path / "g.plan"))
        (tmp_path / "g.plan").unlink()
    assert len(hashes) == 1
    assert [list(tensor) for tensor in built.outputs] == [["y", "float32", [None, None]]]
    assert built.plugins == [] and built.version.startswith("1.")


def test_options_reach_the_compiler(tmp_path: Path) -> None:
    """Each changes the plan, but for level and workspace, which are only taken."""
    variants: dict[str, dict[str, object]] = {
        "plain": {},
        "targets": {"targets": ["sm86", "sm120"]},
        "detailed": {"detailed": True},
        "versions": {"version_compatible": True, "without_lean": True},
        "level": {"level": 0, "workspace_mib": 64},
    }
    hashes = {}
    for name, options in variants.items():
        PlanProcess(request(tmp_path, SUM, [BOTH], **options), "TensorRT-RTX").run()
        hashes[name] = sha256(tmp_path / "g.plan")
    assert len({hashes[name] for name in ("plain", "targets", "detailed", "versions")}) == 4


def test_an_unsupported_operator_is_named(tmp_path: Path) -> None:
    model = HEAD + "g (float[4,8] x, bool[4] c) => (float[M,8] y) { y = Compress<axis=0>(x, c) }"
    assert refusal(tmp_path, model, []).endswith("got Compress: unsupported node")


def test_where_it_stands_in_a_function_is_said(tmp_path: Path) -> None:
    body = '<domain: "compexport", opset_import: ["" : 20]>\nPick (a, c) => (b) { b = Compress<axis=0>(a, c) }'
    model = HEAD + f"g (float[4,8] x, bool[4] c) => (float[M,8] y) {{ y = compexport.Pick(x, c) }}\n{body}"
    line = refusal(tmp_path, model, [])
    assert "got Compress in " in line and "(Pick): unsupported node" in line


def test_sizes_of_one_symbol_must_be_equal(tmp_path: Path) -> None:
    line = refusal(tmp_path, SUM, [{**BOTH, "z": [[1, 4], [3, 8], [4, 16]]}])
    assert "Dimensions with name B must be equal" in line and "2 != 3" in line


@pytest.mark.parametrize("profile", [{"x": BOTH["x"]}, {**BOTH, "q": BOTH["x"]}])
def test_a_profile_of_other_inputs(tmp_path: Path, profile: Profile) -> None:
    assert f"got profile 0 of {', '.join(sorted(profile))}, expected x, z" in refusal(tmp_path, SUM, [profile])


def test_a_profile_that_shrinks(tmp_path: Path) -> None:
    line = refusal(tmp_path, SUM, [{**BOTH, "x": [[3, 4], [2, 8], [4, 16]]}])
    assert "got profile 0: " in line and "MIN<=OPT<=MAX" in line


def test_a_card_that_is_not_supported(tmp_path: Path) -> None:
    line = refusal(tmp_path, SUM, [BOTH], targets=["sm90"])
    assert "no compute capability sm90, one of sm120" in line and "sm89" in line


def test_a_build_stops_when_it_is_told_to(tmp_path: Path) -> None:
    process = PlanProcess(request(tmp_path, SUM, [BOTH]), "TensorRT-RTX")
    process.cancel()
    with pytest.raises(CompexportError, match="got cancelled"):
        process.run()
    assert not (tmp_path / "g.plan").exists()


def test_the_compiler_stops_at_the_next_step(tmp_path: Path) -> None:
    """In this process, so that the moment is known: after the first step that is told."""
    import tensorrt_rtx

    from engines.backends.trt_build import BuildError, build

    asked = []

    def cancelled() -> bool:
        asked.append(True)
        return len(asked) > 3

    shares: list[float] = []
    with pytest.raises(BuildError, match="cancelled") as caught:
        build(tensorrt_rtx, request(tmp_path, SUM, [BOTH]), lambda stage, share: shares.append(share), cancelled)
    assert caught.value.cancelled and not (tmp_path / "g.plan").exists()
    assert shares and all(0 <= share <= 1 for share in shares)
