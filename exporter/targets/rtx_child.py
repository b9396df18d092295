"""The process that parses: ``python -P rtx_child.py FILE`` prints what TensorRT-RTX says of an ONNX file, as JSON.

Run by path, it imports nothing of ours. What the library itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def parsed(path: str) -> dict[str, Any]:
    """Errors of the parser, or the outputs it found, -1 for a size that is known at run time only."""
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    ok = parser.parse_from_file(path)
    errors = [
        {
            "operator": error.node_operator(),
            "node": error.node_name(),
            "says": error.desc(),
            "functions": list(error.local_function_stack()),
        }
        for error in map(parser.get_error, range(parser.num_errors))
    ]
    outputs = [network.get_output(index) for index in range(network.num_outputs)] if ok else []
    shapes = {output.name: list(output.shape) for output in outputs}
    return {"ok": ok, "version": trt.__version__, "errors": errors, "outputs": shapes}


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    json.dump(parsed(sys.argv[1]), answer)
    answer.flush()
    os._exit(0)  # the library has been seen to fail while it is unloaded


if __name__ == "__main__":
    main()
