"""Words for a person that several wings need. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_LISTED: Final = 30
"""So many words of a hint are read; a model has thousands of modules."""


def near(word: str, known: Iterable[str]) -> str:
    """A hint: the known word that is nearest, or all of them, unless these are very many."""
    known = list(known)
    found = difflib.get_close_matches(word, known, 1)
    if found:
        return f"did you mean {found[0]}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    listed = ", ".join(known[:_LISTED]) or "none"
    return f"there {'is' if len(known) == 1 else 'are'} {listed}{more}."
