"""The command that holds the others."""

from __future__ import annotations

import importlib

import click

from ..version import __version__
from .options import SETTINGS

_DEFAULT = "convert"
_COMMANDS = (
    "cache", "calibrate", "convert", "diff", "export", "inspect", "lora", "plan", "presets", "run",
    "verify",
)  # fmt: skip
"""Modules of this package, each with a ``command``."""


class _DefaultsToConvert(click.Group):
    """``cp-convert model.py`` means ``cp-convert convert model.py``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front when none is named."""
        own = {"-h", "--help", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultsToConvert, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="cp-convert")
def cli() -> None:
    """Context-parallel TensorRT engines from a PyTorch diffusion transformer.

    \b
      cp-convert model.py --strategy ulysses --world 8
      cp-convert flux.1-dev --tiny
      cp-convert inspect model-ulysses-w8
      cp-convert verify model-ulysses-w8
      cp-convert diff model-ulysses-w8 model-ring-w8
      cp-convert run model-ulysses-w8
      cp-convert lora model-ulysses-w8 style.safetensors

    The first form is short for `cp-convert convert`; see `cp-convert convert --help`.

    \b
    Exit codes: 0 done, 1 two bundles differ (diff), 2 usage, 3 the model or strategy cannot be
    converted, 4 the proof failed, 5 TensorRT could not build, 6 a bundle is damaged, 7 a run
    failed.
    """


for _name in _COMMANDS:
    cli.add_command(importlib.import_module(f".{_name}", __package__).command)
