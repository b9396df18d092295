"""How texts are written: what a request asks for, and where it asks for nothing, what the model's own settings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from compexport.errors import InputError, describe
from engines.beam import Beams
from engines.logit_rules import NO_RULES, Rules
from engines.manifest import Generation
from engines.profile import check_count
from engines.sampling import GREEDY, Sampling

MAX_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Options:
    """At most ``max_new_tokens``, of the likeliest texts (``beams``) or one by one (``sampling``), under ``rules``.

    ``max_length`` counts a text with its prompt. ``decoder_start_ids``: what a model that reads one text and writes
    another begins to write with, its own where None; models that write on ignore it.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = GREEDY
    beams: Beams = field(default_factory=Beams)
    rules: Rules = NO_RULES
    max_length: int | None = None
    decoder_start_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises InputError for a value out of its range, and for what does not go together."""
        if self.max_length is not None:
            check_count("max_length", self.max_length)
        check_count("max_new_tokens", self.max_new_tokens)
        if self.decoder_start_ids == ():
            raise InputError(describe("decoder_start_ids", got="none", expected="at least one token"))
        beams, wanted = self.beams.num_beams, self.beams.num_return_sequences
        if self.sampling.draws and beams > 1:
            hint = "leave one of them out"
            raise InputError(describe("tokens are drawn one by one, not in beams", got=f"{beams} beams", hint=hint))
        if wanted > beams and not self.sampling.draws:
            expected = f"at most num_beams, {beams}, or a temperature to draw several"
            raise InputError(describe("num_return_sequences", got=wanted, expected=expected))


_BEAMS = {one.name for one in fields(Beams)}
_RULES = {one.name for one in fields(Rules)}
_SAMPLING = {one.name for one in fields(Sampling)}
_NUMBERS = {"temperature", "top_p", "length_penalty", "repetition_penalty"}
# How many of the likeliest tokens transformers draws from where nothing else is said.
_USUAL_TOP_K = 50
NAMES = frozenset({"max_new_tokens", "max_length", "decoder_start_ids"} | _BEAMS | _RULES | _SAMPLING)


def options_for(generation: Generation, asked: Mapping[str, Any] | None = None) -> Options:
    """What was ``asked`` for, by the names in ``NAMES``, before the model's own settings, before none.

    Something that was asked for takes those of the model along that it contradicts: one length the other, a
    temperature its beams, beams its temperature. Raises InputError for an unknown name, a value out of its range, and
    for what could not come true: more new tokens at least than at most, or settings of beams without any.
    """
    asked = {name: value for name, value in (asked or {}).items() if value is not None}
    if unknown := asked.keys() - NAMES:
        got, expected = ", ".join(sorted(unknown)), ", ".join(sorted(NAMES))
        raise InputError(describe("no setting of generation has this name", got=got, expected=expected))
    for name in sorted(asked.keys() & _NUMBERS):
        if isinstance(asked[name], bool) or not isinstance(asked[name], int | float):
            raise InputError(describe(name, got=repr(asked[name]), expected="a number"))
    own = _own(generation)
    if asked.keys() & {"max_length", "max_new_tokens"}:
        own = _without(own, {"max_length", "max_new_tokens"})
    if asked.keys() & {"min_length", "min_new_tokens"}:
        own = _without(own, {"min_length", "min_new_tokens"})
    if asked.get("temperature", 0.0) != 0.0:
        own = _without(own, _BEAMS)
    elif "temperature" in asked or asked.get("num_beams", 1) != 1:
        own = _without(own, _SAMPLING)
    chosen = {**own, **asked}
    # A length with the prompt alone is one: the number of new tokens that nobody named is no limit beside it.
    endless = "max_length" in chosen and "max_new_tokens" not in chosen
    options = Options(
        max_new_tokens=chosen.get("max_new_tokens", chosen["max_length"] if endless else MAX_NEW_TOKENS),
        max_length=None if "max_new_tokens" in chosen else chosen.get("max_length"),
        sampling=Sampling(**_of(chosen, _SAMPLING)),
        beams=Beams(**_of(chosen, _BEAMS)),
        rules=Rules(**_of(chosen, _RULES)),
        decoder_start_ids=_tuples(chosen.get("decoder_start_ids")),
    )
    _check_effect(options, asked)
    return options


def _check_effect(options: Options, asked: Mapping[str, Any]) -> None:
    """InputError for what was asked for and could not come true; a model's own settings may be without effect."""
    least, most = asked.get("min_new_tokens", 0), options.max_new_tokens
    if least > most:
        raise InputError(describe("min_new_tokens", got=least, expected=f"at most max_new_tokens, {most}"))
    without = next((name for name in ("length_penalty", "early_stopping") if name in asked), None)
    if without is not None and options.beams.num_beams == 1:
        raise InputError(describe("only beams have this setting", got=without, expected="num_beams above 1 too"))


def _own(generation: Generation) -> dict[str, Any]:
    """The model's settings, under the names of ``Options`` and its parts.

    A model that draws tokens within beams, which is not done here, gets its beams.
    """
    own = {name: value for name, value in generation.defaults.items() if value is not None and name != "do_sample"}
    if generation.defaults.get("do_sample") and own.get("num_beams", 1) == 1:
        own = {"temperature": 1.0, "top_k": _USUAL_TOP_K, **own}
        if not own["top_k"]:
            del own["top_k"]
    else:
        own = _without(own, _SAMPLING)
    for name in ("forced_bos_id", "forced_eos_id"):
        if getattr(generation, name) is not None:
            own[name] = getattr(generation, name)
    return own


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _of(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: _tuples(value) for name, value in settings.items() if name in names}


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
