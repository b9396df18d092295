"""Texts written on by a loaded bundle: order and chunks, room, choosing by budget, measuring, evaluating."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.data import Examples
from calib.quality import evaluate
from compexport import api, latency
from compexport.errors import InputError
from engines.bundle import Bundle
from engines.generate import Generated
from engines.lengths import Expected
from engines.points import is_part, is_segment, is_token, token_name, variant_of
from engines.profile import Prediction, Profile
from engines.runtime import Runtime
from engines.sampling import Sampling
from engines.selector import Quality
from engines.writing import next_token_scores
from engines.writing_time import WritingTimes
from tests.engines.decoders import EOS, NAMES, PAD, POSITIONS, make_bundle, model
from tests.engines.steps import make_bundle as make_step_bundle

TEXTS = ["Once upon a time", "It was", "A much longer text, as they go", "x", "Once upon a time", "Hm, a"]
SAMPLING = Sampling(temperature=1.0, seed=5)
R1, R2, R4 = NAMES.values()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("writing") / "bundle").path


@pytest.fixture
def runtime(folder: Path) -> Any:
    with Runtime(Bundle.open(folder), threads=1) as opened:
        yield opened


def measured(token_ms: dict[str, float], prompt_ms: float = 4.0, lengths: tuple[int, ...] = (8, 32)) -> Profile:
    """One more token costs an eighth of itself more at the longer length."""
    cells = {name: {(b, s): (prompt_ms, prompt_ms) for b in (1, 2) for s in lengths} for name in token_ms}
    for name, ms in token_ms.items():
        times = {s: (ms * (1 + i / 8),) * 2 for i, s in enumerate(lengths)}
        cells[token_name(name)] = {(b, s): times[s] for b in (1, 2) for s in lengths}  # type: ignore[misc]
    return Profile(cells)


def test_a_text_goes_on_as_transformers_writes_it(runtime: Runtime) -> None:
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(runtime.bundle.file("tokenizer.json")))
    for text in TEXTS[:3]:
        ids = tokenizer.encode(text).ids
        asked = torch.tensor([ids])
        written = model().generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=8)
        wanted = written[0, len(ids) :].tolist()
        result = runtime(text, max_new_tokens=8, ratio=1)
        assert result.output["tokens"] == wanted
        assert result.output["text"] == tokenizer.decode(wanted)
        assert result.why == ("eos" if wanted[-1] == EOS else "length") and result.label is None
        assert result.variant == R1 and result.predicted_ms is None and result.met_budget


@pytest.mark.parametrize("sampling", [None, SAMPLING])
def test_texts_are_answered_in_their_order_whatever_the_chunks(
    runtime: Runtime, sampling: Sampling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = runtime(TEXTS, max_new_tokens=6, sampling=sampling, variant=R2)
    monkeypatch.setattr("engines.choosing.LARGEST_BATCH", 2)
    chunked = runtime(TEXTS, max_new_tokens=6, sampling=sampling, variant=R2)
    assert [one.output for one in together] == [one.output for one in chunked]
    same = together[0].output["tokens"] == together[4].output["tokens"]
    assert same == (sampling is None), "equal texts draw their own numbers"
    first = runtime(TEXTS[0], max_new_tokens=6, sampling=sampling, variant=R2)
    assert first.output == together[0].output


def test_long_texts_leave_room_and_lose_their_beginning(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(POSITIONS + 10))
    with caplog.at_level(logging.WARNING):
        result = runtime(text, max_new_tokens=9, variant=R4)
    assert result.truncated and "longer than the 40 that leave room for the new tokens" in caplog.text
    assert result.output == runtime(text[-40:], max_new_tokens=9, variant=R4).output
    assert len(result.output["tokens"]) == 9 or result.why == "eos"
    with pytest.raises(InputError, match="longer than the 40 that leave room for the new tokens; shorten it"):
        runtime(text, max_new_tokens=9, truncate=False)
    with pytest.raises(InputError, match="max_new_tokens: got 49, expected at most 48, the model's positions"):
        runtime("a", max_new_tokens=POSITIONS + 1)


def test_an_empty_text_begins_with_the_first_token(runtime: Runtime) -> None:
    logits, _ = runtime.generator(R1).read(np.array([[EOS]]), np.array([[1]]))
    assert runtime("", max_new_tokens=1, variant=R1).output["tokens"] == [int(logits[0, -1].argmax())]


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        (("a", "b"), {}, r"text 0 \(counted from 0\) is a pair: expected one text, to be written on"),
        ("   ", {}, r"text 0 \(counted from 0\) is empty"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens is out of range: got 0, expected a whole number >= 1"),
    ],
)
def test_what_cannot_be_written_on(runtime: Runtime, text: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        runtime(text, **options)


def test_other_tasks_write_nothing(tmp_path: Path) -> None:
    with Runtime(make_step_bundle(tmp_path / "bundle", with_exits=False)) as runtime:
        with pytest.raises(InputError, match="max_new_tokens is for bundles that write text: got the task sequence-c"):
            runtime("a film", max_new_tokens=3)
        with pytest.raises(InputError, match="temperature is for bundles"):
            runtime("a film", sampling=SAMPLING)
        with pytest.raises(InputError, match="num_beams is for bundles"):
            runtime("a film", settings={"num_beams": 2})
        for write in (runtime.generator, runtime.stream):
            with pytest.raises(InputError, match="writes no text"):
                write(runtime.variants[0])


# --- time -------------------------------------------------------------------------------------------------------------


def test_names_of_what_is_measured() -> None:
    assert token_name(R1) == f"{R1}/token" and variant_of(token_name(R1)) == R1 == variant_of(R1)
    assert is_part(token_name(R1)) and is_token(token_name(R1)) and not is_segment(token_name(R1))
    assert not is_token(R1) and not is_part(R1)


def predict_writing(profile: Profile, shapes: list[tuple[int, int]], tokens: int) -> Mapping[str, Prediction]:
    return WritingTimes(profile).writing(shapes, [Expected.at_most(tokens)] * len(shapes))


def test_writing_takes_the_prompt_and_every_later_token() -> None:
    profile = measured({R1: 2.0, R2: 1.0})
    one = predict_writing(profile, [(1, 8)], 1)
    assert set(one) == {R1, R2} and one[R1].p50_ms == 4.0 and not one[R1].extrapolated
    # Of 13 tokens 12 come after 8 to 19 others: on average after 13, or 5/24 of the way to 32.
    many = predict_writing(profile, [(1, 8)], 13)
    assert many[R1].p99_ms == pytest.approx(4 + 12 * 2 * (1 + 5 / 24 / 8))
    two = predict_writing(profile, [(1, 8), (2, 8)], 13)
    assert two[R2].p99_ms == pytest.approx(2 * (4 + 12 * (1 + 5 / 24 / 8)))
    assert predict_writing(profile, [(1, 32)], 9)[R1].extrapolated
    assert predict_writing(Profile({R1: {(1, 8): (1.0, 1.0)}}), [(1, 8)], 2) == {}, "no token was timed"


def test_the_budget_is_for_all_tokens(runtime: Runtime) -> None:
    runtime.members.profile = measured({R1: 2.0, R2: 1.0, R4: 0.5})
    chosen = {n: runtime.select(length=8, budget_ms=30, max_new_tokens=n).variant for n in (8, 16, 32)}
    assert chosen == {8: R1, 16: R2, 32: R4}
    decision = runtime.select(length=8, budget_ms=30)
    assert decision.variant == R4 and decision.predicted_ms == pytest.approx(4 + 31 * 0.5 * (1 + 15 / 24 / 8))
    assert runtime("Once", budget_ms=1e5, max_new_tokens=4).variant == R1


def test_a_selection_leaves_room_for_the_new_tokens(runtime: Runtime) -> None:
    runtime.members.profile = measured({R1: 2.0, R2: 1.0, R4: 0.5}, lengths=(8, 40))
    assert not runtime.select(max_new_tokens=20).extrapolated, "29 tokens and 20 more"
    at_the_end = runtime.select(max_new_tokens=POSITIONS).predicted_ms
    assert at_the_end == runtime.select(length=1, max_new_tokens=POSITIONS).predicted_ms
    with pytest.raises(InputError, match="max_new_tokens: got 49, expected at most 48, the model's positions"):
        runtime.select(max_new_tokens=POSITIONS + 1)


def test_what_is_as_good_and_faster_is_open_before_the_clock_starts(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.members.profile = measured({R1: 2.0, R2: 1.0, R4: 0.5})
    runtime.members.quality = Quality({R1: 1, R2: 2, R4: 4}, {R1: 0.9, R2: 0.9, R4: 0.5})
    predict, opened = runtime._chooser._predict, []

    def seen(*given: Any) -> Any:
        opened.extend(runtime._opening.is_open)
        return predict(*given)

    monkeypatch.setattr(runtime._chooser, "_predict", seen)
    assert runtime("Once", max_new_tokens=2).variant == R2
    assert opened == [R1, R2]


@pytest.mark.parametrize(("lengths", "learns"), [((3, 3), True), ((3, 1), False)])
def test_texts_that_end_early_do_not_make_the_machine_look_fast(
    runtime: Runtime, lengths: tuple[int, ...], learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.members.profile = measured({R1: 1e6})
    written = [Generated([1] * length, "eos") for length in lengths]
    monkeypatch.setattr(runtime.generator(R1), "generate", lambda *_, **__: written)
    runtime(["Once upon", "a time"], variant=R1, max_new_tokens=4)
    assert (runtime.correction.factor(R1) < 1.0) is learns


def test_decoders_are_measured_and_evaluated(folder: Path) -> None:
    examples = Examples(["Once upon a time there was", "It was so", "y"])
    with Runtime(Bundle.open(folder), threads=1) as runtime:
        table = latency.measure(runtime, [1, 3], [4, 12], threads=1, min_runs=3, progress=api.quiet)
        runtime.bundle.save_profile(runtime.device, table)
        evaluation = evaluate(runtime, examples)
    assert {row["variant"] for row in table["rows"]} == {*NAMES.values(), *map(token_name, NAMES.values())}
    ideals = {(r["variant"], r["length"]): r["ideal"] for r in table["realised"]}
    assert set(ideals) == {(n, s) for v in (R2, R4) for n in (v, token_name(v)) for s in (4, 12)}
    costs = [runtime.bundle.manifest.graphs[f"ode-r{ratio}"].cost for ratio in (1, 2)]
    after = [cost.fixed + cost.per_token + cost.per_pair * 13 for cost in costs]
    assert ideals[token_name(R2), 12] == pytest.approx(after[0] / after[1])
    _require_right_scores(evaluation.table["variants"][R1], evaluation.rows[0]["perplexity"], examples.texts, folder)
    assert evaluation.table["metric"] == "next_token_accuracy" and evaluation.rows[0]["drop"] == 0
    with Runtime(Bundle.open(folder), threads=1) as again:
        result = again("Once", budget_ms=1e5, max_new_tokens=3)
        assert result.predicted_ms is not None and result.met_budget


def _require_right_scores(accuracy: float, perplexity: float, texts: list[str], folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    right, loss, count = 0, 0.0, 0
    for text in texts[:2]:  # the third has one token alone
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            logits = model()(ids).logits[0, :-1].double()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        right += int((logits.argmax(-1) == ids[0, 1:]).sum())
        count += logits.shape[0]
    assert accuracy == right / count
    assert perplexity == pytest.approx(math.exp(loss / count), rel=1e-4)


def test_scores_do_not_depend_on_how_many_rows_fit(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, generator = runtime._opening.encoder(), runtime.generator(R2)
    encoded = encoder.encode(TEXTS)
    at_once = next_token_scores(generator, encoder, encoded)
    monkeypatch.setattr("engines.writing.ROOM_BYTES", 1)
    one_by_one = next_token_scores(generator, encoder, encoded)
    for together, alone in zip(at_once, one_by_one, strict=True):
        assert (together["tokens"], together["hits"]) == (alone["tokens"], alone["hits"])
        assert together["log_likelihood"] == pytest.approx(alone["log_likelihood"], abs=1e-3)
    assert at_once[3]["tokens"] == 0, "one token follows none"


def test_only_one_token_each_cannot_be_scored(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="texts of one token each"):
        evaluate(runtime, Examples(["x", "y"]))


def test_feeds_are_padded_on_the_left(runtime: Runtime) -> None:
    encoder = runtime._opening.encoder()
    feeds = encoder.feeds(encoder.encode(["ab", "a"]))
    assert feeds["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert feeds["input_ids"][1, 0] == PAD and feeds["input_ids"][1, 1] == feeds["input_ids"][0, 0]


def test_decoders_stop_in_time_too(runtime: Runtime) -> None:
    runtime.members.profile = measured({R1: 1e6}, prompt_ms=1e-3)
    rules = {"min_new_tokens": 5, "max_new_tokens": 5}
    late, other = runtime(["Once upon", "a time"], budget_ms=1e5, variant=R1, settings=rules)
    assert (late.why, other.why) == ("budget", "budget") and late.met_budget
    assert len(late.output["tokens"]) == len(other.output["tokens"]) == 1
    stream = runtime.stream("Once upon", budget_ms=1e5, variant=R1, settings=rules)
    list(stream)
    assert stream.result is not None and stream.result.output == late.output
    assert len(runtime("Once upon", budget_ms=1e8, variant=R1, settings=rules).output["tokens"]) == 5


def test_settings_are_said_once(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="a setting is there twice: got max_new_tokens, expected each once"):
        runtime("Once", max_new_tokens=3, settings={"max_new_tokens": 3})
    by_name = runtime("Once", variant=R2, settings={"max_new_tokens": 4, "temperature": 1.0, "seed": 5, "top_k": None})
    assert by_name.output == runtime("Once", variant=R2, max_new_tokens=4, sampling=SAMPLING).output
    long = runtime("x" * 60, variant=R4, settings={"max_length": 20}).output["tokens"]
    assert len(long) == 1, "nineteen tokens of the text are read, and one is left"
