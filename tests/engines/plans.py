"""Bundles with plans for the doubles of NVIDIA's library and of CUDA, opened by our code as if there were a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from engines.backends import cuda, cuda_memory, trt, trt_maker
from engines.backends.trt_build import Built, Request
from engines.backends.trt_options import PlanOptions, Range
from engines.backends.trt_product import TENSORRT, TENSORRT_RTX, Product
from engines.bundle import Bundle, BundleWriter
from tests.engines import toys
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_trt import Library, plan_bytes

ADA = cuda.Device(0, "NVIDIA GeForce RTX 4090", "sm89")
SMALL = PlanOptions(batch=Range(1, 4, 16), length=Range(1, 8, 48))


@dataclass(frozen=True)
class Machine:
    """A machine with a GPU, made up."""

    cuda: FakeCuda
    library: Library
    product: Product
    moved: dict[str, str] = field(default_factory=dict)

    def backend(self) -> trt.Backend:
        """A new backend, which shares no lanes with others."""
        return trt.Backend(self.product)


class FakePlanProcess:
    """Writes a plan that ``fake_trt`` opens. ``moved``: folders, by where they are while a bundle is written."""

    share = 1.0

    def __init__(self, request: Request, moved: Mapping[str, str]) -> None:
        self._request, self._moved = request, moved

    def run(self) -> Built:
        request, graph = self._request, Path(self._request.graph)
        model = onnx.load(graph, load_external_data=False).graph
        specs = [toys.specs(values) for values in (model.input, model.output)]
        folder = next((folder for folder in self._moved if graph.is_relative_to(folder)), "")
        later = Path(self._moved[folder]) / graph.relative_to(folder) if folder else graph
        Path(request.plan).write_bytes(plan_bytes(later, *specs, profiles=request.profiles, stripped=request.strip))
        inputs, outputs = (
            [(s.name, s.dtype, [n if isinstance(n, int) else None for n in s.shape]) for s in found] for found in specs
        )
        return Built("11.4.0.106", inputs, outputs, [], 0.1)

    def cancel(self) -> None:
        """It is done already."""


def machine(monkeypatch: pytest.MonkeyPatch, product: Product = TENSORRT, limit: int = 1 << 30) -> Machine:
    """One with the library of ``product`` and so much memory on its device, in bytes."""
    fake = FakeCuda(limit)
    library = Library(fake, captures=product is TENSORRT_RTX)
    monkeypatch.setattr(Product, "unavailable", lambda self: "")
    monkeypatch.setattr(Product, "version", lambda self: "11.4.0.106")
    monkeypatch.setattr(cuda, "devices", lambda: [ADA])
    there = Machine(fake, library, product)
    monkeypatch.setattr(trt_maker, "PlanProcess", lambda request, title: FakePlanProcess(request, there.moved))
    monkeypatch.setattr(cuda_memory, "_bindings", lambda: fake)
    # Not among Python's modules, where other libraries would find them.
    monkeypatch.setattr(trt, "importlib", SimpleNamespace(import_module={product.module: library}.__getitem__))
    for backend in (trt.TRT, trt.RTX):
        monkeypatch.setattr(backend, "_lanes", None)
    return there


def with_plans(bundle: Bundle, there: Machine, options: PlanOptions = SMALL) -> Bundle:
    """The bundle, with plans for ``there`` besides the engines that it has."""
    return planned(bundle, there.backend().builder(options), there.moved)


def planned(bundle: Bundle, maker: trt_maker.PlanMaker, moved: dict[str, str] | None = None) -> Bundle:
    """The bundle, with plans that ``maker`` makes; ``moved`` learns where the bundle is meanwhile."""
    manifest = bundle.manifest
    with BundleWriter(bundle.path) as writer:
        for file in sorted(manifest.files):
            writer.reuse(file)
        if moved is not None:
            moved[str(writer.dir)] = str(bundle.path)
        with maker.EngineBuilder(writer.dir, maker.FOLDER) as builder:
            for name, graph in manifest.graphs.items():
                builder.add(name, graph)
            built = builder.finish()
        engines = manifest.engines | {f"{name}-plan": engine for name, engine in built.items()}
        return writer.commit(manifest.model_copy(update={"engines": engines}))
