"""An ExecuTorch program behind what `Engine` asks of a graph: run it on numpy arrays. For checks and tests;
the native runtime has its own (backend_executorch.cpp).

Knows ExecuTorch's Python runtime, which copies every output; nothing of caches.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgespec.errors import BackendError
from edgespec.files import discarded
from edgespec.spec import GraphSpec


class Method:
    """One graph of a program."""

    def __init__(self, graph: GraphSpec, method: Any, tensor: Callable[[np.ndarray], Any]) -> None:
        self.graph, self.method, self.tensor = graph, method, tensor

    def run(self, wanted: Sequence[str], given: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names, as onnxruntime.InferenceSession.run gives them."""
        inputs = [self.tensor(given[t.name]) for t in self.graph.inputs]
        made = self.method.execute(inputs)
        named = dict(zip((t.name for t in self.graph.outputs), made, strict=True))
        return [named[name].numpy() for name in wanted]

    def run_into(self, arrays: dict[str, np.ndarray]) -> None:
        """Run it on the arrays of its inputs' names, into those of its outputs'."""
        names = [t.name for t in self.graph.outputs]
        for name, made in zip(names, self.run(names, arrays), strict=True):
            np.copyto(arrays[name], made)


class Program:
    """A .pte file and the .ptd file with its weights, if any, opened; methods are loaded when asked for."""

    def __init__(self, path: Path, weights: Path | None, threads: int = 0) -> None:
        runtime, self.tensor, set_threads = library()
        try:
            with silent():
                if threads:
                    set_threads(threads)
                self.program = runtime.load_program(path, data_path=weights)
        except RuntimeError as error:
            raise unreadable(path, error) from error
        self.path = path

    def method(self, graph: GraphSpec) -> Method:
        """The method of a graph."""
        try:
            with silent():
                return Method(graph, self.program.load_method(graph.method), self.tensor)
        except (RuntimeError, KeyError) as error:
            raise unreadable(self.path, error) from error


def unreadable(path: Path, error: Exception) -> BackendError:
    """What to say of a program that ExecuTorch refuses."""
    first = str(error).strip().splitlines()[0]
    return BackendError(f"ExecuTorch cannot open {path.name}: {first}", "export the bundle again")


@cache
def library() -> tuple[Any, Callable[[np.ndarray], Any], Callable[[int], None]]:
    """ExecuTorch's Python runtime, what makes a tensor over an array, and what sets the runtime's threads;
    BackendError without them.
    """
    try:
        import torch

        with silent():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime

            return Runtime.get(), torch.from_numpy, portable_lib._unsafe_reset_threadpool
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the bundle is an ExecuTorch program, and {error.name} is not installed",
            "pip install 'edgespec[executorch]'",
        ) from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """ExecuTorch's library writes to the process's own stderr what it reads of the processor, and its errors,
    which it also raises.
    """
    sys.stderr.flush()
    with discarded(2):
        yield
