"""The native runtime's operators in Python's ONNX Runtime: an engine that computes what the runtime computes,
bit for bit, and shares nothing else with it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnxruntime as ort

from edgespec.runtime import build

SOURCES = Path(__file__).parent.parent / "runtime" / "native"


@cache
def library() -> Path | None:
    """The operators, compiled once for these sources; None where this processor has no kernels."""
    home = build.cache() / f"operators-{build.key(build.onnx_library(), False, '')}"
    if not home.exists():
        with build.appearing(home) as made:
            build.build(made, build.onnx_library(), False, f"-DEDGESPEC_TESTS={SOURCES}", target="operators")
    found = home / "liboperators.so"
    try:
        ort.SessionOptions().register_custom_ops_library(str(found))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        return None
    return found


def opener(path: Path | bytes) -> ort.InferenceSession:
    """A graph (its file or bytes) as the native runtime opens it; for Engine's argument of that name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if found := library():
        options.register_custom_ops_library(str(found))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
