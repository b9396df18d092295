"""Every kind of data file, and every way one of them can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calib.data import Examples, has_split, read
from calib.labels import class_names
from compexport.errors import InputError

ROWS = [{"sentence": 'he said "no', "label": "0"}, {"sentence": "NA", "label": "1"}]


def write(folder: Path, kind: str, stem: str = "rows") -> Path:
    """``ROWS`` as a file of this kind."""
    import datasets

    path = folder / f"{stem}.{kind}"
    lines = [[*ROWS[0]], *([*row.values()] for row in ROWS)]
    if kind == "tsv":
        path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8-sig")
    elif kind == "csv":
        quoted = ('"' + '","'.join(cell.replace('"', '""') for cell in line) + '"\n' for line in lines)
        path.write_text("".join(quoted), encoding="utf-8-sig")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "txt":
        path.write_text("\n\n".join(row["sentence"] for row in ROWS), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet", "txt"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path, kind: str) -> None:
    examples = read(write(tmp_path, kind))
    assert examples.texts == [row["sentence"] for row in ROWS]
    if kind != "txt":
        assert examples.labels == ["0", "1"]
        assert str(examples.columns_chosen) == "text = sentence, label = label"


def test_a_folder_has_its_splits(tmp_path: Path) -> None:
    write(tmp_path, "tsv", "train")
    (tmp_path / "dev.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "yes"}\n')
    assert len(read(tmp_path)) == len(read(tmp_path, "train")) == 2
    dev = read(tmp_path, "dev")
    assert dev.inputs == [("a", "b")] and dev.labels == ["yes"]
    (tmp_path / "test.txt").write_text("never measured on while training\n")
    assert read(tmp_path, "dev or test") == dev
    (tmp_path / "dev.jsonl").unlink()
    assert not has_split(tmp_path, "dev") and len(read(tmp_path, "dev or test")) == 1


def test_a_saved_data_set_names_its_labels(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "validation": rows.select([1])}).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "one").labels == ["good", "bad"]
    assert read(tmp_path / "many", "dev").labels == ["bad"]


def test_a_folder_of_datasets_knows_its_splits(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"question": ["x"], "sentence": ["y"], "label": [1]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(tmp_path / "many")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "train")
    assert read(tmp_path / "many").inputs == [("x", "y")]
    assert [has_split(tmp_path / name, "dev") for name in ("one", "many", "train")] == [False, True, False]
    with pytest.raises(InputError, match="no split dev: expected train"):
        read(tmp_path / "train", "dev")
    (tmp_path / "plain").mkdir()
    assert not has_split(tmp_path / "plain", "dev") and not has_split(tmp_path / "nowhere", "dev")
    file = write(tmp_path / "plain", "tsv", "validation")
    assert has_split(tmp_path / "plain", "dev") and not has_split(file, "dev")


# Header line of a raw GLUE file (or of another well-known one) -> what each column is taken for.
HEADERS = {
    "Quality #1_ID #2_ID #1_String #2_String": "text = #1 String, text-pair = #2 String, label = Quality",
    "index sentence1 sentence2 label": "text = sentence1, text-pair = sentence2, label = label",
    "index question sentence label": "text = question, text-pair = sentence, label = label",
    "id qid1 qid2 question1 question2 is_duplicate": "text = question1, text-pair = question2, label = is_duplicate",
    "index promptID pairID genre sentence1 sentence2 label1 gold_label":
        "text = sentence1, text-pair = sentence2, label = gold_label",
    "sentence label": "text = sentence, label = label",
    "index genre sentence1 sentence2 score": "text = sentence1, text-pair = sentence2, label = score",
    "premise hypothesis label": "text = premise, text-pair = hypothesis, label = label",
    "Text Category": "text = Text, label = Category",
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_raw_headers_are_recognised(tmp_path: Path, header: str) -> None:
    names = [name.replace("_", " ") if "#" in name else name for name in header.split()]
    cells = [f'"{n} unbalanced' for n in range(len(names))]
    # With the byte-order mark and line ends that MRPC's files have.
    (tmp_path / "raw.tsv").write_text("\t".join(names) + "\r\n" + "\t".join(cells) + "\r\n", encoding="utf-8-sig")
    examples = read(tmp_path / "raw.tsv")
    assert str(examples.columns_chosen) == HEADERS[header]
    assert examples.texts == [cells[names.index(examples.columns_chosen.text)]]
    assert examples.labels == [cells[names.index(examples.columns_chosen.label or "")]]


def test_a_folder_names_its_numbers(tmp_path: Path) -> None:
    write(tmp_path, "tsv", "train")
    assert read(tmp_path).label_names is None
    (tmp_path / "labels.txt").write_text("bad\ngood\n\n", encoding="utf-8-sig")
    assert read(tmp_path).label_names == ["bad", "good"] and read(tmp_path).labels == ["0", "1"]
    assert read(tmp_path / "train.tsv").label_names is None  # a file's neighbours are not asked
    for wrong in ("", "bad\n\ngood\n", "bad\nBad\n"):
        (tmp_path / "labels.txt").write_text(wrong)
        with pytest.raises(InputError, match=r"labels.txt: label names: got .*, expected distinct names, one a line"):
            read(tmp_path)


def test_a_sample_is_drawn_by_seed() -> None:
    examples = Examples([str(n) for n in range(100)], labels=list(range(100)))
    first, again, other = (examples.sample(10, seed) for seed in (1, 1, 2))
    assert first == again and first != other and len(first) == 10
    assert [str(label) for label in first.labels or []] == first.texts
    assert examples.sample(None, 1) is examples.sample(100, 1) is examples


def test_contents_have_an_identity() -> None:
    one = Examples(["a", "b"], labels=[1, 0], origin="x.tsv")
    assert one.sha256() == Examples(["a", "b"], labels=[1, 0], origin="y.csv").sha256()
    named = Examples(["a", "b"], labels=[1, 0], label_names=["x", "y"])
    assert len({one.sha256(), one.take([1, 0]).sha256(), Examples(["a", "b"]).sha256(), named.sha256()}) == 4


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# Set -> (rows of dev, columns taken, distinct labels).
SETS = {
    "sst2": (872, "text = sentence, label = label", 2),
    "mrpc": (408, "text = #1 String, text-pair = #2 String, label = Quality", 2),
    "rte": (277, "text = sentence1, text-pair = sentence2, label = label", 2),
    "sick": (495, "text = sentence1, text-pair = sentence2, label = label", 3),
    "agnews": (3800, "text = sentence, label = label", 4),
    "news20": (1500, "text = sentence, label = label", 20),
}


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="no ../shared/data beside the repository: real data sets are not shipped"
)
@pytest.mark.parametrize("name", SETS)
def test_real_data_sets(name: str) -> None:
    rows, columns, classes = SETS[name]
    dev = read(SHARED / name, "dev")
    assert (len(dev), str(dev.columns_chosen)) == (rows, columns)
    assert len(class_names(dev)) == classes
    assert not dev.texts[0].startswith("\ufeff") and len(read(SHARED / name, limit=50)) == 50


def test_columns_by_name_and_a_limit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,first,second,gold\n1,a,b,x\n2,c,d,y\n")
    examples = read(tmp_path / "a.csv", text="first", text_pair="second", label="gold", limit=1)
    assert (examples.texts, examples.pairs, examples.labels) == (["a"], ["b"], ["x"])


def test_questions_and_tagged_words(tmp_path: Path) -> None:
    answers = {"text": ["Paris"], "answer_start": [0]}
    (tmp_path / "qa.jsonl").write_text(
        json.dumps({"question": "where?", "context": "Paris", "answers": answers}) + "\n"
    )
    (tmp_path / "ner.jsonl").write_text(json.dumps({"tokens": ["Ada", "ran"], "ner_tags": ["PER", "O"]}) + "\n")
    assert read(tmp_path / "qa.jsonl").labels == [["Paris"]]
    tagged = read(tmp_path / "ner.jsonl")
    assert tagged.texts == ["Ada ran"] and tagged.labels == [["PER", "O"]]


HOSTILE = {
    "missing.tsv": (None, "no such file"),
    "empty.csv": (b"", "empty file"),
    "header.csv": (b"text,label\n", "no rows"),
    "blank.txt": (b"\n \n", "no rows"),
    "kind.xlsx": (b"PK", "unknown kind of file: got .xlsx"),
    "bytes.csv": (b"text\n\xff\xfe\xe9\n", "UTF-8"),
    "ragged.tsv": (b"text\tlabel\na\t1\nb\t1\t2\t3\n", "cannot be read"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": ', "cannot be read"),
    "cut.parquet": (b"PAR1xxxx", "cannot be read"),
    "twice.csv": (b"text,text\na,b\n", "two columns of one name"),
    "strange.csv": (b"alpha,beta\na,b\n", "no text column recognised: expected one of alpha, beta"),
    "hole.csv": (b"text,label\na,1\n,0\n", "row 2: no text in column text"),
    "unlabelled.csv": (b"text,label\na,1\nb,\n", "row 2: no label in column label"),
    "number.jsonl": (b'{"text": 3}\n', "row 1: no text in column text: got 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_data_is_one_line(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value) and name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_columns_and_splits_list_what_there_is(tmp_path: Path) -> None:
    file = write(tmp_path, "tsv", "train")
    with pytest.raises(InputError, match="no column for --label: got gold, expected sentence, label"):
        read(file, label="gold")
    with pytest.raises(InputError, match="no dev data: got train.tsv"):
        read(tmp_path, "dev")
    write(tmp_path, "csv", "train")
    with pytest.raises(InputError, match="several files for train"):
        read(tmp_path)
    with pytest.raises(InputError, match="limit"):
        read(file, limit=0)


def test_nothing_is_left_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    read(write(tmp_path, "tsv"))
    assert not (tmp_path / "cache").exists()
