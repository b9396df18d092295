"""Named tensors from a file that somebody else wrote: read without running anything, checked one by one."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from compexport.errors import InputError, describe

Shape = tuple[int, ...]

_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CALL = re.compile(r"GLOBAL (\S+)")


def read_tensors(path: Path, skip: Container[str] = ()) -> dict[str, Tensor]:
    """The flat dict name -> tensor that ``torch.save`` wrote to ``path``, opened with ``weights_only=True``.

    What is named in ``skip`` is left out. InputError if the file is missing, damaged, names anything to run, or holds
    something else than dense, finite floating-point tensors.
    """
    if not path.is_file():
        raise InputError(describe(f"{path}: no such file", expected="a plugin file or a task checkpoint"))
    with path.open("rb") as stream:
        found = _load(path, stream)
    if not isinstance(found, dict) or not found:
        got = type(found).__name__ if not isinstance(found, dict) else "an empty one"
        raise InputError(describe(f"{path}: not a file of tensors", got=got, expected="a dict of tensors by name"))
    read = {name: value for name, value in found.items() if name not in skip}
    for name, value in read.items():
        _require_plain(path, name, value)
    return {name: value.detach() for name, value in read.items()}


def read_safetensors(path: Path, skip: Container[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file but those named in ``skip``.

    InputError if it is damaged or holds anything but finite numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = {name: tensor for name, tensor in load_file(path).items() if name not in skip}
    except (OSError, SafetensorError) as error:
        raise InputError(describe(f"{path}: unreadable", got=error, expected="a safetensors file")) from error
    for name, value in found.items():
        _require_plain(path, name, value)
    return found


def _load(path: Path, stream: BinaryIO) -> object:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can make the reader fail in any way
        raise InputError(
            describe(f"{path}: not a file of tensors", got=_reason(error), expected="what torch.save makes of a dict")
        ) from error


def _reason(error: Exception) -> str:
    """Why a file was not read; torch's own message is a page long and says how to switch the protection off."""
    named = _CALL.search(str(error))
    return f"a pickle that calls {named[1]}" if named else f"a file torch cannot read ({type(error).__name__})"


def _require_plain(path: Path, name: object, value: object) -> None:
    if not isinstance(name, str):
        raise InputError(describe(f"{path}: key {name!r}", got=type(name).__name__, expected="a name"))
    if not isinstance(value, Tensor):
        raise InputError(describe(f"{path}: {name}", got=type(value).__name__, expected="a tensor"))
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _KINDS:
        got = f"{value.layout}, {value.device.type}, {value.dtype}".replace("torch.", "")
        raise InputError(describe(f"{path}: {name}", got=got, expected="a dense floating-point tensor"))
    # A view that repeats its elements would grow out of a small file without bounds.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(describe(f"{path}: {name}", got="fewer values than its shape says", expected="all of them"))
    if not bool(torch.isfinite(value).all()):
        raise InputError(describe(f"{path}: {name}", got="NaN or infinity", expected="finite values"))


def require_shapes(origin: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """InputError, naming the first tensor that is missing, not expected, or of another shape than expected."""
    for name in sorted(expected.keys() | tensors.keys()):
        got = list(tensors[name].shape) if name in tensors else "nothing"
        wanted = list(expected[name]) if name in expected else "no such tensor"
        if got != wanted:
            raise InputError(describe(f"{origin}: {name}", got=got, expected=wanted))


def promoted(tensor: Tensor) -> Tensor:
    """fp16 and bf16 as fp32, so that arithmetic on them rounds no further; fp32 and fp64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
