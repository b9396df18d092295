"""Built families of models that share layers: a decoder writes as PyTorch does, a step engine answers alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.runtime import Runtime
from engines.stepper import Stepper
from tests.compexport.conftest import TEXTS

pytestmark = pytest.mark.slow
RATIOS = (2, 3)


@pytest.fixture(scope="module")
def decoder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from exporter import family

    folder = tmp_path_factory.mktemp("ode") / "decoder"
    family.build(tiny("tiny-gpt2-shared", "text-generation"), RATIOS, folder, method="ode")
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def encoder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    from exporter import family

    folder = tmp_path_factory.mktemp("ode") / "encoder"
    model = tiny("tiny-albert-groups", "sequence-classification")
    family.build(model, RATIOS[:1], folder, method="ode", step_engine=True)
    return Bundle.open(folder)


def test_a_built_decoder_writes_as_its_model(decoder: Bundle, tiny: Callable[..., Path]) -> None:
    """Against PyTorch without a cache, which reads the whole text anew for every token."""
    import torch

    from exporter.backbone import load_backbone

    model = load_backbone(tiny("tiny-gpt2-shared", "text-generation")).model.eval()
    assert decoder.manifest.generation is not None
    ends = decoder.manifest.generation.eos_ids
    with Runtime(decoder, threads=1) as runtime:
        found = runtime(TEXTS, max_new_tokens=10, ratio=1)
        tokens = [one.encoding.ids for one in runtime._opening.encoder().encode(TEXTS)]
        halves = runtime(TEXTS, max_new_tokens=10, ratio=2)
    for result, ids in zip(found, tokens, strict=True):
        wanted: list[int] = []
        while len(wanted) < 10 and not set(wanted) & set(ends):
            text = torch.tensor([[*ids, *wanted]])
            with torch.no_grad():
                logits = model(input_ids=text, attention_mask=torch.ones_like(text), use_cache=False).logits
            wanted.append(int(logits[0, -1].argmax()))
        assert result.output["tokens"] == wanted
    assert [one.output for one in halves] != [one.output for one in found]


@pytest.mark.parametrize("ratio", [1, *RATIOS])
def test_a_built_decoder_has_a_cache_of_steps(decoder: Bundle, ratio: int) -> None:
    with Runtime(decoder, threads=1) as runtime:
        generator = runtime.generator(f"ode-r{ratio}-fp32")
        ids = np.random.default_rng(0).integers(5, 90, (2, 7), dtype=np.int64)
        mask = np.ones_like(ids)
        mask[0, :3] = 0
        at_once, _ = generator.read(ids, mask)
        _, cache = generator.read(ids[:, :4], mask[:, :4])
        later, cache = generator.read(ids[:, 4:], mask[:, 4:], cache)
        assert len(cache.held) == 2 * 6 // ratio
        np.testing.assert_allclose(later, at_once[:, 4:], atol=1e-4)


def test_a_step_engine_answers_as_the_graph_made_for_its_steps(encoder: Bundle) -> None:
    with Runtime(encoder, threads=1) as runtime:
        for ratio in (1, 2):
            unrolled = runtime(TEXTS, ratio=ratio)
            assert unrolled[0].variant == f"ode-r{ratio}-fp32", "the graph made for it"
            name = f"ode-r{ratio}-step-fp32"
            assert isinstance(runtime.session(name), Stepper)
            for one, other in zip(unrolled, runtime(TEXTS, variant=name), strict=True):
                assert one.scores is not None and other.scores is not None
                assert other.scores == pytest.approx(one.scores, abs=1e-4)
