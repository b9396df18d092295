"""Several processes that fit together, as torchrun or accelerate start them; alone, all of this does nothing.

The first process decides and writes, the others follow: whatever depends on time or on the disk is asked of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from compexport.errors import CompexportError

Value = TypeVar("Value")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the group for a while; a group that the caller started is used and left alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def count() -> int:
    """How many processes fit together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(value: float) -> float:
    """The first process's ``value``, for all; every process must ask."""
    if count() == 1:
        return value
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return float(shared)


def by_first(do: Callable[[], Value]) -> Value:
    """Let the first process ``do`` something, and give its result, or its error, to all."""
    if count() == 1:
        return do()
    shared: list[Any] = [None, None]
    failure: BaseException | None = None
    if rank() == 0:
        try:
            shared[0] = do()
        except Exception as error:
            failure = error
            # Only ours are known to survive the journey; the first process raises the real one.
            shared[1] = error if isinstance(error, CompexportError) else CompexportError("the first process failed")
    dist.broadcast_object_list(shared, src=0)
    if failure is not None or shared[1] is not None:
        raise failure or shared[1]
    result: Value = shared[0]
    return result


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()
