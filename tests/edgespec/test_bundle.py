"""A bundle appears whole or not at all; a hostile one is refused before anything outside it is touched."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgespec.bundle import SCHEMA, creating, digest, open_bundle, require_space
from edgespec.bundle_rules import check
from edgespec.errors import BackendError, BundleError, InputError
from edgespec.plain import to_json
from edgespec.spec import CompiledEntry, Manifest
from tests.helpers.bundles import fill, make, manifest

REPO = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("device", ["cpu", "npu"])
def test_round_trip(tmp_path: Path, device: str) -> None:
    bundle = make(tmp_path / "x.bundle", device)
    before = manifest(device)
    assert bundle.manifest == replace(before, files=bundle.manifest.files)
    on_disk = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert on_disk == {*bundle.manifest.files, "manifest.json"}
    assert bundle.manifest.files["tokenizer.json"] == digest(bundle.path / "tokenizer.json")
    assert bundle.manifest.files["tokenizer.json"].bytes == len("tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]


def test_lookups(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    assert [g.width for g in bundle.graphs("target", "verify")] == [2, 4]
    assert bundle.graph("target", "verify", 4, 8).file == "graphs/target_verify_4_8.onnx"
    assert bundle.graph("target", "decode").bucket == 16
    assert bundle.graph("draft", "draft").width == 2
    assert bundle.has("draft") and not bundle.has("other")
    assert bundle.file("target.weights").read_text() == "target.weights"
    for call in (
        lambda: bundle.graph("target", "verify", 3),
        lambda: bundle.graph("target", "draft"),
        lambda: bundle.graph("target", "decode", 1, 99),
        lambda: bundle.model("other"),
        lambda: bundle.file("../secret"),
    ):
        with pytest.raises(BundleError):
            call()


# Making one.


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_interrupted_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), creating(tmp_path / "x.bundle") as staging:
        fill(staging.path, manifest())
        raise fault
    assert list(tmp_path.iterdir()) == []


def test_a_bad_manifest_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="files lacks"), creating(tmp_path / "x.bundle") as staging:
        staging.finish(manifest())
    assert list(tmp_path.iterdir()) == []


def test_existing_output(tmp_path: Path) -> None:
    make(tmp_path / "x.bundle")
    with pytest.raises(InputError, match="exists"), creating(tmp_path / "x.bundle"):
        raise AssertionError("the block must not start")


def test_force_replaces_only_when_complete(tmp_path: Path) -> None:
    old = make(tmp_path / "x.bundle")
    with pytest.raises(ValueError), creating(old.path, force=True):
        raise ValueError
    assert open_bundle(old.path).manifest == old.manifest
    with creating(old.path, force=True) as staging:
        fill(staging.path, manifest())
        assert open_bundle(old.path).manifest == old.manifest
        staging.finish(replace(manifest(), produced_by={"edgespec": "2"}))
    assert open_bundle(old.path).manifest.produced_by == {"edgespec": "2"}
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]


def test_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="appeared meanwhile"), creating(tmp_path / "x.bundle") as staging:
        fill(staging.path, manifest())
        staging.finish(manifest())
        (tmp_path / "x.bundle").mkdir()
        (tmp_path / "x.bundle/other").write_text("of another run")
    assert [p.name for p in tmp_path.rglob("*")] == ["x.bundle", "other"]


KILLED = """
import sys, time
from edgespec.bundle import creating
with creating(sys.argv[1]) as staging:
    (staging.path / "weights").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_is_cleared_by_the_next_and_a_living_one_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x.bundle")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPO)
    assert run.stdout is not None and run.stdout.readline() == b"ready\n"
    (half,) = tmp_path.iterdir()
    make(tmp_path / "x.bundle")
    assert (half / "weights").read_bytes() == b"half", "its run still lives"
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    with pytest.raises(BundleError, match=r"has no manifest.json"):
        open_bundle(half)
    with creating(tmp_path / "x.bundle", force=True) as staging:
        fill(staging.path, manifest())
        staging.finish(manifest())
    assert [p.name for p in tmp_path.iterdir()] == ["x.bundle"]


def test_a_bundle_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    bundle.path.rename(tmp_path / ".x.bundle.edgespec-0badcafe-old")
    with pytest.raises(ValueError), creating(tmp_path / "y.bundle"):
        raise ValueError
    assert not bundle.path.exists(), "another output's affairs are left alone"
    with pytest.raises(ValueError), creating(bundle.path, force=True):
        raise ValueError
    assert open_bundle(bundle.path).manifest == bundle.manifest


def test_require_space(tmp_path: Path) -> None:
    require_space(tmp_path / "x.bundle", 1)
    with pytest.raises(
        BackendError, match=r"not enough disk at .*: 1,\d{3},\d{3},\d{3},\d{3} MiB needed, [\d,]+ MiB free"
    ):
        require_space(tmp_path / "deep/x.bundle", 2**60)


# Opening one.


def edit(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    (path / "manifest.json").write_text(json.dumps(data))


def refused(path: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(path)
    assert caught.value.hint
    assert str(caught.value).count("\n") == 1


def test_no_bundle(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no bundle at")
    refused(tmp_path, r"has no manifest.json")


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/../../secret",
        "./a",
        "a//b",
        "a\\b",
        "C:a",
        "a\0b",
        "a b",
        "",
        ".hidden",
        "é",
        "-rf",
    ],
)
def test_unsafe_paths(tmp_path: Path, name: str) -> None:
    bundle = make(tmp_path / "x.bundle")
    (tmp_path / "secret").write_text("secret")
    edit(bundle.path, lambda m: m["files"].update({name: digest(tmp_path / "secret").__dict__}))
    refused(bundle.path, "is not a safe relative path|control character")


def test_two_names_for_one_file(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    edit(bundle.path, lambda m: m["files"].update({"Tokenizer.json": m["files"]["tokenizer.json"]}))
    refused(bundle.path, "'Tokenizer.json' is listed twice")


def test_symbolic_links(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "graphs", "manifest.json"):
        bundle = make(tmp_path / f"{name}.bundle")
        (bundle.path / name).rename(tmp_path / f"outside-{name}")
        (bundle.path / name).symlink_to(tmp_path / f"outside-{name}")
        refused(bundle.path, f"{name} is a symbolic link")


def test_pipes_do_not_hang(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "manifest.json"):
        bundle = make(tmp_path / f"{name}.bundle")
        (bundle.path / name).unlink()
        os.mkfifo(bundle.path / name)
        refused(bundle.path, f"{name} is not a regular file")


def test_damaged_files(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    weights = bundle.path / "target.weights"
    weights.write_text("target.weightz")
    refused(bundle.path, "target.weights does not match its checksum")
    assert open_bundle(bundle.path, verify=False).manifest == bundle.manifest
    weights.write_text("target")
    refused(bundle.path, "target.weights has 6 bytes, not 14")
    weights.unlink()
    refused(bundle.path, "target.weights is missing")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1, 2, 3), "does not hold 100 ids of 4 bytes"),
        ((*range(99), 100), "an id outside the vocabulary of 100"),
        ((*range(99), -1), "an id outside the vocabulary of 100"),
    ],
)
def test_ids_of_a_trimmed_head(tmp_path: Path, ids: tuple[int, ...], message: str) -> None:
    target, draft = (what := manifest()).models
    with pytest.raises(BundleError, match=message), creating(tmp_path / "x.bundle") as staging:
        fill(staging.path, what)
        (staging.path / "head.ids").write_bytes(struct.pack(f"<{len(ids)}i", *ids))
        staging.finish(replace(what, models=(target, replace(draft, head_ids="head.ids"))))
    assert list(tmp_path.iterdir()) == []


def test_unlisted_files(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    (bundle.path / "graphs/more.bin").write_text("x")
    refused(bundle.path, r"more.bin' is not part of the bundle")
    (bundle.path / "graphs/more.bin").unlink()
    (bundle.path / "more").mkdir()
    refused(bundle.path, r"more' is not part of the bundle")


def test_other_versions(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    edit(bundle.path, lambda m: m.update(schema=SCHEMA + 1, novelty=True))
    refused(bundle.path, rf"was made by a newer edgespec \(schema {SCHEMA + 1} > {SCHEMA}\)\nhint:  upgrade")
    edit(bundle.path, lambda m: m.update(schema=10**400))
    refused(bundle.path, "was made by a newer edgespec")
    edit(bundle.path, lambda m: m.update(schema=0))
    refused(bundle.path, "has the unknown schema 0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"\x80\x04pickle", "is not JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"schema": 1, "schema": 1}', "a key appears twice"),
        (b'{"schema": NaN}', "NaN is not a number"),
        (b'{"schema": -Infinity}', "-Infinity is not a number"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "manifest: is a list, not an object"),
        (b"{}", "field 'schema' is missing"),
        (b" " * (2**24 + 1), "is larger than 16 MiB"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_hostile_json(tmp_path: Path, text: bytes, message: str) -> None:
    bundle = make(tmp_path / "x.bundle")
    (bundle.path / "manifest.json").write_bytes(text)
    start = time.monotonic()
    refused(bundle.path, message)
    assert time.monotonic() - start < 5


TARGET, DRAFT = ("models", 0), ("models", 1)
SENSE = [
    (("device",), "gpu", "manifest.device: 'gpu' is none of cpu, npu"),
    (("models",), [], "must be one target and at most one draft"),
    ((*DRAFT, "name"), "target", "must be one target and at most one draft"),
    ((*TARGET, "weights"), "other.bin", "manifest names 'other.bin', which manifest.files lacks"),
    ((*TARGET, "precision", "linear"), "int2", "precision.linear: 'int2' is none of"),
    ((*TARGET, "precision"), {"norm": "fp32"}, "'norm' is none of linear, ends, head, embedding"),
    ((*TARGET, "head_rows"), 101, "head_rows: is 101, not 1 to the vocabulary 100"),
    ((*TARGET, "spec", "layers"), 2**40, "layers: is 1099511627776, not 1 to 1024"),
    ((*TARGET, "spec", "layers"), 3, "windows: are 2, not one for each of 3 layers"),
    ((*TARGET, "spec", "kv_heads"), 3, "kv_heads: 3 does not divide heads 4"),
    ((*TARGET, "spec", "head_dim"), 0, "head_dim: is 0, not 1 to"),
    ((*TARGET, "cache", "contract"), "ring", "contract: 'ring' is none of rows, append"),
    ((*TARGET, "cache", "dtype"), "int4", "dtype: 'int4' is none of float32, int8"),
    ((*TARGET, "cache", "dtype"), "int8", r"where keys_0 int8 .* must be|is int8, which"),
    ((*TARGET, "cache", "block"), 0, "block: is 0, not 1 to the budget 16"),
    ((*TARGET, "cache", "budget"), 2**30, "budget: is absurdly large"),
    ((*TARGET, "cache", "buckets"), [16, 8], "must ascend and end with the budget 16"),
    ((*TARGET, "cache", "buckets"), [1, 16], "buckets: hold 1, less than the block 4"),
    ((*TARGET, "cache", "widest"), 5, "widest: is 5, not 1 to the block 4"),
    ((*TARGET, "cache", "policy"), "mru", "unknown policy 'mru'"),
    ((*TARGET, "cache", "policy"), "lru", "queries: are 0, and lru reads 4 or more"),
    ((*TARGET, "cache", "queries"), 5, "queries: are 5, not 0 to the block 4"),
    ((*TARGET, "spec", "softcap"), -1.0, "softcap: is -1.0"),
    ((*TARGET, "cache", "recent"), 16, "protect more rows than the budget"),
    ((*TARGET, "cache", "policy"), "none", None),
    ((*TARGET, "graphs", 0, "kind"), "train", "kind: 'train' is none of"),
    ((*TARGET, "graphs", 0, "bucket"), 12, "bucket: 12 is none of the cache's"),
    ((*TARGET, "graphs", 0, "width"), 0, "width: is 0, not 1 to the widest 4"),
    ((*TARGET, "graphs", 1, "width"), 2, "width: is 2, which no decode graph has"),
    ((*TARGET, "graphs", 0, "inputs"), [], "inputs: are 0, and it has 2 layers"),
    (
        (*TARGET, "graphs", 0, "inputs", 0, "dtype"),
        "int64",
        r"hold 'tokens' 'int64' \[1, 4\] where tokens int32",
    ),
    ((*TARGET, "graphs", 0, "inputs", 0, "dtype"), "str", "has the unknown type 'str'"),
    ((*TARGET, "graphs", 0, "inputs", 4, "shape", 2), 2**33, "has the impossible shape"),
    ((*TARGET, "graphs", 0, "outputs", 0, "shape", 1), 4, r"hold 'logits' 'float32' \[1, 4, 100\] where"),
    ((*TARGET, "graphs", 2, "width"), 4, "hold 'tokens'"),
    ((*TARGET, "graphs", -1, "width"), 1, "width: is 1, not the block 4"),
    ((*TARGET, "graphs", -1, "inputs"), [], "inputs: are 0, not 1"),
    ((*TARGET, "graphs", -1, "inputs", 0, "name"), "queries", "inputs: are 1, not 2"),
    (
        (*TARGET, "graphs", -1, "outputs", 0, "shape"),
        [2, 9],
        r"hold 'keep' 'int32' \[2, 9\] where keep int32 \[2, 16\] must be",
    ),
    (("tokenizer", "stop_ids"), [100], "names the id 100, and the vocabulary has 100"),
    (("tokenizer", "chat_template"), "t.jinja", "manifest names 't.jinja'"),
    (("files", "tokenizer.json", "sha256"), "0", "is not 64 hexadecimal digits"),
]


@pytest.mark.parametrize(("place", "value", "message"), SENSE, ids=[f"{s[0][-1]}={s[1]}"[:40] for s in SENSE])
def test_manifests_that_make_no_sense(
    tmp_path: Path, place: tuple, value: object, message: str | None
) -> None:
    bundle = make(tmp_path / "x.bundle")

    def change(data: dict) -> None:
        for key in place[:-1]:
            data = data[key]
        data[place[-1]] = value

    edit(bundle.path, change)
    if message is None:
        open_bundle(bundle.path)
    else:
        refused(bundle.path, message)


def test_missing_graphs(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    edit(bundle.path, lambda m: m["models"][0]["graphs"].pop(1))
    refused(bundle.path, "models.target.graphs: lack decode for bucket 8")
    bundle = make(tmp_path / "y.bundle")
    edit(bundle.path, lambda m: m["models"][1]["graphs"].pop())
    refused(bundle.path, "models.draft.graphs: lack commit for policy keydiff")
    bundle = make(tmp_path / "z.bundle")
    edit(bundle.path, lambda m: m["models"][0]["graphs"].append(m["models"][0]["graphs"][0]))
    refused(bundle.path, "hold prefill of width 4 for bucket 8 twice")


# Graphs compiled for a SoC.


def compiled_entry(what: Manifest, soc: str = "8-elite") -> CompiledEntry:
    graphs = {g.file: f"{soc}/{g.file}" for m in what.models for g in m.graphs}
    return CompiledEntry(
        soc, "a compiler", f"{soc}/log", {m.name: f"{soc}/{m.name}.bin" for m in what.models}, graphs
    )


def make_compiled(path: Path) -> Path:
    what = manifest("npu")
    what = replace(what, compiled=(compiled_entry(what),))
    with creating(path) as staging:
        fill(staging.path, what)
        for entry in what.compiled:
            for name in (entry.log, *entry.contexts.values(), *entry.graphs.values()):
                (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
                (staging.path / name).write_text(name)
        staging.finish(what)
    return path


def test_a_compiled_bundle_says_for_what(tmp_path: Path) -> None:
    bundle = open_bundle(make_compiled(tmp_path / "x.bundle"))
    assert bundle.compiled("8-elite").contexts["target"] == "8-elite/target.bin"
    with pytest.raises(BundleError, match="is compiled for 8-elite, not for 8-gen-3") as caught:
        bundle.compiled("8-gen-3")
    assert caught.value.hint == "export it again with --device npu --soc 8-gen-3"
    with pytest.raises(BundleError, match="is compiled for no SoC"):
        make(tmp_path / "y.bundle", "npu").compiled("8-gen-3")


COMPILED_FAULTS: list[tuple[Callable[[dict], object], str]] = [
    (lambda m: m["compiled"][0].update(soc="888"), "compiled.soc: '888' is none of 8-gen-2"),
    (lambda m: m["compiled"].append(m["compiled"][0]), r"compiled\['8-elite'\]: stands there twice"),
    (lambda m: m["compiled"][0]["graphs"].popitem(), "graphs: must name what the bundle holds"),
    (
        lambda m: m["compiled"][0]["graphs"].update(more="8-elite/log"),
        "graphs: must name .* differ in 'more'",
    ),
    (lambda m: m["compiled"][0]["contexts"].pop("draft"), "contexts: must name .* differ in 'draft'"),
    (lambda m: m["compiled"][0].update(log="../log"), r"manifest names '../log', which manifest.files lacks"),
    (lambda m: m.pop("compiled"), "field 'compiled' is missing"),
]


@pytest.mark.parametrize(("change", "message"), COMPILED_FAULTS, ids=[f[1][:30] for f in COMPILED_FAULTS])
def test_compiled_parts_that_make_no_sense(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    path = make_compiled(tmp_path / "x.bundle")
    edit(path, change)
    refused(path, message)


def test_a_bundle_for_a_cpu_is_compiled_for_nothing(tmp_path: Path) -> None:
    bundle = make(tmp_path / "x.bundle")
    entry = compiled_entry(bundle.manifest)
    edit(bundle.path, lambda m: m.update(compiled=[to_json(entry)]))
    refused(bundle.path, "manifest names '8-elite/log', which manifest.files lacks")
    with pytest.raises(BundleError, match="is for an npu, and the bundle for cpu"):
        check(replace(bundle.manifest, compiled=(entry,)))
