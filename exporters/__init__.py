"""PyTorch -> graphs: the only place that imports torch and transformers. `export` makes a bundle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgespec.bundle import Bundle
from edgespec.config import ExportConfig
from edgespec.errors import BackendError
from edgespec.spec import CODED, CompiledEntry, Manifest, VisionEntry

# Where executorch brought torchao, Transformers imports it, and it speaks of libraries for GPUs.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)


def export(config: ExportConfig, progress: Any, engine: Any, render: Any = None) -> Bundle:
    """Export a target (and a draft) as one bundle that appears whole or not at all.

    `engine` runs a model's graphs (edgespec.runtime.engine.Engine) for the width test that ends every export.
    `render` fills a chat template: spans of coded activations are then those of chats, too.
    """
    from edgespec.bundle import creating, open_bundle
    from edgespec.exporters.assemble import manifest, save_tokenizer
    from edgespec.exporters.calibrate import needed
    from edgespec.exporters.plan import calibrated, plan, with_spans
    from edgespec.exporters.widths import marked

    export_model = exporter(config.format)
    with progress.stage("checkpoints"):
        jobs = plan(config)
    with creating(config.output, config.force) as staging:
        # First of all: the images that are chosen by may turn out unreadable
        vision = (encoder_for(config, jobs, staging.path, progress),) if jobs[0].reads_images else ()
        entries, target = [], None
        for job in jobs:
            linear = job.precision["linear"]
            if linear == "w4a16" or (linear == "int4" and needed(job.checkpoint)):
                with progress.stage(f"{job.name}: calibration") as advance:
                    job = calibrated(config, job, advance)
            if linear in CODED:
                with progress.stage(f"{job.name}: spans") as advance:
                    job = with_spans(config, job, render, advance)
            entry, source = export_model(job, staging.path, progress, target)
            target = target or source
            with progress.stage(f"{job.name}: widths agree?"):
                entries.append(marked(entry, engine(staging.path, entry)))
        tokenizer = save_tokenizer(jobs[0].checkpoint.tokenizer, staging.path)
        whole = manifest(config, entries, tokenizer, jobs, vision)
        staging.finish(replace(whole, compiled=contexts_for(config.soc, staging.path, whole, progress)))
    return open_bundle(config.output, verify=False)


def exporter(form: str) -> Any:
    """What writes a model's graphs in a format; BackendError where the packages for it are not installed."""
    if form == "onnx":
        from edgespec.exporters.assemble import export_model

        return export_model
    try:
        from edgespec.exporters.assemble_executorch import export_program
    except ModuleNotFoundError as error:
        raise BackendError(
            f"format executorch needs {error.name}, which is not installed",
            "pip install 'edgespec[executorch]', or use --format onnx",
        ) from error
    return export_program


def encoder_for(config: ExportConfig, jobs: Sequence[Any], folder: Path, progress: Any) -> VisionEntry:
    """The target's image encoder in the folder; needs the extra vision."""
    try:
        from edgespec.exporters.assemble_vision import export_images
    except ModuleNotFoundError as error:
        raise BackendError(
            f"a model that reads images needs {error.name}, which is not installed",
            "pip install 'edgespec[vision]'",
        ) from error
    adapter = jobs[-1].checkpoint.adapter
    return export_images(config, jobs[0].checkpoint, adapter, folder, progress)


def contexts_for(
    socs: tuple[str, ...], folder: Path, whole: Manifest, progress: Any
) -> tuple[CompiledEntry, ...]:
    """The graphs in the folder compiled for each SoC; needs the extra qnn where there are any."""
    if not socs:
        return ()
    from edgespec.exporters.contexts import compiled

    made = []
    for soc in socs:
        with progress.stage(f"compiling for {soc}") as advance:
            made.append(compiled(folder, whole, soc, advance))
    return tuple(made)
