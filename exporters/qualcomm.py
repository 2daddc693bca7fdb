"""Qualcomm's compiler and its emulator, behind ONNX Runtime: the one file that knows the package
onnxruntime-qnn.

CPU fallback is disabled in every session: a graph is compiled whole, or it is refused with the nodes that
the compiler does not take.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime as ort
import onnxruntime_qnn
from onnx import TensorProto, helper

from edgespec.errors import BackendError
from edgespec.files import discarded
from edgespec.soc import Soc

PROVIDER = "QNNExecutionProvider"
WHOLE = {"session.disable_cpu_ep_fallback": "1"}
SAID = 3  # modules named of those that hold a refused operator
COMPILER = f"onnxruntime-qnn {version('onnxruntime-qnn')} (onnxruntime {ort.__version__})"


@dataclass(frozen=True)
class Outcome:
    """What the compiler made of a graph: the nodes it took, or why it refused the graph."""

    nodes: int
    refusal: str = ""


def outcome(graph: Path, soc: Soc) -> Outcome:
    """Compile a graph for a SoC, and forget the result."""
    try:
        session = opened(graph, soc)
    except Exception as error:  # whatever the compiler raises is the finding
        return Outcome(0, refused_nodes(graph, soc) or first_line(error))
    return Outcome(len(list(nodes_of(session, PROVIDER))))


def opened(graph: Path, soc: Soc) -> ort.InferenceSession:
    """A graph compiled whole for a SoC, on its emulator; raises what ONNX Runtime raises."""
    return session_of(graph, soc, WHOLE)


def refused_nodes(graph: Path, soc: Soc) -> str:
    """The operators that the compiler leaves to the CPU, and the modules that they stand in; '' for none."""
    try:
        session = session_of(graph, soc, {})
    except Exception:  # not even with the CPU's help
        return ""
    places: dict[str, Counter[str]] = {}
    for node in nodes_of(session, "CPUExecutionProvider"):
        kind = f"{node.domain}.{node.op_type}".lstrip(".")
        places.setdefault(kind, Counter())[node.name.rpartition("/")[0] or node.name or "(no name)"] += 1
    return "; ".join(f"{kind} {described(where)}" for kind, where in places.items())


def described(where: Counter[str]) -> str:
    """`at layers.0.mlp, layers.1.mlp, and 28 more`."""
    more = f", and {len(where) - SAID} more" if len(where) > SAID else ""
    return f"at {', '.join(list(where)[:SAID])}{more}"


def compile_into(context: Path, graph: Path, soc: Soc, first: bool, last: bool) -> int:
    """Add a graph to a context binary, `<context>_qnn.bin`, in which equal weights are stored once; the
    number of its nodes.

    Beside the binary a small ONNX file of the graph's own name opens the graph from there. From the first
    to the last nothing else may be compiled. Raises what ONNX Runtime raises.
    """
    opener = (
        context.with_suffix(".onnx") if first else context.parent / graph.name
    )  # the first names the binary
    try:
        session = sharing(graph, opener, soc, last)
    except Exception:
        give_up(soc)
        raise
    opener.rename(context.parent / graph.name)
    return len(list(nodes_of(session, PROVIDER)))


def sharing(graph: Path, opener: Path, soc: Soc, last: bool) -> ort.InferenceSession:
    """A session that adds its graph to the context binary that the process has begun, or begins one."""
    settings = {
        "ep.context_enable": "1",
        "ep.context_embed_mode": "0",
        "ep.context_file_path": str(opener),
        "ep.share_ep_contexts": "1",
        "ep.stop_share_ep_contexts": str(int(last)),
    }
    return session_of(graph, soc, WHOLE | settings, enable_htp_weight_sharing="1")


def give_up(soc: Soc) -> None:
    """End a context binary that lacks its last graph, for the next one would get its graphs and its name.

    The provider remembers an unfinished binary as long as the process lives and has no call that forgets it,
    so a graph of one operation is compiled as its last, into a folder that goes away.
    """
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 8)) for name in "xy"]
    made = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "last", ends[:1], ends[1:])
    with TemporaryDirectory() as folder:
        graph = Path(folder, "last.onnx")
        onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), graph)
        sharing(graph, Path(folder, "unfinished.onnx"), soc, True)


def stated(opener: Path) -> tuple[int, int, tuple[str, ...]]:
    """What a compiled graph's ONNX file says: HTP architecture, number of the SoC, its context binaries.

    0 and 0 where it does not say; raises what onnx raises where it cannot be read.
    """
    model = onnx.load(str(opener), load_external_data=False)
    notes = {p.key: p.value for p in model.metadata_props}
    fields = notes.get(f"ep_compatibility_info.{PROVIDER}", "").split(":")[4:6]
    arch, number = map(int, fields) if len(fields) == 2 and all(f.isdigit() for f in fields) else (0, 0)
    held = (a for node in model.graph.node for a in node.attribute if a.name == "ep_cache_context")
    return arch, number, tuple(a.s.decode("utf-8", "replace") for a in held)


def session_of(graph: Path, soc: Soc, settings: dict[str, str], **options: str) -> ort.InferenceSession:
    """A session on the emulated SoC that remembers who took which node."""
    session = ort.SessionOptions()
    session.log_severity_level = 4
    session.intra_op_num_threads = 1  # the SoC computes; the CPU's threads would only wait, and spin
    for key, value in {"session.record_ep_graph_assignment_info": "1", **settings}.items():
        session.add_session_config_entry(key, value)
    chip = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "htp_arch": str(soc.htp_arch),
        "soc_model": str(soc.soc_model),
        "enable_htp_fp16_precision": "1",
    }
    with discarded(1):  # the compiler's libraries print to standard output, which is the result's
        session.add_provider_for_devices([device()], chip | options)
        return ort.InferenceSession(graph, session)


def nodes_of(session: ort.InferenceSession, provider: str) -> Iterator[Any]:
    """The nodes that a provider took."""
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == provider:
            yield from part.get_nodes()


@functools.cache
def device() -> Any:
    """The NPU that the package emulates; BackendError where it cannot be loaded."""
    try:
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        return next(d for d in ort.get_ep_devices() if d.ep_name == PROVIDER)
    except Exception as error:
        raise BackendError(
            f"Qualcomm's compiler cannot be loaded: {first_line(error)}",
            "it exists for Linux x86-64, with the onnxruntime that scripts/constraints.txt names",
        ) from error


def first_line(error: Exception) -> str:
    """An error's own words, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
