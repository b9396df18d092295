"""Fixtures shared by all tests. The default run needs neither a GPU nor the network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.traces import Traces

# No test may download, and two workers share two cores: set before any heavy library is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

GPU = Path(__file__).resolve().parent / "gpu"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, so that sums are added up in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("tiny-bert", "question-answering")``: the model's folder, made once per session. Do not write into it."""
    from tests import models

    made: dict[tuple[str, str], Path] = {}

    def get(name: str = "tiny-bert", task: str = "feature-extraction") -> Path:
        if (name, task) not in made:
            folder = tmp_path_factory.mktemp("models") / f"{name}-{task}"
            made[name, task] = models.make(name, folder, task)
        return made[name, task]

    return get


@pytest.fixture(scope="session")
def trace_memory(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """What this test run has traced, in whichever process."""
    from tests.traces import Traces

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traces"
    folder.mkdir(exist_ok=True)
    return Traces(folder)


@pytest.fixture
def traces(trace_memory: Traces, monkeypatch: pytest.MonkeyPatch) -> Traces:
    """Traces are remembered during this test; ``calls`` lists those that it asked for."""
    trace_memory.replace(monkeypatch)
    trace_memory.calls.clear()
    return trace_memory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever lies in ``tests/gpu`` is for a GPU; where there is none, such tests say so and skip."""
    for item in items:
        if GPU in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    waiting = [item for item in items if item.get_closest_marker("gpu")]
    if not waiting:
        return
    from engines.backends import cuda

    if not cuda.devices():
        for item in waiting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here (make test-gpu)"))
