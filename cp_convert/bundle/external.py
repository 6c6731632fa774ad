"""Weights outside the engines: where every weight that is an engine's input finds its numbers.

A weight that stands in the user's safetensors file in the type that is computed with is left there;
any other is written once, in one pass, into ``weights.safetensors`` of the bundle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Final

from torch import Tensor

from ..cache.store import Cache, key_of
from ..errors import ProofFailed, WeightsError
from ..ir.shares import Shares
from ..ir.source import Source
from ..ir.tensors import Location, Weight, is_finite, numbers, save, weight_of
from ..job import Job
from ..mesh import Axis
from .folder import PART, WEIGHTS, check_space

Placed = Mapping[str, tuple[Weight, ...]]
"""By a parameter's name, where it is, or where its parts are."""
NOTHING: Final = Shares({}, Axis("tp", ((0,),)))
_PIECE: Final = 1 << 27
"""Numbers that are checked and hashed at once: between two pieces the thread waits its turn."""
_PART: Final = 1 << 23
"""Numbers of a shared weight that are copied at once, checked, hashed and written."""


class Placing:
    """:func:`place` on a thread of its own: large files are read while the model is traced.

    Where ranks share weights it begins later, by :meth:`share`, with what each of them needs.
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
        waits: bool = False,
    ) -> None:
        """``waits``: nothing is read before it is told what ranks share."""
        self._stop, self._folder, self._given = Event(), folder, (parameters, located)
        self._files = {at.file: at for name, at in located.items() if name in parameters}
        self._pool = ThreadPoolExecutor(1)
        # The numbers as they are now: the proof lends the module others for a while (prove.wide).
        held = {id(one): one.detach() for one in parameters.values()}
        now = {name: held[id(one)] for name, one in parameters.items()}
        self._begin = partial(place, now, located, folder, self._stop, copy=copy, cache=cache)
        self._found: Future[Placed] | None = None if waits else self._pool.submit(self._begin)

    def share(self, shares: Shares) -> None:
        """Begin, if it waits; each rank's part of what is shared is found or written by itself.

        Raises:
            OutputError: what has to be written does not fit on the disk.
        """
        if self._found is not None:
            return
        outside = {n: share for n, share in shares.of.items() if n in self._given[0]}
        shares = replace(shares, of=outside)
        check_space(self._folder, bytes_of_parts(*self._given, shares))
        self._found = self._pool.submit(self._begin, shares=shares)

    @contextmanager
    def to_blame(self) -> Iterator[None]:
        """Where a proof fails, a weight that is not finite, or a changed file, says why."""
        try:
            yield
        except ProofFailed:
            if self._found is not None:
                self._found.result()
            raise

    @property
    def weights(self) -> Placed:
        """Every parameter's place, by name; waits until all are found.

        One that ranks share has as many places as parts.

        Raises:
            WeightsError: one is not finite, or its file is not the one that was read.
        """
        assert self._found is not None, "nobody said what ranks share"
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
    shares: Shares = NOTHING,
) -> Placed:
    """Find every parameter in the user's files, or write it into ``folder``.

    Args:
        parameters: by name.
        located: where the user's files hold them.
        folder: the bundle.
        stop: ends the work early; what is returned then is incomplete.
        copy: write all of them, so that the bundle needs no other file.
        cache: knows the digests of files that are as they were.
        shares: which parameters ranks share. A part that is one range of a user's file is left
            there; others are written, a file for the ranks of each place on the axis.
    """
    whole = {name: one for name, one in parameters.items() if name not in shares.of}
    files = _Files(folder, stop, copy, cache)
    found: dict[str, tuple[Weight, ...]] = {
        name: (weight,) for name, weight in files.place(whole, located, WEIGHTS).items()
    }
    if not shares.of:
        return found
    # Together, because every part of a matrix in pieces reads the whole of it.
    with ThreadPoolExecutor(shares.axis.size) as pool:
        for own in pool.map(
            lambda member: _place_parts(parameters, located, files, shares, member),
            range(shares.axis.size),
        ):
            for name, weight in own.items():
                found[name] = (*found.get(name, ()), weight)
    return found


def _place_parts(
    parameters: Mapping[str, Tensor],
    located: Mapping[str, Location],
    files: _Files,
    shares: Shares,
    member: int,
) -> dict[str, Weight]:
    """What the ranks at the place ``member`` of the axis read of the parameters that they share."""
    parts, left = {}, {}
    for name, share in shares.of.items():
        whole = parameters[name]
        place = share.place(tuple(whole.shape), member)
        parts[name] = described = whole.new_zeros(()).expand(share.shape(tuple(whole.shape)))
        if place is not None:
            parts[name] = share.of(whole, member)  # one range: a view
            if name in located and located[name].dtype == whole.dtype:
                left[name] = _within(located[name], described, place[0])

    def made(name: str) -> Iterator[Tensor]:
        for part in shares.of[name].pieces(parameters[name].detach(), member, _PART):
            own = part.contiguous()
            if not is_finite(own):
                raise WeightsError(
                    f"{name} holds NaN or infinity.", hint="the checkpoint is broken."
                )
            yield own

    found = files.place(parts, left, PART.format(member), made)
    return {name: replace(one, ranks=shares.ranks(member)) for name, one in found.items()}


def _within(at: Location, part: Tensor, first: int) -> Location:
    """Where a part lies that begins with the number ``first`` of the whole."""
    begin = at.offset + first * part.itemsize
    return replace(at, offset=begin, size=part.nbytes, shape=tuple(part.shape))


def bytes_of_parts(
    parameters: Mapping[str, Tensor], located: Mapping[str, Location], shares: Shares
) -> int:
    """Bytes that shared weights take in the bundle: every part once, if no file has it."""
    return sum(
        parameters[name].nbytes
        for name, share in shares.of.items()
        if name not in located
        or located[name].dtype != parameters[name].dtype
        or share.place(tuple(parameters[name].shape), 0) is None
    )


@dataclass(frozen=True)
class _Files:
    """The bundle's folder, and how weights are found or put there."""

    folder: Path
    stop: Event
    copy: bool
    cache: Cache

    def place(
        self,
        parameters: Mapping[str, Tensor],
        located: Mapping[str, Location],
        target: str,
        made: Callable[[str], Iterable[Tensor]] | None = None,
    ) -> dict[str, Weight]:
        """Every parameter's place: in the user's file, or in ``target`` of the bundle."""
        own = to_write(parameters, located, copy=self.copy)
        weights: dict[str, Weight] = {}
        by_file: dict[Path, dict[str, Location]] = {}
        for name in (name for name in parameters if name not in own):
            by_file.setdefault(located[name].file.resolve(), {})[name] = located[name]
        for file, places in sorted(by_file.items()):
            digests = _digests(parameters, places, self.stop, self.cache)
            if self.stop.is_set():
                return {}
            for name, at in places.items():
                weights[name] = weight_of(
                    name, parameters[name], str(file), at.offset, digests[name]
                )
        if own:
            written = save(own, self.folder / target, self.stop, made=made)
            for name, (offset, digest) in written.items():
                weights[name] = weight_of(name, own[name], target, offset, digest)
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
        variants = 1 if job.dynamic is not None else 1 + len(source.others)
        return job.world * source.bytes * variants
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
