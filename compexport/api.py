"""What one does with compexport: build, train, load, bench, evaluate, select, run, inspect, verify.

Each is a short composition of the folders below; the command line calls the same functions. Those whose result a
command prints return that command's JSON document as a dict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import BundleError, InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.runtime import Runtime
    from engines.text import Text

METHODS = ("variator",)
PRECISIONS = ("fp32",)
DEFAULT_RATIOS = (2, 4, 8)
DEFAULT_LENGTH = 128


@dataclass(frozen=True)
class Columns:
    """Which columns of a data file to read; None recognises the usual names."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None


@dataclass(frozen=True)
class Fit:
    """How long and from which seed plugins are fitted; None keeps the method's own default."""

    steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Device:
    """Which engines to use and how; ``threads`` None lets the backend decide."""

    backend: str = "ort"
    provider: str = "cpu"
    threads: int | None = None


COLUMNS, FIT, DEVICE = Columns(), Fit(), Device()  # the defaults


def quiet(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


def open_bundle(path: str | Path) -> Bundle:
    """Open and check a bundle; raises BundleError."""
    from engines.bundle import Bundle

    return Bundle.open(path)


def load(
    path: str | Path = "bundle",
    backend: str = "ort",
    threads: int | None = None,
    provider: str = "cpu",
    variants: Sequence[str] | None = None,
) -> Runtime:
    """Open the bundle at ``path`` for answering; needs neither torch nor transformers.

    Raises BundleError for a damaged bundle or one without engines of this backend, DependencyError when the backend's
    library is missing.
    """
    from engines.runtime import Runtime

    return Runtime.open(path, backend=backend, threads=threads, provider=provider, variants=variants)


def inspect(bundle: str | Path = "bundle") -> dict[str, Any]:
    """The checked manifest."""
    return open_bundle(bundle).manifest.model_dump(mode="json")


def verify(bundle: str | Path = "bundle") -> dict[str, Any]:
    """Read and hash every file; damage is reported, not raised, as long as there is a bundle to look at."""
    try:
        opened = open_bundle(bundle)
    except BundleError as error:
        if not (Path(bundle) / "manifest.json").is_file():
            raise
        return {"ok": False, "files": 0, "problems": [{"file": "manifest.json", "problem": str(error)}]}
    problems = [{"file": problem.file, "problem": problem.problem} for problem in opened.verify()]
    return {"ok": not problems, "files": len(opened.manifest.files), "problems": problems}


# --- making a family -----------------------------------------------------------------------------------------------


def build(
    model: str | Path = ".", ratios: Sequence[float] | None = None, output: str | Path = "bundle", **options: Any
) -> Bundle:
    """Build every ratio of ``model`` into the bundle ``output`` and open it; options as of ``build_document``."""
    build_document(model, ratios=ratios, output=output, **options)
    return open_bundle(output)


def build_document(
    model: str | Path = ".",
    *,
    ratios: Sequence[float] | None = None,
    output: str | Path = "bundle",
    backend: str = "ort",
    precision: str = "fp32",
    method: str | None = None,
    data: str | Path | None = None,
    columns: Columns = COLUMNS,
    fit: Fit = FIT,
    untrained: bool = False,
    command: str = "compexport.build",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Trace, check and build; with ``data``, plugins that are missing are fitted first and kept beside the bundle.

    ``ratios`` defaults to those ``model`` has plugins for, or 2, 4, 8. Raises InputError for bad input, in which case
    nothing was written, and ParityError when a graph differs from PyTorch, in which case no bundle was.
    """
    from exporter import family
    from exporter.checkpoint import find_checkpoint

    method = _choice("method", method or METHODS[0], METHODS)
    _choice("precision", precision, PRECISIONS)
    checked = whole_ratios(ratios) if ratios is not None else None
    _require_free(output)
    checkpoint = find_checkpoint(Path(model))
    wanted = checked if checked is not None else (checkpoint.ratios if checkpoint else list(DEFAULT_RATIOS))
    missing = [ratio for ratio in wanted if checkpoint is None or ratio not in checkpoint.ratios]
    if missing and data is not None and not untrained:
        ...
    report = family.build(...)
    return report.document()


def _require_free(output: str | Path) -> None:
    """Refuse an output that is no bundle before minutes are spent on it; nothing is written."""
    from engines.bundle import BundleWriter

    BundleWriter(output)


# --- answering -----------------------------------------------------------------------------------------------------


def select(
    bundle: str | Path = "bundle",
    *,
    budget_ms: float | None,
    batch: int = 1,
    length: int | None = None,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Which variant would answer ``batch`` sequences of ``length`` tokens, and why each other one lost."""
    with _runtime(bundle, device) as runtime:
        return runtime.select(batch=batch, length=length, budget_ms=budget_ms).document()


def run(
    bundle: str | Path,
    texts: Sequence[Text],
    *,
    budget_ms: float | None = None,
    ratio: float | None = None,
    variant: str | None = None,
    truncate: bool = True,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Answer ``texts`` together; errors as ``Runtime.run_batch``."""
    if not texts:
        raise InputError(describe("nothing to run", expected='--text "..."'))
    with _runtime(bundle, device) as runtime:
        batch = runtime.run_batch(texts, budget_ms=budget_ms, ratio=ratio, variant=variant, truncate=truncate)
        return batch.document()


def paired(texts: Sequence[str], seconds: Sequence[str] | None) -> list[Text]:
    """Texts, or pairs when there is a second text for every one of them."""
    if not seconds:
        return list(texts)
    if len(seconds) != len(texts):
        expected = f"{len(texts)}, one for every --text"
        raise InputError(describe("--text-pair does not match", got=f"{len(seconds)} of them", expected=expected))
    return list(zip(texts, seconds, strict=True))


def _runtime(bundle: str | Path, device: Device) -> Runtime:
    return load(bundle, device.backend, device.threads, device.provider)


# --- checks of what was asked --------------------------------------------------------------------------------------


def whole_ratios(ratios: Sequence[float]) -> list[int]:
    """Ratios of a method that groups whole tokens, checked; 1, the backbone, is always built and may be left out."""
    checked: list[int] = []
    for ratio in ratios:
        if ratio != ratio or ratio != int(ratio):
            raise InputError(describe("--ratio must be whole for variator", got=f"{ratio:g}", expected="like 2,4,8"))
        if ratio < 1:
            raise InputError(describe("--ratio is too small", got=f"{ratio:g}", expected="1 or more, like 2,4,8"))
        if int(ratio) in checked:
            raise InputError(describe("--ratio is there twice", got=f"{ratio:g}", expected="each ratio once"))
        checked.append(int(ratio))
    return [ratio for ratio in checked if ratio != 1]


def _choice(what: str, got: str, choices: Sequence[str]) -> str:
    if got not in choices:
        raise InputError(describe(f"unknown {what}", got=got, expected=" or ".join(choices)))
    return got
