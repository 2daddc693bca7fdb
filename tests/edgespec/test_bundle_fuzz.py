"""Whatever a manifest says, opening ends soon, in a bundle or a BundleError, and touches nothing outside."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgespec.bundle import open_bundle
from edgespec.errors import BundleError
from tests.helpers.bundles import make

SETTINGS = settings(
    max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OPENED: list[Path] = []


def _audit(event: str, args: tuple) -> None:
    if WATCHING and event == "open" and isinstance(args[0], str | bytes):
        OPENED.append(Path(args[0].decode() if isinstance(args[0], bytes) else args[0]))


WATCHING = False
sys.addaudithook(_audit)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        make(Path(place) / "x.bundle")
        (Path(place) / "secret").write_text("secret")
        shutil.copy(Path(place) / "x.bundle/manifest.json", Path(place) / "valid.json")
        yield Path(place) / "x.bundle"


@pytest.fixture(scope="module")
def valid(folder: Path) -> dict:
    """The manifest as it was made, whatever other tests wrote over it."""
    return json.loads((folder.parent / "valid.json").read_text())


def attempt(folder: Path, text: bytes) -> bool:
    """True if the bundle opened; anything but a BundleError, or a file opened elsewhere, fails the test."""
    global WATCHING
    (folder / "manifest.json").write_bytes(text)
    OPENED.clear()
    WATCHING = True
    try:
        open_bundle(folder)
        return True
    except BundleError as error:
        assert error.message and error.hint
        assert str(error).count("\n") == 1 and str(error).encode()
        return False
    finally:
        WATCHING = False
        outside = [path for path in OPENED if not path.is_relative_to(folder) or ".." in path.parts]
        assert not [path for path in outside if "python" not in str(path)], outside


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**31 - 2, 2**64 + 2)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["../secret", "/etc/passwd", "a/../../secret", "manifest.json", "graphs", "target", "append"]
    )
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@SETTINGS
@given(st.binary(max_size=200))
def test_random_bytes(folder: Path, data: bytes) -> None:
    assert not attempt(folder, data)


@SETTINGS
@given(JSON)
def test_random_json(folder: Path, data: Any) -> None:
    assert not attempt(folder, json.dumps(data).encode())


def places(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(pairs):
        yield data, key
        yield from places(value)


def _replace(where: Any, key: Any, value: Any) -> None:
    where[key] = value


def _delete(where: Any, key: Any, value: Any) -> None:
    del where[key]


def _rename(where: Any, key: Any, value: Any) -> None:
    if isinstance(where, dict):
        where[str(value)] = where.pop(key)
    else:
        where.insert(key, copy.deepcopy(where[key]))


CHANGES: tuple[Callable[[Any, Any, Any], None], ...] = (_replace, _delete, _rename)


@SETTINGS
@given(st.data())
def test_mutated_manifests(folder: Path, valid: dict, data: st.DataObject) -> None:
    changed = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        found = list(places(changed))
        if not found:
            break
        where, key = found[data.draw(st.integers(0, len(found) - 1), label="place")]
        data.draw(st.sampled_from(CHANGES), label="change")(where, key, data.draw(JSON, label="value"))
    attempt(folder, json.dumps(changed).encode())


@SETTINGS
@given(st.data())
def test_mutated_text(folder: Path, valid: dict, data: st.DataObject) -> None:
    text = bytearray(json.dumps(valid).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
        if not text:
            break
    attempt(folder, bytes(text))


def test_the_unchanged_manifest_opens(folder: Path, valid: dict) -> None:
    assert attempt(folder, json.dumps(valid).encode())
