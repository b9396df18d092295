"""Tables of ``train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compexport.present import Table
from compexport.tables.naming import percent


def train_table(document: Mapping[str, Any]) -> Table:
    """``train``: what each ratio's plugins add to the model, and how close they come to it."""
    metric = document["metric"]
    rows = [
        (
            ratio,
            f"{document['extra_params'][str(ratio)]:,}",
            percent(document["extra_params_share"][str(ratio)]),
            f"{document['student'][str(ratio)]:.4f}",
        )
        for ratio in document["ratios"]
    ]
    title = f"{document['output']}: plugins fitted in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{metric} of the backbone itself: {document['teacher']:.4f}"]
    return Table(title, ("ratio", "extra parameters", "share", f"{metric}, held out"), rows, notes)


def costeff_table(document: Mapping[str, Any]) -> Table:
    """``train costeff``: how large each ratio's model is, and how good its exits are."""
    metric, rows = document["metric"], []
    for ratio in map(str, document["ratios"]):
        exits = document["exits"][ratio]
        best = " ".join(f"{value:.3f}" for value in exits)
        share = percent(document["extra_params_share"][ratio])
        rows.append((ratio, document["sizes"][ratio], share, f"{exits[-1]:.4f}", best))
    columns = ("ratio", "size", "parameters", metric, "after each layer")
    title = f"{document['output']}: trained in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{metric} of the backbone itself: {document['teacher']:.4f}, on {document['held_out']} rows"]
    return Table(title, columns, rows, notes)


def ode_table(document: Mapping[str, Any]) -> Table:
    """``train ode``: how good the model is in fewer steps, beside plainly leaving iterations out."""
    metric, total = document["metric"], document["iterations"]
    rows = [(1, total, f"{document['teacher']:.4f}", None)]
    for ratio in map(str, document["ratios"]):
        values = (f"{document[name][ratio]:.4f}" for name in ("student", "dropped"))
        rows.append((ratio, document["n"][ratio], *values))
    title = f"{document['output']}: trained in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{document['form']} form of a step; measured on {document['held_out']} rows"]
    if not document["learnt"]:
        always = f"the commonest answer alone has {metric} {document['majority']:.4f}"
        notes.append(f"warning: nothing was learnt: {always}; train longer, or look at the data and the learning rate")
    return Table(title, ("ratio", "steps", metric, "iterations dropped"), rows, notes)


def modular_table(document: Mapping[str, Any]) -> Table:
    """``train modular``: what each ratio's assembly is made of, and how much of the base's answers it keeps."""
    metric, rows = document["metric"], []
    for ratio, assembly in document["assemblies"].items():
        tiles = ("+".join(map(str, assembly[stack])) for stack in ("encoder", "decoder"))
        rows.append((ratio, *tiles, f"{document['student'][ratio]:.4f}"))
    title = f"{document['output']}: modules trained in {document['steps']} steps, {document['seconds']:.0f} s"
    share = percent(document["module_params_share"])
    notes = [
        f"{metric} of the base itself: {document['teacher']:.4f}, on {document['held_out']} rows",
        f"all modules: {document['module_params']:,} parameters, {share} of the base's",
    ]
    return Table(title, ("ratio", "encoder tiles", "decoder tiles", metric), rows, notes)


def finetune_table(document: Mapping[str, Any]) -> Table:
    """``train finetune``: how good the model is, beside what needs no model."""
    title = f"{document['output']}: fine-tuned in {document['steps']} steps, {document['seconds']:.0f} s"
    names = document["labels"]
    labels = f"{len(names)} labels: {', '.join(names)}" if names else "it writes the targets of the data"
    if document["value"] is None:
        notes = [labels, "no dev data beside the training data: not measured"]
        return Table(title, (), (), notes)
    rows = [("fine-tuned", document["value"])]
    if document["majority"] is not None:
        rows.append(("most common label", document["majority"]))
    return Table(title, ("", f"{document['metric']}, {document['held_out']} dev rows"), rows, [labels])


TRAIN_TABLES = {
    "variator": train_table,
    "costeff": costeff_table,
    "ode": ode_table,
    "modular": modular_table,
    "finetune": finetune_table,
}
