"""Some values of a mapping that makes them when they are read, by names of their own.

A comprehension would make, and hold, every one: of weights that ranks share, copies of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class Selected(Mapping[str, T]):
    """The values of ``of`` by other ``names``; none is looked up before it is read."""

    def __init__(self, of: Mapping[str, T], names: Mapping[str, str]) -> None:
        """``names``: by the name here, that in ``of``."""
        self._of, self._names = of, names

    def __getitem__(self, name: str) -> T:
        return self._of[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
