"""A bundle's files on a disk: which paths are safe, which files may be there, and their checksums.

Nothing is opened before it is known to be a regular file, and no link is ever followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import struct
from io import BufferedReader
from pathlib import Path

from edgespec.errors import BundleError
from edgespec.spec import FileEntry, Manifest

MANIFEST = "manifest.json"
REMAKE = "export the bundle again"
_AS_MADE = "use a bundle as `edgespec export` made it"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def check_paths(manifest: Manifest) -> None:
    """Every path is safe and listed once, whatever the file system thinks of upper case."""
    seen: set[str] = set()
    for name in manifest.files:
        if len(name) > 300 or not all(_PART.fullmatch(part) for part in name.split("/")):
            raise BundleError(f"manifest.files: {name[:60]!a} is not a safe relative path", REMAKE)
        if name.lower() in seen or name.lower() == MANIFEST:
            raise BundleError(f"manifest.files: {name!r} is listed twice", REMAKE)
        seen.add(name.lower())
    named = [manifest.tokenizer.tokenizer]
    if manifest.tokenizer.chat_template:
        named.append(manifest.tokenizer.chat_template)
    for model in manifest.models:
        named += [model.weights, *(graph.file for graph in model.graphs)]
        named += [model.head_ids] if model.head_ids else []
    for vision in manifest.vision:
        named += [vision.weights, vision.graph.file, *([vision.selectors] if vision.selectors else [])]
        if not any(name.startswith(f"{vision.processor}/") for name in manifest.files):
            raise BundleError(f"{vision.processor[:60]!a}, the images' processor, has no files", REMAKE)
    for compiled in manifest.compiled:
        named += [compiled.log, *compiled.contexts.values(), *compiled.graphs.values()]
    for name in named:
        if name not in manifest.files:
            raise BundleError(f"manifest names {name[:60]!a}, which manifest.files lacks", REMAKE)


def check_folder(folder: Path, manifest: Manifest) -> None:
    """The folder holds the listed files, regular and of the listed size, and nothing else."""
    listed = {*manifest.files, MANIFEST}
    folders = {str(parent) for name in manifest.files for parent in Path(name).parents}
    for name in sorted(listed):
        for parent in list(Path(name).parents)[:-1]:
            if (folder / parent).is_symlink():
                raise BundleError(f"{folder / parent} is a symbolic link", _AS_MADE)
    for name, entry in manifest.files.items():
        try:
            size = regular_size(folder / name)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{folder / name} is missing", REMAKE) from None
        if size != entry.bytes:
            raise BundleError(
                f"{folder / name} has {size} bytes, not {entry.bytes}", f"{REMAKE}, or copy it again"
            )
    check_head_ids(folder, manifest)
    for root, inside, files in os.walk(folder):
        place = Path(root).relative_to(folder)
        for extra in sorted(
            {n for n in files if str(place / n) not in listed}
            | {n for n in inside if str(place / n) not in folders}
        ):
            raise BundleError(f"{str(Path(root) / extra)!a} is not part of the bundle", "remove it")


def check_head_ids(folder: Path, manifest: Manifest) -> None:
    """A trimmed head has one token id of the vocabulary for each row."""
    for model in manifest.models:
        if not model.head_ids:
            continue
        path = folder / model.head_ids
        if manifest.files[model.head_ids].bytes != 4 * model.head_rows:
            raise BundleError(f"{path} does not hold {model.head_rows} ids of 4 bytes", REMAKE)
        with open_regular(path) as file:
            ids = struct.unpack(f"<{model.head_rows}i", file.read(4 * model.head_rows))
        if ids and not 0 <= min(ids) <= max(ids) < model.spec.vocab:
            raise BundleError(f"{path} holds an id outside the vocabulary of {model.spec.vocab}", REMAKE)


def check_hashes(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        if digest(folder / name).sha256 != entry.sha256:
            raise BundleError(f"{folder / name} does not match its checksum", f"{REMAKE}, or copy it again")


def digest(path: Path) -> FileEntry:
    """A regular file's size and SHA-256."""
    with open_regular(path) as file:
        hashed = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(hashed, file.tell())


def regular_size(path: Path) -> int:
    """The size of a regular file; a link, pipe, device or folder is refused without opening it."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise BundleError(f"{path} is {kind}", _AS_MADE)
    return found.st_size


def open_regular(path: Path) -> BufferedReader:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BundleError(f"{path} is a symbolic link", _AS_MADE) from None
        raise
