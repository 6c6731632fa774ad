"""``cp-convert lora``."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import UsageError
from . import options


@click.command("lora", context_settings=options.SETTINGS)
@options.bundle
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--scale", type=options.Finite(), default=1.0, show_default=True,
    help="The set's strength where `run --lora` names none.",
)  # fmt: skip
@click.option("--as", "name", metavar="NAME", help="What the set is called.  [default: the file]")
@click.option("--remove", metavar="NAME", help="Remove the set of this name instead.")
@options.common
def command(
    *,
    bundle: Path,
    file: Path | None,
    scale: float,
    name: str | None,
    remove: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Apply a LoRA FILE to a BUNDLE with external weights, and keep the result as a named set.

    LoRA, DoRA and LoKr in the names of diffusers, PEFT, Kohya, ComfyUI and, where diffusers knows
    them, of the model's authors. Only the weights that the file changes are computed, in float32,
    and stored beside the others; nothing is built again.

    \b
      cp-convert lora flux-ulysses-w8 style.safetensors --scale 0.8
      cp-convert run flux-ulysses-w8 --lora style
      cp-convert run flux-ulysses-w8 --lora style=0.5 --lora other=1
    """
    if (file is None) == (remove is None):
        raise UsageError("name the LoRA's FILE, or a set to --remove.")
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..lora import add as sets  # late: torch
    from ..show.lora import added, removed  # late: rich

    with options.others_aside(screen):
        if file is not None:
            told, others = sets.add(bundle, file, scale=scale, name=name)
        else:
            sets.remove(bundle, str(remove))
    if file is None:
        removed(screen, bundle, str(remove))
    else:
        added(screen, bundle, told, others)
