"""The native library's own tests, its operators beside the functions that they stand for, and what a machine
without a compiler is told.
"""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgespec.errors import BackendError
from edgespec.exporters.build import Builder
from edgespec.exporters.forms import FORMS
from edgespec.exporters.lower_attention import packed, separate
from edgespec.runtime import build
from tests.helpers.operators import library, opener

SOURCES = Path(__file__).parent / "native"


SANITIZE = os.environ.get("EDGESPEC_SANITIZE") == "1"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the compiled tests."""
    folder = tmp_path_factory.mktemp("native") / "b"
    build.build(folder, build.onnx_library(), SANITIZE, f"-DEDGESPEC_TESTS={SOURCES}")
    return folder


def test_native_tests(compiled: Path) -> None:
    done = subprocess.run(["ctest", "--output-on-failure"], cwd=compiled, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "100% tests passed, 0 tests failed out of 6" in done.stdout


class Functions:
    """Graphs of the exporter's functions, run by ONNX Runtime: by their bodies, and by our operators."""

    def run(self, b: Builder, made: list[Any], feeds: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
        """What a graph's bodies give, then what the operators give."""
        outputs = {f"out_{i}": (value, ir.DataType.FLOAT, shape) for i, (value, shape) in enumerate(made)}
        model = ir.to_proto(b.model("functions", outputs)).SerializeToString()
        found = []
        for open_graph in (lambda m: ort.InferenceSession(m, providers=["CPUExecutionProvider"]), opener):
            found.append(open_graph(model).run(None, feeds))
        return found


@pytest.fixture
def functions() -> Functions:
    if library() is None:
        pytest.skip("this processor has no kernels")
    return Functions()


@pytest.mark.parametrize("rows", [1, 2, 5, 13])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (100, 576), (33, 40)])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_operators_multiply_as_their_functions_do(
    functions: Functions, name: str, n: int, k: int, rows: int
) -> None:
    dice, form = np.random.default_rng(n * rows), FORMS[name]
    weight, x = dice.normal(size=(n, k)).astype(np.float32), dice.normal(size=(1, rows, k)).astype(np.float32)
    encoded = form.encode(weight)
    b = Builder(named=True)
    parts = {key: b.initializer(ir.tensor(array, name=key)) for key, array in encoded.arrays.items()}
    made = form.linear(b, b.input("x", ir.DataType.FLOAT, x.shape), parts, rows, n, k)
    (body,), (own,) = functions.run(b, [(made, (1, rows, n))], {"x": x})
    if name == "int8":  # sums of integers are exact, and what follows rounds alike
        assert np.array_equal(body, own)
    assert np.abs(body - own).max() < 0.01 * np.abs(body).max()
    assert np.abs(own - x @ form.decode(encoded, k).T).max() < 0.03 * np.abs(own).max()


def test_operators_look_up_as_their_function_does(functions: Functions) -> None:
    dice, form = np.random.default_rng(0), FORMS["int8"]
    encoded, ids = (
        form.encode(dice.normal(size=(70, 37)).astype(np.float32)),
        np.array([[0, 69, 31, 32, 7]], np.int32),
    )
    x = dice.normal(size=(1, 2, 37)).astype(np.float32)
    for tied in (True, False):  # with a product that packs the same weights, and as they are stored
        b = Builder(named=True)
        parts = {key: b.initializer(ir.tensor(array, name=key)) for key, array in encoded.arrays.items()}
        made = [(form.embed(b, b.input("ids", ir.DataType.INT32, ids.shape), parts, 5, 70, 37), (1, 5, 37))]
        feeds = {"ids": ids}
        if tied:
            given = b.input("x", ir.DataType.FLOAT, x.shape)
            made.append((form.linear(b, given, parts, 2, 70, 37), (1, 2, 70)))
            feeds["x"] = x
        body, own = functions.run(b, made, feeds)
        assert all(np.array_equal(*pair) for pair in zip(body, own, strict=True))
        assert np.array_equal(own[0], form.decode(encoded, 37)[ids])


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(("window", "softcap", "interleaved"), [(-1, 0.0, 0), (6, 0.0, 1), (-1, 5.0, 0)])
def test_operators_attend_as_their_functions_do(
    functions: Functions, rows: int, packs: bool, window: int, softcap: float, interleaved: int
) -> None:
    heads, kv_heads, dim, slots, count = 6, 2, 16, 32, 19
    dice = np.random.default_rng(rows)
    array = lambda *shape: dice.normal(size=shape).astype(np.float32)  # noqa: E731
    b, feeds = Builder(named=True), {}

    def given(name: str, value: np.ndarray) -> Any:
        feeds[name] = value
        return b.input(name, ir.tensor(value).dtype, value.shape)

    wide = max(rows, 2)
    caches = [given(name, array(1, kv_heads, slots, dim)) for name in ("keys", "values")]
    caches += [
        given(n, np.array([v], np.int32))
        for n, v in (("count", count), ("last", count + wide - 1), ("total", count + wide))
    ]
    numbers = {"heads": heads, "kv_heads": kv_heads, "scale": 0.4, "softcap": softcap, "window": window}
    if packs:
        qkv = given("qkv", array(1, rows, (heads + 2 * kv_heads) * dim))
        places = given("places", np.arange(wide, dtype=np.int64)[None] * (rows > 1) + count + 3)
        angles = array(64, dim // 2)
        turning = [given("cos", np.cos(angles)), given("sin", np.sin(angles)), places]
        made = b.call(
            "AttendPacked",
            partial(packed, rows),
            qkv,
            *caches,
            *turning,
            outputs=3,
            interleaved=interleaved,
            **numbers,
        )
    else:
        own = [given(n, array(1, rows, h * dim)) for n, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))]
        made = b.call("Attend", partial(separate, rows), *own, *caches, outputs=3, **numbers)
    shapes = [(1, rows, heads * dim), *[(1, kv_heads, slots, dim)] * 2]
    body, found = functions.run(b, list(zip(made, shapes, strict=True)), feeds)
    assert np.abs(body[0] - found[0]).max() < 2e-5
    for one, other in zip(body[1:], found[1:], strict=True):
        assert np.abs(one - other)[:, :, : count + rows].max() < 1e-5


def test_help_and_flags() -> None:
    program = build.binary(print)
    run = lambda *flags: subprocess.run([program, *flags], capture_output=True, text=True)  # noqa: E731
    shown = run("--help").stdout
    assert all(op in shown for op in ("generate", "snapshot", "tune", "Exit codes"))
    for flags, message in (
        ((), "no bundle is named"),
        (("--bundle",), "--bundle needs a value"),
        (("--colour", "x"), "unknown flag --colour"),
        (("--bundle", "x", "--threads", "0"), "--threads must be 1 to 256"),
        (("--bundle", "/nowhere"), "/nowhere/manifest.json cannot be read"),
    ):
        done = run(*flags)
        assert done.returncode == 2
        assert f"error: {message}\nhint:" in done.stderr


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BackendError, match="no C\\+\\+ compiler and CMake found") as caught:
        build.binary(print)
    assert "apt install g++ cmake" in caught.value.hint
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_compiler_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "native"
    sources.mkdir()
    for path in build.NATIVE.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    (sources / "tune.cpp").write_text("#error no more\n")
    monkeypatch.setattr(build, "NATIVE", sources)
    with pytest.raises(BackendError, match=r"does not compile: .*no more"):
        build.build(tmp_path / "b", build.onnx_library())


def test_a_wheel_that_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wheel, _, inside = build.JSON_HEADER
    with pytest.raises(BackendError, match="is not the file that edgespec was tested with"):
        build.unpacked(wheel, "0" * 64, inside)
    assert not (tmp_path / "cache" / "edgespec" / ("headers-" + "0" * 16)).exists()
