"""``cp-convert convert``."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..advise.hardware import read as read_hardware
from ..backends import select
from ..bundle.folder import check_target
from ..bundle.manifest import Manifest
from ..cache.store import default_folder
from ..errors import UsageError
from ..job import (
    ALLOW_CASTS,
    ATTENTIONS,
    AUTO,
    BACKEND_NAMES,
    DEVICES,
    FUSED,
    LAYOUTS,
    PROGRAMS,
    PROOFS,
    QUANTIZED,
    STRATEGY_NAMES,
    WEIGHTS_MODES,
    Job,
)
from ..mesh import SEQUENCE
from ..model.preset import read as read_preset
from . import config, matrix, mesh, options
from .matrix import jobs_of
from .matrix import run as run_all
from .summary import option as summary_option
from .summary import summarised


def _read_config(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults of the other options."""
    if path is not None:
        where = f"--config {path}"
        found = config.defaults(ctx.command, config.read(path, "--config"), where)
        ctx.default_map = {**(ctx.default_map or {}), **found}


@click.command("convert", context_settings=options.SETTINGS)
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option(
    "-s", "--strategy", type=options.Word((*STRATEGY_NAMES, FUSED, AUTO)),
    help="How attention is distributed; fused: by TensorRT itself, on Blackwell (SM100) "
    "and later with the tensorrt backend; auto: the shortest estimated forward, as `cp-convert "
    "plan` estimates it.  [a preset knows a good one]",
)  # fmt: skip
@click.option(
    "-w", "--world", type=int, help="The number of ranks (GPUs).  [a preset knows a good one]"
)
@mesh.option
@options.hardware("What auto estimates for; see `cp-convert plan`.")
@click.option("--ulysses", type=int, help="For usp: neighbours that trade heads for tokens.")
@click.option("--ring", type=int, help="For usp: groups of such neighbours that form the ring.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path),
    help="Folder of the bundle.  [default: <model>-<strategy>-w<world>, and -cfg<N>, -tp<N>]",
)  # fmt: skip
@options.precision
@options.exchange
@click.option(
    "--quantize", type=options.Word(QUANTIZED),
    help="Compute linear layers with FP8 (from compute capability 8.9 on), NVFP4 (from 12.0 on) or "
    "INT8 weights and activations, but for embedders, modulation and the output.",
)  # fmt: skip
@click.option(
    "--attention", type=options.Word(ATTENTIONS),
    help="fp8: attention over FP8 codes, beside quantized linear layers (--quantize, or such a "
    "checkpoint); precision: in the precision, whatever scales a checkpoint has.  [default: as the "
    "checkpoint has it]",
)  # fmt: skip
@click.option(
    "--keep", multiple=True, metavar="PATTERN",
    help="Linear layers (and, with --attention fp8, modules that attend) that are left alone, such "
    "as '*.ff.net.2'; repeatable.",
)  # fmt: skip
@click.option(
    "--calibration", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
    help="A .safetensors file of inputs; --quantize takes the range of activations from these and "
    "the example's. Repeatable.",
)  # fmt: skip
@click.option(
    "--max-loss", type=options.Finite(), metavar="SHARE",
    help="Refuse what quantization costs beyond this share of the output (root mean square).",
)  # fmt: skip
@options.float32(
    "Compute modules whose path matches in float32, such as 'blocks.*.norm'; repeatable. The word "
    "residual: the sums that run from block to block, which outgrow fp16 first."
)
@click.option(
    "--backend", type=options.Word(BACKEND_NAMES), default="auto", show_default=True,
    help="Which TensorRT builds; auto takes the installed one.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(path_type=Path),
    help="A .safetensors file, a .safetensors.index.json, or a folder holding either; for a preset "
    "the published folder.",
)  # fmt: skip
@click.option(
    "--weights-mode", type=options.Word(WEIGHTS_MODES), default=AUTO, show_default=True,
    help="Weights as constants of every engine, or as inputs that all engines share; auto: "
    "external from 1 GiB on.",
)  # fmt: skip
@click.option(
    "--allow-cast", type=options.Word(ALLOW_CASTS), multiple=True,
    help="Take weights that were cast to this type, without scales, and compute in the precision "
    "that is asked for; the manifest says so.",
)  # fmt: skip
@click.option(
    "--copy-weights",
    is_flag=True,
    help="Copy external weights into the bundle instead of naming your files.",
)
@click.option(
    "--program", type=options.Word(PROGRAMS), default=AUTO, show_default=True,
    help="Store the program in the bundle, for `cp-convert run` where no TensorRT is; auto: unless "
    "1 GiB of weights or more would be copied for it.",
)  # fmt: skip
@click.option(
    "--layout", type=options.Word(LAYOUTS), default=AUTO, show_default=True,
    help="One engine for all ranks, or one each; auto: shared where weights are external and the "
    "strategy names no groups; blocks: likewise, and one for all blocks that differ in their "
    "weights alone.",
)  # fmt: skip
@click.option(
    "--split-after", multiple=True, metavar="MODULE",
    help="Cut the program after this module, such as transformer_blocks.0; repeatable. Every rank "
    "gets one engine more, and a step cache may skip those between the first and the last.",
)  # fmt: skip
@click.option(
    "--compute-capability", "compute_capabilities", multiple=True, metavar="X.Y",
    help="Build for this GPU generation; repeatable, tensorrt-rtx only.",
)  # fmt: skip
@click.option(
    "--proof", type=options.Word(PROOFS), default="auto", show_default=True,
    help="What is compared with the dense model, all ranks together: the program, or the program "
    "and the TensorRT networks (auto: these too, unless that takes longer than building).",
)  # fmt: skip
@click.option(
    "--proof-device", type=options.Word(DEVICES), default="cpu", show_default=True,
    help="Where the proof computes; on a GPU all ranks share one copy of the weights.",
)  # fmt: skip
@options.plan(
    "Where the sequence is split: as the model's own plan says, or found from the program "
    "(auto).  [default: the model's plan if it has one, else auto]"
)
@options.freeze(
    "Make this argument's example value part of the engines; repeatable. For masks and "
    "indices that decide how many tokens there are."
)
@click.option("--tiny", is_flag=True, help="A preset's structure in small, with random weights.")
@click.option(
    "--resolution", "resolutions", multiple=True, metavar="NAME",
    help="One of the preset's, see `cp-convert presets`; repeated, one bundle of several variants, "
    "with every --batch and every --text.",
)  # fmt: skip
@click.option(
    "--batch", "batches", type=options.Numbers(), metavar="LIST",
    help="How many samples the inputs hold, such as 1,2,4; for presets.  [default: 1]",
)  # fmt: skip
@click.option(
    "--text", "texts", type=options.Numbers(), metavar="LIST",
    help="How many tokens the text has, such as 256,512; for presets.  [default: the resolution's]",
)  # fmt: skip
@click.option(
    "--variant", "variants", multiple=True, metavar="NAME",
    help="One of the model file's variants; repeatable.  [default: all of them]",
)  # fmt: skip
@click.option(
    "--dynamic", type=options.Range(), metavar="NAME=FIRST:LAST[:STEP]",
    help="One engine for a range of sizes: of an argument of example_inputs(), or of a preset's "
    "batch or text.  [default: an engine has one size]",
)  # fmt: skip
@click.option(
    "-j", "--jobs", type=click.IntRange(1),
    help="How many engines are built at once, at most.  [default: one for each CPU]",
)  # fmt: skip
@click.option(
    "--memory", type=options.Bytes(), metavar="SIZE",
    help="What the conversion should hold in memory at most, such as 8GiB; fewer engines are then "
    "built at once.  [default: 80 % of what is free]",
)  # fmt: skip
@options.cache(
    "Where traces and engines are kept; what is there and still right is not made again."
)
@click.option("--no-cache", is_flag=True, help="Make everything anew, and keep nothing.")
@click.option("--no-proof", is_flag=True, help="The same as --proof none.")
@click.option(
    "--rtol", type=options.Finite(),
    help="Relative error to allow, instead of the derived bound.",
)  # fmt: skip
@click.option(
    "--unsafe-groups", is_flag=True,
    help="Let collectives name a part of the ranks (usp, models with groups of their own) although "
    "this TensorRT ignores groups: to look at, not to run.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option(
    "--config", type=click.Path(path_type=Path), callback=_read_config, is_eager=True,
    expose_value=False, help="A TOML file with any of these options; flags win.",
)  # fmt: skip
@matrix.option
@summary_option
@options.common
@click.pass_context
def command(
    context: click.Context,
    /,
    *,
    as_json: bool,
    quiet: bool,
    verbose: int,
    summary: Path | None,
    matrix: Path | None,
    **asked: Any,
) -> None:
    """Convert MODEL, a Python file or a preset, into one TensorRT engine per rank.

    A Python file defines build_model() -> torch.nn.Module, example_inputs() -> dict of forward's
    keyword arguments (their shapes become the engines'), and optionally cp_plan: which module
    inputs are split along the sequence and which outputs are gathered, in diffusers' _cp_plan
    vocabulary.
    Without cp_plan the model's own _cp_plan is used, and without either the plan is found.

    A preset is one of `cp-convert presets`, or a TOML file of the same form.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    if matrix is not None:
        jobs = jobs_of(matrix, _job)
        context.exit(run_all(jobs, matrix, summary, screen))
    if asked["model"] is None:
        model = context.command.params[0]
        raise click.MissingParameter(ctx=context, param=model, param_hint="'MODEL'")
    from ..show.bundle import converted  # late: rich
    from ..show.summary import cases_of

    with summarised(summary, f"convert {asked['model']}") as cases:
        job = _job(asked)
        manifest = _run(job, screen)
        cases += cases_of(manifest)
    converted(screen, manifest, job.out)


def _job(asked: dict[str, Any]) -> Job:
    """What was asked for, by the options' names."""
    rest = dict(asked)
    model, out, cache = rest.pop("model"), rest.pop("out"), rest.pop("cache")
    cache = None if rest.pop("no_cache") else cache or default_folder()
    ring, no_proof = rest.pop("ring"), rest.pop("no_proof")
    found = options.found(model, _commands())
    mesh.taken(rest)
    rest |= _chosen(found.path, rest)
    rest["open_axes"] = rest["open_axes"] if rest["strategy"] == AUTO else ()
    read_hardware(rest["hardware"])  # what is not there is told before anything is done
    rest["ulysses"] = mesh.factor(rest["ulysses"], ring, mesh.sequence(rest))
    rest |= {name: rest[name] or () for name in ("batches", "texts")}
    rest["proof"] = options.proof_level(rest["proof"], no_proof)
    if rest["copy_weights"] and rest["weights_mode"] == "embedded":
        raise UsageError(
            "--copy-weights with --weights-mode embedded: engines hold their weights already.",
            hint="leave one of the two out.",
        )
    job = Job(
        model=found.path,
        module=found.module,
        out=out or Path(),
        cache=cache,
        command=shlex.join(["cp-convert", *sys.argv[1:]]),
        **rest,
    )
    if out is None:
        beside = "".join(f"-{n}{size}" for n, size in job.mesh.axes if n != SEQUENCE and size > 1)
        job = replace(job, out=Path(f"{job.name}-{job.strategy}-w{job.world}{beside}"))
    return job


def _commands() -> list[str]:
    context = click.get_current_context().parent
    return list(context.command.commands) if context else []  # type: ignore[attr-defined]


def _chosen(model: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Strategy and world: what was asked for, else what a preset knows to be good."""
    names = ("strategy", "world")
    found = {name: given[name] for name in names}
    if model.suffix == ".toml":
        preset = read_preset(model)
        found = {n: getattr(preset, n) if value is None else value for n, value in found.items()}
    for name in names:
        if found[name] is None:
            raise UsageError(
                f"Missing option '-{name[0]}' / '--{name}'.",
                hint="cp-convert convert --help; only a preset knows a good one.",
            )
    return found


def _run(job: Job, screen: Any) -> Manifest:
    """Check what needs no torch, then import it and convert."""
    from ..show.progress import shown  # late: rich

    backend = select(job.backend, job.compute_capabilities)
    check_target(job.out, force=job.force)
    with options.others_aside(screen), shown(screen) as progress:
        from ..pipeline import convert  # late: torch

        try:
            return convert(job, backend, progress)
        except KeyboardInterrupt:
            if job.cache is not None:
                click.echo("What was finished is in the cache; the same command goes on.", err=True)
            raise
