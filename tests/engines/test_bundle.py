"""Writing, replacing and reading bundles: what a well-meaning user and a badly timed kill can do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compexport.errors import BundleError, InputError
from engines import atomic
from engines.bundle import Bundle, BundleWriter, Problem
from engines.manifest import Manifest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "bundle-v1"
SCHEMA = ROOT / "docs" / "manifest.schema.json"
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: renameat2, tmpfs and signals")


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A private copy of the golden bundle."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "work" / "bundle"))


@pytest.fixture
def golden_in_memory(golden: Path) -> Iterator[Path]:
    """The same where flushing costs nothing, for tests that rebuild again and again."""
    if not os.access("/dev/shm", os.W_OK):
        yield golden
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(shutil.copytree(GOLDEN, Path(folder) / "bundle"))


def stage(writer: BundleWriter, source: Path = GOLDEN) -> None:
    """Put the golden bundle's built files into a writer's folder."""
    for name in ("graphs", "engines"):
        shutil.copytree(source / name, writer.dir / name, dirs_exist_ok=True)
    shutil.copy2(source / "tokenizer.json", writer.dir)


def golden_manifest(**changes: Any) -> Manifest:
    return Bundle.open(GOLDEN).manifest.model_copy(update=changes)


def rekeyed(*graphs: str) -> Manifest:
    """The golden manifest with other keys for some graphs, as if they had been built anew."""
    old = golden_manifest()
    keys = {
        name: g.model_copy(update={"key": f"new {name}"}) if name in graphs else g for name, g in old.graphs.items()
    }
    return old.model_copy(update={"graphs": keys})


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


# Reading


def test_golden_bundle_reads_and_verifies() -> None:
    bundle = Bundle.open(GOLDEN)
    assert bundle.path == GOLDEN.resolve()
    assert list(bundle.manifest.variants) == ["variator-r1-fp32", "variator-r4-fp32"]
    assert bundle.verify() == []
    assert bundle.profiles() == ["cpu-golden"]
    profile, quality = bundle.profile("cpu-golden"), bundle.quality()
    assert profile is not None and len(profile["rows"]) == 2
    assert quality is not None and quality["variants"]["variator-r4-fp32"] == 0.875
    assert bundle.profile("other") is None
    assert bundle.file("graphs/weights.bin").read_bytes()[:8] == b"\0\0\0\0\0\0\x80?"


def test_seal_is_what_sha256sum_reads() -> None:
    digest = hashlib.sha256((GOLDEN / "manifest.json").read_bytes()).hexdigest()
    assert (GOLDEN / "manifest.sha256").read_text() == f"{digest}  manifest.json\n"


def test_table_checksum_is_that_of_its_bytes() -> None:
    """The rule a reader in another language follows: docs/bundle.md, "Measured tables"."""
    raw = (GOLDEN / "quality.json").read_bytes()
    head, table = raw[:90], raw[90:-2]
    assert head == b'{"checksum": "' + hashlib.sha256(table).hexdigest().encode() + b'", "table": '
    assert raw[-2:] == b"}\n"


def test_open_is_quick() -> None:
    def once() -> float:
        start = time.perf_counter()
        Bundle.open(GOLDEN)
        return time.perf_counter() - start

    assert min(once() for _ in range(10)) < 0.01


def test_opens_through_a_link_to_the_bundle(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(golden)
    assert Bundle.open(tmp_path / "current").path == golden.resolve()


def test_published_schema_matches_the_classes() -> None:
    assert json.loads(SCHEMA.read_text()) == Manifest.model_json_schema(), (
        "the manifest changed: run `python -m engines.manifest > docs/manifest.schema.json` and update docs/bundle.md"
    )


def test_large_files_are_checked_when_asked_for(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        stage(writer)
        (writer.dir / "graphs" / "large.bin").write_bytes(bytes((1 << 20) + 1))
        writer.commit(golden_manifest())
    large = tmp_path / "b" / "graphs" / "large.bin"
    with large.open("r+b") as file:
        file.write(b"x")
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.file("graphs/large.bin", check=False) == large
    with pytest.raises(BundleError, match=r"graphs/large\.bin is damaged"):
        bundle.file("graphs/large.bin")
    assert [problem.file for problem in bundle.verify()] == ["graphs/large.bin"]


def test_file_is_hashed_once_per_process(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = golden / "graphs" / "weights.bin"
    os.utime(weights, ns=(1, 1_700_000_000_123_456_789))
    bundle = Bundle.open(golden)
    monkeypatch.setattr("engines.bundle_reader._digest", lambda descriptor: pytest.fail("read again"))
    assert bundle.file("graphs/weights.bin") == weights


# Writing


def test_commit_round_trip(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "new" / "b") as writer:
        assert writer.previous is None
        stage(writer)
        bundle = writer.commit(golden_manifest(command="again"))
    assert bundle.manifest == golden_manifest(command="again")
    assert bundle.verify() == []
    assert os.listdir(tmp_path / "new") == ["b"]
    assert bundle.profiles() == [] and bundle.quality() is None


def test_leaving_without_commit_writes_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "new" / "b") as writer:
        stage(writer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), BundleWriter(tmp_path / "new" / "b") as writer:
        stage(writer)
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_failed_rebuild_leaves_the_old_bundle(golden: Path) -> None:
    with pytest.raises(BundleError, match="needs the graph r9"), BundleWriter(golden) as writer:
        stage(writer)
        variant = golden_manifest().variants["variator-r1-fp32"].model_copy(update={"graphs": {"encoder": "r9"}})
        writer.commit(golden_manifest(variants={"v": variant}))
    assert Bundle.open(golden).verify() == []
    assert Bundle.open(golden).profiles() == ["cpu-golden"]
    assert hidden(golden.parent) == []


def test_rebuild_replaces_whole_folder(golden: Path) -> None:
    with BundleWriter(golden) as writer:
        stage(writer)
        (writer.dir / "engines" / "ort-cpu" / "extra.bin").write_bytes(b"extra")
        writer.commit(golden_manifest(command="second"))
    bundle = Bundle.open(golden)
    assert bundle.manifest.command == "second" and "engines/ort-cpu/extra.bin" in bundle.manifest.files
    assert hidden(golden.parent) == []


def test_reuse_shares_the_file_and_leaves_one_name(golden: Path) -> None:
    weights = golden / "graphs" / "weights.bin"
    inode = weights.stat().st_ino
    with BundleWriter(golden) as writer:
        assert writer.reusable("graphs/weights.bin") and not writer.reusable("graphs/none.bin")
        stage(writer)
        (writer.dir / "graphs" / "weights.bin").unlink()
        writer.reuse("graphs/weights.bin")
        assert weights.stat().st_nlink == 2
        assert Bundle.open(golden).verify() == []  # a reader during the rebuild
        writer.commit(golden_manifest())
    assert weights.stat().st_ino == inode and weights.stat().st_nlink == 1


def test_damaged_file_is_not_reused(golden: Path) -> None:
    with BundleWriter(golden) as writer:
        (golden / "graphs" / "weights.bin").write_bytes(bytes(256))
        assert not writer.reusable("graphs/weights.bin")
        with pytest.raises(BundleError, match=r"graphs/weights\.bin is damaged"):
            writer.reuse("graphs/weights.bin")


def test_damaged_bundle_is_rebuilt_in_place(golden: Path) -> None:
    (golden / "manifest.json").write_text("{")
    with BundleWriter(golden) as writer:
        assert writer.previous is None
        stage(writer)
        writer.commit(golden_manifest())
    assert Bundle.open(golden).verify() == []


def test_file_with_a_name_elsewhere_becomes_its_own(tmp_path: Path) -> None:
    outside = tmp_path / "tokenizer.json"
    shutil.copy2(GOLDEN / "tokenizer.json", outside)
    with BundleWriter(tmp_path / "b") as writer:
        stage(writer)
        (writer.dir / "tokenizer.json").unlink()
        os.link(outside, writer.dir / "tokenizer.json")
        writer.commit(golden_manifest())
    assert outside.stat().st_nlink == 1
    assert Bundle.open(tmp_path / "b").verify() == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: b.write_text("x"), "got a file"),
        (lambda b: (b.mkdir(), (b / "notes.txt").touch()), r"got no manifest\.json"),
        (lambda b: (b.mkdir(), (b / "manifest.json").touch()), "got no graphs"),
        (lambda b: (shutil.copytree(GOLDEN, b), (b / "notes.txt").touch()), r"got notes\.txt, which is no part"),
    ],
)
def test_other_things_are_not_overwritten(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "b")
    with pytest.raises(InputError, match=f"exists and is not a bundle: {message}.*; choose another output"):
        BundleWriter(tmp_path / "b")
    assert hidden(tmp_path) == []
    with BundleWriter(tmp_path / "b", force_not_bundle=True) as writer:
        stage(writer)
        writer.commit(golden_manifest())
    assert Bundle.open(tmp_path / "b").verify() == []
    assert os.listdir(tmp_path) == ["b"]


def test_empty_folder_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with BundleWriter(tmp_path / "b") as writer:
        stage(writer)
        writer.commit(golden_manifest())
    assert Bundle.open(tmp_path / "b").verify() == []


@pytest.mark.parametrize("name", ["notes.txt", "model/weights.bin", "graphs/a:b", "manifest.json"])
def test_strange_staged_files_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="no place in a bundle|not allowed"), BundleWriter(tmp_path / "b") as writer:
        stage(writer)
        (writer.dir / name).parent.mkdir(exist_ok=True)
        (writer.dir / name).write_text("{}")
        writer.commit(golden_manifest())
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"), BundleWriter(tmp_path / "file" / "b"):
        pass
    with pytest.raises(InputError, match="cannot write"):
        BundleWriter("/")
    with pytest.raises(InputError, match="cannot write"):
        BundleWriter("a\0b")


@linux
def test_second_writer_is_told_to_wait(golden: Path) -> None:
    with BundleWriter(golden) as writer:
        message = rf"another process \(pid {os.getpid()}\) is writing .*; wait until it is done"
        with pytest.raises(InputError, match=message), BundleWriter(golden):
            pass
        stage(writer)
        writer.commit(golden_manifest(command="first"))
    with BundleWriter(golden):
        pass
    assert Bundle.open(golden).manifest.command == "first"
    assert hidden(golden.parent) == []


def test_leftovers_of_dead_writers_are_swept(golden: Path) -> None:
    parent = golden.parent
    (parent / ".bundle.99999999-0123abcd.tmp" / "graphs").mkdir(parents=True)
    (parent / ".bundle.lock").write_text("99999999\n")
    (parent / ".other.99999999-0123abcd.tmp").mkdir()
    with BundleWriter(golden):
        assert len(hidden(parent)) == 3
    assert hidden(parent) == [".other.99999999-0123abcd.tmp"]


# Replacing


def test_fallback_without_exchange(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    with BundleWriter(golden) as writer:
        stage(writer)
        writer.commit(golden_manifest(command="second"))
    assert Bundle.open(golden).manifest.command == "second"
    assert hidden(golden.parent) == []


def test_fallback_killed_between_its_renames_is_undone(golden: Path) -> None:
    golden.rename(golden.with_name(".bundle.99999999-0123abcd.old"))
    with pytest.raises(BundleError, match=r"is missing: a build was interrupted; rename .*\.old to it"):
        Bundle.open(golden)
    with BundleWriter(golden) as writer:
        assert writer.previous is not None
    assert Bundle.open(golden).verify() == []
    assert hidden(golden.parent) == []


def test_open_bundle_notices_that_it_was_replaced(golden: Path) -> None:
    old = Bundle.open(golden)
    with BundleWriter(golden) as writer:
        stage(writer)
        (writer.dir / "engines" / "ort-cpu" / "r1.bin").write_bytes(b"another")
        writer.commit(golden_manifest())
    for use in (lambda: old.file("engines/ort-cpu/r1.bin"), lambda: old.save_quality({})):
        with pytest.raises(BundleError, match="was replaced or removed while it was open; open it again"):
            use()
    assert [problem.file for problem in old.verify()] == ["manifest.json", "engines/ort-cpu/r1.bin"]


def test_readers_during_rebuilds_see_whole_bundles(golden_in_memory: Path) -> None:
    golden = golden_in_memory
    done = threading.Event()
    failures: list[str] = []
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add(Bundle.open(golden).manifest.command)
            except Exception as error:
                failures.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(40):
            with BundleWriter(golden) as writer:
                stage(writer)
                (writer.dir / "graphs" / "weights.bin").unlink()
                writer.reuse("graphs/weights.bin")
                (writer.dir / "engines" / "ort-cpu" / "r1.bin").write_text(str(turn) * (1 + turn % 3))
                writer.commit(golden_manifest(command=str(turn)))
    finally:
        done.set()
        reader.join()
    assert failures == [] and len(seen) > 1


REBUILDER = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from engines.bundle import Bundle, BundleWriter
golden, dest = Path(sys.argv[1]), Path(sys.argv[2])
manifest = Bundle.open(golden).manifest

def rebuild(turn):
    with BundleWriter(dest) as writer:
        shutil.copytree(golden / "engines", writer.dir / "engines")
        shutil.copy2(golden / "tokenizer.json", writer.dir)
        for rel in ("graphs/weights.bin", "graphs/r1.onnx", "graphs/r4.onnx"):
            writer.reuse(rel)
        for name in ("r1", "r4"):
            (writer.dir / f"engines/ort-cpu/{name}.bin").write_text(str(turn))
        writer.commit(manifest.model_copy(update={"command": str(turn)}))
    os.write(1, f"{turn}\\n".encode())

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        for turn in range(int(line), 100_000):
            rebuild(turn)
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"dead\\n")
"""


def kill_one_rebuild(rebuilder: subprocess.Popen[str], first: int, after: int, after_s: float) -> int:
    """Rebuild with the numbers ``first``, ``first + 1``, ... and SIGKILL some time after so many are done.

    Returns the last one that was done. Counted in rebuilds, since a busy machine may do none in any given time.
    """
    assert rebuilder.stdin is not None and rebuilder.stdout is not None
    rebuilder.stdin.write(f"{first}\n")
    rebuilder.stdin.flush()
    timer: threading.Timer | None = None
    pid = None
    last = first - 1
    for line in iter(rebuilder.stdout.readline, "dead\n"):
        assert line, "the rebuilder failed, see its output above"
        if line.startswith("pid "):
            pid = int(line.split()[1])
        else:
            last = int(line)
        if timer is None and pid is not None and last - first + 1 >= after:
            timer = threading.Timer(after_s, os.kill, (pid, signal.SIGKILL))
            timer.start()
    assert timer is not None
    timer.join()
    return last


@linux
def test_killed_at_random_moments(golden_in_memory: Path) -> None:
    """Old or new after every SIGKILL, never a mixture, and the next writer sweeps what was left."""
    golden = golden_in_memory
    chance = random.Random(20)
    turn = -1
    seen = 0
    command = [sys.executable, "-c", REBUILDER, str(GOLDEN), str(golden), str(ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rebuilder:
        for _ in range(40):
            last = kill_one_rebuild(rebuilder, turn + 1, after=chance.randrange(3), after_s=chance.uniform(0, 0.05))
            bundle = Bundle.open(golden)
            assert bundle.verify() == []
            quality = bundle.quality()
            assert bundle.profiles() == ["cpu-golden"] and quality is not None and len(quality["variants"]) == 2
            if bundle.manifest.command.isdigit():
                turn = int(bundle.manifest.command)
                assert {(golden / f"engines/ort-cpu/{name}.bin").read_text() for name in ("r1", "r4")} == {str(turn)}
            assert turn in (last, last + 1)
            seen += bool(hidden(golden.parent))
    assert turn > 5 and seen > 5, "the kills came at the wrong moments to prove anything"
    with BundleWriter(golden):
        pass
    assert hidden(golden.parent) == []


# No space left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 4 MiB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a tmpfs here; the file size limit test covers the same code")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@linux
def test_disk_full_while_building(small_disk: Path) -> None:
    dest = Path(shutil.copytree(GOLDEN, small_disk / "bundle"))
    with pytest.raises(InputError, match="no space left to write .*; free some space") as caught:
        with BundleWriter(dest) as writer:
            stage(writer)
            with open(writer.dir / "graphs" / "large.bin", "wb") as file:
                for _ in range(8):
                    file.write(bytes(1 << 20))
                    file.flush()
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert Bundle.open(dest).verify() == [] and os.listdir(small_disk) == ["bundle"]


@linux
def test_disk_full_behind_a_library(small_disk: Path) -> None:
    """A library that reports a full disk as some error of its own."""
    dest = Path(shutil.copytree(GOLDEN, small_disk / "bundle"))
    with pytest.raises(InputError, match="no space left"), BundleWriter(dest) as writer:
        try:
            (writer.dir / "large.bin").write_bytes(bytes(8 << 20))
        except OSError:
            raise RuntimeError("write failed") from None
    assert Bundle.open(dest).verify() == [] and os.listdir(small_disk) == ["bundle"]


@linux
def test_disk_full_while_committing(small_disk: Path) -> None:
    dest = Path(shutil.copytree(GOLDEN, small_disk / "bundle"))
    with pytest.raises(InputError, match="no space left"), BundleWriter(dest) as writer:
        stage(writer)
        with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        writer.commit(golden_manifest())
    assert Bundle.open(dest).verify() == [] and sorted(os.listdir(small_disk)) == ["bundle", "filler"]


@linux
def test_disk_full_while_saving_a_table(small_disk: Path) -> None:
    dest = Path(shutil.copytree(GOLDEN, small_disk / "bundle"))
    bundle = Bundle.open(dest)
    with pytest.raises(InputError, match=r"no space left to write .*quality\.json"):
        bundle.save_quality({"padding": "x" * (5 << 20)})
    assert bundle.verify() == [] and hidden(dest) == []


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from engines.bundle import BundleWriter
from compexport.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with BundleWriter(sys.argv[1]) as writer:
        (writer.dir / "tokenizer.json").write_bytes(bytes(1 << 20))
except InputError as error:
    print(error)
"""


@linux
def test_file_size_limit(golden: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(golden), str(ROOT)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.startswith("no space left to write ") and out.count("\n") == 1
    assert Bundle.open(golden).verify() == [] and hidden(golden.parent) == []


# Measured tables


def test_tables_round_trip(golden: Path) -> None:
    bundle = Bundle.open(golden)
    table = {"device": "cpu-x", "rows": [{"variant": "é\n\ud7ff", "p50_ms": 0.1 + 0.2}], "none": None, "n": 2**70}
    bundle.save_profile("cpu-x", table)
    bundle.save_quality({"metric": "accuracy"})
    again = Bundle.open(golden)
    assert again.profile("cpu-x") == table and again.quality() == {"metric": "accuracy"}
    assert again.profiles() == ["cpu-golden", "cpu-x"]
    assert again.verify() == [] and hidden(golden) == []


@pytest.mark.parametrize("device", ["", ".", "..", "../x", "a/b", "a\\b", "a b", "x" * 101, "é", "con", "\0"])
def test_bad_device_names(golden: Path, device: str) -> None:
    with pytest.raises(InputError, match="bad device name"):
        Bundle.open(golden).save_profile(device, {})
    with pytest.raises(InputError, match="bad device name"):
        Bundle.open(golden).profile(device)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"x", 10**400])
def test_tables_hold_plain_json_only(golden: Path, value: object) -> None:
    bundle = Bundle.open(golden)
    with pytest.raises(InputError, match=r"cannot write quality\.json: got .*, expected plain JSON"):
        bundle.save_quality({"value": value})
    assert bundle.quality() is not None


def test_stale_temporary_tables_are_swept(golden: Path) -> None:
    (golden / ".quality.json.99999999-0123abcd.tmp").write_text("half")
    bundle = Bundle.open(golden)
    assert bundle.verify() == []
    bundle.save_quality({"metric": "accuracy"})
    assert hidden(golden) == []


def carried(golden: Path, manifest: Manifest) -> tuple[list[str], list[str], list[str]]:
    """Rebuild; variants left in the profile's rows, in its comparison with the backbone, in the quality table."""
    with BundleWriter(golden) as writer:
        stage(writer)
        bundle = writer.commit(manifest)
    profile, quality = bundle.profile("cpu-golden") or {}, bundle.quality() or {}
    rows = [row["variant"] for row in profile.get("rows", [])]
    return rows, [row["variant"] for row in profile.get("realised", [])], list(quality.get("variants", []))


R1, R4 = "variator-r1-fp32", "variator-r4-fp32"


def test_tables_outlive_a_rebuild_of_the_same(golden: Path) -> None:
    assert carried(golden, golden_manifest(command="other")) == ([R1, R4], [R4], [R1, R4])


def test_tables_drop_a_variant_that_changed(golden: Path) -> None:
    assert carried(golden, rekeyed("r4")) == ([R1], [], [R1])


def test_tables_drop_what_is_relative_to_a_changed_backbone(golden: Path) -> None:
    assert carried(golden, rekeyed("r1")) == ([R4], [], [])


def test_tables_drop_everything_when_all_changed(golden: Path) -> None:
    assert carried(golden, rekeyed("r1", "r4")) == ([], [], [])
    assert Bundle.open(golden).profiles() == []


def test_tables_drop_a_variant_that_is_gone(golden: Path) -> None:
    variants = {R1: golden_manifest().variants[R1]}
    assert carried(golden, golden_manifest(variants=variants)) == ([R1], [], [R1])


def test_latency_goes_with_its_engine_and_quality_stays(golden: Path) -> None:
    engines = golden_manifest().engines
    engines = {**engines, "r4-ort": engines["r4-ort"].model_copy(update={"key": "newer runtime"})}
    assert carried(golden, golden_manifest(engines=engines)) == ([R1], [], [R1, R4])


def test_quality_goes_with_the_labels_and_latency_stays(golden: Path) -> None:
    assert carried(golden, golden_manifest(labels=["a", "b"])) == ([R1, R4], [R4], [])


def test_damaged_tables_are_not_carried(golden: Path) -> None:
    (golden / "quality.json").write_text("{}")
    assert carried(golden, golden_manifest()) == ([R1, R4], [R4], [])
    assert Bundle.open(golden).verify() == []


def test_problem_is_a_plain_record() -> None:
    assert Problem("a", "b").__dict__ == {"file": "a", "problem": "b"}
