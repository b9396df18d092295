"""The Python interface of the README, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import compexport
from calib.data import Examples
from compexport import InputError, api
from compexport.api import building
from tests.compexport.conftest import TEXTS, labelled_texts


def test_the_example_of_the_readme(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("tiny-electra", "sequence-classification")
    bundle = compexport.build(model, ratios=[2], output=tmp_path / "bundle", untrained=True)
    assert isinstance(bundle, compexport.Bundle)
    table = compexport.bench(bundle.path, batches=[1], lengths=[8, 32], min_runs=3)
    assert table == bundle.profile(table["device"])
    compexport.evaluate(bundle.path, labelled_texts(tmp_path))
    with compexport.load(bundle.path) as runtime:
        result = runtime(TEXTS[0], budget_ms=1000)
        assert isinstance(result, compexport.Result)
        assert result.label in {"negative", "positive"} and result.met_budget
        choice = runtime.select(batch=1, length=16, budget_ms=1000)
        assert isinstance(choice, compexport.Decision)
        assert {candidate.variant for candidate in choice.candidates} == set(runtime.variants)
    assert compexport.verify(bundle.path)["ok"]


def test_build_checks_what_it_is_given_before_loading_anything(tmp_path: Path) -> None:
    for options, message in [
        ({"ratios": [0]}, "--ratio is too small"),
        ({"method": "pruning"}, "unknown method"),
        ({"backend": "x"}, "unknown backend"),
    ]:
        with pytest.raises(InputError, match=message):
            compexport.build(tmp_path, output=tmp_path / "b", **options)  # type: ignore[arg-type]


def test_plugins_fitted_by_build_are_kept_for_the_next_one(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    model = Path(shutil.copytree(tiny("tiny-roberta"), tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 3))
    fit = compexport.Fit(steps=2)
    compexport.build(model, [2], tmp_path / "b", data=tmp_path / "texts.txt", fit=fit)
    assert {name: (model / name).read_bytes() for name in before} == before
    assert (model / "variator-r2.safetensors").is_file()
    again = compexport.build(model, [2], tmp_path / "b")
    assert not any(variant.untrained for variant in again.manifest.variants.values())


@pytest.mark.parametrize(("splits", "read"), [(("train", "dev"), "train"), (("dev",), "dev"), (("train",), "train")])
def test_exits_are_not_chosen_on_the_rows_that_are_evaluated(
    splits: tuple[str, ...], read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in splits:
        (tmp_path / f"{split}.tsv").write_text("sentence\tlabel\n" + f"of {split}\t1\n" * 4)
    found: list[str] = []

    def chosen(model: Path, checkpoint: object, ratios: object, examples: Examples, progress: object) -> dict[int, int]:
        found.extend(examples.texts)
        return {}

    monkeypatch.setattr("compexport.exits.chosen_exits", chosen)
    read_rows = partial(building._calibration, tmp_path, api.COLUMNS, api.quiet)
    building._exits("model", None, [1], "auto", read_rows, api.quiet)
    assert found == [f"of {read}"] * 4
