"""The members of a bundle's family on one device: their names, what was measured of them, what that predicts.

A member is a variant, or an operating point of a variant with exits (``engines.points``). Tables are read at first
need, so that a damaged one can be replaced by measuring again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines import backends
from engines.bundle import Bundle
from engines.exit_rule import ExitRule
from engines.forecast import Forecast, Rung
from engines.lengths import OutputLengths
from engines.points import Point, engine_of, is_point, points_of, to_the_end
from engines.profile import MAX_REMEMBERED_SHAPES, Prediction, Profile
from engines.selector import Quality
from engines.writing_time import WritingTimes

Predictions = tuple[Mapping[str, Prediction], Mapping[str, Sequence[Rung]]]


class Members:
    """Names and tables; immutable but for what is read late."""

    def __init__(self, bundle: Bundle, backend: str, device: str, names: Sequence[str] | None) -> None:
        """``names``: variants and points to use, all by default. ``backend``: "" for one that needs no engines.

        Raises InputError for an unknown name, BundleError for a variant without an engine of this backend.
        """
        self._bundle = bundle
        self._backend = backend
        self._device = device
        given = tuple(bundle.manifest.variants) if names is None else tuple(dict.fromkeys(names))
        self.engines = tuple(dict.fromkeys(map(engine_of, given)))
        self._given = None if names is None else given
        self._remembered: dict[tuple[int, int], Predictions] = {}
        self._check_engines(given)
        for name in filter(is_point, given):
            self.known(name)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All members: the variants first, then their points. Raises BundleError for a damaged quality table."""
        return self._given if self._given is not None else (*self.engines, *self._points)

    @cached_property
    def profile(self) -> Profile | None:
        """This device's latencies, None when not measured with this backend; BundleError names a damaged row."""
        table = self._bundle.profile(self._device)
        if table is None or table.get("backend", self._backend) != self._backend:
            return None
        return Profile.from_table(table)

    @cached_property
    def quality(self) -> Quality:
        """The members, best first. Raises BundleError that names a value that is no number."""
        ratios = {name: self._bundle.manifest.variants[engine_of(name)].ratio for name in self.names}
        return Quality.from_table(self._table, ratios)

    @cached_property
    def forecast(self) -> Forecast | None:
        """What is predicted of cascades; None without a profile or without cascades."""
        if self.profile is None or not self.layers:
            return None
        counts = {name: len(layers) for name, layers in self.layers.items()}
        return Forecast(self.profile, {**to_the_end(self._table, counts), **self._points}, self.layers)

    @cached_property
    def writing_times(self) -> WritingTimes | None:
        """What is predicted of texts that are written; None without a profile."""
        return None if self.profile is None else WritingTimes(self.profile)

    @cached_property
    def output_lengths(self) -> OutputLengths | None:
        """How long written texts are; None where that was not measured. BundleError names what is damaged."""
        return OutputLengths.from_table(self._table)

    @cached_property
    def layers(self) -> dict[str, Sequence[int]]:
        """The exits of every variant that has some."""
        variants = self._bundle.manifest.variants
        return {name: exits for name in self.engines if (exits := variants[name].exits) is not None}

    def load(self) -> None:
        """Read all tables now, so that no request waits for them."""
        _ = self.quality, self.forecast, self.output_lengths

    def rule(self, name: str) -> ExitRule | None:
        """By what rule the rows of a point leave; None for a variant."""
        return self._points[name].rule if is_point(name) else None

    def known(self, name: str) -> str:
        """``name``, or InputError when it is no member."""
        if name not in (self._points if is_point(name) else self._given or self.engines):
            choices = ", ".join(self._given or (*self.engines, *self._points))
            raise InputError(describe("unknown variant", got=name, expected=f"one of {choices}"))
        return name

    def of_ratio(self, ratio: float) -> str:
        """The one variant of this ratio; InputError when there is none, or more than one.

        Where a graph made for it and a step engine compute the same, the graph.
        """
        variants = self._bundle.manifest.variants
        ratios = {name: variants[engine_of(name)].ratio for name in self._given or self.engines}
        named = [name for name in ratios if ratios[name] == ratio]
        plain = [name for name in named if not is_point(name)] or named
        plain = [name for name in plain if not variants[engine_of(name)].is_stepper] or plain
        if not named:
            choices = ", ".join(f"{value:g}" for value in sorted(set(ratios.values())))
            raise InputError(describe("no variant has this ratio", got=ratio, expected=f"one of {choices}"))
        if len(plain) > 1:
            choices = ", ".join(plain)
            raise InputError(describe(f"several variants have ratio {ratio:g}", expected=f"one named: {choices}"))
        return plain[0]

    def with_exits(self, name: str | None) -> str:
        """The variant that a rule of exits is meant for: ``name``, or the only one that has exits."""
        possible = [one for one in self.layers if self._given is None or one in self._given]
        if name is None and len(possible) == 1:
            return possible[0]
        if name is None:
            choices = ", ".join(possible) or "no variant in use has exits without a rule of its own"
            raise InputError(describe("exit thresholds need a variant", expected=f"a ratio or a name: {choices}"))
        if is_point(name):
            what = f"{name} has its own exit thresholds"
            raise InputError(describe(what, hint=f"name {engine_of(name)} to set others"))
        if name not in self.layers:
            choices = ", ".join(self.layers) or "none in this bundle"
            raise InputError(describe(f"{name} has no exits", expected=f"one with exits: {choices}"))
        return name

    def predict(self, shapes: Sequence[tuple[int, int]]) -> Predictions:
        """Running several (batch, length) chunks after each other: times by member, and what cascades can be cut to."""
        if self.profile is None:
            return {}, {}
        if self.forecast is None:
            return self.profile.predict_chunks(shapes), {}
        known = self._remembered.get(shapes[0]) if len(shapes) == 1 else None
        if known is None:
            points, rungs = self.forecast.predict_chunks(shapes)
            known = {**self.profile.predict_chunks(shapes), **points}, rungs
            if len(self._remembered) >= MAX_REMEMBERED_SHAPES:
                self._remembered.clear()
            if len(shapes) == 1:
                self._remembered[shapes[0]] = known
        return known

    @cached_property
    def _table(self) -> dict[str, Any] | None:
        return self._bundle.quality()

    @cached_property
    def _points(self) -> dict[str, Point]:
        found = points_of(self._table, {name: len(exits) for name, exits in self.layers.items()})
        return {name: point for name, point in found.items() if self._given is None or name in self._given}

    def _check_engines(self, given: tuple[str, ...]) -> None:
        manifest = self._bundle.manifest
        known = tuple(manifest.variants)
        if not given or not set(self.engines) <= set(known):
            wrong = ", ".join(name for name in given if engine_of(name) not in known) or "none"
            raise InputError(describe("unknown variant", got=wrong, expected=f"one of {', '.join(known)}"))
        built = {engine.graph for engine in manifest.engines.values() if self._backend in ("", engine.backend)}
        for name in self.engines:
            if not set(manifest.variants[name].graphs.values()) <= built:
                raise BundleError(self._missing_engine(name))

    def _missing_engine(self, name: str) -> str:
        """What there is instead, and the command that adds what is missing."""
        manifest, built = self._bundle.manifest, defaultdict(set)
        for engine in manifest.engines.values():
            built[engine.backend].add(engine.graph)
        precision, needed = manifest.variants[name].precision, set(manifest.variants[name].graphs.values())
        there = [backend for backend, graphs in sorted(built.items()) if needed <= graphs]
        ways = [f"choose --backend {backend}" for backend in there if not backend.endswith("-recipe")]
        if f"{self._backend}-recipe" in there:
            ways.append("run `compexport build --from-recipe` with the bundle")
        elif not backends.lacking(self._backend, precision):
            ways.append(f"run `{backends.build_command(self._backend, precision)}` again")
        what = f"variant {name} has no engine for backend {self._backend}"
        return describe(what, got=f"engines for {', '.join(there)}" if there else None, hint=", or ".join(ways))
