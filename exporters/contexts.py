"""Compiles a bundle's graphs for a SoC while the bundle is made: a context binary a model, and the log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from edgespec.errors import InputError
from edgespec.exporters import qualcomm
from edgespec.soc import SOCS
from edgespec.spec import CompiledEntry, Manifest


def compiled(folder: Path, whole: Manifest, name: str, advance: Any) -> CompiledEntry:
    """Compile every graph that lies in `folder` for the SoC of this name, into `folder/name`.

    InputError with the refused nodes where a graph is not taken whole.
    """
    soc, place = SOCS[name], folder / name
    place.mkdir()
    total, done = sum(map(len, whole.parts.values())), 0
    stored = f"linears {whole.models[0].precision['linear']}"
    log = [
        f"compiler {qualcomm.COMPILER}",
        f"soc {soc.name}: HTP architecture {soc.htp_arch}, number {soc.soc_model}; {stored}, weights shared",
    ]
    for part, graphs in whole.parts.items():
        for i, graph in enumerate(graphs):
            start = time.monotonic()
            try:
                nodes = qualcomm.compile_into(
                    place / part, folder / graph.file, soc, i == 0, i == len(graphs) - 1
                )
            except Exception as error:  # whatever the compiler raises
                why = qualcomm.refused_nodes(folder / graph.file, soc) or qualcomm.first_line(error)
                raise InputError(
                    f"{graph.file} does not compile for {soc.name}: {why}",
                    "leave --soc out, and see edgespec check --npu qualcomm",
                ) from error
            log.append(f"{graph.file}: {nodes} nodes, all on the NPU, {time.monotonic() - start:.2f} s")
            done += 1
            advance(done, total)
    (place / "compile.log").write_text("\n".join(log) + "\n", encoding="utf-8")
    return CompiledEntry(
        soc.name,
        qualcomm.COMPILER,
        f"{name}/compile.log",
        {part: f"{name}/{part}_qnn.bin" for part in whole.parts},
        {graph.file: f"{name}/{graph.file}" for graphs in whole.parts.values() for graph in graphs},
    )
