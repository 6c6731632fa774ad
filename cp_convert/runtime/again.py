"""The command that made a bundle, with other options: what a refusal tells to try."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Final

_SENSELESS: Final = {
    "--weights-mode": {"--copy-weights": False},
    "--backend": {"--compute-capability": True},
    "--out": {"--force": False, "-o": True},
}
"""By an option: those that its new value leaves without sense, and whether they have a value."""


def command_with(command: str, options: Mapping[str, str | None]) -> str:
    """A ``cp-convert`` command in which these options have these values.

    Args:
        command: as the manifest has it, quoted for a shell.
        options: long names and values; every other spelling in ``command`` is replaced. ``None``:
            the option is left out.
    """
    dropped = dict.fromkeys(options, True)
    for name in options:
        dropped |= _SENSELESS.get(name, {})
    kept: list[str] = []
    words = iter(shlex.split(command))
    for word in words:
        name, joined = _name(word)
        if name not in dropped:
            kept.append(word)
        elif dropped[name] and not joined:
            next(words, None)
    new = [(name, value) for name, value in options.items() if value is not None]
    return shlex.join([*kept, *(word for pair in new for word in pair)])


def _name(word: str) -> tuple[str, bool]:
    """A word's option, and whether its value is in the same word: ``--out=a``, ``-oa``."""
    if word.startswith("-") and not word.startswith("--"):
        return word[:2], len(word) > 2
    name, equals, _ = word.partition("=")
    return name, bool(equals)
