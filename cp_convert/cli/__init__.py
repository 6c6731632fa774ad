"""The command line: words come in, one library call is made, ``show`` shows what it gave.

One command, one file; what several share is in ``options``; ``main`` is the only exit.
"""

from .main import main
from .root import cli

__all__ = ["cli", "main"]
