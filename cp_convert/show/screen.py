"""Where things are shown: results on stdout, errors and progress on stderr."""

from __future__ import annotations

import json
import traceback

from rich.console import Console
from rich.markup import escape

from ..errors import ConvertError


class Screen:
    """Where things are shown: results on stdout, errors and progress on stderr.

    Args:
        as_json: print one JSON document on stdout and everything else on stderr.
        verbosity: -1 quiet, 0 normal, 1 and 2 more.
    """

    def __init__(self, *, as_json: bool = False, verbosity: int = 0) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        # Without emoji: `a:b:c` are a user's words, and no letter in a box.
        self.out = Console(highlight=False, emoji=False)
        self.err = Console(stderr=True, highlight=False, emoji=False)

    def document(self, value: object) -> None:
        """Print ``value`` as the one JSON document."""
        print(json.dumps(value, indent=2))  # noqa: T201

    def error(self, error: ConvertError) -> None:
        """Show an error: what, where, why, what to try; its traceback with ``-vv``."""
        if self.as_json:
            self.document(
                {"status": "error", "exit_code": error.exit_code, "error": error.as_dict()}
            )
        if self.verbosity >= 2:
            self.err.print(escape("".join(traceback.format_exception(error))))
        self.said(error)

    def said(self, error: ConvertError, whose: str = "") -> None:
        """An error's words for a person; ``whose`` stands before them."""
        title = f"[bold red]{whose}{error.title}[/]"
        self.err.print(f"{title}: {escape(error.message)}", soft_wrap=True)
        for name, text in (("where", error.where), ("try", error.hint)):
            if text:
                self.err.print(f"  [bold]{name:5}[/]  {escape(text)}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A line for a person, unless quiet."""
        if self.verbosity >= 0:
            (self.err if self.as_json else self.out).print(escape(text), soft_wrap=True)
