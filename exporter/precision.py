"""The precision in which a graph computes: made in PyTorch, before anything is traced.

In fp16 and bf16 parameters and products are half, and what adds up many numbers is not: norms, softmax, log-softmax,
means and sums are computed in fp32 and rounded afterwards, and the parameters of norms stay in fp32. What leaves a
family (logits, how sure they are, final states) is fp32; what goes from one of its graphs into another is half.

fp16 also has too small a range for hosts whose hidden states grow with every layer (T5). Their weights are divided so
that the residual stream is ``SHRUNK_BY`` times smaller, which the norms undo; a power of two, so nothing is rounded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from engines.manifest import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF = (torch.float16, torch.bfloat16)
SHRUNK_BY = 128.0

Shrink = Callable[[Any, float], None]  # divides, in place, what a module adds to the residual stream
M = TypeVar("M", bound=nn.Module)


def wide(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.float() if tensor.dtype in HALF else tensor


def lowest(dtype: torch.dtype) -> float:
    """What is added to the score of a place that nobody may look at.

    In half types it is half of the lowest number: together with a score it stays finite, so that a row that may look at
    nothing gets equal weights and no NaN.
    """
    limit = float(torch.finfo(dtype).min)
    return limit / 2 if dtype in HALF else limit


_WIDE = {
    *(F.softmax, torch.softmax, Tensor.softmax),
    *(F.log_softmax, torch.log_softmax, Tensor.log_softmax),
    *(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.normalize),
    *(torch.sum, Tensor.sum, torch.mean, Tensor.mean, torch.logsumexp, Tensor.logsumexp),
}


class WideSums(TorchFunctionMode):
    """While it is active, functions of half tensors that add up many numbers compute in fp32 and round their result.

    Other types, and calls that name the type they want, are left alone. It holds for a trace as for an eager run.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        if func is F.scaled_dot_product_attention and _is_half(given[0]):
            return _attention(*args, **kwargs)
        if func not in _WIDE or not _is_half(given[0]) or any(isinstance(one, torch.dtype) for one in given):
            return func(*args, **kwargs)
        widened = {name: _widened(one) for name, one in kwargs.items()}
        return func(*map(_widened, args), **widened).to(given[0].dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> Tensor:
    """``F.scaled_dot_product_attention`` without dropout: half products, and between them the softmax in fp32.

    Queries and keys are scaled before their product, which then has the range of what the softmax reads.
    """
    assert not is_causal and not any(others.values()), "hosts give a mask, and as many keys as queries have heads"
    share = (query.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    scores = wide(torch.matmul(query * share, (key * share).transpose(-1, -2)))
    if attn_mask is not None:
        seen = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, lowest(query.dtype)) if seen else scores + attn_mask
    return torch.matmul(F.softmax(scores, dim=-1).to(value.dtype), value)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _widened(value: Any) -> Any:
    return wide(value) if isinstance(value, Tensor) else value


def wide_sums(module: nn.Module) -> AbstractContextManager[object]:
    """``WideSums`` where ``module`` has half parameters or buffers, otherwise nothing."""
    halves = any(map(_is_half, (*module.parameters(), *module.buffers())))
    return WideSums() if halves else nullcontext()


def narrowed(module: M, precision: Precision, shrink: Shrink | None = None) -> M:
    """A copy with parameters and buffers of ``precision``, those of norms in fp32; tensors that are one stay one.

    ``shrink``: applied first where the range of ``precision`` may not do.
    """
    made = copy.deepcopy(module)
    if shrink is not None and precision == "fp16":
        with torch.no_grad():
            shrink(made, SHRUNK_BY)
    for part in made.modules():
        if not isinstance(part, nn.LayerNorm | nn.RMSNorm):
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(DTYPES[precision])
    return made


@dataclass(frozen=True)
class Arithmetic:
    """How PyTorch computes what a graph is compared with.

    "plain": the model as it is, in fp32. "exact": in fp64. "half": as a graph of ``precision`` computes. "rounded" and
    "rounded exact": with the half one's weights, in fp32 and in fp64.
    """

    kind: Literal["plain", "exact", "half", "rounded", "rounded exact"]
    precision: Precision = "fp32"

    @property
    def is_stock(self) -> bool:
        """Whether weights are the model's own, so that transformers' own code may run it."""
        return self.kind in ("plain", "exact")

    @property
    def dtype(self) -> torch.dtype:
        """In which states are kept."""
        if self.kind == "half":
            return DTYPES[self.precision]
        return torch.float64 if self.kind.endswith("exact") else torch.float32

    def of(self, module: M, shrink: Shrink | None = None) -> M:
        """``module`` itself if plain, otherwise a copy."""
        if self.kind == "plain":
            return module
        if self.kind == "exact":
            return copy.deepcopy(module).double()
        made = narrowed(module, self.precision, shrink)
        return made if self.kind == "half" else made.to(self.dtype)


PLAIN, EXACT = Arithmetic("plain"), Arithmetic("exact")


def computing(precision: Precision) -> Arithmetic:
    """What a graph of ``precision`` is traced from."""
    return PLAIN if precision == "fp32" else Arithmetic("half", precision)


# --- arrays, which know bf16 by the type that ONNX gives it -----------------------------------------------------------

FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)  # of weights
_BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's values, of the same type."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.contiguous().view(torch.uint16).numpy().view(_BFLOAT16)


def tensor_of(array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
    """The array's values; ``dtype``: the type of those that are no integers."""
    if array.dtype == _BFLOAT16:
        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
