"""Bundles that are damaged or made to do harm: every one is refused with one line that names the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import BundleError
from engines.bundle import Bundle
from engines.bundle_manifest import parse_manifest, seal_of
from engines.bundle_paths import FileFault
from engines.bundle_reader import sha256_of
from engines.onnx_links import locations_in
from engines.strict_json import parse

GOLDEN = Path(__file__).parents[1] / "data" / "bundle-v1"
FILES = sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*") if path.is_file())
LISTED = sorted(json.loads((GOLDEN / "manifest.json").read_text())["files"])
MANIFEST = (GOLDEN / "manifest.json").read_bytes()
HOSTILE_PATHS = [
    "../bundle/graphs/r1.onnx",
    "graphs/../../x",
    "graphs/../graphs/r1.onnx",
    "/etc/passwd",
    "//etc/passwd",
    "..",
    ".",
    "",
    "./graphs/r1.onnx",
    "graphs//r1.onnx",
    "graphs/",
    "graphs\\r1.onnx",
    "..\\x",
    "C:\\x",
    "C:x",
    "\\\\host\\x",
    "graphs/r1.onnx:x",
    "graphs/r1\0.onnx",
    "graphs/r1\n.onnx",
    "graphs/\u202er1.onnx",
    "\ud800",
    "graphs/con",
    "graphs/NUL.onnx",
    "graphs/r1.onnx.",
    "graphs/r1.onnx ",
    "a" * 5000,
    "a/" * 600 + "a",
    "graphs/" + "é" * 200,
    "manifest.json",
    "manifest.sha256",
    "quality.json",
    "profiles/x.json",
    "graphs",
    "graphs/none.onnx",
    "graphs/r1.onnx/x",
    "~/x",
    "$HOME/x",
]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))


def seal(bundle: Path, manifest: Any) -> None:
    """Write a manifest (bytes, or a value for JSON) with the seal that fits it."""
    raw = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (bundle / "manifest.json").write_bytes(raw)
    (bundle / "manifest.sha256").write_bytes(seal_of(raw))


def reseal(bundle: Path, rel: str) -> None:
    """Make the manifest agree with a changed file, as somebody would who means harm."""
    manifest = json.loads(MANIFEST)
    path = bundle / rel
    manifest["files"][rel] = {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    seal(bundle, manifest)


def refused(bundle: Path) -> str:
    """The one-line error of opening."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 + len(str(bundle)) and caught.value.exit_code == 2
    return message


def noticed(bundle: Path) -> bool:
    """Whether opening or verifying complains; anything but a BundleError is a failure."""
    try:
        return bool(Bundle.open(bundle).verify())
    except BundleError as error:
        assert str(error).isprintable(), ascii(error)
        return True


# Damage


@pytest.mark.parametrize("rel", FILES)
def test_every_file_is_guarded(golden: Path, rel: str) -> None:
    measured = rel == "quality.json" or rel.startswith("profiles/")
    path = golden / rel
    whole = path.read_bytes()
    changes = [whole[:-1], whole + b"x", b"", whole[:5] + bytes([whole[5] ^ 1]) + whole[6:]]
    for changed in changes:
        path.write_bytes(changed)
        if measured:
            assert [problem.file for problem in Bundle.open(golden).verify()] == [rel]
        else:
            assert (rel if rel != "manifest.sha256" else "manifest") in refused(golden)
    path.unlink()
    if not measured:
        assert f"{rel} is missing" in refused(golden)


def test_damaged_tables_name_the_file(golden: Path) -> None:
    (golden / "quality.json").write_text('{"checksum": "", "table": {}}')
    (golden / "profiles" / "cpu-golden.json").write_bytes(b"")
    bundle = Bundle.open(golden)
    with pytest.raises(BundleError, match=r"quality\.json it is damaged or was edited.*delete it and measure again"):
        bundle.quality()
    with pytest.raises(BundleError, match=r"profiles/cpu-golden\.json it is damaged"):
        bundle.profile("cpu-golden")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_is_noticed(data: st.DataObject) -> None:
    rel = data.draw(st.sampled_from(FILES))
    whole = (GOLDEN / rel).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "drop", "insert"]))
    if kind == "drop" and (rel == "quality.json" or rel.startswith("profiles/")):
        return  # not having been measured is no damage
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(shutil.copytree(GOLDEN, Path(folder) / "bundle"))
        path = bundle / rel
        if kind == "drop":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(whole[:at])
        elif kind == "insert":
            path.write_bytes(whole[:at] + data.draw(st.binary(min_size=1, max_size=9)) + whole[at:])
        else:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
        assert noticed(bundle)


def test_files_that_do_not_belong_are_reported(golden: Path) -> None:
    (golden / "graphs" / "extra.so").touch()
    (golden / "profiles" / "x").touch()
    (golden / "link").symlink_to("/etc/passwd")
    assert {problem.file for problem in Bundle.open(golden).verify()} == {"graphs/extra.so", "profiles/x", "link"}


# Paths


def edits(path: str) -> list[Callable[[dict[str, Any]], object]]:
    """Every place of a manifest that names a file, set to ``path``."""

    def rename_file(manifest: dict[str, Any]) -> None:
        manifest["files"][path] = manifest["files"].pop("graphs/r1.onnx")

    return [
        rename_file,
        lambda m: m["files"].update({path: {"size_bytes": 0, "sha256": "0" * 64}}),
        lambda m: m["graphs"]["r1"].update(path=path),
        lambda m: m["tokenizer"].update(path=path),
        lambda m: m["engines"]["r1-ort"].update(path=path),
        lambda m: m["engines"]["r1-ort"].update(files=[path]),
    ]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_hostile_paths_are_refused_everywhere(golden: Path, path: str) -> None:
    for edit in edits(path):
        manifest = json.loads(MANIFEST)
        edit(manifest)
        seal(golden, manifest)
        refused(golden)


def test_what_is_wrong_with_the_whole_is_said_as_it_stands(golden: Path) -> None:
    manifest = json.loads(MANIFEST)
    manifest["task"] = "text-generation"
    seal(golden, manifest)
    assert "manifest.json is not valid: generation belongs to" in refused(golden)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40).filter(lambda text: text not in LISTED and text not in ("engines", "engines/ort-cpu")))
def test_random_paths_are_refused(path: str) -> None:
    """Whatever a manifest names that is not there is refused before it is touched."""
    for edit in edits(path)[2:]:
        manifest = json.loads(MANIFEST)
        edit(manifest)
        with pytest.raises(FileFault):
            parse_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("rel", [*LISTED, "manifest.json", "manifest.sha256"])
def test_symbolic_links_are_refused(golden: Path, tmp_path: Path, rel: str) -> None:
    outside = tmp_path / "outside"
    (golden / rel).rename(outside)
    (golden / rel).symlink_to(outside)
    assert f"{rel} is a symbolic link" in refused(golden)


@pytest.mark.parametrize("folder", ["graphs", "engines", "engines/ort-cpu"])
def test_linked_folders_are_refused(golden: Path, tmp_path: Path, folder: str) -> None:
    (golden / folder).rename(tmp_path / "outside")
    (golden / folder).symlink_to(tmp_path / "outside")
    assert "is a symbolic link or below one" in refused(golden)


@pytest.mark.parametrize("rel", [*LISTED, "manifest.json", "manifest.sha256"])
def test_hard_links_out_of_the_bundle_are_refused(golden: Path, tmp_path: Path, rel: str) -> None:
    os.link(golden / rel, tmp_path / "outside")
    assert f"{rel} is a hard link to a file outside the bundle" in refused(golden)
    (tmp_path / "outside").unlink()
    assert Bundle.open(golden).verify() == []


def test_hard_link_beside_one_inside_is_still_refused(golden: Path, tmp_path: Path) -> None:
    weights = golden / "graphs" / "weights.bin"
    stale = tmp_path / ".bundle.99999999-0123abcd.tmp"
    stale.mkdir()
    os.link(weights, stale / "weights.bin")
    assert Bundle.open(golden).verify() == []  # a rebuild that was killed shares files like this
    os.link(weights, tmp_path / "outside")
    assert "graphs/weights.bin is a hard link" in refused(golden)


def test_linked_tables_are_refused(golden: Path, tmp_path: Path) -> None:
    (golden / "quality.json").rename(tmp_path / "outside")
    (golden / "quality.json").symlink_to(tmp_path / "outside")
    bundle = Bundle.open(golden)
    with pytest.raises(BundleError, match=r"quality\.json is a symbolic link"):
        bundle.quality()
    shutil.rmtree(golden / "profiles")
    (tmp_path / "profiles").mkdir()
    (golden / "profiles").symlink_to(tmp_path / "profiles")
    with pytest.raises(BundleError, match="profiles is a link"):
        bundle.save_profile("x", {})
    assert list((tmp_path / "profiles").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no such files on Windows")
@pytest.mark.parametrize("rel", ["manifest.json", "manifest.sha256", "graphs/weights.bin", "quality.json"])
def test_special_files_are_refused_without_waiting(golden: Path, rel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (os.mkfifo, os.mkdir, _make_socket):
        (golden / rel).unlink()
        with monkeypatch.context() as patch:
            patch.chdir((golden / rel).parent)
            make((golden / rel).name)
        if rel == "quality.json":
            with pytest.raises(BundleError, match="is not a regular file"):
                Bundle.open(golden).quality()
        else:
            assert "is not a regular file" in refused(golden)
        (golden / rel).rmdir() if (golden / rel).is_dir() else (golden / rel).unlink()
        shutil.copy2(GOLDEN / rel, golden / rel)


def _make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def test_files_that_the_manifest_does_not_list_are_not_given_out(golden: Path) -> None:
    bundle = Bundle.open(golden)
    for rel in ("manifest.json", "../x", "/etc/passwd", "\ud800", "graphs"):
        with pytest.raises(BundleError, match="has no file"):
            bundle.file(rel)


@pytest.mark.parametrize("path", ["nowhere", "a\0b", "manifest.json", "manifest.json/x", "x" * 5000])
def test_what_is_no_folder(golden: Path, path: str) -> None:
    refused(golden / path)


def test_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "manifest.json is missing: this folder is not a bundle" in refused(tmp_path)


def test_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    refused(tmp_path / "a")


# Manifests


def test_newer_format_is_one_clear_error(golden: Path) -> None:
    """Whatever else a newer manifest holds, and before its seal is looked at."""
    (golden / "manifest.json").write_text(json.dumps({"format": 7, "novelty": ["../x"]}))
    message = refused(golden)
    assert message.endswith("has bundle format 7, this version reads up to 1: upgrade compexport to read it")


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1], {}])
def test_bad_format_versions(golden: Path, version: object) -> None:
    seal(golden, {**json.loads(MANIFEST), "format": version})
    assert "has no bundle format version" in refused(golden)


def test_edited_manifest_is_noticed(golden: Path) -> None:
    (golden / "manifest.json").write_bytes(MANIFEST.replace(b'"golden"', b'"silver"'))
    assert "manifest.json is damaged or was edited" in refused(golden)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"null", "no bundle format version"),
        (b"[]", "no bundle format version"),
        (b"\xff\xfe{}", "not UTF-8"),
        (MANIFEST[:-3], "not JSON"),
        (MANIFEST.replace(b'"max_abs": 0.0', b'"max_abs": NaN', 1), "NaN, which is not JSON"),
        (MANIFEST.replace(b'"max_abs": 0.0', b'"max_abs": -Infinity', 1), "Infinity, which is not JSON"),
        (MANIFEST.replace(b'"max_abs": 0.0', b'"max_abs": 1e999', 1), "number too large"),
        (MANIFEST.replace(b'"params": 64', b'"params": 1' + b"0" * 399, 1), "number too large"),
        (MANIFEST.replace(b'"params": 64', b'"params": -' + b"9" * 9999, 1), "number too large"),
        (MANIFEST.replace(b'"max_abs": 0.0', b'"max_abs": "0.0"', 1), r"graphs\.r1\.parity\.max_abs"),
        (MANIFEST.replace(b'"params": 64', b'"params": ' + b"9" * 5000, 1), "cannot be read"),
        (MANIFEST.replace(b'"params": 64', b'"params": "\\ud800"', 1), "not valid"),
        (MANIFEST.replace(b'"format": 1', b'"format": 1, "format": 1', 1), "key 'format' twice"),
        (MANIFEST.replace(b'"format": 1', b'"format": 1, "more": 1', 1), "more: Extra"),
        (b'{"format": 1, "x": ' + b"[" * 65 + b"]" * 65 + b"}", "more than 64 deep"),
        (b'{"format": 1, "x": ' + b"[" * 100_000, "more than 64 deep|not JSON"),
        (b" " * (8 << 20) + MANIFEST, "larger than"),
        (b'{"format": 1}', "backbone: Field required"),
    ],
)
def test_bad_manifests(golden: Path, raw: bytes, message: str) -> None:
    seal(golden, raw)
    line = refused(golden)
    assert "manifest.json" in line
    assert re.search(message, line)


@pytest.mark.parametrize("twin", ["graphs/R1.onnx", "GRAPHS/r1.onnx", "graphs/\u017f", "graphs/e\u0301"])
def test_names_that_one_folder_cannot_hold_everywhere(golden: Path, twin: str) -> None:
    manifest = json.loads(MANIFEST)
    manifest["files"] |= {twin: manifest["files"]["graphs/r1.onnx"]}
    manifest["files"] |= {
        "graphs/s": manifest["files"]["graphs/r1.onnx"],
        "graphs/é": {"size_bytes": 0, "sha256": "0" * 64},
    }
    seal(golden, manifest)
    assert " twice, also as " in refused(golden)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_manifest_edits_never_surprise(data: st.DataObject) -> None:
    """Any value anywhere in the manifest: it is read or refused, nothing else."""
    manifest = json.loads(MANIFEST)
    node = manifest
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    try:
        parse_manifest(json.dumps(manifest).encode())
    except FileFault as fault:
        assert str(fault).isprintable()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}":,0123456789.eE-+truefalsn\\u ', max_size=60).map(str.encode))
def test_random_json_is_read_or_refused(raw: bytes) -> None:
    try:
        parse(raw)
    except ValueError as error:
        assert str(error)


# ONNX files


def test_locations_of_the_golden_graphs() -> None:
    assert locations_in((GOLDEN / "graphs" / "r1.onnx").read_bytes()) == {"weights.bin"}


@pytest.mark.parametrize(
    "location", ["../../x.bin", "/etc/passwd", "../x/../x/x", "weights.biN", "C:\\wind.bin", "\0eights.bin"]
)
def test_external_data_outside_is_refused(golden: Path, location: str) -> None:
    """A graph that would read another file, in a bundle whose hashes all fit."""
    path = golden / "graphs" / "r1.onnx"
    assert len(location) == len("weights.bin")
    path.write_bytes(path.read_bytes().replace(b"weights.bin", location.encode()))
    reseal(golden, "graphs/r1.onnx")
    bundle = Bundle.open(golden)
    with pytest.raises(BundleError, match=r"graphs/r1\.onnx wants to read .*, which is not a file of the bundle"):
        bundle.file("graphs/r1.onnx")
    assert [problem.file for problem in bundle.verify()] == ["graphs/r1.onnx"]


@pytest.mark.parametrize("name", ["../../r1", "a/b", "a\\b", "c:r1"])
def test_graphs_that_no_file_can_be_named_after(golden: Path, name: str) -> None:
    """Engines are built into files of their graphs' names."""
    manifest = json.loads(MANIFEST)
    manifest["graphs"][name] = manifest["graphs"]["r1"]
    seal(golden, manifest)
    assert "manifest.json has a graph with a name that is no file's: " in refused(golden)


def test_graph_is_looked_into_whatever_its_name(golden: Path) -> None:
    graph = (GOLDEN / "graphs" / "r1.onnx").read_bytes()
    (golden / "engines" / "ort-cpu" / "r1.bin").write_bytes(graph.replace(b"weights.bin", b"/etc/passwd"))
    reseal(golden, "engines/ort-cpu/r1.bin")
    manifest = json.loads((golden / "manifest.json").read_bytes())
    manifest["graphs"]["r1"]["path"] = "engines/ort-cpu/r1.bin"
    seal(golden, manifest)
    with pytest.raises(BundleError, match="wants to read /etc/passwd"):
        Bundle.open(golden).file("engines/ort-cpu/r1.bin")


def test_external_data_may_lie_elsewhere_inside(golden: Path) -> None:
    """Relative to the ONNX file, as engines that share the graphs' weights name it."""
    path = golden / "graphs" / "r1.onnx"
    path.write_bytes(path.read_bytes().replace(b"weights.bin", b"./././r4.onnx"[-11:]))
    reseal(golden, "graphs/r1.onnx")
    assert Bundle.open(golden).verify() == []


@pytest.mark.parametrize("place", ["initializer", "sparse", "attribute", "subgraph", "function", "training"])
def test_locations_are_found_wherever_a_tensor_may_be(place: str) -> None:
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(name="t", data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value="../secret")
    node = onnx.NodeProto(op_type="Constant", doc_string="x" * 300)
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=tensor)
    model = onnx.ModelProto(ir_version=10, producer_name="location")
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "sparse":
        model.graph.sparse_initializer.add(values=tensor)
    elif place == "attribute":
        model.graph.node.append(node)
    elif place == "subgraph":
        branch = model.graph.node.add(op_type="If").attribute.add(name="then", type=onnx.AttributeProto.GRAPH)
        branch.g.node.append(node)
    elif place == "function":
        model.functions.add(name="f").node.append(node)
    else:
        model.training_info.add().algorithm.initializer.append(tensor)
    assert locations_in(model.SerializeToString()) == {"../secret"}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_random_onnx_files_are_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray((GOLDEN / "graphs" / "r1.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for sample in (bytes(raw), bytes(raw[:cut]), data.draw(st.binary(max_size=40))):
        try:
            locations_in(sample)
        except ValueError as error:
            assert str(error)


def test_deep_onnx_files_are_refused() -> None:
    inner = b""
    for _ in range(200):
        for field in (6, 5, 1):  # a graph in an attribute of a node, again and again
            inner = _delimited(field, inner)
    with pytest.raises(ValueError, match="nested more than"):
        locations_in(_delimited(7, inner))


def _delimited(field: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    size, varint = len(content), bytearray()
    while size > 0x7F:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([field << 3 | 2, *varint, size]) + content
