"""The operator sets are data: readable, with a reason each, and what the design says of them."""

from __future__ import annotations

import pytest

from edgespec.errors import InputError
from edgespec.profiles import devices, operators, reasons, refused

MICROSOFT = "com.microsoft"


def test_every_device_has_a_list() -> None:
    assert devices() == ("cpu", "npu")


@pytest.mark.parametrize("device", devices())
def test_every_operator_has_a_reason_and_is_not_refused(device: str) -> None:
    assert set(reasons(device)) == operators(device)
    assert not operators(device) & set(refused(device))
    for text in (reasons(device) | refused(device)).values():
        assert text.strip()


def test_a_cpu_takes_what_an_npu_takes_and_more() -> None:
    assert operators("npu") < operators("cpu")
    assert {(MICROSOFT, "GroupQueryAttention"), ("", "MatMulInteger")} <= operators("cpu") - operators("npu")


def test_the_npu_list_is_the_designs() -> None:
    named = "MatMul Softmax Where Concat Gather RMSNormalization RotaryEmbedding TopK GatherElements"
    assert {("", op) for op in named.split()} | {(MICROSOFT, "MatMulNBits")} <= operators("npu")
    for op in (("", "MatMulInteger"), (MICROSOFT, "GroupQueryAttention")):
        assert op in refused("npu") and op not in operators("npu")


def test_a_kernel_that_shares_a_scale_between_rows_is_never_taken() -> None:
    assert (MICROSOFT, "DynamicQuantizeMatMul") not in operators("cpu")


def test_a_device_without_a_list_is_refused() -> None:
    with pytest.raises(InputError, match="no operators are listed for device 'toaster'") as refusal:
        operators("toaster")
    assert refusal.value.hint == "use cpu or npu"


def test_the_standard_operators_exist() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    for domain, op in operators("cpu") | set(refused("npu")):
        if domain == "" and op != "Swish":  # Swish came after our opset
            assert onnx.defs.has(op, 23, domain), op
