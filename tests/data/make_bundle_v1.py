"""Makes ``tests/data/bundle-v1``, the golden bundle of format 1: ``python -m tests.data.make_bundle_v1 FOLDER``.

It is kept in the repository as it was first written, so that every later reader, in any language, is tested
against it. Make it anew only while format 1 is not released. Two graphs share one ``weights.bin``.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from engines.bundle import BundleWriter
from engines.manifest import Backbone, Cost, Engine, Graph, Manifest, Parity, TensorSpec, Tokenizer, Variant

ROWS, HIDDEN = 16, 4
WEIGHTS = np.arange(ROWS * HIDDEN, dtype=np.float32)
TOKENIZER = b'{"version": "1.0", "note": "a stand-in: the readers tested here do not tokenize"}\n'


def graph(scale: float) -> bytes:
    """last_hidden_state = table[input_ids] * scale, the table kept in weights.bin."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [ROWS, HIDDEN], WEIGHTS.tobytes(), raw=True)
    table.ClearField("raw_data")
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(WEIGHTS.nbytes))):
        table.external_data.add(key=key, value=value)
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Mul", ["rows", "scale"], ["last_hidden_state"]),
        ],
        "golden",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])],
        [table, helper.make_tensor("scale", TensorProto.FLOAT, [], [scale])],
    )
    opsets = [helper.make_opsetid("", 18)]
    data: bytes = helper.make_model(body, opset_imports=opsets, ir_version=10).SerializeToString(deterministic=True)
    return data


def manifest(graphs: dict[str, bytes]) -> Manifest:
    """The manifest of the golden family, its files still to be filled in."""
    return Manifest(
        backbone=Backbone(
            name="golden",
            architecture="GoldenModel",
            model_type="golden",
            sha256=hashlib.sha256(WEIGHTS.tobytes()).hexdigest(),
            params=WEIGHTS.size,
            hidden_size=HIDDEN,
            layers=1,
        ),
        method="variator",
        task="feature-extraction",
        tokenizer=Tokenizer(path="tokenizer.json", max_length=8, pad_id=0, inputs=["input_ids"]),
        variants={
            f"variator-{name}-fp32": Variant(
                method="variator",
                ratio=float(name[1:]),
                precision="fp32",
                graphs={"encoder": name},
                params=WEIGHTS.size,
                extra_params=0,
                flops_ratio=1.0,
            )
            for name in graphs
        },
        graphs={
            name: Graph(
                path=f"graphs/{name}.onnx",
                opset=18,
                inputs=[TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"])],
                outputs=[TensorSpec(name="last_hidden_state", dtype="float32", shape=["batch", "sequence", HIDDEN])],
                cost=Cost(per_token=HIDDEN),
                parity=Parity(max_abs=0.0, tolerance=1e-4, shapes=[(1, 1), (3, 4)]),
                key=hashlib.sha256(data).hexdigest(),
            )
            for name, data in graphs.items()
        },
        engines={
            f"{name}-ort": Engine(
                graph=name,
                backend="ort",
                backend_version="1.31.1",
                device="cpu",
                path=f"engines/ort-cpu/{name}.bin",
                files=[f"engines/ort-cpu/{name}.bin"],
                key=f"engine-{name}",
            )
            for name in graphs
        },
        files={},
        versions={"compexport": "0.1.0"},
        command="python -m tests.data.make_bundle_v1",
    )


def make(folder: Path) -> None:
    """Write the golden bundle, measured tables included."""
    graphs = {"r1": graph(1.0), "r4": graph(4.0)}
    with BundleWriter(folder) as writer:
        (writer.dir / "graphs").mkdir()
        (writer.dir / "engines" / "ort-cpu").mkdir(parents=True)
        (writer.dir / "tokenizer.json").write_bytes(TOKENIZER)
        (writer.dir / "graphs" / "weights.bin").write_bytes(WEIGHTS.tobytes())
        for name, data in graphs.items():
            (writer.dir / "graphs" / f"{name}.onnx").write_bytes(data)
            (writer.dir / "engines" / "ort-cpu" / f"{name}.bin").write_bytes(f"engine of {name}\n".encode())
        bundle = writer.commit(manifest(graphs))
    rows = [
        {"variant": variant, "batch": 1, "length": 8, "p50_ms": 1.0, "p99_ms": 1.5, "runs": 9}
        for variant in bundle.manifest.variants
    ]
    realised = [{"variant": "variator-r4-fp32", "batch": 1, "length": 8, "speedup": 1.0, "ideal": 1.0, "realised": 1.0}]
    profile = {"device": "cpu-golden", "backend": "ort", "threads": 1, "environment": {}}
    bundle.save_profile("cpu-golden", {**profile, "rows": rows, "realised": realised})
    bundle.save_quality(
        {
            "metric": "cosine",
            "higher_is_better": True,
            "n": 2,
            "data": "golden",
            "backbone_variant": "variator-r1-fp32",
            "variants": {"variator-r1-fp32": 1.0, "variator-r4-fp32": 0.875},
        }
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]))
