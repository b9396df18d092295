"""Putting stored tensors into a module, all of them or none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from compexport.errors import InputError, describe

Module = TypeVar("Module", bound=nn.Module)


def loaded_exactly(module: Module, tensors: Mapping[str, Tensor], origin: str) -> Module:
    """``module`` with ``tensors`` in fp32, in eval mode; InputError for one that is missing, left over or misshapen."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        if got != expected.get(name):
            raise InputError(describe(f"{origin}: {name}", got=got, expected=expected.get(name, "no such tensor")))
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return module.eval()
