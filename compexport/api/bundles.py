"""A bundle as it lies there: open, load, inspect, verify, and export a variant of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.api.checks import choice
from compexport.api.options import Device
from compexport.errors import BundleError, InputError, describe
from compexport.present import Progress, quiet

if TYPE_CHECKING:
    from engines.bundle import Bundle
    from engines.runtime import Runtime


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


def open_runtime(bundle: str | Path, device: Device) -> Runtime:
    return load(bundle, device.backend, device.threads, device.provider)


def inspect(bundle: str | Path = "bundle", target: str | None = None, progress: Progress = quiet) -> dict[str, Any]:
    """The checked manifest; with ``target``, whether the graphs are expected to pass that compiler.

    ``target`` is "tensorrt" or "tensorrt-rtx", and ``bundle`` may then also be an ONNX file. Nothing is built. Where
    tensorrt_rtx is installed, its parser is asked too. Raises InputError for a file that is no ONNX model.
    """
    if target is not None:
        return _checked_for(Path(bundle), target, progress)
    if Path(bundle).is_file():
        hint = "an ONNX file is checked with --target tensorrt"
        raise InputError(describe("inspect", got=bundle, expected="the folder of a bundle", hint=hint))
    return open_bundle(bundle).manifest.model_dump(mode="json")


def _checked_for(path: Path, target: str, progress: Progress) -> dict[str, Any]:
    from exporter.targets.check import Candidate, check
    from exporter.targets.tensorrt import BOTH

    product = choice("target", target, BOTH)
    if path.is_file():
        return check([Candidate(path.stem, path)], product, progress)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    users = {
        key: tuple(name for name, variant in manifest.variants.items() if key in variant.graphs.values())
        for key in manifest.graphs
    }
    graphs = [Candidate(key, bundle.file(graph.path), users[key]) for key, graph in manifest.graphs.items()]
    return check(graphs, product, progress)


def verify(bundle: str | Path = "bundle") -> dict[str, Any]:
    """Read and hash every file; damage is reported, not raised, as long as there is a bundle to look at."""
    from engines.bundle import Problem

    opened: Bundle | None
    try:
        opened = open_bundle(bundle)
    except BundleError as error:
        manifest = Path(bundle) / "manifest.json"
        if not manifest.is_file():
            raise
        opened = _unchecked(Path(bundle))
        problems = opened.verify() if opened is not None else [Problem("manifest.json", str(error))]
    else:
        problems = opened.verify()
    files = len(opened.manifest.files) if opened is not None else 0
    return {"ok": not problems, "files": files, "problems": [vars(problem) for problem in problems]}


def _unchecked(path: Path) -> Bundle | None:
    """A damaged bundle, only to ask what is wrong with it; None when its manifest cannot be read either."""
    from engines.bundle import Bundle
    from engines.bundle_manifest import MAX_BYTES, parse_manifest
    from engines.bundle_paths import FileFault
    from engines.bundle_reader import identity

    root = path.resolve()
    manifest = root / "manifest.json"
    try:
        with manifest.open("rb") as file:
            parsed = parse_manifest(file.read(MAX_BYTES + 1))
        return Bundle(root, parsed, identity(manifest.lstat()))
    except (FileFault, OSError, ValueError):
        return None


def export(
    bundle: str | Path = "bundle", output: str | Path = "exported", variant: str | None = None
) -> dict[str, Any]:
    """Write one variant (by default that of ratio 1), which reads one text and writes another, to a new folder.

    Hugging Face's optimum loads it: ``ORTModelForSeq2SeqLM.from_pretrained(output)``. Raises InputError for another
    task, an unknown variant, and an output that holds something already.
    """
    from compexport.handing_on import export as write

    return write(bundle, output, variant)
