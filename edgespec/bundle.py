"""The bundle's directory format: how one is written, opened and trusted. Knows no tensors, no graph's inside.

    demo.bundle/
      manifest.json      typed, versioned, written last (edgespec.spec.Manifest)
      ...                every other file, each listed in the manifest with its size and SHA-256

A bundle comes from anywhere, so nothing in it is believed. A path is plain ASCII, relative and stays inside;
links, special files and files that the manifest does not list are refused (a graph could load an unlisted
file, which no checksum covers); sizes and, by default, checksums are compared before a caller sees a path.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgespec import bundle_rules
from edgespec.bundle_files import (
    MANIFEST,
    REMAKE,
    check_folder,
    check_hashes,
    check_paths,
    digest,
    open_regular,
    regular_size,
)
from edgespec.errors import BackendError, BundleError, InputError
from edgespec.plain import from_json, to_json
from edgespec.spec import CompiledEntry, GraphSpec, Manifest, ModelEntry

SCHEMA = 8
LARGEST_MANIFEST = 16 * 2**20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, and a manifest that has been checked."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where a listed file lies."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} lists no file {name!r}", REMAKE)
        return self.path / name

    def model(self, name: str) -> ModelEntry:
        """The entry of `target` or `draft`."""
        for model in self.manifest.models:
            if model.name == name:
                return model
        raise BundleError(f"{self.path} holds no {name}", f"export it with --{name}")

    def has(self, name: str) -> bool:
        """True if the bundle holds this model."""
        return any(model.name == name for model in self.manifest.models)

    def compiled(self, soc: str) -> CompiledEntry:
        """The graphs as compiled for a SoC; BundleError where they are compiled for others or for none."""
        for entry in self.manifest.compiled:
            if entry.soc == soc:
                return entry
        others = ", ".join(entry.soc for entry in self.manifest.compiled)
        what = f"is compiled for {others}, not for {soc}" if others else "is compiled for no SoC"
        raise BundleError(f"{self.path} {what}", f"export it again with --device npu --soc {soc}")

    def graphs(self, model: str, kind: str, bucket: int | None = None) -> tuple[GraphSpec, ...]:
        """A model's graphs of one kind, narrowest first; `bucket` None means the largest cache."""
        entry = self.model(model)
        wanted = entry.cache.budget if bucket is None else bucket
        found = [g for g in entry.graphs if g.kind == kind and g.bucket == wanted]
        return tuple(sorted(found, key=lambda g: g.width))

    def graph(self, model: str, kind: str, width: int | None = None, bucket: int | None = None) -> GraphSpec:
        """The one graph of a kind, width and bucket; `width` None means the only (or narrowest) one."""
        for graph in self.graphs(model, kind, bucket):
            if width in (None, graph.width):
                return graph
        wanted = f"{kind} graph" + (f" of width {width}" if width else "")
        where = f" for bucket {bucket}" if bucket else ""
        raise BundleError(f"{self.path}: the {model} has no {wanted}{where}", REMAKE)


def open_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """The bundle in this folder, checked; with `verify` every file is hashed. Any fault is a BundleError."""
    folder = Path(path)
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}", f"make one: edgespec export TARGET -o {folder}")
    try:
        manifest = parse(_read_manifest(folder), folder)
        check_folder(folder, manifest)
        if verify:
            check_hashes(folder, manifest)
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error}", "check the folder's permissions") from error
    return Bundle(folder, manifest)


def parse(text: bytes, folder: Path) -> Manifest:
    """The manifest in these bytes, typed and checked for sense; `folder` only names it in errors."""
    where = folder / MANIFEST
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise BundleError(f"{where} is nested too deeply", REMAKE) from None
    except ValueError as error:
        raise BundleError(f"{where} is not JSON: {str(error)[:100]}", REMAKE) from None
    version = data.get("schema") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA:
        hint = "upgrade edgespec, or export the bundle again"
        raise BundleError(
            f"{where} was made by a newer edgespec (schema {str(version)[:20]} > {SCHEMA})", hint
        )
    if type(version) is int and version < SCHEMA:
        raise BundleError(f"{where} has the unknown schema {str(version)[:20]}", REMAKE)
    manifest = from_json(Manifest, data)
    check_paths(manifest)
    bundle_rules.check(manifest)
    return manifest


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        size = regular_size(path)
    except FileNotFoundError:
        hint = "use a folder that `edgespec export` made; an interrupted export leaves none"
        raise BundleError(f"{folder} has no {MANIFEST}", hint) from None
    if size > LARGEST_MANIFEST:
        raise BundleError(f"{path} is larger than 16 MiB", REMAKE)
    with open_regular(path) as file:
        return file.read(LARGEST_MANIFEST + 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


class Staging:
    """A bundle being made: write its files under `path`, then `finish` with a manifest (`files` empty)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = None

    def finish(self, manifest: Manifest) -> None:
        """Say what the files are; sizes, checksums and the final name come when the `with` block ends."""
        self.manifest = manifest


@contextmanager
def creating(path: Path | str, force: bool = False) -> Iterator[Staging]:
    """Make a bundle that appears at `path` whole, by one rename, or not at all.

    The block fills a hidden folder beside `path`. Whatever leaves the block early (Ctrl-C too) removes it,
    and a run that was killed has its folder removed by the next one. With `force` an existing bundle is
    replaced, once the new one is complete; anything else that exists is an InputError.
    """
    output = Path(os.path.abspath(path))
    check_output(output, force)
    remove_stale(output)
    folder, lock = _lock_new_folder(output)
    try:
        staging = Staging(folder)
        yield staging
        if staging.manifest is None:
            raise RuntimeError("a bundle was left without its manifest")
        _seal(folder, staging.manifest)
        _publish(folder, output, force)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def check_output(path: Path, force: bool) -> None:
    """Nothing, or an InputError saying why a bundle cannot be made at this path."""
    parent = path.parent
    if not parent.is_dir():
        raise InputError(f"{parent}, where the bundle should go, is not a folder", f"mkdir -p {parent}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not writable", "choose another output with -o")
    if not os.path.lexists(path):
        return
    if not force:
        raise InputError(f"{path} exists", "choose another output with -o, or replace it with --force")
    if path.is_symlink() or not (path / MANIFEST).is_file():
        raise InputError(
            f"{path} exists and is no bundle, so --force leaves it", "choose another output with -o"
        )


def require_space(path: Path | str, bytes_needed: int) -> None:
    """Nothing, or a BackendError with both numbers where the disk that holds `path` has less room."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if bytes_needed > free:
        need = f"{bytes_needed / 2**20:,.0f} MiB needed, {free / 2**20:,.0f} MiB free"
        raise BackendError(
            f"not enough disk at {place}: {need}", "free some space, or choose another disk with -o"
        )


def remove_stale(output: Path) -> None:
    """Clear what killed runs of this output left; a bundle set aside comes back if its place is free.

    A living run holds a lock on its folder, which the system drops when the run dies.
    """
    for folder in sorted(output.parent.glob(f".{glob.escape(output.name)}.edgespec-*")):
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.name.endswith("-old") and not output.exists():
                folder.rename(output)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass
        finally:
            os.close(lock)


def _lock_new_folder(output: Path) -> tuple[Path, int]:
    while True:
        folder = output.with_name(f".{output.name}.edgespec-{os.urandom(4).hex()}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network file systems have no locks: then nobody clears up after a kill
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.is_dir():  # another run may have cleared it before it was locked
            return folder, lock
        os.close(lock)


def _seal(folder: Path, manifest: Manifest) -> None:
    """Hash every file, then write the manifest, last; refuse here what `open_bundle` would refuse later."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            files[path.relative_to(folder).as_posix()] = digest(path)
            _sync(path)
    complete = replace(manifest, schema=SCHEMA, files=files)
    text = json.dumps(to_json(complete), indent=1).encode()
    parse(text, folder)
    (folder / MANIFEST).write_bytes(text + b"\n")
    check_folder(folder, complete)
    for place in (folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        _sync(place)


def _publish(folder: Path, output: Path, force: bool) -> None:
    old = folder.with_name(folder.name + "-old")
    if force and output.exists():
        check_output(output, force)
        output.rename(old)
    try:
        folder.rename(output)
    except OSError as error:
        if old.exists():
            old.rename(output)
        raise InputError(
            f"{output} appeared meanwhile ({error.strerror})", "choose another output with -o"
        ) from None
    _sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)
