"""A bundle for a range of sizes at one of them, as if that were a variant. No torch.

A manifest that tells of a range comes in, one whose bindings have one size's shapes goes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace

from ..errors import UsageError
from .dynamic import Dynamic
from .manifest import Io, Manifest


def at_size(manifest: Manifest, size: int) -> Manifest:
    """The manifest of the bundle at a size of its range."""
    told = manifest.dynamic
    assert told is not None and size in told.sizes
    request = replace(manifest.request, variant=f"{told.argument}-{size}")
    return replace(manifest, io=[_io(one, told, size) for one in manifest.io], request=request)


def _io(io: Io, told: Dynamic, size: int) -> Io:
    shape = list(io.shape)
    for extent in told.shapes.get(io.name, ()):
        shape[extent.dim] = extent.at(size)
    return replace(io, shape=shape)


def size_called(manifest: Manifest, name: str) -> int:
    """The size that ``text-77`` names.

    Raises:
        UsageError: it is none of the range.
    """
    told = manifest.dynamic
    assert told is not None
    argument, _, size = name.rpartition("-")
    if argument != told.argument or not (size.isascii() and size.isdecimal()):
        raise UsageError(
            f"the bundle has no variant {name!r}; it serves {told.words}.",
            hint=f"name a size of that: {told.argument}-{told.last}.",
        )
    return _checked(told, int(size), f"{told.argument}={size}")


def size_of(manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> int:
    """The size of inputs, by the first of their dimensions that follows it.

    Args:
        manifest: of a bundle for a range.
        shapes: of tensors, by binding.

    Raises:
        UsageError: it is none of the range; the nearest is named.
    """
    told = manifest.dynamic
    assert told is not None
    for name, extents in told.shapes.items():
        shape = shapes.get(name)
        for extent in extents:
            if shape is None or extent.dim >= len(shape):
                continue
            length = shape[extent.dim]
            what = f"dimension {extent.dim} of {name} is {length}"
            size = extent.size_of(length)
            if size is None:
                sizes = sorted(told.sizes, key=lambda n: abs(extent.at(n) - length))[:1]
                raise _outside(told, what, sizes[0])
            return _checked(told, size, what)
    return told.last  # of which whatever else is wrong is told


def _checked(told: Dynamic, size: int, what: str) -> int:
    if size not in told.sizes:
        raise _outside(told, what, told.nearest(size))
    return size


def _outside(told: Dynamic, what: str, nearest: int) -> UsageError:
    return UsageError(
        f"{what}; the bundle serves {told.words}, and the nearest size is {nearest}.",
        hint=f"run at {told.argument}={nearest}, or convert for a wider range.",
    )


class AllSizes(Mapping[str | None, Manifest]):
    """The bundle at every size of its range, by name; each is made when it is asked for."""

    def __init__(self, manifest: Manifest) -> None:
        told = manifest.dynamic
        assert told is not None
        self.manifest = manifest
        self._names = {f"{told.argument}-{size}": size for size in told.sizes}
        self._made: dict[str, Manifest] = {}

    def __getitem__(self, name: str | None) -> Manifest:
        if name is None:
            raise KeyError(name)
        size = self._names[name]
        if name not in self._made:
            self._made[name] = at_size(self.manifest, size)
        return self._made[name]

    def __iter__(self) -> Iterator[str | None]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def fitting(self, shapes: Mapping[str, Sequence[int]]) -> str:
        """The name of the size that these inputs have.

        Raises:
            UsageError: see :func:`size_of`.
        """
        assert self.manifest.dynamic is not None
        return f"{self.manifest.dynamic.argument}-{size_of(self.manifest, shapes)}"
