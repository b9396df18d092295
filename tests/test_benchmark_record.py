"""What benchmarks keep of the documents of commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import once, without_paths


@pytest.mark.parametrize("work", ["/var/models", "w", "/var/Wörk (2)"])
def test_files_are_named_as_from_the_work_folder(work: str) -> None:
    document: dict[str, Any] = {
        "output": f"{work}/model",
        "bundle": f"{work}/bundle",
        "n": 3,
        "data": f"{work}/data/dev.tsv",
        "calibration": {"rows": f"500 rows of {work}/data/calibration.tsv", "others": [f"/kept/{work}/dev.tsv", None]},
        "say": "how/ever",
    }
    assert without_paths(document, Path(work)) == {
        "n": 3,
        "data": "data/dev.tsv",
        "calibration": {"rows": "500 rows of data/calibration.tsv", "others": [f"/kept/{work}/dev.tsv", None]},
        "say": "how/ever",
    }
    assert document["output"] == f"{work}/model"  # itself unchanged


def test_without_a_work_folder_only_what_was_written_is_left_out() -> None:
    assert without_paths({"output": "o", "bundle": "b", "data": "/data/dev.tsv"}) == {"data": "/data/dev.tsv"}


def test_work_is_done_once_for_what_it_is_made_from(tmp_path: Path) -> None:
    record = tmp_path / "kept" / "train.json"
    assert once(record, {"rows": (1, 2)}, lambda: {"n": 1}) == {"n": 1}
    assert once(record, {"rows": [1, 2]}, lambda: {"n": 2}) == {"n": 1}
    with pytest.raises(SystemExit, match="made from something else"):
        once(record, {"rows": [3]}, lambda: {"n": 3})
