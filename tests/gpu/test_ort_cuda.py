"""ONNX Runtime on the card: the answers of the processor, by all methods, with and without CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from onnx import TensorProto, helper

from compexport.errors import CompexportError, DependencyError
from engines.backends import ort, ort_provider
from engines.backends.ort_bound import BoundSession
from engines.backends.ort_rows import rows_taken
from engines.backends.ort_values import array_of, copied, element_type, empty_value, stored
from engines.manifest import TensorSpec
from engines.runtime import Runtime

Precision = Literal["fp32", "fp16"]
BOUND = ["cuda", "cuda-graphs"]
ATOL: dict[str, float] = {"fp32": 1e-3, "fp16": 2e-2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "variator": ("tiny-bert", "sequence-classification", {}),
    "costeff": ("tiny-bert", "sequence-classification", {"method": "costeff"}),
    "ode": ("tiny-albert", "sequence-classification", {}),
    "modular": ("tiny-t5-pair", "text2text-generation", {"method": "modular"}),
}
TEXTS = [["a fine film"], ["a fine film", "nothing but the plot"], ["nothing but the plot", "a fine film"]]


@pytest.fixture(autouse=True, scope="module")
def _provider() -> None:
    """Skips where this environment's ONNX Runtime is the one for the processor."""
    try:
        ort_provider.require_provider("cuda")
    except DependencyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def built(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Precision], Path]:
    """The folder of a method's bundle, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(method: str, precision: Precision) -> Path:
        from exporter import family

        if (method, precision) not in made:
            name, task, options = FAMILIES[method]
            folder = tmp_path_factory.mktemp(method) / "bundle"
            family.build(tiny(name, task), (1, 2), folder, untrained=True, precision=precision, **options)
            made[method, precision] = folder
        return made[method, precision]

    return get


@pytest.mark.parametrize("provider", BOUND)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", ["variator", "costeff", "ode"])
def test_answers_are_the_processors(
    built: Callable[[str, Precision], Path], method: str, precision: Precision, provider: str
) -> None:
    """Each batch three times: as it comes, captured, and replayed with the other's texts in between."""
    folder = built(method, precision)
    with Runtime.open(folder, threads=1) as here, Runtime.open(folder, provider=provider) as there:
        for variant in here.members.engines:
            for texts in TEXTS * 3:
                pairs = zip(here(list(texts), variant=variant), there(list(texts), variant=variant), strict=True)
                for expected, found in pairs:
                    assert expected.scores is not None and found.scores is not None
                    np.testing.assert_allclose(
                        list(found.scores.values()), list(expected.scores.values()), atol=ATOL[precision]
                    )


@pytest.mark.parametrize("provider", BOUND)
def test_texts_are_the_processors(built: Callable[[str, Precision], Path], provider: str) -> None:
    """Greedy and with beams, whose rows are taken on the card."""
    folder = built("modular", "fp32")
    with Runtime.open(folder, threads=1) as here, Runtime.open(folder, provider=provider) as there:
        for variant in here.members.engines:
            for settings in (None, {"num_beams": 3}):
                for texts in TEXTS:
                    how: dict[str, Any] = {"variant": variant, "max_new_tokens": 8, "settings": settings}
                    expected, found = (runtime(list(texts), **how) for runtime in (here, there))
                    assert [one.output["text"] for one in found] == [one.output["text"] for one in expected]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_rows_are_taken_on_the_card(dtype: str) -> None:
    array, number = np.arange(60, dtype=np.float32).reshape(5, 2, 6), element_type(dtype)
    there = empty_value(array.shape, number, "cuda")
    there.update_inplace(stored(array if dtype == "bfloat16" else array.astype(dtype), number))
    for rows in ([4], [3, 0, 0, 2], [0, 1, 2, 3, 4]):
        taken = copied(rows_taken(there, np.array(rows), "cuda"), "cuda")
        assert taken.device_name() == "cuda"
        here = rows_taken(taken, np.arange(len(rows)), "cuda", "cpu")
        assert np.array_equal(array_of(here), array[rows])


def test_captured_runs_repeat_with_other_numbers(tmp_path: Path) -> None:
    """From several threads; what was given before stays as it was."""
    session = opened(tmp_path, "MatMul", "cuda-graphs")
    wrong: list[int] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        before: list[tuple[np.ndarray, Any]] = []
        for turn in range(20):
            x = random.standard_normal((4 + turn % 2, 4 + turn % 2)).astype(np.float32)
            found, held = session.run_held({"x": x}, {}, (), ("y",)) if turn % 3 else (session.run({"x": x}), {})
            before.append((x, held["y"] if held else found["y"]))
        for x, y in before:
            y = y if isinstance(y, np.ndarray) else y.numpy()
            if not np.allclose(y, x @ x, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and session.captured == 2


@pytest.mark.parametrize("provider", BOUND)
def test_nothing_is_computed_on_the_processor(tmp_path: Path, provider: str) -> None:
    with pytest.raises(CompexportError, match="would compute that on the processor: got Tan"):
        opened(tmp_path, "Tan", provider)


def test_the_profile_names_the_card(device: Any) -> None:
    name = ort.device_name({"provider": "cuda"})
    assert name.startswith("cuda-") and device.name.lower().split()[-1] in name


def opened(folder: Path, op: str, provider: str) -> BoundSession:
    """A session of one node, ``y = op(x, x)`` or ``op(x)``."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "a"]) for name in "xy")
    node = helper.make_node(op, ["x", "x"] if op == "MatMul" else ["x"], ["y"])
    graph = helper.make_graph([node], op, [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = folder / f"{op}.onnx"
    path.write_bytes(model.SerializeToString())
    specs = [TensorSpec(name=name, dtype="float32", shape=["a", "a"]) for name in "xy"]
    facts: Any = type("Facts", (), {"inputs": specs[:1], "outputs": specs[1:]})
    return ort.open_bound(op, facts, path, threads=1, provider=provider)
