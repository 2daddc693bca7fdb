"""The names and shapes of the step graph, and typed JSON both ways."""

from __future__ import annotations

import json

import pytest

from edgespec.errors import BundleError
from edgespec.plain import from_json, to_json
from edgespec.spec import (
    CacheSpec,
    FileEntry,
    Manifest,
    ModelSpec,
    TensorSpec,
    TokenizerEntry,
    step_inputs,
    step_outputs,
    vision_tensors,
)
from tests.helpers.bundles import manifest

MODEL = ModelSpec("llama", 2, 32, 4, 2, 8, 100, 64, True, (0, 0))
ROWS = CacheSpec("rows", 16, 4, "keydiff", 1, 2, (8, 16), 4)
APPEND = CacheSpec("append", 16, 4, "keydiff", 1, 2, (8, 16), 4)


def test_a_prefill_that_takes_pictures() -> None:
    plain, mixed = (step_inputs(kind, 4, MODEL, 20) for kind in ("prefill", "embeds"))
    assert mixed == (*plain[:4], TensorSpec("features", "float32", (1, 4, 32)), *plain[4:])
    same = [step_outputs(kind, 4, MODEL, ROWS, 16, 100) for kind in ("prefill", "embeds")]
    assert same[0] == same[1]
    assert vision_tensors(28, 4, 32, 2, 16)[1][1] == TensorSpec("draft_features", "float32", (1, 2, 16))


def test_slots_and_rows() -> None:
    assert ROWS.slots == APPEND.slots == 20
    assert (ROWS.rows(16), ROWS.rows(8)) == (20, 12)
    assert (APPEND.rows(16), APPEND.rows(8)) == (23, 15)


def test_inputs_of_verify() -> None:
    cache = (1, 2, 20, 8)
    assert step_inputs("verify", 4, MODEL, 20) == (
        TensorSpec("tokens", "int32", (1, 4)),
        TensorSpec("position", "int32", (1,)),
        TensorSpec("count", "int32", (1,)),
        TensorSpec("keys_0", "float32", cache),
        TensorSpec("keys_1", "float32", cache),
        TensorSpec("values_0", "float32", cache),
        TensorSpec("values_1", "float32", cache),
    )


def test_only_prefill_names_its_row() -> None:
    assert "row" in [t.name for t in step_inputs("prefill", 4, MODEL, 20)]
    assert "row" not in [t.name for t in step_inputs("decode", 1, MODEL, 20)]


def test_outputs_of_each_contract() -> None:
    rows = {t.name: t.shape for t in step_outputs("verify", 4, MODEL, ROWS, 16, 100)}
    new = (2, 2, 4, 8)
    assert rows == {"logits": (1, 4, 100), "argmax": (1, 4), "new_keys": new, "new_values": new}
    append = {t.name: t.shape for t in step_outputs("prefill", 4, MODEL, APPEND, 8, 100)}
    assert (append["logits"], append["argmax"]) == ((1, 1, 100), (1, 1))
    assert append["new_keys_1"] == append["new_values_0"] == (1, 2, 15, 8)
    draft = {t.name: t.shape for t in step_outputs("draft", 2, MODEL, ROWS, 16, 40)}
    assert (draft["logits"], draft["entropy"], draft["top_ids"]) == ((1, 2, 40), (1, 2), (1, 2, 8))


def test_manifest_round_trip() -> None:
    before = manifest()
    assert from_json(Manifest, json.loads(json.dumps(to_json(before)))) == before


ENTRY = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "manifest: is a list, not an object"),
        (None, "manifest: is null, not an object"),
        ({**ENTRY, "extra": 1}, "manifest: unknown field 'extra'"),
        ({"bytes": 1}, "manifest: field 'sha256' is missing"),
        ({**ENTRY, "bytes": True}, "manifest.bytes: is bool, not int"),
        ({**ENTRY, "bytes": 1.0}, "manifest.bytes: is float, not int"),
        ({**ENTRY, "bytes": "1"}, "manifest.bytes: is a text, not int"),
        ({**ENTRY, "bytes": -1}, "manifest.bytes: is negative"),
        ({**ENTRY, "bytes": 2**48}, "manifest.bytes: is absurdly large"),
        (
            {**ENTRY, "sha256": "a\x00b"},
            r"manifest.sha256: 'a\x00b' is too long or holds a control character",
        ),
        (
            {**ENTRY, "sha256": "\ud800"},
            r"manifest.sha256: '\ud800' is too long or holds a control character",
        ),
        ({**ENTRY, "x" * 99: 1}, f"manifest: unknown field '{'x' * 57}...'"),
    ],
)
def test_wrong_types(data: object, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        from_json(FileEntry, data)
    assert caught.value.message == message
    assert caught.value.hint == "export the bundle again with this version of edgespec"


def test_optional_and_nested_faults_name_their_place() -> None:
    entry = {"tokenizer": "t", "chat_template": "", "stop_ids": [1, 2], "bos_id": None}
    assert from_json(TokenizerEntry, entry) == TokenizerEntry("t", "", (1, 2), None)
    with pytest.raises(BundleError, match=r"manifest.stop_ids\[1\]: is null, not int"):
        from_json(TokenizerEntry, {**entry, "stop_ids": [1, None]})
    with pytest.raises(BundleError, match=r"manifest.stop_ids: is an object, not a list"):
        from_json(TokenizerEntry, {**entry, "stop_ids": {}})
