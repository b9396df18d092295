"""Models that read one text and write another, on real engines: what transformers writes, by every setting."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compexport.errors import BundleError, InputError
from engines.beam import Beams
from engines.generate import Generated, StepDeadline
from engines.manifest import Generation
from engines.options import Options, options_for
from engines.sampling import Sampling
from engines.seq2seq import Seq2SeqGenerator
from tests.engines import plans, seq2seqs
from tests.engines.seq2seqs import EOS, PAD, V, generation_of, open_generator, texts

SAMPLING = Sampling(temperature=1.5, top_k=20, top_p=0.95, seed=3)
# Frequent tokens of these models, so that texts end at different places.
ENDS = {"t5": [EOS, 34, 59], "bart": [EOS, 22, 29]}
START = {"t5": PAD, "bart": 2}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -1.0},
    {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"repetition_penalty": 1.7, "num_beams": 3, "encoder_no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[11], [25, 39], [86, 26], [10, 28, 28], [EOS]]},
    {"suppress_tokens": [25, 28], "begin_suppress_tokens": [11, 38, 44], "num_beams": 2, "forced_bos": 9},
    {
        "num_beams": 4, "early_stopping": True, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_length": 4,
        "num_return_sequences": 2, "forced_bos": 5, "forced_eos": EOS,
    },
    {"max_length": 7, "num_beams": 3, "forced_eos": EOS},
    {"decoder_start_ids": [9, 22], "num_beams": 2, "forced_bos": 5, "begin_suppress_tokens": [5, 6]},
]  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "bart"])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """The model, and the folder of its graphs."""
    model = getattr(seq2seqs, request.param)()
    folder = tmp_path_factory.mktemp(request.param)
    seq2seqs.export(model, folder)
    return request.param, model, folder


@pytest.fixture(scope="module")
def pair(traced: tuple[str, Any, Path]) -> tuple[str, Any, Any]:
    """The model, and a function that opens its engines."""
    name, model, folder = traced
    generation = generation_of(model)

    def opened(provider: str = "cpu", **changes: Any) -> Seq2SeqGenerator:
        how = generation.model_copy(update={"eos_ids": ENDS[name], **changes})
        return open_generator(folder, how, provider=provider)

    return name, model, opened


@pytest.fixture(scope="module")
def generator(pair: tuple[str, Any, Any]) -> Seq2SeqGenerator:
    found: Seq2SeqGenerator = pair[2]()
    return found


def by_transformers(name: str, model: Any, settings: dict[str, Any], batch: int) -> Any:
    """Its tokens, a list for each text, and their scores."""
    given = {"max_new_tokens": 12} | settings if "max_length" not in settings else dict(settings)
    for kind in ("bos", "eos"):
        given[f"forced_{kind}_token_id"] = given.pop(f"forced_{kind}", None)
    start = [START[name], *given.pop("decoder_start_ids", [])]
    ids, mask = (torch.tensor(one) for one in texts(batch))
    written = model.generate(
        ids, attention_mask=mask, decoder_input_ids=torch.tensor([start] * batch), eos_token_id=ENDS[name],
        pad_token_id=PAD, do_sample=False, return_dict_in_generate=True, output_scores=True, **given,
    )  # fmt: skip
    rows = []
    for row in written.sequences[:, len(start) :].tolist():
        ends = [place for place, token in enumerate(row) if token in ENDS[name]]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows, written.sequences_scores.tolist() if "num_beams" in settings else None


def flat(found: list[Generated]) -> list[Generated]:
    return [text for one in found for text in (one, *one.others)]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "greedy")
def test_tokens_are_those_of_transformers(
    pair: tuple[str, Any, Any], generator: Seq2SeqGenerator, settings: dict[str, Any]
) -> None:
    name, model, _ = pair
    asked = {name.replace("bos", "bos_id").replace("eos", "eos_id"): value for name, value in settings.items()}
    if "decoder_start_ids" in asked:
        asked["decoder_start_ids"] = [START[name], *asked["decoder_start_ids"]]
    asked = {"max_new_tokens": 12} | asked if "max_length" not in asked else asked
    found = flat(generator.generate(*texts(5), options=options_for(generator.generation, asked)))
    tokens, scores = by_transformers(name, model, settings, 5)
    assert [one.tokens for one in found] == tokens
    if scores is not None:
        np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-4)
    assert all((one.why == "eos") == (one.tokens[-1] in ENDS[name]) for one in found)
    if settings.keys() <= {"num_beams"}:
        assert len({len(one.tokens) for one in found}) > 2, "texts end at different times"


@pytest.mark.parametrize(
    "options", [Options(10), Options(10, SAMPLING), Options(10, beams=Beams(3))], ids=["greedy", "sampled", "beams"]
)
def test_rows_write_the_same_alone(generator: Seq2SeqGenerator, options: Options) -> None:
    ids, mask = texts(6)
    together = generator.generate(ids, mask, options=options)
    for row in range(6):
        real = mask[row : row + 1, mask[row] == 1]
        alone = generator.generate(ids[row : row + 1, mask[row] == 1], real, options=options, rows=[row])[0]
        assert (alone.tokens, alone.why) == (together[row].tokens, together[row].why)
        assert (alone.score or 0.0) == pytest.approx(together[row].score or 0.0, rel=1e-4)


def test_tokens_come_as_they_are_written(generator: Seq2SeqGenerator) -> None:
    ids, mask = texts(3)
    whole = generator.generate(ids, mask, options=Options(4))
    streamed: list[list[int]] = [[], [], []]
    stream = generator.stream(ids, mask, options=Options(4))
    assert [next(stream).row for _ in range(3)] == [0, 1, 2]
    for token in generator.stream(ids, mask, options=Options(4)):
        streamed[token.row].append(token.id)
    assert streamed == [one.tokens for one in whole]
    with pytest.raises(InputError, match="several texts at a time come whole, not token by token; generate with one"):
        generator.stream(ids, mask, options=Options(4, beams=Beams(2)))


def test_several_texts_are_drawn(generator: Seq2SeqGenerator) -> None:
    ids, mask = texts(3)
    single = generator.generate(ids, mask, options=Options(8, SAMPLING))
    found = generator.generate(ids, mask, options=Options(8, SAMPLING, Beams(num_return_sequences=4)))
    assert [one.tokens for one in found] == [one.tokens for one in single], "the first is what would come alone"
    assert all(len(one.others) == 3 for one in found)
    assert all(len({tuple(text.tokens) for text in flat([one])}) > 1 for one in found)


def test_a_generation_ends_in_time(generator: Seq2SeqGenerator) -> None:
    """Ten milliseconds each, and no time for a sixth step; the first step's own time is the caller's to plan."""
    ids, mask = texts(4)
    now = [0.0]
    asked: list[tuple[int, int]] = []

    def step_ms(rows: int, past: int) -> float:
        asked.append((rows, past))
        now[0] += 0.010
        return 10.0

    options = Options(12)
    whole = generator.generate(ids, mask, options=options)
    found = generator.generate(ids, mask, options=options, deadline=StepDeadline(0.055, step_ms, lambda: now[0]))
    assert [past for _, past in asked] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(found, whole, strict=True):
        assert one.tokens == other.tokens[:6]
        assert one.why == ("budget" if len(other.tokens) > 6 else other.why)
    assert "budget" in {one.why for one in found}


def test_a_search_ends_in_time(generator: Seq2SeqGenerator) -> None:
    never = StepDeadline(-1.0, lambda rows, past: 1.0, lambda: 0.0)
    found = generator.generate(*texts(4), options=Options(12, beams=Beams(3)), deadline=never)
    assert all(len(one.tokens) == 1 and one.score is not None for one in found)
    assert {one.why for one in found} <= {"budget", "eos"} and "budget" in {one.why for one in found}


def test_what_is_kept_of_a_source_moves_once(generator: Seq2SeqGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """To become as many beams: two tensors of every tile. Those of the text that is written follow its beams."""
    taken = []
    take = generator._cached.take_rows
    monkeypatch.setattr(
        generator._cached, "take_rows", lambda held, rows: taken.append(held.shape()[2]) or take(held, rows)
    )
    ids, mask = texts(1, longest=20, seed=2)
    length = ids.shape[1]
    generator.generate(ids, mask, options=options_for(generator.generation, {"num_beams": 3, "max_new_tokens": 8}))
    assert length > 10 and taken.count(length) == len(generator._source)
    assert len(taken) > taken.count(length)
    taken.clear()
    generator.generate(ids, mask, options=Options(8))
    assert not taken, "nothing moves where no row does"


def test_the_model_s_own_settings_hold(pair: tuple[str, Any, Any]) -> None:
    name, model, opened = pair
    generator = opened(defaults={"num_beams": 3, "max_length": 7}, forced_eos_id=EOS)
    tokens, _ = by_transformers(name, model, {"num_beams": 3, "max_length": 7, "forced_eos": EOS}, 5)
    assert [one.tokens for one in generator.generate(*texts(5))] == tokens
    generator.warm_up()
    assert [one.tokens for one in generator.generate(*texts(5))] == tokens


@pytest.mark.parametrize(
    ("ids", "mask", "changes", "match"),
    [
        ([[5, 6, 7]], [[0, 1, 1]], {}, "tiny: texts are padded on the left: expected on the right"),
        ([[5, 6, 7]], [[1, 0, 1]], {}, "tiny: texts are padded on the left"),
        ([[5, 6]], [[0, 0]], {}, "an empty prompt: expected at least one token in every row"),
        ([[5, V]], [[1, 1]], {}, f"the model does not have: got 5 to {V}, expected ids from 0 to {V - 1}"),
        ([[5]], [[1]], {"rows": [0, 1]}, "numbers of rows: got 2, expected 1"),
        ([[5]], [[1]], {"options": Options(decoder_start_ids=(1, V))}, f"decoder_start_ids: got 1 to {V}"),
        ([[5]], [[1]], {"options": Options(max_length=1)}, "leaves no room: got 1 tokens in row 0, expected fewer"),
    ],
)
def test_what_cannot_be_written(
    generator: Seq2SeqGenerator, ids: list[list[int]], mask: list[list[int]], changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        generator.stream(np.array(ids), np.array(mask), **changes)


def test_rules_that_leave_nothing(generator: Seq2SeqGenerator) -> None:
    rules = options_for(generator.generation, {"suppress_tokens": list(range(V))})
    with pytest.raises(InputError, match="tiny: the rules of this generation leave no token to go on with; loosen"):
        generator.generate(*texts(2), options=rules)
    unknown = options_for(generator.generation, {"suppress_tokens": [V]})
    with pytest.raises(InputError, match=f"tiny: suppress_tokens: got {V}, expected ids from 0 to {V - 1}"):
        generator.generate(*texts(2), options=unknown)


def test_positions_end_a_text(pair: tuple[str, Any, Any]) -> None:
    generator = pair[2](max_positions=6, eos_ids=[])
    found = generator.generate(*texts(2, longest=5), options=Options(99))
    assert [(len(one.tokens), one.why) for one in found] == [(6, "length")] * 2
    with pytest.raises(InputError, match="tiny: tokens: got 7, expected at most 6"):
        generator.generate(np.full((1, 7), 5), np.ones((1, 7), np.int64))


@pytest.mark.parametrize(
    ("graph", "lost", "match"),
    [
        ("_encoder", "last_hidden_state", "got encoder outputs none; build the bundle again"),
        ("_first", "encoder_hidden_states", "got decoder inputs encoder_attention_mask, input_ids"),
        ("_cached", "present.1.decoder.key", "got decoder-with-past outputs logits, present.0.decoder.key"),
        ("_cached", "past_key_values", "got decoder outputs"),
    ],
)
def test_graphs_that_do_not_belong_together(generator: Seq2SeqGenerator, graph: str, lost: str, match: str) -> None:
    sessions = {name: getattr(generator, name) for name in ("_encoder", "_first", "_cached")}
    kept = {
        side: [spec for spec in getattr(sessions[graph], side) if not spec.name.startswith(lost)]
        for side in ("inputs", "outputs")
    }
    sessions[graph] = SimpleNamespace(**kept)
    with pytest.raises(
        BundleError, match=f"tiny: its graphs are no encoder and decoder, or not this bundle's: {match}"
    ):
        Seq2SeqGenerator("tiny", *sessions.values(), generator.generation)


def test_a_model_that_begins_with_nothing(generator: Seq2SeqGenerator) -> None:
    nothing = generator.generation.model_copy(update={"decoder_start_ids": []})
    assert isinstance(nothing, Generation)
    with pytest.raises(BundleError, match="got no decoder_start_ids"):
        Seq2SeqGenerator("tiny", generator._encoder, generator._first, generator._cached, nothing)


@pytest.mark.parametrize("provider", ["cuda", "cuda-graphs"])
def test_bound_sessions_write_the_same(pair: tuple[str, Any, Any], generator: Seq2SeqGenerator, provider: str) -> None:
    """As they run on a GPU, here over this process's memory; what is held moves by rows there."""
    bound = pair[2](provider)
    ids, mask = texts(4)
    for options in (Options(9), Options(9, beams=Beams(3, num_return_sequences=2))):
        expected = generator.generate(ids, mask, options=options)
        for _ in range(3):
            assert [_all_tokens(one) for one in bound.generate(ids, mask, options=options)] == [
                _all_tokens(one) for one in expected
            ]
    graphs = [session.captured for session in (bound._encoder, bound._first, bound._cached)]
    assert graphs == ([1, 1, 0] if provider == "cuda-graphs" else [0, 0, 0]), "a past that grows never comes again"


def _all_tokens(one: Generated) -> list[list[int]]:
    return [one.tokens, *(other.tokens for other in one.others)]


def test_a_gpu_writes_what_ort_writes(
    traced: tuple[str, Any, Path], pair: tuple[str, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plans, over doubles of TensorRT and of CUDA: greedy, in beams, drawn, with rows that end early."""
    name, model, opened = pair
    bundle = seq2seqs.make_bundle(tmp_path / "bundle", traced[2], model, ENDS[name])
    there = plans.machine(monkeypatch)
    sessions = there.backend().open_graphs(plans.with_plans(bundle, there), seq2seqs.GRAPHS)
    assert bundle.manifest.generation is not None
    found = Seq2SeqGenerator("tiny", *(sessions[graph] for graph in seq2seqs.GRAPHS), bundle.manifest.generation)
    for options in (Options(12), Options(12, beams=Beams(3, num_return_sequences=2)), Options(12, sampling=SAMPLING)):
        ids, mask = texts(5)
        pairs = zip(
            found.generate(ids, mask, options=options), opened().generate(ids, mask, options=options), strict=True
        )
        for one, other in pairs:
            assert [t.tokens for t in (one, *one.others)] == [t.tokens for t in (other, *other.others)]
    for session in sessions.values():
        session.close()
    assert not any(there.cuda.left.values()), there.cuda.left
