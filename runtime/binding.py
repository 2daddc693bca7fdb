"""A step's graphs on fixed arrays, run one after the other: what one part gives is what the next takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from edgespec.spec import GraphSpec

NUMPY = {"float32": np.float32, "int32": np.int32, "int8": np.int8}
LAYERED = {
    "new_keys": 0,
    "new_values": 0,
    "new_queries": 1,
}  # the axis of layers, of which a part has its own


@dataclass(frozen=True)
class Bound:
    """A step's graphs on their arrays: what all of them are given or hand on, by name, and each one's own."""

    given: dict[str, np.ndarray]
    runs: list[Callable[[], None]]
    parts: list[dict[str, np.ndarray]]

    def run(self) -> dict[str, np.ndarray]:
        """Run the parts in order; what the last one gives, and the new rows and queries of all layers."""
        for run in self.runs:
            run()
        layered = {name: axis for name, axis in LAYERED.items() if name in self.parts[0]}
        return self.parts[-1] | {
            name: np.concatenate([own[name] for own in self.parts], axis) for name, axis in layered.items()
        }


def bound_to(
    arrays: dict[str, np.ndarray], graphs: Sequence[GraphSpec], session_of: Callable[[GraphSpec], Any]
) -> Bound:
    """A step's graphs on these arrays (caches, by the names of inputs) and fresh ones for all other names.

    A name means one array in all parts, but for what each gives of its own layers; an updated cache is the
    cache's own array.
    """
    made = Bound(dict(arrays), [], [])
    for graph in graphs:
        own: dict[str, np.ndarray] = {}
        for tensor in (*graph.inputs, *graph.outputs):
            name, fresh = tensor.name, lambda t=tensor: np.zeros(t.shape, NUMPY[t.dtype])  # type: ignore[misc]
            if name in LAYERED:
                own[name] = fresh()
            else:
                cache = made.given.get(name.removeprefix("new_"))
                own[name] = made.given.setdefault(name, fresh() if cache is None else cache)
        session = session_of(graph)
        run = partial(session.run_into, own) if graph.method else bound_run(session, graph, own)
        made.runs.append(run)
        made.parts.append(own)
    return made


def bound_run(
    session: ort.InferenceSession, graph: GraphSpec, arrays: dict[str, np.ndarray]
) -> Callable[[], None]:
    """What runs a session on the arrays' own memory."""
    binding = session.io_binding()
    for tensors, bind in ((graph.inputs, binding.bind_input), (graph.outputs, binding.bind_output)):
        for name in (tensor.name for tensor in tensors):
            array = arrays[name]
            bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
    return partial(session.run_with_iobinding, binding)
