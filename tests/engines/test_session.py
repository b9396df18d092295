"""What every session checks before a backend sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from compexport.errors import InputError
from engines.manifest import TensorSpec
from engines.session import Array, Session

INPUTS = [TensorSpec(name=n, dtype="int64", shape=["batch", "sequence"]) for n in ("input_ids", "attention_mask")]
OUTPUTS = [
    TensorSpec(name="sum", dtype="int64", shape=["batch", "sequence"]),
    TensorSpec(name="product", dtype="int64", shape=["batch", "sequence"]),
]


class Calculator(Session):
    """Adds and multiplies its two inputs."""

    closed = False

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        a, b = feeds["input_ids"], feeds["attention_mask"]
        return [{"sum": a + b, "product": a * b}[name] for name in names]

    def close(self) -> None:
        self.closed = True


def session(*more: TensorSpec) -> Calculator:
    return Calculator("calculator", [*INPUTS, *more], OUTPUTS)


def feeds(**changes: object) -> dict[str, Array]:
    made: dict[str, object] = {"input_ids": np.full((2, 3), 5), "attention_mask": np.full((2, 3), 4), **changes}
    return {name: array for name, array in made.items() if array is not None}  # type: ignore[misc]


def test_all_outputs_by_name() -> None:
    found = session().run(feeds())
    assert list(found) == ["sum", "product"]
    assert (found["sum"] == 9).all() and (found["product"] == 20).all()


def test_some_outputs_in_the_order_asked_for() -> None:
    assert list(session().run(feeds(), ["product"])) == ["product"]
    assert list(session().run(feeds(), ("product", "sum"))) == ["product", "sum"]
    with pytest.raises(InputError, match=r"^calculator: no such output: got quotient, expected \['sum', 'product'\]$"):
        session().run(feeds(), ["sum", "quotient"])


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"attention_mask": None}, "['input_ids']"),
        ({"extra": np.zeros(1)}, "['attention_mask', 'extra', 'input_ids']"),
        ({"attention_mask": None, "mask": np.zeros((2, 3), np.int64)}, "['input_ids', 'mask']"),
    ],
    ids=["missing", "unknown", "renamed"],
)
def test_wrong_names(changes: dict[str, object], got: str) -> None:
    with pytest.raises(InputError) as caught:
        session().run(feeds(**changes))
    assert str(caught.value) == f"calculator: wrong inputs: got {got}, expected ['attention_mask', 'input_ids']"


@pytest.mark.parametrize(
    ("array", "got"),
    [
        (np.full((2, 3), 4, np.int32), "int32[2, 3]"),
        (np.full((2, 3), 4.0, np.float32), "float32[2, 3]"),
        (np.full((2, 3), True), "bool[2, 3]"),
        (np.full(3, 4), "int64[3]"),
        (np.full((), 4), "int64[]"),
        (np.full((2, 3, 1), 4), "int64[2, 3, 1]"),
        (np.full((2, 4), 4), "int64[2, 4]"),
        (np.full((1, 3), 4), "int64[1, 3]"),
        (np.full((3, 2), 4), "int64[3, 2]"),
        (np.full((2, 0), 4), "int64[2, 0]"),
        (np.full((0, 3), 4), "int64[0, 3]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_type_rank_or_size(array: Array, got: str) -> None:
    with pytest.raises(InputError) as caught:
        session().run(feeds(attention_mask=array))
    message = str(caught.value)
    assert message.startswith(f"calculator: input attention_mask: got {got}, expected int64['batch', 'sequence']")
    assert "\n" not in message


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_empty_axes_of_all_inputs(shape: tuple[int, int]) -> None:
    empty = np.zeros(shape, np.int64)
    with pytest.raises(InputError, match="none empty"):
        session().run(feeds(input_ids=empty, attention_mask=empty))


def test_static_axes_are_compared_with_their_number() -> None:
    calculator = session(TensorSpec(name="table", dtype="float32", shape=["batch", 4]))
    calculator.run(feeds(table=np.zeros((2, 4), np.float32)))
    for shape in ((2, 5), (3, 4)):
        with pytest.raises(InputError, match="input table"):
            calculator.run(feeds(table=np.zeros(shape, np.float32)))


def test_closes_as_a_context_manager_even_after_an_error() -> None:
    with pytest.raises(InputError):
        with session() as calculator:
            calculator.run({})
    assert isinstance(calculator, Calculator) and calculator.closed
