"""torch.onnx.export as the exporters use it: quiet, and with its table of operators made once a process.

torch makes that table anew for every graph, and onnxscript reads the source of each operator for it: 0.9 s,
half the time of a small graph.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

OPSET = 23
_kept: dict[int, dict[Any, list[Any]]] = {}  # an opset's operators, as torch makes them


def to_onnx(model: Any, examples: tuple[Any, ...] = (), **more: Any) -> ir.Model:
    """The graph of a module with these example inputs, or of an exported program; raises what torch
    raises. `more`: torch.onnx.export's own.
    """
    for name in ("onnxscript", "torch.onnx"):  # or every graph comes with lines about torchvision
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), operators_kept():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(model, examples, dynamo=True, opset_version=OPSET, verbose=False, **more)
    assert made is not None
    return made.model


@contextmanager
def operators_kept() -> Iterator[None]:
    """While it lasts, torch's table is a copy of the one that it made first."""
    makes = ONNXRegistry.__dict__["from_torchlib"]

    def from_torchlib(kind: type[ONNXRegistry], opset_version: int) -> ONNXRegistry:
        if opset_version not in _kept:
            _kept[opset_version] = makes.__func__(kind, opset_version).functions
        registry = kind()
        registry._opset_version = opset_version
        registry.functions = {target: list(made) for target, made in _kept[opset_version].items()}
        return registry

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = makes  # type: ignore[method-assign]
