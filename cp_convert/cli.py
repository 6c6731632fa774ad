"""The command line: click parses, the library works, ``render`` shows; the only exit."""

from __future__ import annotations

import difflib
import re
import shlex
import signal
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import click

from . import __version__
from .advise.hardware import names as hardware_names
from .advise.hardware import read as read_hardware
from .errors import ConvertError, DamagedBundle, UsageError
from .job import (
    AUTO,
    BACKEND_NAMES,
    DEVICES,
    FUSED,
    LAYOUTS,
    PLANS,
    PRECISIONS,
    PROOFS,
    STRATEGY_NAMES,
    WEIGHTS_MODES,
    Job,
)
from .model.preset import names as preset_names
from .model.preset import path_of as preset_path
from .model.preset import read as read_preset

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_DEFAULT = "convert"


class _DefaultsToConvert(click.Group):
    """``cp-convert model.py`` means ``cp-convert convert model.py``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the default command in front when none is named."""
        own = {"-h", "--help", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultsToConvert, context_settings=_SETTINGS)
@click.version_option(__version__, prog_name="cp-convert")
def cli() -> None:
    """Context-parallel TensorRT engines from a PyTorch diffusion transformer.

    \b
      cp-convert model.py --strategy ulysses --world 8
      cp-convert flux.1-dev --tiny
      cp-convert inspect model-ulysses-w8
      cp-convert verify model-ulysses-w8

    The first form is short for `cp-convert convert`; see `cp-convert convert --help`.

    \b
    Exit codes: 0 done, 2 usage, 3 the model or strategy cannot be converted, 4 the proof failed,
    5 TensorRT could not build, 6 a bundle is damaged.
    """


class _Bytes(click.ParamType[int]):
    """A number of bytes with a unit."""

    name = "size"
    _units: ClassVar = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
    _binary: ClassVar = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """``8GiB``, ``500 MB`` or a plain number of bytes."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(value).strip().lower())
        if found is None or (found[3] and not found[2]):
            self.fail(f"{value!r} is no size; write 8GiB, 500MB or a number of bytes.", param, ctx)
        units = self._binary if found[3] else self._units
        return int(float(found[1]) * units[found[2]])


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every command has."""
    for option in (
        click.option("-v", "--verbose", count=True, help="Say more; twice: tracebacks as well."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
        click.option(
            "--json", "as_json", is_flag=True,
            help="One JSON document on stdout, everything else on stderr.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _read_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of the other options."""
    if path is None:
        return
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {error}.") from error
    names = {
        spelling.lstrip("-").replace("-", "_"): p.name
        for p in ctx.command.params
        for spelling in (*p.opts, *p.secondary_opts)
        if p is not parameter and len(spelling) > 2
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(names))}."
            raise UsageError(f"--config {path}: there is no option {key!r}.", hint=hint)
        defaults[str(names[name])] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


@cli.command(context_settings=_SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-s", "--strategy", type=click.Choice((*STRATEGY_NAMES, FUSED, AUTO)),
    help="How attention is distributed; fused: by TensorRT itself, on Blackwell (SM100) "
    "and later with the tensorrt backend; auto: the shortest estimated forward, as `cp-convert "
    "plan` estimates it.  [a preset knows a good one]",
)  # fmt: skip
@click.option(
    "-w", "--world", type=int, help="The number of ranks (GPUs).  [a preset knows a good one]"
)
@click.option(
    "--hardware", default="h200", show_default=True, metavar="NAME|FILE",
    help="What auto estimates for; see `cp-convert plan`.",
)  # fmt: skip
@click.option("--ulysses", type=int, help="For usp: neighbours that trade heads for tokens.")
@click.option("--ring", type=int, help="For usp: groups of such neighbours that form the ring.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path),
    help="Folder of the bundle.  [default: <model>-<strategy>-w<world>]",
)  # fmt: skip
@click.option(
    "-p", "--precision", type=click.Choice(PRECISIONS),
    help="Of parameters and floating inputs.  [default: the preset's, else fp16]",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(BACKEND_NAMES), default="auto", show_default=True,
    help="Which TensorRT builds; auto takes the installed one.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(path_type=Path),
    help="A .safetensors file, a .safetensors.index.json, or a folder holding either; for a preset "
    "the published folder.",
)  # fmt: skip
@click.option(
    "--weights-mode", type=click.Choice(WEIGHTS_MODES), default=AUTO, show_default=True,
    help="Weights as constants of every engine, or as inputs that all engines share; auto: "
    "external from 1 GiB on.",
)  # fmt: skip
@click.option(
    "--copy-weights",
    is_flag=True,
    help="Copy external weights into the bundle instead of naming your files.",
)
@click.option(
    "--layout", type=click.Choice(LAYOUTS), default=AUTO, show_default=True,
    help="One engine for all ranks, or one each; auto: shared where weights are external and the "
    "strategy names no groups.",
)  # fmt: skip
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, metavar="X.Y",
    help="Build for this GPU generation; repeatable, tensorrt-rtx only.",
)  # fmt: skip
@click.option(
    "--proof", type=click.Choice(PROOFS), default="auto", show_default=True,
    help="What is compared with the dense model, all ranks together: the program, or the program "
    "and the TensorRT networks (auto: these too, unless that takes longer than building).",
)  # fmt: skip
@click.option(
    "--proof-device", type=click.Choice(DEVICES), default="cpu", show_default=True,
    help="Where the proof computes; on a GPU all ranks share one copy of the weights.",
)  # fmt: skip
@click.option(
    "--plan", type=click.Choice(PLANS),
    help="Where the sequence is split: as the model's own plan says, or found from the program "
    "(auto).  [default: the model's plan if it has one, else auto]",
)  # fmt: skip
@click.option(
    "--freeze", multiple=True, metavar="ARGUMENT",
    help="Make this argument's example value part of the engines; repeatable. For masks and "
    "indices that decide how many tokens there are.",
)  # fmt: skip
@click.option("--tiny", is_flag=True, help="A preset's structure in small, with random weights.")
@click.option("--resolution", metavar="NAME", help="One of the preset's; see `cp-convert presets`.")
@click.option(
    "-j", "--jobs", type=click.IntRange(1),
    help="How many engines are built at once, at most.  [default: one for each CPU]",
)  # fmt: skip
@click.option(
    "--memory", type=_Bytes(), metavar="SIZE",
    help="What the conversion should hold in memory at most, such as 8GiB; fewer engines are then "
    "built at once.  [default: 80 % of what is free]",
)  # fmt: skip
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Where traces and engines are kept; what is there and still right is not made again.  "
    "[default: the platform's cache folder]",
)  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Make everything anew, and keep nothing.")
@click.option("--no-proof", is_flag=True, help="The same as --proof none.")
@click.option("--rtol", type=float, help="Relative error to allow, instead of the derived bound.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--config", type=click.Path(path_type=Path), callback=_read_config, is_eager=True,
    expose_value=False, help="A TOML file with any of these options; flags win.",
)  # fmt: skip
@_common
def convert(
    *,
    as_json: bool,
    quiet: bool,
    verbose: int,
    out: Path | None,
    cache: Path | None,
    model: Path,
    no_cache: bool,
    no_proof: bool,
    ring: int | None,
    **options: Any,
) -> None:
    """Convert MODEL, a Python file or a preset, into one TensorRT engine per rank.

    A Python file defines build_model() -> torch.nn.Module, example_inputs() -> dict of forward's
    keyword arguments (their shapes become the engines'), and optionally cp_plan: which module
    inputs are split along the sequence and which outputs are gathered, in diffusers' _cp_plan
    vocabulary.
    Without cp_plan the model's own _cp_plan is used, and without either the plan is found.

    A preset is one of `cp-convert presets`, or a TOML file of the same form.
    """
    from .cache.store import default_folder
    from .show.screen import Screen

    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    model = _resolved(model)
    if model.suffix == ".toml":
        preset = read_preset(model)
        for name in ("strategy", "world", "precision"):
            options[name] = getattr(preset, name) if options[name] is None else options[name]
    for name in ("strategy", "world"):
        if options[name] is None:
            raise UsageError(
                f"Missing option '-{name[0]}' / '--{name}'.",
                hint="cp-convert convert --help; only a preset knows a good one.",
            )
    options["precision"] = options["precision"] or "fp16"
    read_hardware(options["hardware"])  # what is not there is told before anything is done
    options["ulysses"] = _factor(options["ulysses"], ring, options["world"])
    if no_proof:
        options["proof"] = "none"
    job = Job(
        model=model,
        out=out or Path(),
        cache=None if no_cache else cache or default_folder(),
        command=shlex.join(["cp-convert", *sys.argv[1:]]),
        **options,
    )
    if out is None:
        job = replace(job, out=Path(f"{job.name}-{job.strategy}-w{job.world}"))
    manifest = _run(job, screen)
    screen.converted(manifest, job.out)


def _factor(ulysses: int | None, ring: int | None, world: int) -> int | None:
    """How many ranks exchange, from either factor of the world."""
    if ring is None:
        return ulysses
    if ring < 1 or ring * (ulysses or world // ring) != world:
        raise UsageError(
            f"--ulysses {ulysses} times --ring {ring} is not the world of {world}."
            if ulysses
            else f"--ring {ring} does not divide the world of {world}."
        )
    return ulysses or world // ring


@cli.command(context_settings=_SETTINGS)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-w", "--world", type=int, default=8, show_default=True, help="The largest world.")
@click.option(
    "--hardware", default="h200", show_default=True, metavar="NAME|FILE",
    help=f"{', '.join(hardware_names())}, or a TOML file.",
)  # fmt: skip
@click.option(
    "-p", "--precision", type=click.Choice(PRECISIONS),
    help="Of parameters and floating inputs.  [default: the preset's, else fp16]",
)  # fmt: skip
@click.option("--plan", type=click.Choice(PLANS), help="As for convert.")
@click.option("--freeze", multiple=True, metavar="ARGUMENT", help="As for convert.")
@click.option("--tiny", is_flag=True, help="A preset's structure in small.")
@click.option("--resolution", metavar="NAME", help="One of the preset's.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page with charts to this file as well.",
)  # fmt: skip
@_common
def plan(
    *,
    model: Path,
    hardware: str,
    html: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    plan: str | None,
    **options: Any,
) -> None:
    """Compare the strategies for MODEL at worlds 2, 4, ... up to --world; nothing is built.

    Collectives and bytes are those of the very programs that convert would build; times and
    activations are estimated by a roofline, with the hardware's published rates and the shares of
    them that its file assumes. A model of any size is planned without memory for its weights.
    """
    from .show.screen import Screen

    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    told, model = read_hardware(hardware), _resolved(model)
    known = read_preset(model).precision if model.suffix == ".toml" else "fp16"
    options["precision"] = options["precision"] or known
    job = Job(model=model, strategy="ulysses", out=Path(), proof="none", plan=plan, **options)
    elsewhere = redirect_stdout(sys.stderr) if as_json else nullcontext()
    with elsewhere, screen.progress() as progress:
        from .advise.planning import forecast

        found = forecast(job, told, hardware, progress)
    if html is not None:
        from .show.page import page

        try:
            html.write_text(page(found))
        except OSError as error:
            raise UsageError(f"--html {html}: {error.strerror}.") from error
    screen.planned(found)


def _resolved(model: Path) -> Path:
    """The file itself, or that of the preset of this name."""
    if model.is_file():
        return model
    found = preset_path(str(model))
    if found is None:
        known = [*cli.commands, *preset_names()]
        if near := difflib.get_close_matches(str(model), known, 1):
            raise UsageError(
                f"there is no file {model}.", hint=f"did you mean `cp-convert {near[0]}`?"
            )
    return found or model


def _run(job: Job, screen: Any) -> Any:
    """Check what needs no torch, then import it and convert."""
    from .backends import select
    from .bundle.folder import check_target

    backend = select(job.backend, job.compute_capabilities)
    check_target(job.out, force=job.force)
    # What the model's own code prints is not the JSON document.
    elsewhere = redirect_stdout(sys.stderr) if screen.as_json else nullcontext()
    with elsewhere, screen.progress() as progress:
        from .pipeline import convert as run

        try:
            return run(job, backend, progress)
        except KeyboardInterrupt:
            if job.cache is not None:
                click.echo("What was finished is in the cache; the same command goes on.", err=True)
            raise


@cli.command(context_settings=_SETTINGS)
@click.argument("name", required=False)
@_common
def presets(*, name: str | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """List the models that need no file; with NAME, print that preset's TOML.

    `cp-convert NAME --tiny` converts one in small, with random weights, within a minute.
    """
    from .show.screen import Screen

    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    if name is None:
        screen.presets({n: read_preset(_resolved(Path(n))) for n in preset_names()})
        return
    path = preset_path(name)
    if path is None:
        near = difflib.get_close_matches(name, preset_names(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(preset_names())}."
        raise UsageError(f"there is no preset {name!r}.", hint=hint)
    screen.preset(read_preset(path), path.read_text())


@cli.command(context_settings=_SETTINGS)
@click.argument("bundle", type=click.Path(path_type=Path))
@_common
def inspect(*, bundle: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show what a BUNDLE (its folder or its manifest.json) holds and how it was made."""
    from .bundle.folder import read
    from .show.screen import Screen

    manifest, folder = read(bundle)
    Screen(as_json=as_json, verbosity=-1 if quiet else verbose).inspected(manifest, folder)


@cli.command(context_settings=_SETTINGS)
@click.argument("bundle", type=click.Path(path_type=Path))
@_common
def verify(*, bundle: Path, as_json: bool, quiet: bool, verbose: int) -> None:
    """Check a BUNDLE: every file present, sizes and SHA-256 right, schema valid.

    Exits with 6 when something is wrong.
    """
    from .bundle.folder import verify as check
    from .show.screen import Screen

    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    checks = list(check(bundle))
    screen.verified(checks)
    damaged = [c for c in checks if c.problem]
    if damaged and as_json:
        sys.exit(DamagedBundle.exit_code)
    if damaged:
        raise DamagedBundle(
            f"{bundle}: {'; '.join(f'{c.subject} {c.problem}' for c in damaged)}.",
            hint="copy the bundle again, or convert again with --force.",
        )
    if not as_json:
        screen.note(f"{bundle} is whole.")


@cli.group("cache", context_settings=_SETTINGS)
def cache_() -> None:
    """What earlier conversions made and later ones need not make again."""


def _cached(command: Callable[..., Any]) -> Callable[..., Any]:
    option = click.option(
        "--cache", type=click.Path(path_type=Path), metavar="FOLDER",
        help="Which.  [default: the platform's cache folder]",
    )  # fmt: skip
    return option(_common(command))


@cache_.command("info", context_settings=_SETTINGS)
@_cached
def cache_info(*, cache: Path | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show where the cache is, and how much it holds."""
    from .cache.store import Cache, default_folder
    from .show.screen import Screen

    folder = cache or default_folder()
    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    screen.cache(folder, Cache(folder).held())


@cache_.command("clear", context_settings=_SETTINGS)
@_cached
def cache_clear(*, cache: Path | None, as_json: bool, quiet: bool, verbose: int) -> None:
    """Remove everything from the cache. Bundles stay as they are."""
    from .cache.store import Cache, default_folder
    from .show.screen import Screen

    folder = cache or default_folder()
    freed = Cache(folder).clear()
    screen = Screen(as_json=as_json, verbosity=-1 if quiet else verbose)
    screen.cleared(folder, freed)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; every :class:`ConvertError` becomes a message and a code."""
    args = list(sys.argv[1:] if argv is None else argv)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        sys.exit(cli.main(args, prog_name="cp-convert", standalone_mode=False) or 0)
    except click.ClickException as error:
        _show(UsageError(error.format_message().rstrip(), hint=_help_hint(error)), args)
    except ConvertError as error:
        _show(error, args)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; nothing was written.", err=True)
        sys.exit(130)


def _interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _help_hint(error: click.ClickException) -> str | None:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else None


def _show(error: ConvertError, args: Sequence[str]) -> NoReturn:
    from .show.screen import Screen

    verbosity = sum(a.count("v") for a in args if a.startswith("-v")) + args.count("--verbose")
    Screen(as_json="--json" in args, verbosity=verbosity).error(error)
    sys.exit(error.exit_code)
