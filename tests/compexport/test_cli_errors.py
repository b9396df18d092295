"""Bad input: one line that says what, got, expected and what to do; exit code 2; nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compexport.conftest import plain_texts

Cli = Callable[..., Any]


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; gives its one line after checking that nothing was written."""

    def run(*arguments: object) -> str:
        before = listing(tmp_path)
        done = cli(*arguments)
        assert done.code == 2, (done.code, done.err)
        assert not done.out
        assert listing(tmp_path) == before
        return str(done.error)

    return run


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ("0", "--ratio is too small: got 0, expected 1 or more"),
        ("-1", "--ratio is too small: got -1, expected 1 or more"),
        ("1.5", "--ratio must be whole for variator: got 1.5"),
        ("two", "--ratio is not a number: got 'two'"),
        ("2,4,2", "--ratio is there twice: got 2"),
        ("2,,4", "--ratio is not a number: got ''"),
        ("nan", "--ratio must be whole for variator: got nan"),
        ("inf", "--ratio must be whole for variator: got inf"),
    ],
)
@pytest.mark.parametrize("command", ["build", "train"])
def test_ratios(refused: Callable[..., str], tmp_path: Path, command: str, ratio: str, message: str) -> None:
    start = ("build",) if command == "build" else ("train", "variator", ".", "--data", plain_texts(tmp_path))
    assert message in refused(*start, f"--ratio={ratio}")


def test_folder_without_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "not a model: got no config.json in it, expected a Hugging Face folder" in refused("build", "empty")
    assert "no such folder" in refused("build", "nowhere")
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    assert "not a model: got a bundle, expected" in refused("build", "empty")
    assert "not a model: got a file, expected" in refused("build", "empty/manifest.json")


def test_a_model_where_a_bundle_is_meant(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = refused("run", "model", "--text", "a")
    assert found.startswith("no bundle at ") and found.count(";") == 1
    assert "got a model, expected a bundle; `compexport build" in found and found.endswith("makes one")


def test_unsupported_architecture_names_the_supported_ones(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "opt", "architectures": ["OPTModel"]}))
    line = refused("build", "gpt", "--ratio", "2", "--untrained")
    assert (
        "unsupported architecture: got 'opt', expected one of albert, bart, bert, distilbert, electra, gpt2, mbart, "
        "roberta, t5" in line
    )


def test_pickled_weights(refused: Callable[..., str], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((tiny() / "config.json").read_bytes())
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert "pickle" in refused("build", "m", "--ratio", "2", "--untrained")


def test_no_plugins(refused: Callable[..., str], tiny: Callable[..., Path]) -> None:
    line = refused("build", tiny(), "--ratio", "2,4")
    for part in ("ratio 2,4", "compexport train variator", "--untrained", "--data"):
        assert part in line


def test_output_that_is_no_bundle(refused: Callable[..., str], tmp_path: Path, tiny: Callable[..., Path]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "mine" in refused("build", tiny(), "--ratio", "2", "--untrained", "-o", "mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "costef"], "unknown method: got costef, expected variator"),
        (["--precision", "fp8"], "unknown precision: got fp8, expected fp32 or fp16 or bf16"),
        (["--backend", "abacus"], "unknown backend: got 'abacus', expected one of ort"),
        (["--rato", "2"], "No such option: --rato"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_wrong_choices(
    refused: Callable[..., str], tiny: Callable[..., Path], arguments: list[str], message: str
) -> None:
    assert message in refused("build", tiny(), *arguments)


def test_unknown_command(refused: Callable[..., str]) -> None:
    assert "No such command 'biuld'" in refused("biuld")


def test_train_needs_data_and_a_known_method(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "train needs texts: expected --data FILE" in refused("train", "variator")
    data = plain_texts(tmp_path)
    assert "unknown method: got pruning, expected variator" in refused("train", "pruning", ".", "--data", data)
    assert "nothing to fit" in refused("train", "variator", ".", "--data", data, "--ratio", "1")


@pytest.mark.parametrize("command", ["inspect", "verify", "bench", "select --budget-ms 1", "run --text x"])
def test_no_bundle(refused: Callable[..., str], command: str) -> None:
    assert "no bundle at" in refused(*command.split())


@pytest.mark.parametrize("budget", ["0", "-3", "nan"])
@pytest.mark.parametrize("command", ["select", "run --text x"])
def test_budgets(refused: Callable[..., str], bundle: Path, command: str, budget: str) -> None:
    line = refused(*command.split(), f"--budget-ms={budget}")
    assert "budget_ms is out of range" in line and "> 0" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], 'nothing to run: expected --text "..."'),
        (["--text", ""], "empty"),
        (["--text", "  "], "empty"),
        (["--text", "a", "--text", "b", "--text-pair", "c"], "--text-pair does not match: got 1 of them, expected 2"),
        (["--text", "a", "--ratio", "3"], "no variant has this ratio: got 3.0, expected one of 1, 2, 4"),
        (["--text", "a", "--variant", "r9"], "unknown variant: got r9, expected one of variator-r1-fp32"),
        (["--text", "a", "--variant", "variator-r2-fp32", "--ratio", "2"], "both ratio and variant were given"),
        (["--text", "word " * 400, "--no-truncate"], "is longer than the model's 160 tokens; shorten it"),
    ],
)
def test_run_refuses(refused: Callable[..., str], bundle: Path, arguments: list[str], message: str) -> None:
    assert message in refused("run", *arguments)


def test_long_text_is_cut_with_a_warning(cli: Cli, bundle: Path) -> None:
    done = cli("run", "--text", "short", "--text", "word " * 400)
    assert done.code == 0
    assert done.error.startswith("warning: text 1 of 2 (counted from 0) is longer than the model's 160 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is out of range: got 0"),
        (["--batch", "a"], "--batch is not a number: got 'a'"),
        (["--length", "1.5"], "--length is out of range: got 1.5"),
        (["--length", "9999"], "--length is too long: got 9999, expected at most"),
        (["--min-runs", "0"], "--min-runs"),
    ],
)
def test_bench_refuses(refused: Callable[..., str], bundle: Path, arguments: list[str], message: str) -> None:
    assert message in refused("bench", *arguments)


def test_budget_without_a_profile_says_how_to_get_one(refused: Callable[..., str], bundle: Path) -> None:
    for path in (bundle / "profiles").iterdir():
        path.unlink()
    assert "compexport bench" in refused("select", "--budget-ms", "5")


def test_plot_without_quality_says_how_to_get_it(refused: Callable[..., str], bundle: Path) -> None:
    (bundle / "quality.json").unlink()
    assert "run `compexport evaluate` first" in refused("bench", "--plot", "x.png")


def test_missed_budget_is_exit_code_3_only_when_strict(cli: Cli, bundle: Path) -> None:
    assert cli("select", "--budget-ms", "0.0001").code == 0
    done = cli("select", "--budget-ms", "0.0001", "--strict", "--json")
    assert done.code == 3
    assert done.document["met_budget"] is False
    assert done.error.startswith("no variant meets the budget, not variator-r")
    assert done.error.endswith("expected at most 0.0001 ms")
    assert cli("run", "--text", "x", "--budget-ms", "0.0001", "--strict").code == 3


def test_flipped_byte(cli: Cli, bundle: Path) -> None:
    path = bundle / "graphs" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    done = cli("verify", "--json")
    assert done.code == 1 and done.document["ok"] is False
    assert [problem["file"] for problem in done.document["problems"]] == ["graphs/weights.bin"]


def test_missing_file(cli: Cli, bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    done = cli("run", "--text", "x")
    assert done.code == 2 and "tokenizer.json is missing" in done.error
    assert cli("verify").code == 1


def test_newer_format(refused: Callable[..., str], bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    line = refused("inspect")
    assert "format" in line and "upgrade compexport" in line


def test_engine_of_another_version(refused: Callable[..., str], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, {"onnxruntime"}, "1.0.0")
    line = refused("run", "--text", "x")
    assert "1.0.0" in line and "compexport build" in line


def test_both_runtimes_installed(refused: Callable[..., str], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, {"onnxruntime", "onnxruntime-gpu"})
    line = refused("run", "--text", "x")
    assert "onnxruntime and onnxruntime-gpu" in line and "uninstall" in line


def test_no_runtime_installed(refused: Callable[..., str], bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, set())
    line = refused("run", "--text", "x")
    assert "onnxruntime" in line and "compexport[cpu]" in line


def _installed(monkeypatch: pytest.MonkeyPatch, names: set[str], installed: str = "1.31.1") -> None:
    """Pretend that exactly these of the ONNX Runtime packages are installed."""
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if not name.startswith("onnxruntime"):
            return real(name)
        if name in names:
            return installed
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def test_interrupt_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compexport import api

    def interrupted(bundle: Path) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "inspect", interrupted)
    done = cli("inspect")
    assert (done.code, done.error) == (130, "interrupted")


def test_bug_is_one_line_and_debug_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compexport import api

    def broken(bundle: Path) -> dict[str, Any]:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(api, "inspect", broken)
    done = cli("inspect")
    assert done.code == 1
    assert done.error == "internal error, ZeroDivisionError: by zero; run again with --debug for the traceback"
    with pytest.raises(ZeroDivisionError):
        cli("inspect", "--debug")


def test_full_disk_and_missing_packages_are_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compexport import api

    for error, code, message in [
        (OSError(28, "No space left on device", "b/graphs"), 2, "b/graphs: No space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "pip install 'compexport[export]'"),
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), 2, "pip install 'compexport[cpu]'"),
    ]:

        def failing(bundle: Path, error: Exception = error) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(api, "inspect", failing)
        done = cli("inspect")
        assert done.code == code and message in done.error
