"""The version of this program."""

from typing import Final

__version__: Final = "0.2.0.dev0"
