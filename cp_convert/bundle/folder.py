"""Writing, reading and checking a bundle. No torch, no tensorrt.

A bundle is a folder with ``manifest.json`` and ``rank{r}.engine`` files. It is put together in a
hidden sibling folder and renamed into place when it is whole, so that a crash at any moment
leaves either no bundle or a whole one.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from ..errors import DamagedBundle, OutputError
from ..files import sha256, sweep, sync_folder
from ..version import __version__
from . import manifest as manifests
from .lock import alone
from .manifest import Manifest
from .parts import kind_problem, numbers_of_kinds
from .variants import all_variants

MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "weights.safetensors"
"""External weights that stand in no file of the user's."""
PART: Final = "weights.tp{}.safetensors"
"""Those of which ranks share every one, by their place on the axis ``tp``."""
PROGRAM: Final = "program"
"""The folder of the program, which is run where no TensorRT is."""
LORA: Final = "lora"
"""The folder of LoRA sets."""
CONSTANTS: Final = "constants.safetensors"
"""What forward computes from external weights alone."""
_CHUNK: Final = 1 << 28
_ANOTHER: Final = "choose another --out"
WRITABLE: Final = "make the bundle's folder writable"


@dataclass(frozen=True)
class Check:
    """One thing that ``verify`` looked at.

    Attributes:
        subject: what was checked, such as ``rank0.engine``.
        problem: what is wrong with it, or ``None``.
    """

    subject: str
    problem: str | None


def engine_name(rank: int) -> str:
    """The file name of a rank's engine."""
    return f"rank{rank}.engine"


def piece_folder(piece: int | None) -> str:
    """The folder of a piece's engines, ending in a slash; none: that of the bundle."""
    return "" if piece is None else f"piece{piece}/"


def check_target(out: Path, *, force: bool) -> None:
    """Refuse, before any work is done, a target that could not be written in the end.

    Raises:
        OutputError: ``out`` exists and may not be replaced, or its parent cannot be written.
    """
    if out.exists() or out.is_symlink():
        if not out.is_dir():
            raise OutputError(f"{out} exists and is not a folder.", hint="choose another --out.")
        holds_bundle = (out / MANIFEST).is_file()
        if any(out.iterdir()) and not holds_bundle:
            raise OutputError(
                f"{out} exists and holds something other than a bundle; it is not replaced.",
                hint="choose another --out, or empty the folder yourself.",
            )
        if holds_bundle and not force:
            raise OutputError(
                f"{out} already holds a bundle.",
                hint="--force replaces it; --out writes elsewhere.",
            )
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} is not writable.", hint="choose another --out.")


def check_space(out: Path, needed: int) -> None:
    """Refuse when ``needed`` bytes do not fit on the target's file system.

    Raises:
        OutputError: not enough free space.
    """
    parent = _existing_parent(out)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{parent} has {free / 1e9:.1f} GB free; the engines need about {needed / 1e9:.1f} GB.",
            hint="choose another --out, a smaller --world, or free some space.",
        )


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder in which to put the bundle together; :func:`publish` moves it to ``out``.

    Whatever is left in the folder when the block ends is removed. No other conversion writes to
    ``out`` meanwhile.

    Raises:
        OutputError: the disk is full, the folder cannot be written, or another conversion does.
    """
    out = out.absolute()
    prefix = f".{out.name}.partial-"
    with ExitStack() as held:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(out))
            sweep(out.parent, prefix)
            folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=out.parent))
        except OSError as error:
            raise output_error(error, out.parent) from error
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            yield folder
        except OSError as error:
            raise output_error(error, out) from error


def output_error(error: OSError, path: Path, otherwise: str = _ANOTHER) -> OutputError:
    """What the system refused, in words.

    Args:
        error: the system's.
        path: where, unless the system says it.
        otherwise: what to do where space is not what lacks.
    """
    hints = {
        errno.ENOSPC: f"the disk is full: free some space, or {otherwise}.",
        errno.EDQUOT: f"your quota is used up: free some space, or {otherwise}.",
    }
    return OutputError(
        f"{error.filename or path}: {error.strerror or error}. Nothing was left behind.",
        hint=hints.get(error.errno or 0, f"{otherwise}."),
    )


def publish(folder: Path, out: Path, manifest: Manifest, *, force: bool) -> None:
    """Write the manifest into ``folder`` and move the whole to ``out``.

    An existing bundle at ``out`` is moved aside first and deleted last.

    Raises:
        OutputError: see :func:`check_target`; it came while the bundle was being made.
    """
    out = out.absolute()
    check_target(out, force=force)
    path = folder / MANIFEST
    with path.open("wb") as file:
        file.write(manifests.encode(manifest))
        file.flush()
        os.fsync(file.fileno())
    folder.chmod(0o755)
    sync_folder(folder)
    if not out.exists():
        folder.rename(out)
    else:
        old = folder.with_name(folder.name + "-old")
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(out.parent)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write into, which takes its place when the block ends well.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield beside
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise output_error(error, path) from error


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Put another manifest into a bundle that is there, whole or not at all.

    What it names must be there already. The caller holds the bundle's lock (:mod:`.lock`).

    Raises:
        OutputError: the folder cannot be written.
    """
    beside = folder / f".{MANIFEST}.partial-{os.getpid()}"
    try:
        with beside.open("wb") as file:
            file.write(manifests.encode(manifest))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(folder / MANIFEST)
        sync_folder(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise output_error(error, folder, WRITABLE) from error


def read(path: Path) -> tuple[Manifest, Path]:
    """The manifest of the bundle at ``path`` (its folder or its manifest), and the folder.

    Raises:
        DamagedBundle: there is no manifest, it does not follow the schema, or it is of another.
    """
    file = path / MANIFEST if path.is_dir() else path
    try:
        data = file.read_bytes()
        _check_schema(data, file)
        return manifests.decode(data), file.parent
    except OSError as error:
        raise DamagedBundle(
            f"{file} cannot be read: {error.strerror}.",
            hint="name a folder that cp-convert wrote, or the manifest.json inside it.",
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedBundle(f"{file} is not a valid manifest: {error}") from error


class _Origin(msgspec.Struct):
    """What every schema so far has had: who wrote it, and by which."""

    schema_version: int
    tool: manifests.Tool


def _check_schema(data: bytes, file: Path) -> None:
    try:
        told = msgspec.json.decode(data, type=_Origin)
    except msgspec.ValidationError:
        return  # no manifest at all; the strict decoder says how
    ours, theirs = manifests.SCHEMA_VERSION, told.schema_version
    if theirs == ours:
        return
    wrote = told.tool.version
    raise DamagedBundle(
        f"{file} follows schema {theirs}, and cp-convert {__version__} reads schema {ours}.",
        hint=f"cp-convert {wrote} wrote it and reads it; "
        + ("install that or a later one." if theirs > ours else "or convert the model again."),
    )


def verify(path: Path) -> Iterator[Check]:
    """Check every file of the bundle against its manifest, one :class:`Check` each.

    Raises:
        DamagedBundle: the manifest itself cannot be read.
    """
    manifest, folder = read(path)
    yield Check(MANIFEST, None)
    views = all_variants(manifest)
    for one in views:
        yield from _variant_checks(one, folder)
    for lora in manifest.lora:
        for own in (lora.file, lora.factors):
            yield Check(own.file, file_problem(folder / own.file, own))
    weights = list({(w.file, w.name): w for one in views for w in one.weights}.values())
    for file in sorted({weight.file for weight in weights}):
        held = [weight for weight in weights if weight.file == file]
        yield Check(file, _weights_problem(folder / file, held))


def _variant_checks(manifest: Manifest, folder: Path) -> Iterator[Check]:
    ranks = [engine.rank for engine in manifest.engines]
    numbers = numbers_of_kinds(manifest)
    expected = list(range(manifest.world)) * len(numbers)
    problem = None if ranks == expected else f"lists ranks {ranks}, expected {expected}"
    pieces = [engine.piece for engine in manifest.engines]
    if problem is None and pieces != [number for number in numbers for _ in range(manifest.world)]:
        problem = f"lists engines of pieces {pieces}, expected those of {numbers}"
    name = manifest.request.variant
    of = "" if name is None else f" of {name}"
    yield Check(f"ranks{of}", problem)
    if any(piece.kind is not None for piece in manifest.pieces):
        yield Check(f"pieces{of}", kind_problem(manifest))
    for engine in manifest.engines:
        yield Check(engine.file, file_problem(folder / engine.file, engine))
    if manifest.program is not None:
        for own in (manifest.program.document, manifest.program.tensors):
            yield Check(own.file, file_problem(folder / own.file, own))


def file_problem(
    path: Path, told: manifests.Engine | manifests.BundleFile, *, digest: bool = True
) -> str | None:
    """What is wrong with a file of the bundle, if anything; its ``digest`` takes reading it."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size != told.bytes:
        return f"{size} bytes, expected {told.bytes}"
    if digest and sha256(path) != told.sha256:
        return "SHA-256 differs from the manifest's"
    return None


def _weights_problem(path: Path, weights: Sequence[manifests.Weight]) -> str | None:
    """What is wrong with the numbers that the manifest finds in a file of weights."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    absent = [w.name for w in weights if size < w.offset + w.bytes]
    if absent:
        return f"ends before {absent[0]}"
    other = [w.name for w in weights if sha256(path, w.offset, w.bytes) != w.sha256]
    if other:
        return f"SHA-256 of {len(other)} weights differs from the manifest's: {other[0]} first"
    return None
