"""The same job again: its manifest and engines from the cache, before TensorRT is imported.

A finished conversion leaves its manifest under a key of everything that decides a byte of the
engines or a number of the proof: the program that was traced (made anew, never looked up), the
values of parameters and inputs, every option, the code of the model that the proof calls, and the
versions. What is found was proven with these very values by this very code, so the proof is not
repeated, and the manifest says so (``proof.recalled``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from torch import Tensor
from torch.utils import _pytree as pytree

from .advise.hardware import read as read_hardware
from .bundle import manifest as m
from .bundle.describe import model_entry, weight_entry
from .bundle.external import Placing
from .bundle.folder import CONSTANTS
from .cache.fingerprint import code_key
from .cache.store import ENGINE, Cache, key_of
from .errors import CannotLower
from .files import file_state, place, sha256
from .ir.identity import readable
from .ir.layout import Layout
from .ir.shares import Share, Shares
from .ir.source import Source
from .ir.tensors import numbers
from .job import AUTO, EXTERNAL_FROM, Job
from .mesh import TENSOR

_MANIFEST: Final = "manifest.json"
_ENGINES: Final = "engines.json"
_NO_DIFFERENCE: Final = frozenset(
    {
        "model",
        "out",
        "hardware",
        "weights",
        "force",
        "cache",
        "jobs",
        "memory",
        "command",
        "calibration",
    }
)
"""Options that decide nothing, or are in the key by what they name."""


def request_key(job: Job, tool: str) -> str:
    """Of what was asked for, whatever the model file makes of it: says that recalling may pay."""
    return key_of([tool, str(job.model.resolve()), *_options(job)])


def values_key(job: Job, source: Source) -> str | None:
    """Of a loaded model's numbers, before anything is computed with them (or changes them).

    Parameters that lie in files count as these files' state (path, size, times); others by their
    numbers, unless that would take long: no key then, and none for ranks with numbers of their own.
    """
    elsewhere = [p for name, p in _parameters(source).items() if name not in source.located]
    if source.peers or sum(p.nbytes for p in elsewhere) > EXTERNAL_FROM:
        return None
    try:
        known = [sorted(source.freeze), source.external, source.sha256, _scales(source)]
        return key_of([*known, *_values(source)])
    except CannotLower:  # numbers that cannot be read
        return None


def job_key(job: Job, values: str | None, program: str | None) -> str | None:
    """Of a whole conversion; ``None`` for one that gets no key.

    Args:
        job: what was asked for.
        values: see :func:`values_key`.
        program: the key of what was traced, with our own code and the versions below it.
    """
    if values is None or program is None:
        return None
    hardware = read_hardware(job.hardware) if job.strategy == AUTO else None
    # The proof's reference is the model itself, called: its code counts beside its trace.
    reference = code_key() if job.proof != "none" else None
    return key_of([program, values, *_options(job), hardware, reference])


def _options(job: Job) -> list[tuple[str, Any]]:
    """All that decide something; a new one counts until it is said that it does not."""
    names = (field.name for field in fields(job) if field.name not in _NO_DIFFERENCE)
    told = [(name, getattr(job, name)) for name in sorted(names)]
    return [*told, ("calibration", [sha256(file) for file in job.calibration])]


def _parameters(source: Source) -> dict[str, Tensor]:
    return dict(source.module.named_parameters(remove_duplicate=False))


def _values(source: Source) -> Iterator[object]:
    files = {at.file for at in source.located.values()}
    states = {file: file_state(file.resolve()) for file in files}
    for name, parameter in sorted(_parameters(source).items()):
        at = source.located.get(name)
        where = None if at is None else (states[at.file], at.offset, at.size, str(at.dtype))
        yield name, _kind(parameter), where or _digest(parameter)
    for path, leaf in pytree.tree_flatten_with_path(source.inputs)[0]:
        is_tensor = isinstance(leaf, Tensor)
        yield str(path), (_kind(leaf), _digest(leaf)) if is_tensor else (type(leaf), repr(leaf))


def _scales(source: Source) -> list[tuple[object, ...]]:
    """Of a quantized checkpoint, whose weights count as their files do."""
    return [(n, one.weight_scale, one.input_scale) for n, one in sorted(source.codes.items())]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return str(tensor.dtype), tuple(tensor.shape)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(numbers(readable(tensor))).hexdigest()


def recall(
    cache: Cache, key: str | None, job: Job, source: Source, placing: Placing, folder: Path
) -> m.Manifest | None:
    """The manifest of an equal conversion, its engines put into ``folder``; or ``None``.

    Args:
        cache: where to look.
        key: see :func:`job_key`.
        job: this conversion's.
        source: its model.
        placing: finds the external weights; what it finds must be what was converted then.
        folder: where the bundle is put together.
    """
    entry = None if key is None else cache.find("bundles", key)
    if entry is None:
        return None
    known = m.decode((entry / _MANIFEST).read_bytes())
    engines: dict[str, str] = json.loads((entry / _ENGINES).read_bytes())
    files: dict[str, Path] = {}
    for engine in set(engines.values()):
        found = cache.find("engines", engine)
        if found is None:
            return None
        files[engine] = found / ENGINE
    placing.share(_shares(known, job))
    weights = [w if w.file == CONSTANTS else _found(placing, w) for w in known.weights]
    if [_content(w) for w in weights] != [_content(w) for w in known.weights]:
        return None
    for name, engine in engines.items():
        place(files[engine], folder / name)
    _take(entry, folder, known)
    return replace(
        known,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_entry(job, source),
        weights=weights,
        engines=[replace(engine, recalled=True) for engine in known.engines],
        proof=replace(known.proof, recalled=known.proof.status == "passed"),
        command=job.command,
    )


def _shares(known: m.Manifest, job: Job) -> Shares:
    axis, told = job.mesh.axis(TENSOR), () if known.tensor is None else known.tensor.weights
    return Shares({w.name: Share(w.dim, Layout.even(w.segments, axis.size)) for w in told}, axis)


def _found(placing: Placing, told: m.Weight) -> m.Weight:
    """Where the same weight, or the same ranks' part of it, is now."""
    found = map(weight_entry, placing.weights[told.name])
    return next((one for one in found if one.ranks == told.ranks), told)


def _content(weight: m.Weight) -> tuple[Any, ...]:
    return weight.name, weight.dtype, weight.shape, weight.sha256


def keep(
    cache: Cache,
    request: str,
    key: str | None,
    manifest: m.Manifest,
    keys: Mapping[int, str],
    bundle: Path,
) -> None:
    """Remember a finished conversion; its engines are in the cache already.

    Args:
        cache: where.
        request: see :func:`request_key`.
        key: see :func:`job_key`.
        manifest: of the conversion.
        keys: the engines' own keys by rank; ranks that are not named share rank 0's.
        bundle: the folder that holds it.
    """
    if key is None:
        return
    engines = {engine.file: keys.get(engine.rank, keys[0]) for engine in manifest.engines}
    with cache.store("bundles", key) as folder:
        (folder / _MANIFEST).write_bytes(m.encode(manifest))
        (folder / _ENGINES).write_bytes(msgspec.json.encode(engines))
        _take(bundle, folder, manifest)
    with cache.store("requests", request):
        pass  # that there is one is all there is to know


def _take(source: Path, target: Path, manifest: m.Manifest) -> None:
    """The bundle's own files besides engines and weights, from one folder into another."""
    names = [CONSTANTS] if (source / CONSTANTS).is_file() else []
    if manifest.program is not None:
        names += [manifest.program.document.file, manifest.program.tensors.file]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        place(source / name, target / name)
