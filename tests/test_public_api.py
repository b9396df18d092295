"""The public names: a short list that agrees with reality, and nothing else leaks."""

from __future__ import annotations

import pytest

import compexport


@pytest.mark.parametrize("name", compexport.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(compexport, name)
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_no_name_twice() -> None:
    assert len(set(compexport.__all__)) == len(compexport.__all__)


def test_star_import_gives_exactly_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from compexport import *", names)
    assert set(names) - {"__builtins__"} == set(compexport.__all__)


def test_dir_lists_what_is_not_loaded_yet() -> None:
    assert set(compexport.__all__) <= set(dir(compexport))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'compexport' has no attribute 'biuld'"):
        _ = compexport.biuld  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("CompexportError", 1),
        ("ParityError", 1),
        ("InputError", 2),
        ("BundleError", 2),
        ("DependencyError", 2),
        ("TargetMissed", 3),
    ],
)
def test_errors_carry_their_exit_code(name: str, code: int) -> None:
    error = getattr(compexport, name)
    assert issubclass(error, compexport.CompexportError)
    assert error("x").exit_code == code
