"""Which folder may import what of ours, and what ``engines`` may never import at all; read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("compexport", "exporter", "calib", "engines", "benchmarks", "tests")
ALLOWED = {
    "engines": ("engines", "compexport.errors"),
    "exporter": ("exporter", "engines.bundle", "engines.manifest", "engines.backends", "compexport.errors"),
    "calib": ("calib", "exporter", "engines", "compexport.errors"),
    # A benchmark may time one part alone, such as the selector or the tracer; nothing may import a benchmark.
    "benchmarks": OURS,
    "compexport": ("compexport", "exporter", "engines", "calib"),
}
HEAVY = ("torch", "transformers", "datasets", "accelerate", "optimum", "onnxscript")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every absolute module name a file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("folder", ALLOWED)
def test_arrows_between_folders(folder: str) -> None:
    files = sources(folder)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported(path)
        if within(name, OURS) and not within(name, ALLOWED[folder])
    ]
    assert not wrong, f"{folder} may import only {', '.join(ALLOWED[folder])}"


def test_benchmarks_are_imported_by_nobody_but_tests() -> None:
    for folder in ("compexport", "exporter", "calib", "engines"):
        names = [name for path in sources(folder) for _, name in imported(path)]
        assert not [name for name in names if within(name, ("benchmarks", "tests"))]


def test_engines_never_import_training_libraries() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("engines")
        for line, name in imported(path)
        if within(name, HEAVY)
    ]
    assert not wrong


def test_errors_import_nothing_of_ours() -> None:
    names = [name for _, name in imported(ROOT / "compexport" / "errors.py")]
    assert not [name for name in names if within(name, OURS)]


def test_the_check_itself_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "probe.py"
    path.write_text("def f():\n    from exporter.ops import x\n    import torch.nn\n")
    assert [name for _, name in imported(path)] == ["exporter.ops.x", "torch.nn"]
