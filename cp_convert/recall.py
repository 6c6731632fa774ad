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
from collections.abc import Iterator, Mapping, Sequence
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
from .bundle.variants import all_variants, joined
from .cache.fingerprint import code_key
from .cache.store import ENGINE, Cache, key_of
from .errors import CannotLower
from .files import file_state, place, sha256
from .ir.identity import readable
from .ir.layout import Layout
from .ir.shares import Share, Shares
from .ir.source import Codes, Source
from .ir.tensors import numbers
from .job import AUTO, EXTERNAL_FROM, Job
from .mesh import GUIDANCE, TENSOR, Mesh

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
        known += [sorted(source.tp_plan.items()), sorted(source.attentions.items())]
        return key_of([*known, *_values(source)])
    except CannotLower:  # numbers that cannot be read
        return None


def job_key(job: Job, values: str | None, programs: Sequence[str | None]) -> str | None:
    """Of a whole conversion; ``None`` for one that gets no key.

    Args:
        job: what was asked for.
        values: see :func:`values_key`.
        programs: the keys of what was traced, variant by variant, with our own code and the
            versions below it.
    """
    if values is None or None in programs:
        return None
    hardware = read_hardware(job.hardware) if job.strategy == AUTO else None
    # The proof's reference is the model itself, called: its code counts beside its trace.
    reference = code_key() if job.proof != "none" else None
    return key_of([*programs, values, *_options(job), hardware, reference])


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
        own = source.codes[name].codes if name in source.codes else parameter
        yield name, _kind(parameter), where or _digest(own)
    for one in (source, *source.others):
        yield one.variant
        for path, leaf in pytree.tree_flatten_with_path(one.inputs)[0]:
            is_tensor = isinstance(leaf, Tensor)
            yield str(path), (_kind(leaf), _digest(leaf)) if is_tensor else (type(leaf), repr(leaf))


def _scales(source: Source) -> list[tuple[object, ...]]:
    """Of a quantized checkpoint, whose weights count as their files do."""
    return [(name, *map(_told, _parts(one))) for name, one in sorted(source.codes.items())]


def _parts(one: Codes) -> tuple[object, ...]:
    scales = one.weight_scale, one.input_scale, one.by_token, one.smooth, one.blocks
    return *scales, *(one.low_rank or ())


def _told(value: object) -> object:
    return _digest(value) if isinstance(value, Tensor) else value


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
    placing.share(_shares(known))
    views = [_recalled(one, placing) for one in all_variants(known)]
    for told, one in zip(all_variants(known), views, strict=True):
        if [_content(w) for w in one.weights] != [_content(w) for w in told.weights]:
            return None
    for name, engine in engines.items():
        _put(files[engine], folder / name)
    _take(entry, folder, known)
    return replace(
        joined(views),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_entry(job, source),
        command=job.command,
    )


def _recalled(known: m.Manifest, placing: Placing) -> m.Manifest:
    """A variant with its weights where they are now, proven when it was first converted."""
    weights = [w if _is_constant(w) else _found(placing, w) for w in known.weights]
    return replace(
        known,
        weights=weights,
        engines=[replace(engine, recalled=True) for engine in known.engines],
        proof=replace(known.proof, recalled=known.proof.status == "passed"),
    )


def _shares(known: m.Manifest) -> Shares:
    sizes = {name: known.axes.get(name, 1) for name in (GUIDANCE, TENSOR)}  # auto may have chosen
    axis = Mesh.of(known.world, **sizes).axis(TENSOR)
    told = () if known.tensor is None else known.tensor.weights
    return Shares({w.name: Share(w.dim, Layout.even(w.segments, axis.size)) for w in told}, axis)


def _found(placing: Placing, told: m.Weight) -> m.Weight:
    """Where the same weight, or the same ranks' part of it, is now."""
    found = map(weight_entry, placing.weights[told.name])
    return next((one for one in found if one.ranks == told.ranks), told)


def _is_constant(weight: m.Weight) -> bool:
    """Whether it is in a file that the conversion wrote beside the engines."""
    file = Path(weight.file)
    return file.name == CONSTANTS and not file.is_absolute()


def _put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    place(source, target)


def _content(weight: m.Weight) -> tuple[Any, ...]:
    return weight.name, weight.dtype, weight.shape, weight.sha256


def keep(
    cache: Cache,
    request: str,
    key: str | None,
    manifest: m.Manifest,
    keys: Mapping[str, str],
    bundle: Path,
) -> None:
    """Remember a finished conversion; its engines are in the cache already.

    Args:
        cache: where.
        request: see :func:`request_key`.
        key: see :func:`job_key`.
        manifest: of the conversion.
        keys: the engines' own keys by file.
        bundle: the folder that holds it.
    """
    if key is None:
        return
    with cache.store("bundles", key) as folder:
        (folder / _MANIFEST).write_bytes(m.encode(manifest))
        (folder / _ENGINES).write_bytes(msgspec.json.encode(dict(keys)))
        _take(bundle, folder, manifest)
    with cache.store("requests", request):
        pass  # that there is one is all there is to know


def _take(source: Path, target: Path, manifest: m.Manifest) -> None:
    """The bundle's own files besides engines and weights, from one folder into another."""
    for one in all_variants(manifest):
        names = {weight.file for weight in one.weights if _is_constant(weight)}
        if one.program is not None:
            names |= {one.program.document.file, one.program.tensors.file}
        for name in sorted(names):
            if not (target / name).exists():
                _put(source / name, target / name)
