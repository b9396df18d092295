"""Attention in half precision: half products, and between them a softmax in fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from exporter.precision import WideSums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mask", ["none", "added", "seen"])
@pytest.mark.parametrize("scale", [None, 1.0], ids=["by-size", "unscaled"])
def test_is_attention_but_for_rounding(dtype: torch.dtype, mask: str, scale: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8).to(dtype) for length in (5, 7, 7))
    seen = torch.rand(2, 1, 5, 7) > 0.3
    given = {"none": None, "seen": seen, "added": torch.where(seen, 0.0, -1e4).to(dtype)}[mask]
    with WideSums():
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=scale)
    wide = given.float() if mask == "added" and given is not None else given
    exact = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=wide, scale=scale)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), exact, atol=16 * torch.finfo(dtype).eps)


def test_softmax_alone_is_wide() -> None:
    """The products are half, so that a runtime's fused attention fits; what adds up is not."""
    types: dict[str, set[torch.dtype]] = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types_, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            made = func(*args, **(kwargs or {}))
            types.setdefault(func.overloadpacket.__name__, set()).add(getattr(made, "dtype", None))
            return made

    with Watch(), WideSums():
        F.scaled_dot_product_attention(*(torch.randn(1, 2, 4, 8).half() for _ in range(3)))
    assert types["_softmax"] == {torch.float32}
    assert types["bmm"] == {torch.float16}


def test_nobody_to_look_at_gives_equal_shares() -> None:
    query = torch.randn(1, 1, 2, 4).half()
    with WideSums():
        found = F.scaled_dot_product_attention(query, query, query, attn_mask=torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    assert torch.allclose(found, query.float().mean(2, keepdim=True).half(), atol=1e-3)
