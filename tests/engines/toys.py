"""Bundles of tiny graphs made by hand: what their entries, engines and manifests have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

from engines.backends import ort
from engines.bundle import Bundle, BundleWriter
from engines.manifest import Backbone, Cost, Graph, Manifest, Parity, TensorSpec, Tokenizer, Variant

DTYPES = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """An input or output of a graph, as its entry says."""
    return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], spec.shape)


def specs(values: Sequence[onnx.ValueInfoProto]) -> list[TensorSpec]:
    """A graph's inputs or outputs, as an entry says them."""
    dtypes = {number: name for name, number in DTYPES.items()}
    kinds = [(value.name, value.type.tensor_type) for value in values]
    return [
        TensorSpec(
            name=n, dtype=dtypes[kind.elem_type], shape=[dim.dim_param or dim.dim_value for dim in kind.shape.dim]
        )
        for n, kind in kinds
    ]


def make_bundle(
    folder: Path,
    models: Mapping[str, tuple[onnx.ModelProto, Cost]],
    variants: Mapping[str, Variant],
    *,
    model_type: str,
    layers: int,
    hidden_size: int,
    tokenizer: Tokenizer,
    save_tokenizer: Callable[[Path], object],
    **facts: Any,
) -> Bundle:
    """``models``, by the names of their graphs, and ``variants`` of them into ``folder``, with engines.

    ``facts``: what else the manifest says.
    """
    with BundleWriter(folder) as writer:
        (writer.dir / "graphs").mkdir()
        save_tokenizer(writer.dir)
        graphs = {}
        with ort.EngineBuilder(writer.dir, "engines/ort-cpu") as builder:
            for name, (model, cost) in models.items():
                data = model.SerializeToString(deterministic=True)
                graphs[name] = _entry(name, model, cost, data)
                (writer.dir / graphs[name].path).write_bytes(data)
                builder.add(name, graphs[name])
            engines = builder.finish()
        sizes = {"params": 1, "hidden_size": hidden_size, "layers": layers}
        return writer.commit(
            Manifest(
                backbone=Backbone(name="toy", architecture="Toy", model_type=model_type, sha256="0" * 64, **sizes),  # type: ignore[arg-type]
                tokenizer=tokenizer,
                variants=dict(variants),
                graphs=graphs,
                engines={f"{name}-ort-cpu": engine for name, engine in engines.items()},
                files={},
                versions={},
                command="tests",
                **facts,
            )
        )


def variant(method: str, ratio: float, graphs: dict[str, str], **facts: Any) -> Variant:
    """A member of such a family; ``facts``: what else its entry says."""
    costs: dict[str, Any] = {"params": 1, "extra_params": 0, "flops_ratio": ratio}
    return Variant(method=method, ratio=ratio, precision="fp32", graphs=graphs, **costs, **facts)


def _entry(name: str, model: onnx.ModelProto, cost: Cost, data: bytes) -> Graph:
    return Graph(
        path=f"graphs/{name}.onnx",
        opset=18,
        inputs=specs(model.graph.input),
        outputs=specs(model.graph.output),
        cost=cost,
        parity=Parity(max_abs=0.0, tolerance=1e-4, shapes=[]),
        key=hashlib.sha256(data).hexdigest(),
    )
