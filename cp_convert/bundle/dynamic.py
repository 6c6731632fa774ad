"""The part of the manifest that tells for which range of sizes a bundle is. No torch."""

from __future__ import annotations

from .call import Count, Positive, Struct


class Extent(Struct, frozen=True):
    """Dimension ``dim`` of a binding at the size ``n``: ``(scale n + offset) / under``, a whole."""

    dim: Count
    scale: int
    offset: int
    under: Positive

    def at(self, size: int) -> int:
        """Its length."""
        return (self.scale * size + self.offset) // self.under

    def size_of(self, length: int) -> int | None:
        """The size at which it has this length; ``None``: there is none."""
        size, rest = divmod(length * self.under - self.offset, self.scale)
        return None if rest else size


class ProvenSize(Struct, frozen=True):
    """A size at which the program was proven: its largest relative errors over all ranks.

    ``algebra`` is with float32 arithmetic, ``ranks`` in the bundle's precision, ``network`` with
    float32 arithmetic by the network that TensorRT's builder was given; null where nobody looked.
    """

    size: Positive
    algebra: float | None
    ranks: float | None
    network: float | None


class Dynamic(Struct, frozen=True):
    """Sizes that one program, and one engine a rank, serves.

    The size is the ``argument`` of the model file's ``example_inputs``, or a preset's ``batch`` or
    ``text``; it is ``first``, ``first + step`` and so on to ``last``. ``shapes`` are the dimensions
    of bindings that follow it; everywhere else the manifest tells of ``last``. ``multiple`` is what
    the length of a sequence is padded to a multiple of.
    """

    argument: str
    first: Positive
    last: Positive
    step: Positive
    multiple: Positive
    shapes: dict[str, list[Extent]]
    proven: list[ProvenSize]

    @property
    def sizes(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1, self.step)

    @property
    def words(self) -> str:
        """Such as ``text from 64 to 512 in steps of 8``."""
        steps = f" in steps of {self.step}" if self.step > 1 else ""
        return f"{self.argument} from {self.first} to {self.last}{steps}"

    def nearest(self, size: int) -> int:
        """Of all sizes the one that is closest."""
        return min(self.sizes, key=lambda one: abs(one - size))
