"""``cp-convert export``."""

from __future__ import annotations

from pathlib import Path

import click

from ..runtime import cpp_project, triton
from . import options


@click.group("export", context_settings=options.SETTINGS)
def command() -> None:
    """Hand a bundle to a server, or its runner to a C++ programmer."""


@command.command("triton", context_settings=options.SETTINGS)
@options.bundle
@click.option(
    "--repository", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
    help="Triton's model repository; made when it is not there.",
)  # fmt: skip
@click.option("--name", help="What the model is called there.  [default: the bundle's model]")
@click.option("--variant", metavar="NAME", help="Which of the bundle's variants.")
@options.common
def to_triton(
    *,
    bundle: Path,
    repository: Path,
    name: str | None,
    variant: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Write a BUNDLE with embedded weights into the repository of a Triton server.

    The engines are linked where both are on one file system, else copied.
    """
    model = triton.export(bundle, repository, name, variant)
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.export import exported  # late: rich

    exported(screen, model, "README.md tells how the server is started")


@command.command("cpp", context_settings=options.SETTINGS)
@click.argument("folder", type=click.Path(path_type=Path))
@options.common
def to_cpp(*, folder: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Write the C++ runner, a CMake project of its own, into a new FOLDER."""
    cpp_project.export(folder)
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.export import exported  # late: rich

    exported(screen, folder, "README.md tells how it is compiled")
