"""Forms: a graph multiplies with what was stored, and a row's bits do not depend on the rows beside it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from edgespec.errors import InputError
from edgespec.exporters.build import Builder
from edgespec.exporters.forms import FORMS, Encoded
from edgespec.exporters.gguf_weights import Grid
from edgespec.exporters.grids import nearest_grid, nearest_steps
from edgespec.exporters.weights import Weights

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
WIDTHS = (1, 2, 3, 4, 5, 8, 16, 33)
# relative to |x|·|w|: what int8 activations (per row, or per block of 32) may cost
TOLERANCE = {"int4": 4e-3, "int8": 4e-3, "fp16": 1e-6, "fp32": 1e-6, "w8a16": 1e-6, "w4a16": 1e-6}


def session(
    b: Builder, name: str, value: ir.Value, dims: tuple[int, ...], threads: int = 1
) -> onnxruntime.InferenceSession:
    """The graph of one value."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # as our engines do for codes
    model = ir.to_proto(b.model("g", {name: (value, FLOAT, dims)})).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def parts_of(b: Builder, form, encoded: Encoded, n: int, k: int) -> dict[str, ir.Value]:
    """The stored arrays as initializers."""
    made = {}
    for part, (kind, shape) in form.parts(n, k).items():
        array = encoded.arrays[part]
        if kind == "int4":
            pairs = np.stack([array & 15, array >> 4], -1).reshape(-1)[: np.prod(shape)].reshape(shape)
            array = pairs.astype(ml_dtypes.int4)
        made[part] = b.initializer(ir.tensor(array, name=part))
    return made


def multiply(form, encoded: Encoded, x: np.ndarray, n: int, threads: int = 1) -> np.ndarray:
    """The form's product of x [rows,k] in a graph of just that width."""
    b, (rows, k) = Builder(), x.shape
    made = form.linear(b, b.input("x", FLOAT, (1, rows, k)), parts_of(b, form, encoded, n, k), rows, n, k)
    return session(b, "y", made, (1, rows, n), threads).run(None, {"x": x[None]})[0][0]


def look_up(form, encoded: Encoded, ids: np.ndarray, n: int, k: int) -> np.ndarray:
    """The form's rows of these ids."""
    b = Builder()
    made = form.embed(
        b, b.input("ids", INT64, (1, len(ids))), parts_of(b, form, encoded, n, k), len(ids), n, k
    )
    return session(b, "e", made, (1, len(ids), k)).run(None, {"ids": ids[None]})[0][0]


def sample(n: int, k: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and activations with outliers such as real ones have."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k)) * np.exp(rng.standard_normal(k))
    x[:, 3] *= 20
    return (rng.standard_normal((n, k)) * 0.05).astype(np.float32), x.astype(np.float32)


@pytest.fixture(params=sorted(FORMS))
def form(request):
    return FORMS[request.param]


def skip_part_blocks(form, k: int) -> None:
    if form.name == "w4a16" and k % 32:
        with pytest.raises(InputError, match=f"in blocks of 32 inputs, and a layer has {k}"):
            form.parts(96, k)
        pytest.skip("w4a16 has whole blocks only")


def skip_tables(form) -> None:
    if not hasattr(form, "embed"):
        pytest.skip(f"{form.name} stores no table that is looked up")


@pytest.mark.parametrize("k", [64, 576, 80])
def test_product_is_that_of_the_stored_weight(form, k):
    skip_part_blocks(form, k)
    weight, x = sample(96, k, 5)
    encoded = form.encode(weight, None)
    exact = x.astype(np.float64) @ form.decode(encoded, k).astype(np.float64).T
    size = np.abs(x).max(1, keepdims=True) * np.abs(weight).sum(1)
    assert np.abs((multiply(form, encoded, x, 96) - exact) / size).max() < TOLERANCE[form.name]


def test_parts_say_what_encode_gives(form):
    encoded = form.encode(sample(96, 64, 1)[0], None)
    given = form.parts(96, 64)
    packed = {p for p, (kind, _) in given.items() if kind == "int4"}  # two codes a byte
    assert {p: (a.dtype.name, a.shape) for p, a in encoded.arrays.items() if p not in packed} == {
        p: what for p, what in given.items() if p not in packed
    }
    for part in packed:
        assert encoded.arrays[part].dtype == np.uint8
        assert 2 * encoded.arrays[part].size == np.prod(given[part][1])


@pytest.mark.parametrize("shape", [(96, 64), (200, 576), (576, 1536), (50, 80)])
def test_a_row_has_the_same_bits_at_every_width(form, shape):
    n, k = shape
    skip_part_blocks(form, k)
    weight, x = sample(n, k, max(WIDTHS))
    encoded = form.encode(weight, None)
    whole = multiply(form, encoded, x, n)
    for threads in (1, 2):
        for rows in WIDTHS:
            assert np.array_equal(multiply(form, encoded, x[:rows], n, threads), whole[:rows]), (
                threads,
                rows,
            )
            assert np.array_equal(multiply(form, encoded, x[-rows:], n, threads), whole[-rows:]), (
                threads,
                rows,
            )


@pytest.mark.parametrize("k", [64, 80])
def test_a_looked_up_row_is_a_row_of_the_stored_weight(form, k):
    skip_tables(form)
    encoded = form.encode(sample(96, k, 1)[0], None)
    ids = np.array([0, 95, 7, 7, 32])
    assert np.array_equal(look_up(form, encoded, ids, 96, k), form.decode(encoded, k)[ids])


def test_weights_stacked_before_encoding_give_the_bits_of_each_alone(form):
    (first, x), (second, _) = sample(96, 64, 5), sample(32, 64, 5, seed=1)
    together = multiply(form, form.encode(np.concatenate([first, second]), None), x, 128)
    apart = [multiply(form, form.encode(w, None), x, len(w)) for w in (first, second)]
    assert np.array_equal(together, np.concatenate(apart, 1))


def test_a_file_grid_is_kept_exactly():
    rng = np.random.default_rng(0)
    grid = Grid(
        rng.integers(0, 16, (48, 64), dtype=np.uint8),
        (rng.random((48, 2)) * 0.01).astype(np.float16).astype(np.float32),
        (-rng.random((48, 2)) * 0.1).astype(np.float16).astype(np.float32),
    )
    weight = grid.codes * np.repeat(grid.scale, 32, 1) + np.repeat(grid.low, 32, 1)
    form = FORMS["int4"]
    stored = form.decode(form.encode(weight, grid), 64)
    assert (
        np.abs(stored - weight).max() < 1e-7
    )  # min/max rounding would move every block that lacks code 0 or 15
    assert np.abs(form.decode(form.encode(weight, None), 64) - weight).max() > 1e-4


def test_the_nearest_steps_are_within_half_a_blocks_scale():
    weight, _ = sample(16, 64, 1)
    weight[3, 32:] *= 1e-3  # far below a step of its output
    codes, steps, size = nearest_steps(weight)
    assert np.abs(codes).max() <= 7 and steps.min() == 1 and steps.max() == 15
    scale = np.repeat(steps * size[:, None], 32, 1)
    assert (np.abs(codes * scale - weight) <= scale / 2 + 1e-7).all()


def test_whole_steps_that_gptq_chose_are_kept_exactly():
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 16, (48, 2))
    steps[:, 0] = 15
    scale = (steps * (rng.random((48, 1)) * 1e-3 + 1e-4)).astype(np.float32)
    grid = Grid(rng.integers(0, 16, (48, 64), dtype=np.uint8), scale, -8 * scale)
    weight = (grid.codes.astype(np.float32) - 8) * np.repeat(scale, 32, 1)
    form = FORMS["w4a16"]
    assert np.abs(form.decode(form.encode(weight, grid), 64) - weight).max() < 1e-8


def test_the_nearest_grid_is_within_half_a_step():
    weight, _ = sample(16, 64, 1)
    codes, scale, low = nearest_grid(weight)
    step = np.repeat(scale, 32, 1)
    assert (np.abs(codes * step + np.repeat(low, 32, 1) - weight) <= step / 2 + 1e-7).all()


def test_extreme_codes_do_not_saturate():
    """On AVX2, int8 weights beside uint8 activations lose sums of products beyond 16 bits; ours do not."""
    weight = np.full((8, 64), 0.5, np.float32)
    x = np.full((2, 64), 3.0, np.float32)
    x[:, 0] = 0.0
    form = FORMS["int8"]
    assert np.allclose(multiply(form, form.encode(weight, None), x, 8), 63 * 1.5, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.5, -2.0])
def test_constant_rows_and_zero_weights(form, value):
    weight = np.zeros((8, 64), np.float32)
    weight[0] = 0.25
    y = multiply(form, form.encode(weight, None), np.full((2, 64), value, np.float32), 8)
    assert np.allclose(y[:, 0], 16 * value, rtol=1e-2) and not y[:, 1:].any()


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(InputError, match="does not fit fp16"):
        FORMS["fp16"].encode(np.full((2, 2), 1e5, np.float32), None)


def test_one_stored_table_serves_head_and_embedding(form, tmp_path: Path):
    """A tied table is in the weights file once, and both uses read it."""
    skip_tables(form)
    weight, x = sample(96, 64, 2)
    weights, b = Weights("w.data", tmp_path), Builder()
    make = lambda: form.encode(weight, None).arrays  # noqa: E731
    parts = [weights.parts(b, ("table", form.name), form.parts(96, 64), make) for _ in range(2)]
    e = form.embed(b, b.input("ids", INT64, (1, 2)), parts[0], 2, 96, 64)
    y = form.linear(b, b.input("x", FLOAT, (1, 2, 64)), parts[1], 2, 96, 64)
    ir.save(b.model("g", {"e": (e, FLOAT, (1, 2, 64)), "y": (y, FLOAT, (1, 2, 96))}), tmp_path / "g.onnx")
    weights.write()
    encoded = form.encode(weight, None)
    assert weights.size <= sum(a.nbytes for a in encoded.arrays.values()) + 128
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    run = onnxruntime.InferenceSession(tmp_path / "g.onnx", options, providers=["CPUExecutionProvider"]).run
    got_e, got_y = run(None, {"ids": np.array([[5, 9]]), "x": x[None]})
    assert np.array_equal(got_e[0], form.decode(encoded, 64)[[5, 9]])
    assert np.array_equal(got_y[0], multiply(form, encoded, x, 96))
