"""From a model to plans that run, on the device: every method and precision, refitted, with plugins, from recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from compexport import api
from compexport.errors import InputError
from engines.backends.cuda import Device
from engines.backends.trt_options import PlanOptions, Range
from engines.backends.trt_plan import read_record
from engines.bundle import Bundle
from engines.runtime import Runtime
from tests.compexport.rtx_families import FAMILIES

TEXTS = ["a fine film with a quiet heart", "the plot is thin"]
CLASSIFIERS = ("variator", "label-words", "costeff", "ode")
# Of probabilities, between TensorRT, which multiplies fp32 in TF32, and ONNX Runtime on the processor in fp32.
TOLERANCE = {"fp32": 2e-2, "fp16": 5e-2, "bf16": 0.2}
BUILDS = [(family, precision) for family in FAMILIES if family != "tilings" for precision in ("fp32", "fp16")]
BUILDS += [(family, "bf16") for family in ("variator", "costeff", "ode", "modular-t5")]


@pytest.fixture(scope="module")
def options(plan_backend: Any, device: Device) -> PlanOptions:
    """Plans for this device and short texts."""
    targets = (device.capability,) if plan_backend.product.targets else None
    return PlanOptions(batch=Range(1, 2, 4), length=Range(1, 16, 40), targets=targets)


@pytest.fixture(scope="module")
def build(
    plan_backend: Any, options: PlanOptions, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``build("ode", "fp16", strip=True)``: a bundle with plans, made once; ``changes`` are of ``PlanOptions``."""
    made: dict[Any, Path] = {}

    def get(family: str, precision: str = "fp32", backend: str = plan_backend.NAME, **changes: Any) -> Path:
        key = (family, precision, backend, *sorted(changes.items()))
        if key not in made:
            name, task, given = FAMILIES[family]
            given = {one: value for one, value in given.items() if one not in ("engine", "strategy", "tilings")}
            plans = None if backend == "ort" else replace(options, **changes)
            target = tmp_path_factory.mktemp("plans") / "bundle"
            given |= {"backend": backend, "plans": plans, "precision": precision}
            api.build_document(tiny(name, task), output=target, **given)
            made[key] = target
        return made[key]

    return get


def answers(folder: Path, backend: str) -> dict[str, list[Any]]:
    """What every variant answers, by ratio, which are named alike in all precisions."""
    with Runtime(Bundle.open(folder), backend=backend, provider="cpu" if backend == "ort" else "") as runtime:
        return {name.rsplit("-", 1)[0]: runtime.answers(name, TEXTS) for name in runtime.members.engines}


def require_close(got: dict[str, list[Any]], expected: dict[str, list[Any]], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, rows in expected.items():
        for mine, theirs in zip(got[name], rows, strict=True):
            assert mine["scores"] == pytest.approx(theirs["scores"], abs=tolerance), name


@pytest.mark.parametrize(("family", "precision"), BUILDS)
def test_a_family_is_compiled_and_answers(
    build: Callable[..., Path], plan_backend: Any, family: str, precision: str
) -> None:
    got = answers(build(family, precision), plan_backend.NAME)
    if family in CLASSIFIERS:
        require_close(got, answers(build(family, backend="ort"), "ort"), TOLERANCE[precision])
    else:
        assert all(len(rows) == len(TEXTS) for rows in got.values())


def test_plans_without_weights_take_them_from_the_graphs(build: Callable[..., Path], plan_backend: Any) -> None:
    whole, stripped = build("variator"), build("variator", strip=True)
    sizes = [sum(plan.stat().st_size for plan in folder.rglob("*.plan")) for folder in (whole, stripped)]
    assert sizes[1] < sizes[0]
    require_close(answers(stripped, plan_backend.NAME), answers(whole, plan_backend.NAME), 1e-3)


def test_portable_plans_run_too(build: Callable[..., Path], plan_backend: Any) -> None:
    changes = {"version_compatible": True, "detailed": True}
    if not plan_backend.product.targets:
        changes["hardware_compatible"] = True
    expected = answers(build("variator"), plan_backend.NAME)
    require_close(answers(build("variator", **changes), plan_backend.NAME), expected, TOLERANCE["fp32"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_plugins_compute_what_the_bodies_do(build: Callable[..., Path], plan_backend: Any, precision: str) -> None:
    if plan_backend.product.targets:
        pytest.skip("TensorRT-RTX has no plugins")
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = build("variator", precision, plugins=True)
    records = [read_record(path.with_suffix(".json")) for path in folder.rglob("*.plan")]
    assert sum(bool(record.plugins) for record in records) == len(records) - 1  # all but the model itself
    require_close(answers(folder, "trt"), answers(build("variator", precision), "trt"), TOLERANCE[precision])


def test_recipes_are_finished(build: Callable[..., Path], plan_backend: Any) -> None:
    folder = build("variator", recipe=True)
    assert not list(folder.rglob("*.plan"))
    api.build_recipes(folder)
    assert not Bundle.open(folder).verify()
    require_close(answers(folder, plan_backend.NAME), answers(build("variator"), plan_backend.NAME), 1e-2)


def test_timings_are_kept_for_the_next_build(
    plan_backend: Any, options: PlanOptions, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    if not plan_backend.product.keeps_timings:
        pytest.skip("TensorRT-RTX times nothing")
    model, target = tiny("tiny-bert", "sequence-classification"), tmp_path / "bundle"
    sizes = []
    for level in (None, 3):  # which is the default: the same work, asked for in other words
        plans = replace(options, level=level)
        api.build_document(model, ratios=[2], untrained=True, output=target, backend="trt", plans=plans)
        (cache,) = target.rglob("timing.cache")
        sizes.append(cache.stat().st_size)
    assert 0 < sizes[0] <= sizes[1]


def test_shapes_outside_the_profiles_are_refused(build: Callable[..., Path], plan_backend: Any) -> None:
    with Runtime(Bundle.open(build("variator")), backend=plan_backend.NAME, provider="") as runtime:
        name = runtime.members.of_ratio(2)
        with pytest.raises(InputError, match=r"shapes outside the plan: got input_ids \[5, "):
            runtime.answers(name, TEXTS * 2 + TEXTS[:1])
