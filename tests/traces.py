"""``exporter.trace`` with a memory: a trace takes seconds of a processor, and equal models give equal ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import save
from torch.onnx._internal.exporter import _registration

from exporter import trace
from exporter.methods.span import SpanPlugins
from exporter.methods.variator import VariatorModel


class Traces:
    """What was traced in this test run, by others too, in ``folder``; ``calls`` lists what was asked."""

    def __init__(self, folder: Path) -> None:
        self.made: dict[tuple[Any, ...], onnx.ModelProto] = {}
        self.calls: list[tuple[Any, ...]] = []
        self._folder = folder
        self._trace = trace.onnx_from_inputs

    def of_ids(self, module: Any, input_names: Sequence[str], output_names: Sequence[str]) -> onnx.ModelProto:
        """``trace.onnx_from_module``."""
        return self.of_inputs(module, trace.ids(*input_names), output_names)

    def of_inputs(
        self, module: Any, inputs: Sequence[trace.TracedInput], output_names: Sequence[str]
    ) -> onnx.ModelProto:
        """``trace.onnx_from_inputs``."""
        key = (*identity(module), *inputs, *output_names)
        return self._remembered(key, lambda: self._trace(module, inputs, output_names))

    def _remembered(self, key: tuple[Any, ...], make: Callable[[], onnx.ModelProto]) -> onnx.ModelProto:
        self.calls.append(key)
        if key not in self.made:
            path = self._folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.onnx"
            self.made[key] = onnx.load(path) if path.is_file() else _written(make(), path)
        copy = onnx.ModelProto()
        copy.CopyFrom(self.made[key])
        return copy

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """Let the exporter use the memory."""
        remember_translations(patch)
        patch.setattr(trace, "onnx_from_module", self.of_ids)
        patch.setattr(trace, "onnx_from_inputs", self.of_inputs)


def remember_translations(patch: pytest.MonkeyPatch) -> None:
    """Read PyTorch's translations to ONNX once: for each trace anew, their source takes a third of a small one."""
    patch.setattr(_registration.onnxscript_apis, "get_torchlib_ops", _translations)


_translations = cache(_registration.onnxscript_apis.get_torchlib_ops)


def _written(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    own = path.with_suffix(f".{os.getpid()}")
    onnx.save(model, own)
    own.replace(path)
    return model


def identity(module: Any) -> tuple[Any, ...]:
    """What a trace depends on: parts of the module, settings, tensors; those of plugins are bound later."""
    if isinstance(module, VariatorModel):
        plugins = module.variator.plugins
        assert plugins is not None
        tensors = plugins.state_dict()
        bound = hashlib.sha256(save(tensors)).hexdigest() if isinstance(plugins, SpanPlugins) else ""
        kinds = sorted({str(tensor.dtype) for tensor in tensors.values()})
        return module.backbone.sha256, module.backbone.task, plugins.pad, plugins.ratio, bound, *kinds
    digest = hashlib.sha256(repr(module).encode())
    for name, tensor in module.state_dict().items():  # some of which may share their memory
        digest.update(f"{name} {tensor.dtype}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    configs = {}
    for part in module.modules():
        digest.update(str([(name, _plain(value)) for name, value in vars(part).items()]).encode())
        configs[id(getattr(part, "config", None))] = getattr(part, "config", None)
    for config in filter(None, configs.values()):
        settings = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        digest.update(str(sorted(settings.items())).encode())
    return type(module).__name__, digest.hexdigest()


def _plain(value: object) -> object:
    """A setting as any process would write it; None for what is none."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in fields(value)]
    return getattr(value, "__qualname__", None)  # of a function
