"""Reading a user's examples, whatever they are kept in, through the ``datasets`` library; offline, leaving no cache.

A file (tsv, csv, jsonl, parquet, or plain text with one text a line), a folder with ``train.*`` and ``dev.*``, or a
folder that ``datasets`` saved. Columns are named by the caller or recognised by their usual names.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from calib.columns import Columns, choose_columns, listed
from calib.docstrings import docstrings
from compexport.errors import InputError, describe

__all__ = ["Columns", "Examples", "docstrings", "read"]

BUILDERS = {".tsv": "csv", ".csv": "csv", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
SPLIT_NAMES = {"train": ("train", "training"), "dev": ("dev", "validation", "valid", "val", "eval", "test")}


@dataclass(frozen=True)
class Examples:
    """Rows in the order of the file. ``pairs``, ``labels`` and ``targets`` are None or as long as ``texts``.

    A label is a string, a number, a list (one per token) or, for question answering, a list of accepted answers.
    ``label_names``, where the data say so, are what class numbers mean. ``origin`` names the file that was read.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Any] | None = None
    targets: list[str] | None = None
    columns_chosen: Columns = field(default_factory=lambda: Columns("text"))
    origin: str = ""
    label_names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Examples:
        """The examples at ``indices``, in that order."""
        chosen = list(indices)

        def pick(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[index] for index in chosen]

        texts = [self.texts[index] for index in chosen]
        return replace(self, texts=texts, pairs=pick(self.pairs), labels=pick(self.labels), targets=pick(self.targets))

    def sample(self, limit: int | None, seed: int) -> Examples:
        """At most ``limit`` of them, drawn by ``seed``, in the order they have here."""
        if limit is None or limit >= len(self):
            return self
        return self.take(sorted(random.Random(seed).sample(range(len(self)), limit)))

    def sha256(self) -> str:
        """Identity of what is in them, wherever it was read."""
        columns: list[Any] = [self.texts, self.pairs, self.labels, self.targets]
        if self.label_names is not None:
            columns.append(self.label_names)
        content = json.dumps(columns, ensure_ascii=False, default=str)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def inputs(self) -> list[str | tuple[str, str]]:
        """Texts, or (text, pair) tuples, as ``Runtime`` takes them."""
        return list(self.texts) if self.pairs is None else list(zip(self.texts, self.pairs, strict=True))


def read(
    path: str | Path,
    split: str | None = None,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    target: str | None = None,
    limit: int | None = None,
) -> Examples:
    """Read ``split`` ("train" or "dev") of a folder, or a file as a whole; at most the first ``limit`` rows.

    A folder's ``labels.txt`` says what class numbers mean, one name a line, from 0.

    Raises InputError, in one line, for a missing, empty or damaged file, an unknown kind of file, a column that is not
    there (naming those that are), an empty text, or a label that is missing in some row.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(describe(f"{path}: no such file or folder", expected="a data file, or a folder with train.*"))
    if limit is not None and limit < 1:
        raise InputError(describe("limit", got=limit, expected="1 or more rows"))
    with _rows(path, split) as (origin, names, rows):
        columns = choose_columns(names, origin, text=text, text_pair=text_pair, label=label, target=target)
        examples = _examples(islice(rows, limit), columns, origin)
        del rows
    if path.is_dir() and columns.label is not None:
        examples = replace(examples, label_names=_label_names(path))
    if not examples.texts:
        raise InputError(describe(f"{origin}: no rows", expected="at least one"))
    return examples


def has_split(path: str | Path, split: str) -> bool:
    """Whether ``path`` is a folder with data of this split."""
    path = Path(path)
    if not path.is_dir():
        return False
    if _saved_by_datasets(path):
        names = {file.name for file in path.iterdir() if file.is_dir()}
        return (path / "dataset_dict.json").is_file() and bool(names & set(SPLIT_NAMES.get(split, (split,))))
    stems = {file.stem.lower() for file in path.iterdir() if file.is_file() and file.suffix.lower() in BUILDERS}
    return bool(stems & set(SPLIT_NAMES.get(split, (split,))))


def _label_names(folder: Path) -> list[str] | None:
    """The lines of ``labels.txt``; for a folder that ``datasets`` saved, names stand in the rows already."""
    file = folder / "labels.txt"
    if not file.is_file():
        return None
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(describe(f"{file}: cannot be read", got=_first_line(error), expected="UTF-8 text")) from error
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len({name.lower() for name in names}) != len(names):
        raise InputError(describe(f"{file}: label names", got=listed(names), expected="distinct names, one a line"))
    return names


# --- rows ----------------------------------------------------------------------------------------------------------

_Opened = tuple[str, list[str], Iterator[Mapping[str, Any]]]


@contextmanager
def _rows(path: Path, split: str | None) -> Iterator[_Opened]:
    """What is read, its column names, and its rows as dicts."""
    with _quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        if path.is_dir() and _saved_by_datasets(path):
            yield _saved_rows(path, split)
        else:
            yield from _closing(_file_of_split(path, split) if path.is_dir() else path, cache)


def _closing(file: Path, cache: str) -> Iterator[_Opened]:
    """``datasets`` leaves the file open when reading stops early: let go of it here, and not at some later time."""
    opened = _file_rows(file, cache)
    try:
        yield opened
    finally:
        del opened
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Errors are raised; that ``datasets`` also logs them, and draws bars, is of no use to the caller."""
    import datasets

    level = datasets.logging.get_verbosity()
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved_rows(folder: Path, split: str | None) -> _Opened:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise many kinds for a damaged folder
        raise InputError(describe(f"{folder}: unreadable data set", got=_first_line(error))) from error
    if isinstance(data, datasets.DatasetDict):
        wanted = SPLIT_NAMES.get(split or "train", (split or "train",))
        name = next((name for name in wanted if name in data), None)
        if name is None:
            raise InputError(describe(f"{folder}: no split {split or 'train'}", expected=listed(list(data))))
        data = data[name]
    return str(folder), list(data.column_names), (_named_labels(row, data.features) for row in data)


def _named_labels(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row with class numbers replaced by their names where the data set knows them (-1 means unlabelled)."""
    named = dict(row)
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)
        names = getattr(inner, "names", None)
        if names is None or named[column] is None:
            continue
        value = named[column]
        named[column] = [names[i] for i in value] if isinstance(value, list) else (names[value] if value >= 0 else None)
    return named


def _file_of_split(folder: Path, split: str | None) -> Path:
    """The folder's ``train.*`` or ``dev.*`` (or one of their other usual names)."""
    split = split or "train"
    readable = [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix.lower() in BUILDERS]
    for name in SPLIT_NAMES.get(split, (split,)):
        found = [file for file in readable if file.stem.lower() == name]
        if len(found) > 1:
            got = ", ".join(file.name for file in found)
            raise InputError(describe(f"{folder}: several files for {split}", got=got, hint="name the file itself"))
        if found:
            return found[0]
    got = ", ".join(file.name for file in readable[:5]) or "no data file"
    endings = ", ".join(suffix[1:] for suffix in BUILDERS)
    raise InputError(describe(f"{folder}: no {split} data", got=got, expected=f"{split}.* ({endings})"))


def _file_rows(file: Path, cache: str) -> _Opened:
    import datasets

    builder = BUILDERS.get(file.suffix.lower())
    if builder is None:
        endings = ", ".join(suffix[1:] for suffix in BUILDERS)
        raise InputError(describe(f"{file}: unknown kind of file", got=file.suffix or "no ending", expected=endings))
    if file.stat().st_size == 0:
        raise InputError(describe(f"{file}: empty file", expected="at least one row"))
    options = _reader_options(file)
    try:
        # Streaming reads the file in place; only a lock file is left in the cache folder.
        data = datasets.load_dataset(
            builder, data_files=str(file.resolve()), split="train", streaming=True, cache_dir=cache, **options
        )
        rows = iter(data)
        first = next(rows, None)
    except Exception as error:  # pandas, pyarrow and datasets raise many kinds for a damaged file
        raise InputError(describe(f"{file}: cannot be read", got=_first_line(error))) from error
    if first is None:
        raise InputError(describe(f"{file}: no rows", expected="at least one"))
    every = _guarded(first, rows, file)
    if builder == "text":
        every = (row for row in every if str(row["text"]).strip())
    return str(file), [str(name) for name in first], every


def _reader_options(file: Path) -> dict[str, Any]:
    """Every csv and tsv value is read as text as it stands: "NA" and "01" are no numbers of ours."""
    from datasets import Features, Value

    ending = file.suffix.lower()
    if ending == ".txt":
        return {"encoding": "utf-8-sig"}
    if ending not in {".csv", ".tsv"}:
        return {}
    # In a tsv a quote is a character like any other.
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {"delimiter": ","}
    features = Features({name: Value("string") for name in _header(file, form)})
    return {**form, "features": features, "na_filter": False, "encoding": "utf-8-sig"}


def _header(file: Path, form: dict[str, Any]) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            names = next(csv.reader(lines, **form), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(describe(f"{file}: cannot be read", got=_first_line(error), expected="UTF-8 text")) from error
    if len(set(names)) != len(names):
        raise InputError(describe(f"{file}: two columns of one name", got=listed(names), expected="distinct names"))
    return names


def _guarded(first: Mapping[str, Any], rest: Iterator[Mapping[str, Any]], file: Path) -> Iterator[Mapping[str, Any]]:
    """All rows; damage further down the file ends in an InputError too."""
    yield first
    try:
        yield from rest
    except Exception as error:
        raise InputError(describe(f"{file}: cannot be read", got=_first_line(error))) from error


# --- values --------------------------------------------------------------------------------------------------------


def _examples(rows: Iterable[Mapping[str, Any]], columns: Columns, origin: str) -> Examples:
    texts: list[str] = []
    pairs: list[str] = []
    labels: list[Any] = []
    targets: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"{origin}: row {number}"
        texts.append(_text(row, columns.text, where))
        if columns.text_pair is not None:
            pairs.append(_text(row, columns.text_pair, where))
        if columns.label is not None:
            labels.append(_label(row, columns.label, where))
        if columns.target is not None:
            targets.append(_text(row, columns.target, where))
    return Examples(
        texts,
        pairs if columns.text_pair is not None else None,
        labels if columns.label is not None else None,
        targets if columns.target is not None else None,
        columns,
        origin,
    )


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, list):  # words, as token classification data has them
        value = " ".join(map(str, value))
    if not isinstance(value, str) or not value.strip():
        got = "nothing" if value is None or value == "" else repr(value)
        raise InputError(describe(f"{where}: no text in column {column}", got=got, expected="a text"))
    return value.strip("\ufeff")


def _label(row: Mapping[str, Any], column: str, where: str) -> Any:
    value = row.get(column)
    if isinstance(value, Mapping) and "text" in value:  # SQuAD's {"text": [...], "answer_start": [...]}
        value = value["text"]
    if value is None or value == "":
        raise InputError(describe(f"{where}: no label in column {column}", expected="a label in every row"))
    return value


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:200]
