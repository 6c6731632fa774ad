"""Weights outside the engines: where every weight that is an engine's input finds its numbers.

A weight that stands in the user's safetensors file in the type that is computed with is left there;
any other is written once, in one pass, into ``weights.safetensors`` of the bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Final

from torch import Tensor

from ..cache.store import Cache, key_of
from ..errors import ProofFailed, WeightsError
from ..ir.source import Source
from ..ir.tensors import Location, Weight, is_finite, numbers, save, weight_of
from ..job import Job
from .folder import WEIGHTS

_PIECE: Final = 1 << 27
"""Numbers that are checked and hashed at once: between two pieces the thread waits its turn."""


class Placing:
    """:func:`place` on a thread of its own: large files are read while the model is traced.

    Leaving the ``with`` block ends it, finished or not.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        located: Mapping[str, Location],
        folder: Path,
        *,
        copy: bool,
        cache: Cache,
    ) -> None:
        self._stop = Event()
        self._files = {at.file: at for name, at in located.items() if name in parameters}
        self._pool = ThreadPoolExecutor(1)
        # The numbers as they are now: the proof lends the module others for a while (prove.wide).
        held = {id(one): one.detach() for one in parameters.values()}
        now = {name: held[id(one)] for name, one in parameters.items()}
        self._found = self._pool.submit(
            place, now, located, folder, self._stop, copy=copy, cache=cache
        )

    @contextmanager
    def to_blame(self) -> Iterator[None]:
        """Where a proof fails, a weight that is not finite, or a changed file, says why."""
        try:
            yield
        except ProofFailed:
            self._found.result()
            raise

    @property
    def weights(self) -> dict[str, Weight]:
        """Every parameter's place, by name; waits until all are found.

        Raises:
            WeightsError: one is not finite, or its file is not the one that was read.
        """
        found = self._found.result()
        for at in self._files.values():
            at.check_unchanged()
        return found

    def __enter__(self) -> Placing:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()


def place(
    parameters: Mapping[str, Tensor],
    located: Mapping[str, Location],
    folder: Path,
    stop: Event,
    *,
    copy: bool,
    cache: Cache,
) -> dict[str, Weight]:
    """Find every parameter in the user's files, or write it into ``folder``.

    Args:
        parameters: by name.
        located: where the user's files hold them.
        folder: the bundle.
        stop: ends the work early; what is returned then is incomplete.
        copy: write all of them, so that the bundle needs no other file.
        cache: knows the digests of files that are as they were.
    """
    own = to_write(parameters, located, copy=copy)
    left = {name: located[name] for name in parameters if name not in own}
    weights: dict[str, Weight] = {}
    by_file: dict[Path, dict[str, Location]] = {}
    for name, at in left.items():
        by_file.setdefault(at.file.resolve(), {})[name] = at
    for file, places in sorted(by_file.items()):
        digests = _digests(parameters, places, stop, cache)
        if stop.is_set():
            return {}
        for name, at in places.items():
            weights[name] = weight_of(name, parameters[name], str(file), at.offset, digests[name])
    if own:
        for name, (offset, digest) in save(own, folder / WEIGHTS, stop).items():
            weights[name] = weight_of(name, own[name], WEIGHTS, offset, digest)
    return weights


def _digests(
    parameters: Mapping[str, Tensor], places: Mapping[str, Location], stop: Event, cache: Cache
) -> dict[str, str]:
    """SHA-256 of the very numbers that the proof computes with, all in one file.

    They are the file's: mapped, or copied, from there, and the file is as it was when its header
    was read. They are read anew unless those of the same file were read, and found finite, before.
    """
    at = next(iter(places.values()))
    at.check_unchanged()
    ranges = sorted({(at.offset, at.size) for at in places.values()})
    key = key_of(("finite", *at.state, ranges))
    entry = cache.find("digests", key)
    if entry is not None:
        told: dict[str, str] = json.loads((entry / "sha256.json").read_bytes())
        return {name: told[_range(at)] for name, at in places.items()}
    found: dict[str, str] = {}
    # In the order in which the file holds them: disks read that fastest.
    for name, at in sorted(places.items(), key=lambda item: item[1].offset):
        if stop.is_set():
            return {}
        if _range(at) not in found:
            found[_range(at)] = _digest(name, parameters[name].detach(), at)
    at.check_unchanged()
    with cache.store("digests", key) as folder:
        (folder / "sha256.json").write_text(json.dumps(found))
    return {name: found[_range(at)] for name, at in places.items()}


def _range(at: Location) -> str:
    return f"{at.offset}+{at.size}"


def _digest(name: str, tensor: Tensor, at: Location) -> str:
    """Checked and hashed piece by piece: what comes from a disk is read from it once."""
    digest = hashlib.sha256()
    for piece in tensor.reshape(-1).split(_PIECE):
        if not is_finite(piece):
            raise WeightsError(
                f"{name} holds NaN or infinity in {at.file.name}.",
                where=str(at.file),
                hint="the checkpoint is broken, or was saved in a type too small for it.",
            )
        digest.update(numbers(piece))
    return digest.hexdigest()


def bytes_needed(job: Job, source: Source) -> int:
    """Bytes that weights take in the bundle, at most."""
    if not source.external:
        return job.world * source.bytes * (1 + len(source.others))
    own = to_write(source.parameters_outside, source.located, copy=job.copy_weights)
    return sum(tensor.nbytes for tensor in own.values())


def to_write(
    parameters: Mapping[str, Tensor], located: Mapping[str, Location], *, copy: bool
) -> dict[str, Tensor]:
    """Those that stand in no file of the user's in the type that they are computed in."""
    return {
        name: tensor
        for name, tensor in parameters.items()
        if copy or name not in located or located[name].dtype != tensor.dtype
    }
