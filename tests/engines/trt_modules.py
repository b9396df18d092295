"""Stand-ins for a library that a build cannot survive; each is written to a folder as a module of its own."""

from __future__ import annotations

from pathlib import Path

ABORTING = """
import os, sys
print("Internal Error: check failed", file=sys.stderr, flush=True)
os.abort()
"""
# Goes on without ever asking whether it is to stop.
DEAF = """
import time
class Builder:
    def __init__(self, log):
        time.sleep(600)
class ILogger:
    pass
"""
MISSING_LIBRARY = """
raise ImportError("libnvinfer.so.11: cannot open shared object file")
"""

# A TensorRT that knows the inputs and outputs of a graph, and keeps timings: those of a graph are its name.
TIMING = """
import onnx
__version__ = "11.4.0.106"
class ILogger:
    class Severity:
        ERROR = 1
class IProgressMonitor:
    pass
class Tensor:
    class dtype:
        name = ""
    def __init__(self, value):
        self.name, kind = value.name, value.type.tensor_type
        self.dtype = type("dtype", (), {"name": onnx.TensorProto.DataType.Name(kind.elem_type)})
        self.shape = [dim.dim_value or -1 for dim in kind.shape.dim]
class Network:
    num_layers = 0
    def take(self, graph):
        self.inputs, self.outputs = [Tensor(one) for one in graph.input], [Tensor(one) for one in graph.output]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
    def get_input(self, index):
        return self.inputs[index]
    def get_output(self, index):
        return self.outputs[index]
class OnnxParser:
    def __init__(self, network, log):
        self.network = network
    def parse_from_file(self, path):
        self.network.take(onnx.load(path, load_external_data=False).graph)
        self.network.name = path.removesuffix(".onnx")
        return True
class Cache:
    def __init__(self, content):
        self.content = content
    def serialize(self):
        return self.content
class Config:
    def create_timing_cache(self, content):
        return Cache(content)
    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        return not cache.content.startswith(b"of another version")
    def add_optimization_profile(self, profile):
        return 0
class Profile:
    def set_shape(self, *shapes):
        pass
class Builder:
    def __init__(self, log):
        pass
    def create_network(self, flags):
        return Network()
    def create_builder_config(self):
        return Config()
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        config.cache.content += network.name.encode() + b" "
        return b"a plan of " + network.name.encode()
"""


def write(folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
