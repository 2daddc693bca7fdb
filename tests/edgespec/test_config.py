"""Every setting that cannot work is refused by name, with the flag that helps, before anything is written."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

import pytest

from edgespec.config import CheckConfig, ExportConfig
from edgespec.config_answering import GenerateConfig
from edgespec.config_evaluation import EvalConfig
from edgespec.errors import InputError
from edgespec.flags import add_flags, from_values
from edgespec.policy import NAMES
from tests.helpers.bundles import make


def config(folder: Path, **changes: object) -> ExportConfig:
    return from_values(ExportConfig, {"target": "demo", "output": str(folder / "x.bundle"), **changes})


def test_defaults(tmp_path: Path) -> None:
    found = config(tmp_path).check()
    assert (found.budget, found.block, found.widths, found.policy) == (1024, 128, (2, 4, 8), "keydiff")
    assert found.all_buckets == (1024,)
    assert config(tmp_path, buckets=(256, 512)).check().all_buckets == (256, 512, 1024)
    assert config(tmp_path, buckets=(256, 1024)).check().all_buckets == (256, 1024)
    static = {"format": "executorch"}
    for given, buckets in (
        ({}, (256, 1024)),
        ({"block": 96, "budget": 960}, (192, 960)),
        ({"block": 512}, (1024,)),
        ({"budget": 256}, (256,)),
        ({"buckets": (512,)}, (512, 1024)),
        ({"buckets": (1024,)}, (1024,)),
    ):
        assert config(tmp_path, **static, **given).check().all_buckets == buckets
    assert config(tmp_path, device="npu", weights="fp16", head="int4").check().weights == "fp16"


REFUSED = [
    ({"block": 2048}, "block 2048 is larger than budget 1024", "use --block 512, or --budget 2048"),
    (
        {"widths": (2, 256)},
        "width 256 is larger than block 128",
        "use --block 256 or more, or narrower --widths",
    ),
    ({"widths": (1, 2)}, "widths 1,2 must be 2 or more", "use --widths 2,4,8"),
    ({"widths": ()}, "widths  must be 2 or more", "use --widths 2,4,8"),
    ({"widths": (4, 2, 4)}, "widths 4,2,4 must ascend", "use --widths 2,4"),
    ({"budget": 1}, "budget 1 is not 2 to 1048576", "use another --budget"),
    ({"block": 0}, "block 0 is not 2 to 1048576", "use another --block"),
    (
        {"buckets": (200,)},
        "bucket 200 is not a multiple of block 128 up to budget 1024",
        "use --buckets 128, or leave --buckets out",
    ),
    (
        {"buckets": (2048,)},
        "bucket 2048 is not a multiple of block 128 up to budget 1024",
        "use --buckets 128, or leave --buckets out",
    ),
    (
        {"sinks": 1000},
        "sinks 1000 + recent 32 protect more rows than the budget 1024 keeps",
        "use --budget 1032 or more, or protect fewer rows",
    ),
    ({"policy": "mru"}, "unknown policy 'mru'", f"use one of: {', '.join(NAMES)}"),
    ({"policy": "caote(mru)"}, "unknown base 'mru' of caote", f"use one of: {', '.join(NAMES)}"),
    (
        {"policy": "h2o", "budget": 1000},
        "h2o scores every block, and budget 1000 is not a multiple of block 128",
        "use --budget 896, or another --policy",
    ),
    (
        {"policy": "none", "positions": "compact"},
        "positions compact turn keys when rows are evicted, and policy none evicts none",
        "use --policy keydiff, or leave --positions out",
    ),
    ({"policy": "caote(keydiff)"}, "unknown base 'keydiff' of caote", f"use one of: {', '.join(NAMES)}"),
    (
        {"draft": "demo", "recent": 300},
        "sinks 4 + recent 300 protect more rows than the budget 256 keeps",
        "use --draft-budget 304 or more, or protect fewer rows",
    ),
    (
        {"draft": "demo", "draft_policy": "h2o", "draft_budget": 200},
        "h2o scores every block, and budget 200 is not a multiple of block 128",
        "use --draft-budget 128, or another --draft-policy",
    ),
    (
        {"draft": "demo", "draft_policy": "fly"},
        "unknown policy 'fly'",
        f"use one of: {', '.join(NAMES)}",
    ),
    ({"window": 129}, "window 129 is not 1 to 128", "use another --window"),
    ({"device": "gpu"}, "unknown device 'gpu'", "use one of: cpu, npu"),
    ({"format": "tflite"}, "unknown format 'tflite'", "use one of: onnx, executorch"),
    (
        {"format": "executorch", "device": "npu"},
        "format executorch is given for device npu",
        "leave --device out, or --format",
    ),
    (
        {"format": "executorch", "weights": "fp16"},
        "weights fp16 cannot run in an ExecuTorch program",
        "use --weights int8, int4 or fp32, or --format onnx",
    ),
    ({"weights": "int2"}, "unknown weights 'int2'", "use one of: int4, int8, fp16, fp32, w4a16, w8a16"),
    (
        {"device": "npu", "weights": "int8"},
        "weights int8 cannot run on device npu",
        "use --weights int4, fp16, w4a16 or w8a16, or --device cpu",
    ),
    (
        {"device": "npu", "embedding": "fp32"},
        "embedding fp32 cannot run on device npu",
        "use --embedding fp16, or --device cpu",
    ),
    (
        {"soc": ("8-elite",)},
        "soc 8-elite is given for device cpu",
        "add --device npu, or leave --soc out",
    ),
    (
        {"device": "npu", "soc": ("888",)},
        "unknown soc '888'",
        "use one of: 8-gen-2, 8-gen-3, 8-elite, 8-elite-gen-5",
    ),
    (
        {"device": "npu", "soc": ("8-elite", "8-elite")},
        "soc 8-elite,8-elite names one twice",
        "name each once in --soc",
    ),
    (
        {"draft_budget": 512},
        "--draft-budget is given without a draft",
        "add --draft, or leave --draft-budget out",
    ),
    (
        {"draft_weights": "int4"},
        "--draft-weights is given without a draft",
        "add --draft, or leave --draft-weights out",
    ),
    (
        {"draft": "demo", "draft_weights": "w4a16"},
        "draft-weights w4a16 cannot run on device cpu",
        "use --draft-weights int4, int8, fp16 or fp32, or --device cpu",
    ),
    (
        {"draft": "demo", "device": "npu", "weights": "w8a16", "draft_weights": "int4"},
        "draft-weights int4 do not fit weights w8a16: one codes activations",
        "use w4a16 or w8a16 for both, or for neither",
    ),
    (
        {"draft_vocab": "v"},
        "--draft-vocab is given without a draft",
        "add --draft, or leave --draft-vocab out",
    ),
    (
        {"draft": "demo", "draft_budget": 64},
        "block 128 is larger than draft_budget 64",
        "use --draft-budget 128 or more, or --block 64",
    ),
    (
        {"draft": "demo", "draft_rows": 9, "draft_vocab": __file__},
        "--draft-vocab names the rows that --draft-rows would choose",
        "leave one of them out",
    ),
    ({"draft": "demo", "draft_rows": 0}, "draft_rows 0 is not 1 to 16777216", "use another --draft-rows"),
    (
        {"target": "/nowhere/model"},
        "target '/nowhere/model' does not exist",
        "give a model folder, a .gguf file, or the word demo",
    ),
    (
        {"draft": "/nowhere/model"},
        "draft '/nowhere/model' does not exist",
        "give a model folder, a .gguf file, or the word demo or layers",
    ),
    ({"text": "/nowhere.txt"}, "text '/nowhere.txt' is not a file", "give an existing file to --text"),
    ({"layers": 3}, "unknown setting 'layers'", None),
    ({"budget": True}, "budget is True, which has the wrong type", None),
    ({"widths": (2, "4")}, "widths is (2, '4'), which has the wrong type", None),
    ({"draft": 3}, "draft is 3, which has the wrong type", None),
]


@pytest.mark.parametrize(("changes", "message", "hint"), REFUSED, ids=[str(r[0]) for r in REFUSED])
def test_refusals(tmp_path: Path, changes: dict, message: str, hint: str | None) -> None:
    with pytest.raises(InputError) as caught:
        config(tmp_path, **changes).check()
    assert caught.value.message == message
    assert hint is None or caught.value.hint == hint
    assert list(tmp_path.iterdir()) == []


def test_missing_setting() -> None:
    with pytest.raises(InputError, match="output is missing"):
        from_values(ExportConfig, {"target": "demo"})


def test_output_exists(tmp_path: Path) -> None:
    make(tmp_path / "x.bundle")
    with pytest.raises(InputError, match=r"x.bundle exists\nhint: .* replace it with --force"):
        config(tmp_path).check()
    assert config(tmp_path, force=True).check().force


def test_force_replaces_bundles_only(tmp_path: Path) -> None:
    (tmp_path / "x.bundle").mkdir()
    (tmp_path / "x.bundle/thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is no bundle, so --force leaves it"):
        config(tmp_path, force=True).check()
    assert (tmp_path / "x.bundle/thesis.txt").read_text() == "years of work"


def test_output_without_a_parent(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"deep, where the bundle should go, is not a folder\nhint:  mkdir -p"
    ):
        config(tmp_path / "deep").check()
    assert not (tmp_path / "deep").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="is not writable"):
        config(tmp_path).check()


def test_flags_are_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ExportConfig)
    assert [a.dest for a in parser._actions if a.dest != "help"] == [f.name for f in fields(ExportConfig)]
    values = vars(
        parser.parse_args(["demo", "-o", "x", "--widths", "2,16", "--draft-budget", "64", "--buckets", ""])
    )
    assert (values["widths"], values["draft_budget"], values["buckets"]) == ((2, 16), 64, ())
    assert from_values(ExportConfig, values) == ExportConfig("demo", "x", widths=(2, 16), draft_budget=64)


def test_lists_of_words_and_numbers_that_may_be_missing() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EvalConfig)
    plain = from_values(EvalConfig, vars(parser.parse_args(["b", "-o", "x"])))
    assert plain == EvalConfig("b", "x") and (plain.policies, plain.sinks) == ((), None)
    words = ["b", "-o", "x", "--policies", "keydiff, sinks", "--sinks", "0", "--tasks", "text"]
    given = from_values(EvalConfig, vars(parser.parse_args(words)))
    assert (given.policies, given.sinks, given.tasks) == (("keydiff", "sinks"), 0, ("text",))
    with pytest.raises(InputError, match=r"policies is .* which has the wrong type"):
        from_values(EvalConfig, {"bundle": "b", "output": "x", "policies": (1,)})


def test_small_configs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="max_new_tokens 0 is not 1 to"):
        GenerateConfig("b", "hello", max_new_tokens=0).check()
    with pytest.raises(InputError, match="the prompt is empty"):
        GenerateConfig("b", "  ").check()
    with pytest.raises(InputError, match="source '/nowhere' does not exist"):
        CheckConfig("b", source="/nowhere").check()
    with pytest.raises(InputError, match="is not a file"):
        CheckConfig("b", text=str(tmp_path)).check()
