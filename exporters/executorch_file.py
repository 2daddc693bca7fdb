"""Methods -> one .pte file, and the arrays that they share -> one .ptd file; what a .pte says of its methods.

Knows ExecuTorch's ahead-of-time compiler and nothing of models.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.extension.pybindings.portable_lib import _load_program
from torch import nn

from edgespec.errors import BackendError

TYPES = {3: "int32", 6: "float32"}
STORED = "b_table_"  # how ExecuTorch names the placeholder of a buffer that goes into the weights file


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the compiler's notes on what it is going to deprecate."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().setLevel(level)


def write(
    methods: Mapping[str, tuple[nn.Module, tuple[Any, ...]]],
    folder: Path,
    name: str,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Write `name.pte` with a method for each module (and example inputs), and `name.ptd` with their arrays.

    Inputs and outputs get no memory of their own: the caller binds its buffers. `tick` is called a method.
    """
    with quiet(), torch.no_grad():
        traced = {}
        for method, (module, given) in methods.items():
            traced[method] = torch.export.export(module.eval(), given, strict=False)
            tick()
        edge = to_edge(traced, compile_config=EdgeCompileConfig(_check_ir_validity=False))
        made = edge.to_executorch(backend_config(lambda node: name if node.name.startswith(STORED) else None))
        with (folder / f"{name}.pte").open("wb") as file:
            made.write_to_file(file)
        made.write_tensor_data_to_file(str(folder))


def write_delegated(module: nn.Module, given: tuple[Any, ...], method: str, folder: Path, name: str) -> None:
    """Write a module as the one method of `name.pte`, what XNNPACK knows of it delegated by ExecuTorch's own
    partitioner with its weights inside, and `name.ptd` with the rest's.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    except ModuleNotFoundError as error:
        what = f"an image encoder in an ExecuTorch program needs {error.name}, which is not installed"
        raise BackendError(what, "pip install 'edgespec[executorch]', or use --format onnx") from error

    with quiet(), torch.no_grad():
        traced = torch.export.export(module.eval(), given, strict=False)
        config = EdgeCompileConfig(_check_ir_validity=False)
        edge = to_edge_transform_and_lower(
            {method: traced}, partitioner=[XnnpackPartitioner()], compile_config=config
        )
        made = edge.to_executorch(backend_config(lambda node: name))
        with (folder / f"{name}.pte").open("wb") as file:
            made.write_to_file(file)
        made.write_tensor_data_to_file(str(folder))


def backend_config(outside: Callable[[Any], str | None]) -> ExecutorchBackendConfig:
    """Buffers of inputs and outputs are the caller's; `outside` names the file that a constant goes into."""
    planned = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    return ExecutorchBackendConfig(memory_planning_pass=planned, external_constants=outside)


Tensors = list[tuple[str, tuple[int, ...]]]


def tensors(file: Path, weights: Path) -> dict[str, tuple[Tensors, Tensors]]:
    """Type and shape of every input and output of a program's methods; RuntimeError where it is none."""
    program = _load_program(str(file), data_path=str(weights))
    found = {}
    for i in range(program.num_methods()):
        name = program.get_method_name(i)
        meta = program.method_meta(name)
        given = [meta.input_tensor_meta(k) for k in range(meta.num_inputs())]
        made = [meta.output_tensor_meta(k) for k in range(meta.num_outputs())]
        found[name] = (
            [(TYPES.get(t.dtype(), "?"), tuple(t.sizes())) for t in given],
            [(TYPES.get(t.dtype(), "?"), tuple(t.sizes())) for t in made],
        )
    return found
