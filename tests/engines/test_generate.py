"""Generation on real engines of hand-made graphs: what transformers writes, whoever else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compexport.errors import BundleError, CompexportError, InputError
from engines.backends import ort
from engines.bundle import Bundle
from engines.causal import CausalGenerator
from engines.generate import Generated
from engines.options import Options, options_for
from engines.sampling import Sampling
from tests.engines.decoders import EOS, NAMES, PAD, POSITIONS, V, make_bundle, model, prompts

SAMPLING = Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("decoders") / "bundle")


def opened(bundle: Bundle, ratio: int, **changes: object) -> CausalGenerator:
    name = NAMES[ratio]
    graph = bundle.manifest.variants[name].graphs["decoder"]
    session = ort.open_graphs(bundle, [graph], threads=1)[graph]
    assert bundle.manifest.generation is not None
    return CausalGenerator(name, session, bundle.manifest.generation.model_copy(update=changes))


@pytest.fixture(scope="module")
def whole(bundle: Bundle) -> CausalGenerator:
    return opened(bundle, 1)


@pytest.fixture(scope="module")
def half(bundle: Bundle) -> CausalGenerator:
    return opened(bundle, 2)


def eos_among(generator: CausalGenerator, batch: int) -> int:
    """A token that some rows write early, some late and some never, to end them at different times."""
    rows = [one.tokens for one in generator.generate(*prompts(batch), options=Options(12))]
    places = {token: [row.index(token) for row in rows if token in row] for row in rows for token in row}
    return max((token for token in places if len(places[token]) < batch), key=lambda token: len(set(places[token])))


def by_transformers(ids: np.ndarray, mask: np.ndarray, eos: int, new_tokens: int) -> list[list[int]]:
    import torch

    written = model().generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    rows = written[:, ids.shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_greedy_tokens_are_those_of_transformers(bundle: Bundle, whole: CausalGenerator) -> None:
    ids, mask = prompts(6)
    eos = eos_among(whole, 6)
    generator = opened(bundle, 1, eos_ids=[eos])
    found = generator.generate(ids, mask, options=Options(12))
    assert [one.tokens for one in found] == by_transformers(ids, mask, eos, 12)
    assert {one.why for one in found} == {"eos", "length"}
    assert all((one.why == "eos") == (one.tokens[-1] == eos) for one in found)
    assert len({len(one.tokens) for one in found}) > 2, "rows end at different times"


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLING], ids=["greedy", "sampled"])
def test_rows_write_the_same_alone(bundle: Bundle, half: CausalGenerator, sampling: Sampling) -> None:
    generator = opened(bundle, 2, eos_ids=[eos_among(half, 8), EOS])
    ids, mask = prompts(8)
    together = generator.generate(ids, mask, options=Options(12, sampling))
    alone = [
        generator.generate(
            ids[row : row + 1, mask[row] == 1],
            mask[row : row + 1, mask[row] == 1],
            options=Options(12, sampling),
            rows=[row],
        )[0]
        for row in range(8)
    ]
    assert together == alone


@pytest.mark.parametrize("ratio", NAMES)
def test_cached_and_uncached_logits_agree(bundle: Bundle, ratio: int) -> None:
    generator = opened(bundle, ratio)
    ids, mask = prompts(3, longest=8)
    at_once, _ = generator.read(ids, mask)
    cache = None
    for start, end in ((0, 3), (3, 4), (4, 5), (5, ids.shape[1])):
        part, cache = generator.read(ids[:, start:end], mask[:, start:end], cache)
        real = mask[:, start:end] == 1
        np.testing.assert_allclose(part[real], at_once[:, start:end][real], atol=2e-5)
    assert cache is not None and cache.variant == NAMES[ratio]
    entries = len(cache.held)
    assert entries == 2 * 4 // ratio, "a key and a value for every step"


def test_long_prompts_are_read_in_pieces(half: CausalGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = prompts(4)
    at_once, whole = half.read_prompt(ids, mask)
    monkeypatch.setattr("engines.causal.ROOM_BYTES", 4 * 4 * V * 2)
    in_twos, cache = half.read_prompt(ids, mask)
    np.testing.assert_allclose(in_twos, at_once, atol=2e-5)
    assert np.array_equal(cache.mask, whole.mask) and ids.shape[1] > 4


def test_padding_changes_nothing(half: CausalGenerator) -> None:
    ids, mask = prompts(4)
    logits, _ = half.read(ids, mask)
    longer = [np.pad(one, [(0, 0), (5, 0)], constant_values=value) for one, value in ((ids, 3), (mask, 0))]
    padded, _ = half.read(*longer)
    np.testing.assert_allclose(padded[:, 5:][mask == 1], logits[mask == 1], atol=2e-5)


def reference(logits: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """One token by plain loops over a sorted list."""
    assert sampling.top_k is not None
    scores = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(len(scores)), key=lambda token: -scores[token])[: sampling.top_k]
    shares = np.exp(scores[order] - scores[order[0]])
    shares /= shares.sum()
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if total >= sampling.top_p:
            break
        kept.append((token, share))
        total += share
    point = uniform * total
    for token, share in sorted(kept):
        point -= share
        if point < 0:
            return token
    return max(kept)[0]


def test_sampled_tokens_are_those_of_a_plain_loop(half: CausalGenerator) -> None:
    ids, mask = prompts(3)
    found = half.generate(ids, mask, options=Options(10, SAMPLING))
    for row in range(3):
        random = np.random.default_rng((SAMPLING.seed, row))
        text, wanted = ids[row][mask[row] == 1].tolist(), []
        for _ in range(10):
            logits, _ = half.read(np.array([text]), np.ones((1, len(text)), np.int64))
            wanted.append(reference(logits[0, -1], SAMPLING, random.random()))
            text.append(wanted[-1])
            if wanted[-1] == EOS:
                break
        assert found[row].tokens == wanted
    other = half.generate(ids, mask, options=Options(10, replace(SAMPLING, seed=8)))
    assert other != found


def test_tokens_come_as_they_are_written(half: CausalGenerator) -> None:
    ids, mask = prompts(3)
    whole = half.generate(ids, mask, options=Options(4))
    stream = half.stream(ids, mask, options=Options(4))
    first = [next(stream) for _ in range(3)]
    assert [token.row for token in first] == [0, 1, 2] and [t.id for t in first] == [one.tokens[0] for one in whole]
    assert [token.why for token in stream][-3:] == ["length"] * 3


def test_a_text_ends_where_the_positions_do(whole: CausalGenerator) -> None:
    """The last token needs no position: nothing is read after it."""
    ids, mask = prompts(2, longest=POSITIONS - 1, seed=1)
    ids, mask = ids[:, -POSITIONS + 3 :], mask[:, -POSITIONS + 3 :]
    found = whole.generate(ids, mask, options=Options(99))
    assert [len(one.tokens) for one in found] == (POSITIONS + 1 - mask.sum(axis=1)).tolist()
    assert {one.why for one in found} == {"length"}


def test_a_cache_of_another_number_of_steps_is_refused(whole: CausalGenerator, half: CausalGenerator) -> None:
    ids, mask = prompts(2)
    _, cache = whole.read(ids, mask)
    with pytest.raises(InputError, match="this cache holds the states of ode-r1-fp32, and ode-r2-fp32 has other steps"):
        half.read(ids[:, :1], mask[:, :1], cache)
    with pytest.raises(InputError, match="ode-r1-fp32: rows: got 1, expected 2, as cached"):
        whole.read(ids[:1, :1], mask[:1, :1], cache)


@pytest.mark.parametrize(
    ("ids", "mask", "changes", "match"),
    [
        (np.ones((2, 3)), [[0, 0, 0], [1, 1, 1]], {}, "an empty prompt: expected at least one token in every row"),
        (np.ones((1, 3)), [[1, 1, 0]], {}, "ode-r2-fp32: prompts are padded on the right: expected on the left"),
        (np.ones((1, 2)), [[1, 1, 1]], {}, r"got ids int64\[1, 2\] and mask int64\[1, 3\], expected both"),
        (np.ones((0, 2)), np.ones((0, 2), np.int64), {}, r"got ids int64\[0, 2\] and mask"),
        (np.full((1, 2), V), [[1, 1]], {}, "the model does not have: got 257 to 257, expected ids from 0 to 256"),
        (np.ones((1, 2)), [[1, 1]], {"rows": [0, 1]}, "numbers of rows: got 2, expected 1"),
        (
            np.ones((1, 2)),
            [[1, 1]],
            {"options": Options(max_length=2)},
            "no room: got 2 tokens in row 0, expected fewer",
        ),
        (np.ones((1, POSITIONS + 1)), [[1] * (POSITIONS + 1)], {}, "tokens: got 49, expected at most 48"),
    ],
)
def test_what_cannot_be_written_on(
    half: CausalGenerator, ids: np.ndarray, mask: list[list[int]], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        half.stream(ids.astype(np.int64), np.array(mask), **changes)


def test_logits_that_are_not_finite(half: CausalGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    read = half.read

    def broken(*given: object) -> object:
        logits, cache = read(*given)  # type: ignore[arg-type]
        logits[1, -1, V // 2] = np.nan
        return logits, cache

    monkeypatch.setattr(half, "read", broken)
    with pytest.raises(CompexportError, match="ode-r2-fp32: logits hold NaN or infinity: got row 1"):
        half.generate(*prompts(3))


def test_a_row_that_has_ended_may_hold_anything(
    bundle: Bundle, whole: CausalGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three rows one ends first and stays in the batch, as half of it goes on."""
    ids, mask = prompts(3)
    first = whole.generate(ids, mask, options=Options(1))[2].tokens[0]
    generator = opened(bundle, 1, eos_ids=[first])
    wanted = generator.generate(ids, mask, options=Options(2))
    read = generator.read

    def broken(given: np.ndarray, given_mask: np.ndarray, cache: object = None) -> object:
        logits, cache = read(given, given_mask, cache)  # type: ignore[arg-type]
        logits[given_mask[:, -1] == 0] = np.nan
        return logits, cache

    monkeypatch.setattr(generator, "read", broken)
    assert generator.generate(ids, mask, options=Options(2)) == wanted
    assert [one.why for one in wanted].count("eos") == 1


@pytest.mark.parametrize(
    ("lost", "match"),
    [
        ("logits", "ode-r2-fp32: its graph is no decoder, or not this bundle's: got outputs present.0.key"),
        ("attention_mask", "got inputs input_ids, position_ids; build the bundle again"),
        ("present.1.value", "got past_key_values.1.value without present"),
        ("past_key_values", "got no past"),
    ],
)
def test_graphs_that_are_no_decoders(half: CausalGenerator, lost: str, match: str) -> None:
    inputs = [spec for spec in half._session.inputs if not spec.name.startswith(lost)]
    outputs = [spec for spec in half._session.outputs if spec.name != lost]
    without: Any = SimpleNamespace(inputs=inputs, outputs=outputs)
    with pytest.raises(BundleError, match=match):
        CausalGenerator(half.name, without, half.generation)


def test_padding_that_is_no_token(half: CausalGenerator) -> None:
    with pytest.raises(BundleError, match=f"got pad_id -1 of {V} tokens"):
        CausalGenerator(half.name, half._session, half.generation.model_copy(update={"pad_id": -1}))


def test_warming_up_leaves_nothing_behind(whole: CausalGenerator) -> None:
    before = whole.generate(*prompts(1), options=Options(2))
    whole.warm_up()
    assert whole.generate(*prompts(1), options=Options(2)) == before
    assert isinstance(before[0], Generated)


def test_beams_and_rules_are_those_of_transformers(bundle: Bundle, whole: CausalGenerator) -> None:
    """Of a model that writes on, what it reads counts as its text."""
    import torch

    ids, mask = prompts(4)
    eos = eos_among(whole, 4)
    generator = opened(bundle, 1, eos_ids=[eos])
    asked = {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2, "max_new_tokens": 9}
    found = generator.generate(ids, mask, options=options_for(generator.generation, asked))
    written = (
        model()
        .generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=PAD,
            **asked,
        )[:, ids.shape[1] :]
        .tolist()
    )
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in written]
    assert [one.tokens for row in found for one in (row, *row.others)] == wanted
