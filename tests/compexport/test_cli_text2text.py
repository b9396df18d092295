"""A family of encoder-decoders from bundle to user: bench, evaluate, select, run, pairs of stacks, budgets, streams."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compexport import api
from compexport.errors import InputError
from engines import backends
from engines.bundle import Bundle
from engines.lengths import Expected, Group, OutputLengths
from engines.points import encoder_name, first_token_name, token_name
from engines.profile import Profile
from engines.results import Result
from engines.runtime import Runtime
from engines.sampling import Sampling
from engines.selector import Quality

Cli = Callable[..., Any]
TEXTS = ["a fine film with a quiet heart", "the plot", "what a waste of two hours!"]
BASE, BOTH = "modular-r1-fp32", "modular-r2-fp32"
SMALL_DECODER, SMALL_ENCODER = "modular-e2x1-d1x2-fp32", "modular-e1x2-d2x1-fp32"
NAMES = {BASE, BOTH, SMALL_DECODER, SMALL_ENCODER}
PARTS = [encoder_name, first_token_name, lambda name: token_name(name, 1), lambda name: token_name(name, 64)]
HOUR_MS = 3.6e6


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-t5-pair", "text2text-generation")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tilings of each stack, and so four variants of six graphs."""
    output = tmp_path_factory.mktemp("text2text") / "bundle"
    api.build(model, ratios=[2], output=output, untrained=True, assemblies=api.Assemblies(pairs=True))
    return output


@pytest.fixture
def bundle(made: Path, tmp_path: Path, cli: Cli) -> Path:
    """At ``./bundle``, with ``dev.tsv`` beside it."""
    rows = [f"{text}\t{text.split()[0]}" for text in TEXTS]
    (tmp_path / "dev.tsv").write_text("\n".join(["source\ttarget", *rows]) + "\n", encoding="utf-8")
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def runtime(made: Path) -> Iterator[Runtime]:
    with Runtime(Bundle.open(made), threads=1) as opened:
        yield opened


def measured(token_ms: dict[str, float], first_ms: float = 4.0) -> Profile:
    """As good as no time for a step's further tokens."""
    sizes = [(batch, length) for batch in (1, 4) for length in (4, 32)]
    cells = {name: dict.fromkeys(sizes, (first_ms, first_ms)) for name in token_ms}
    for name, ms in token_ms.items():
        cells |= {token_name(name, written): dict.fromkeys(sizes, (ms, ms)) for written in (1, 64)}
    return Profile(cells)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_whole_way(cli: Cli, bundle: Path) -> None:
    sizes = ("--batch", "1,2", "--length", "4,12", "--min-runs", 3, "--threads", 1)
    timed = cli("bench", *sizes, "--json").document
    assert {row["variant"] for row in timed["rows"]} == NAMES | {part(name) for name in NAMES for part in PARTS}
    ideal = {(row["variant"], row["length"]): row["ideal"] for row in timed["realised"]}
    assert ideal[encoder_name(SMALL_DECODER), 4] == 1.0 < ideal[encoder_name(BOTH), 4]
    assert ideal[BOTH, 12] > ideal[SMALL_ENCODER, 12] > 1.0
    same = [
        row["p50_ms"] for row in timed["rows"] if row["variant"] in (encoder_name(BASE), encoder_name(SMALL_DECODER))
    ]
    assert len(same) == 8 and len(set(same)) == 4, "the same graph was timed once"
    shown = cli("bench", *sizes).out
    assert shown.count("one more token after 64") == 2 * 4 and "tokens/s" in shown and "up to the first token" in shown

    options = ("--data", "dev.tsv", "--max-new-tokens", 6, "--threads", 1)
    evaluated = cli("evaluate", *options, "--json").document
    assert evaluated["metric"] == "bleu" and {row["variant"] for row in evaluated["variants"]} == NAMES
    assert all({"exact_match", "word_error_rate"} <= set(row) for row in evaluated["variants"])
    lengths = evaluated["output_tokens"]
    assert lengths["variant"] == BASE and lengths["max_new_tokens"] == 6 and lengths["num_beams"] == 1
    assert sum(sum(group["counts"]) + group["cut"] for group in lengths["groups"]) == len(TEXTS)
    by_edits = cli("evaluate", *options, "--metric", "word_error_rate")
    assert by_edits.code == 0 and "outputs of modular-r1-fp32 have" in by_edits.out

    chosen = cli("select", "--budget-ms", HOUR_MS, "--length", 8, "--threads", 1, "--json").document
    assert chosen["expected_tokens"]["measured"] and chosen["usual_ms"] <= chosen["predicted_ms"]
    assert {row["variant"] for row in chosen["candidates"]} == NAMES
    assert "usual ms" in cli("select", "--budget-ms", HOUR_MS, "--length", 8, "--threads", 1).out
    written = cli(
        "run", "--text", TEXTS[0], "--text", TEXTS[1], "--budget-ms", HOUR_MS, "--threads", 1, "--json"
    ).document
    assert written["met_budget"] and written["predicted_ms"] > 0 and written["expected_tokens"]["measured"]
    assert all(set(output) == {"text", "tokens", "why"} for output in written["outputs"])

    searched = cli("evaluate", *options, "--num-beams", 2, "--json").document["output_tokens"]
    assert searched["num_beams"] == 2 and searched["p99"] <= 6
    arguments = ("select", "--budget-ms", HOUR_MS, "--length", 8, "--threads", 1)
    assert "counted with 2 beams" in cli(*arguments).out
    assert "counted" not in cli(*arguments, "--num-beams", 2).out


def test_a_run_has_the_options_of_writing(cli: Cli, bundle: Path) -> None:
    def outputs(*options: object) -> list[dict[str, Any]]:
        arguments = ("--text", TEXTS[0], "--ratio", 1, "--threads", 1, "--max-new-tokens", 5, *options)
        found: list[dict[str, Any]] = cli("run", *arguments, "--json").document["outputs"]
        return found

    (plain,) = outputs()
    (beams,) = outputs("--num-beams", 3, "--num-return-sequences", 2, "--early-stopping", "true", "--length-penalty", 2)
    assert beams["score"] >= beams["others"][0]["score"] and len(beams["others"]) == 1
    assert len(beams["tokens"]) <= beams["steps"] <= 5 and "steps" not in beams["others"][0]
    (forced,) = outputs("--forced-bos-id", 7, "--min-new-tokens", 3)
    assert forced["tokens"][0] == 7 and len(forced["tokens"]) >= 3
    (varied,) = outputs("--no-repeat-ngram-size", 1, "--repetition-penalty", 1.5, "--encoder-no-repeat-ngram-size", 2)
    assert len(set(varied["tokens"])) == len(varied["tokens"])
    drawn = [outputs("--temperature", 3, "--num-return-sequences", 2, "--seed", 1) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0][0]["others"]) == 1
    streamed = cli("run", "--text", TEXTS[0], "--ratio", 1, "--threads", 1, "--max-new-tokens", 5, "--stream")
    assert streamed.out.startswith(plain["text"] + "\n")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("run", "--text", "a", "--num-beams", 2, "--stream"), "several texts at a time come whole"),
        (("run", "--text", "a", "--text", "b", "--stream"), "shown as it comes: got 2 texts, expected one text"),
        (
            ("run", "--text", "a", "--early-stopping", "soon"),
            "--early-stopping: got 'soon', expected true, false or never",
        ),
        (("run", "--text", "a", "--num-beams", 2, "--temperature", 1), "not in beams"),
        (("run", "--text", "a", "--text-pair", "b"), "text 0 (counted from 0) is a pair: expected one text, of which"),
        (("run", "--text", "a", "--text", ""), "text 1 (counted from 0) is empty"),
        (
            ("evaluate", "--data", "pairs.tsv"),
            "pairs.tsv: texts to read: got two columns, text = sentence1,",
        ),
        (("run", "--text", "a", "--budget-ms", 5), "a budget needs a latency profile"),
        (
            ("evaluate", "--data", "dev.tsv", "--metric", "rouge"),
            "--metric: got rouge, expected bleu or exact_match or",
        ),
        (("run", "--text", "a", "--forced-bos-id", 10**6), "forced_bos_id: got 1000000, expected ids from 0 to"),
    ],
)
def test_what_is_refused(cli: Cli, bundle: Path, arguments: tuple[Any, ...], error: str) -> None:
    Path("pairs.tsv").write_text("sentence1\tsentence2\na\tb\n")
    done = cli(*arguments)
    assert done.code == 2 and error in done.error


def test_evaluate_says_once_what_it_does(cli: Cli, bundle: Path) -> None:
    Path("plain.txt").write_text("\n".join(["film " * 300, *TEXTS]))
    done = cli("evaluate", "--data", "plain.txt", "--max-new-tokens", 3, "--threads", 1)
    assert done.code == 0, done.err
    assert done.err.count("longer than") == 1 and "1 of 4 texts are longer than the model reads" in done.err
    assert "bleu on 4 examples, which have no targets: compared with what modular-r1-fp32 writes" in done.out


def test_lengths_that_nobody_names_are_those_that_the_bundle_reads(cli: Cli, bundle: Path) -> None:
    longest = Bundle.open(bundle).manifest.tokenizer.max_length  # type: ignore[union-attr]
    done = cli("bench", "--batch", 1, "--min-runs", 3, "--threads", 1, "--json")
    assert done.code == 0, done.err
    assert {row["length"] for row in done.document["rows"]} == {min(one, longest) for one in (32, 128)}
    assert "--batch is out of range: got 0" in cli("bench", "--batch", 0).error


# --- opening and writing ----------------------------------------------------------------------------------------------


def test_texts_are_those_of_transformers(runtime: Runtime, model: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = Tokenizer.from_file(str(runtime.bundle.file("tokenizer.json")))
    tokenizer.no_padding()
    stock = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    results = runtime(list(TEXTS), ratio=1, max_new_tokens=8)
    for text, result in zip(TEXTS, results, strict=True):
        ids = torch.tensor([tokenizer.encode(text).ids])
        wanted = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert result.output["tokens"] == wanted[0, 1:].tolist()
        assert result.output["text"] == tokenizer.decode(result.output["tokens"])
        assert result.variant == BASE and result.why in ("eos", "length") and result.met_budget


def test_variants_that_share_graphs_share_what_is_open(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    open_graphs = runtime._opening.backend.open_graphs

    def seen(bundle: Bundle, graphs: Any, **options: Any) -> Any:
        asked.extend(graphs)
        return open_graphs(bundle, graphs, **options)

    monkeypatch.setattr(runtime._opening.backend, "open_graphs", seen)
    runtime.warm_up([BASE, SMALL_DECODER])
    assert sorted(asked) == ["modular-d1x2", "modular-d1x2-past", "modular-d2x1", "modular-d2x1-past", "modular-e2x1"]
    runtime.warm_up()
    assert asked[5:] == ["modular-e1x2"] and set(runtime._opening.is_open) == NAMES
    assert runtime.generator(BASE) is runtime.generator(BASE)
    with pytest.raises(InputError, match="has several engines: got none named, expected the role encoder, decoder or"):
        runtime.session(BASE)
    with runtime.open_role(BASE, "encoder") as encoder:  # type: ignore[attr-defined]
        assert [spec.name for spec in encoder.outputs] == ["last_hidden_state"]


def test_a_stream_is_the_text_in_pieces(runtime: Runtime) -> None:
    asked: Any = {"max_new_tokens": 9, "variant": BOTH, "sampling": Sampling(temperature=9.0)}
    whole = runtime(TEXTS[0], **asked)
    stream = runtime.stream(TEXTS[0], **asked)
    assert stream.result is None
    pieces = list(stream)
    assert "".join(pieces) == whole.output["text"] and len(pieces) > 1
    assert isinstance(stream.result, Result) and stream.result.output == whole.output


def test_a_stream_tells_what_its_steps_took(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engines.writer.perf_counter", lambda: now[0])
    generator = runtime.generator(BASE)
    step, told = generator._step, []

    def slow(*given: Any) -> Any:
        now[0] += 0.25
        return step(*given)

    monkeypatch.setattr(generator, "_step", slow)
    runtime.members.profile = measured({BASE: 1.0})
    monkeypatch.setattr(runtime._anytime, "observe", lambda *given: told.append(given))
    for _ in runtime.stream(TEXTS[0], variant=BASE, settings={"min_new_tokens": 5, "max_new_tokens": 5}):
        now[0] += 60.0  # whoever reads it
    ((name, expected, engine_ms),) = told
    assert name == BASE and expected.p50_ms == pytest.approx(4 + 4) and not expected.extrapolated
    assert engine_ms == pytest.approx(4 * 250)


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_any_pair_that_was_built_can_be_chosen(runtime: Runtime) -> None:
    runtime.members.profile = measured({BASE: 4.0, SMALL_ENCODER: 4.0, SMALL_DECODER: 1.0, BOTH: 1.0})
    values = {BASE: 0.9, SMALL_ENCODER: 0.8, SMALL_DECODER: 0.7, BOTH: 0.6}
    runtime.members.quality = Quality(dict.fromkeys(NAMES, 1.0), values)
    chosen = {ms: runtime.select(length=8, budget_ms=ms, max_new_tokens=11).variant for ms in (50, 20)}
    assert chosen == {50: BASE, 20: SMALL_DECODER}
    runtime.members.profile = measured({BASE: 4.0, SMALL_ENCODER: 3.0, SMALL_DECODER: 4.0, BOTH: 1.0})
    del runtime.members.writing_times
    assert runtime.select(length=8, budget_ms=40, max_new_tokens=11).variant == SMALL_ENCODER


def test_lengths_that_were_measured_are_expected(runtime: Runtime) -> None:
    runtime.members.profile = measured(dict.fromkeys(NAMES, 1.0))
    unknown = runtime.select(length=8, budget_ms=100, settings={"max_new_tokens": 21})
    assert unknown.predicted_ms == unknown.usual_ms == pytest.approx(4 + 20)
    assert unknown.expected_tokens == Expected(21, 21, measured=False)
    assert "for all 21 tokens that are allowed, as lengths of outputs were not measured" in unknown.reason
    runtime.members.output_lengths = OutputLengths([Group(8.0, 8, {5: 98, 9: 2}, 0)])
    known = runtime.select(length=8, budget_ms=100, settings={"max_new_tokens": 21})
    assert (known.usual_ms, known.predicted_ms) == (pytest.approx(4 + 4), pytest.approx(4 + 8))
    assert "for the 9 tokens that one output in a hundred has, usually 8.00 ms for 5" in known.reason
    assert known.document()["expected_tokens"] == {"p50": 5, "p99": 9, "measured": True, "extrapolated": False}
    least = runtime.select(length=8, settings={"max_new_tokens": 21, "min_new_tokens": 12})
    assert least.expected_tokens == Expected(12, 12)
    beams = runtime.select(length=8, batch=1, settings={"max_new_tokens": 21, "num_beams": 8})
    assert beams.predicted_ms == pytest.approx(4 + 2 * 8), "eight rows are two chunks of the largest batch"


def test_writing_stops_before_a_token_that_would_be_late(runtime: Runtime) -> None:
    rules = {"min_new_tokens": 6, "max_new_tokens": 6}
    runtime.members.profile = measured({BASE: 1e6, BOTH: 1e6}, first_ms=1e-3)
    late = runtime(TEXTS[0], budget_ms=1e5, variant=BASE, settings=rules)
    assert late.why == "budget" and len(late.output["tokens"]) == 1 and late.met_budget
    both = runtime(list(TEXTS), budget_ms=1e5, variant=BASE, settings={**rules, "num_beams": 2})
    assert {one.why for one in both} == {"budget"}
    stream = runtime.stream(TEXTS[0], budget_ms=1e5, variant=BASE, settings=rules)
    assert len(list(stream)) <= 1 and stream.result is not None and stream.result.why == "budget"
    whole = runtime(TEXTS[0], budget_ms=HOUR_MS * 10, variant=BASE, settings=rules)
    assert whole.why in ("eos", "length") and len(whole.output["tokens"]) == 6
    assert whole.output["tokens"][:1] == late.output["tokens"]


def test_without_measured_tokens_writing_goes_by_its_own_pace(runtime: Runtime) -> None:
    rules = {"min_new_tokens": 20, "max_new_tokens": 20}
    runtime(TEXTS[0], variant=BASE, settings=rules)  # opened, and as fast as later ones
    late = runtime(TEXTS[0], budget_ms=1e-3, variant=BASE, settings=rules)
    assert late.why == "budget" and len(late.output["tokens"]) == 1 and not late.met_budget
    assert len(runtime(TEXTS[0], budget_ms=HOUR_MS, variant=BASE, settings=rules).output["tokens"]) == 20


def test_layers_cost_what_bench_measured_of_them(bundle: Path) -> None:
    """Of one encoder layer 1 ms, of one decoder layer 2 ms a token."""
    from compexport.assembling import measured_layers

    opened = Bundle.open(bundle)
    sha256 = opened.manifest.backbone.sha256
    assert measured_layers(bundle, sha256, 8, 5) is None and measured_layers("nowhere", sha256, 8, 5) is None
    rows = []
    for name in NAMES:
        encoder, decoder = (len(tiles) for tiles in opened.manifest.variants[name].assembly.values())  # type: ignore[union-attr]
        parts = {name: 9.0, encoder_name(name): 7.0 + encoder, first_token_name(name): 3.0 + 2 * decoder}
        parts |= {token_name(name, written): 1.0 + 2 * decoder for written in (1, 64)}
        cell = {"batch": 1, "length": 8, "runs": 3}
        rows += [{"variant": part, "p50_ms": ms, "p99_ms": ms, **cell} for part, ms in parts.items()]
    device = backends.load("ort").device_name({"threads": None, "provider": "cpu"})
    opened.save_profile(device, {"device": device, "backend": "ort", "threads": None, "environment": {}, "rows": rows})
    found = measured_layers(bundle, sha256, 8, 8)
    assert found is not None and found.decoder == 16.0 and str(bundle) in found.origin
    assert measured_layers(bundle, "0" * 64, 8, 8) is None, "of another model"
