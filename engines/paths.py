"""Which graphs of a variant a row runs through, in order; one that is run n times stands there n times."""

from __future__ import annotations

from engines.manifest import DECODER, EMBED, ENCODER, HEAD, Manifest, Variant, head_role, segment_role, step_role


def segment_paths(variant: Variant) -> list[list[str]]:
    """The graphs of each segment, of which a variant without exits has one."""
    if variant.is_stepper:
        return [[variant.graphs[role] for role in roles] for roles in _step_roles(variant)]
    if variant.exits is None:
        return [[variant.graphs.get(ENCODER) or variant.graphs[DECODER]]]
    return [[variant.graphs[segment_role(number)]] for number in range(len(variant.exits))]


def whole_path(variant: Variant) -> list[str]:
    """The graphs that a row runs through when it never leaves early."""
    return [graph for path in segment_paths(variant) for graph in path]


def segment_macs(manifest: Manifest, variant: str, length: int) -> list[int]:
    """MACs of one row of ``length`` tokens in each segment of a variant."""
    paths = segment_paths(manifest.variants[variant])
    return [sum(manifest.graphs[graph].cost.macs(length) for graph in path) for path in paths]


def _step_roles(variant: Variant) -> list[list[str]]:
    """The embedding and the steps up to the first exit, then those up to the next, each with its head."""
    assert variant.steps is not None
    groups = len(variant.steps)
    steps = [step_role(group, groups) for group, sizes in enumerate(variant.steps) for _ in sizes]
    exits = variant.exits or [len(steps)]
    heads = [head_role(step) for step in variant.exits] if variant.exits is not None else [HEAD]
    segments = [[*steps[start:end], head] for start, end, head in zip([0, *exits], exits, heads, strict=False)]
    return [[EMBED, *segments[0]], *segments[1:]]
