"""Words for a person that several wings need. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, known: Iterable[str]) -> str:
    """A hint: the known word that is nearest, or all of them."""
    known = list(known)
    found = difflib.get_close_matches(word, known, 1)
    if found:
        return f"did you mean {found[0]}?"
    return f"there {'is' if len(known) == 1 else 'are'} {', '.join(known) or 'none'}."
