"""Run by path in a process of its own: builds the models of a JSON file with TensorRT-RTX, without a GPU.

Reads [{"model": base64, "profile": {...}, "values": {...}}], prints what became of each:
{"outcome", "errors", "layers"}.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any

import tensorrt_rtx as trt


class Log(trt.ILogger):
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(base64.b64decode(case["model"])):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        return {"outcome": "not parsed", "errors": errors, "layers": []}
    layers = [network.get_layer(index).type.name for index in range(network.num_layers)]
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in case["profile"].items():
        profile.set_shape(name, *shapes)
    for name, values in case["values"].items():
        profile.set_shape_input(name, *values)
    if case["profile"] or case["values"]:
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return {"outcome": "not built" if plan is None else "built", "errors": log.errors, "layers": layers}


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with open(sys.argv[1], encoding="utf-8") as file:
        json.dump([outcome(case) for case in json.load(file)], out)
    out.flush()
    os._exit(0)
