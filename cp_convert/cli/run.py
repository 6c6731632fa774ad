"""``cp-convert run``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import bundle as bundles
from ..bundle.folder import whole
from ..bundle.manifest import Manifest
from ..bundle.parts import TO_SKIP, why_no_step
from ..bundle.variants import all_variants, variant_of
from ..errors import UsageError
from ..runtime.executors import EXECUTORS
from ..runtime.original import Original, check_named
from ..runtime.places import Place, place_of
from . import options


@click.command("run", context_settings=options.SETTINGS)
@options.bundle
@click.option(
    "--executor", type=options.Word(EXECUTORS), default="auto", show_default=True,
    help="What runs: the engines by TensorRT, or the stored program by torch (NCCL on GPUs, gloo "
    "on CPUs); auto: TensorRT where it can.",
)  # fmt: skip
@click.option(
    "--devices", metavar="LIST",
    help="Such as 0,1,2,3 for GPUs, one a rank, or cpu.  [default: GPU 0, 1, ...; cpu where there "
    "is none]",
)  # fmt: skip
@click.option(
    "--inputs", type=click.Path(path_type=Path),
    help="A safetensors file with the names that `cp-convert inspect` lists.  [default: random]",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of random inputs.")
@click.option(
    "--outputs", type=click.Path(path_type=Path), help="Write the outputs to this safetensors file."
)
@click.option(
    "--check/--no-check", default=True, show_default=True,
    help="Outputs must be finite, the same on all ranks, TensorRT's those of torch, and the dense "
    "model's, where that can be built again.",
)  # fmt: skip
@click.option(
    "--model", type=click.Path(path_type=Path), metavar="FILE",
    help="The file that the bundle was made from, for the dense model.  [default: as it was named, "
    "from here or from a folder above the bundle]",
)  # fmt: skip
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="PATH",
    help="Its weights, likewise.",
)  # fmt: skip
@click.option(
    "--repeat", type=click.IntRange(0), default=0, show_default=True,
    help="Time this many forwards after the first, and after the second with --step-cache, and one "
    "more with --cuda-graph: so that none compiles or makes graphs.",
)  # fmt: skip
@click.option("--compile", "compiled", is_flag=True, help="torch: through torch.compile.")
@click.option(
    "--cuda-graph", "graph", is_flag=True, help="Replay forwards after the first as a CUDA graph."
)
@click.option(
    "--lora", "lora", multiple=True, metavar="NAME[=SCALE]",
    help="Use this LoRA set; repeated, several are added.  [default SCALE: the set's]",
)  # fmt: skip
@click.option(
    "--variant", metavar="NAME",
    help="Which of the bundle's variants is run.  [default: that of the shapes of --inputs; the "
    "first]",
)  # fmt: skip
@click.option(
    "--step-cache", "step_cache", type=options.Finite(0), metavar="THRESHOLD",
    help="Skip the pieces between the first and the last where the first adds nearly what it did "
    "before. With --repeat every forward after the first is skipped, as inputs are the same.",
)  # fmt: skip
@click.option("--profile", is_flag=True, help="Measure the share of collectives.")
@click.option(
    "--verify/--no-verify", default=True, show_default=True,
    help="Compare what is read with the manifest's SHA-256.",
)  # fmt: skip
@click.option(
    "--timeout", type=options.Seconds(), metavar="SECONDS",
    help="All ranks are ended when one says nothing for so long.  [default: 60; 600 with "
    "--compile, as the first forward compiles]",
)  # fmt: skip
@options.common
def command(
    *,
    bundle: Path,
    devices: str | None,
    inputs: Path | None,
    outputs: Path | None,
    timeout: float | None,
    lora: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    verbose: int,
    **rest: Any,
) -> None:
    """Run all ranks of BUNDLE together, compare their outputs, and time them.

    Alone it starts one process a rank on this machine. Under torchrun, mpirun or srun it is one
    rank, and takes its place from the launcher:

    \b
      cp-convert run flux-ulysses-w8 --repeat 10
      torchrun --nproc-per-node 8 --no-python cp-convert run flux-ulysses-w8

    Exits with 7 when a rank dies, hangs, disagrees with the others or returns NaN.
    """
    screen = options.screen(as_json=as_json, quiet=quiet, verbose=verbose)
    from ..show.run import ran  # late: rich

    manifest, folder = bundles.read(bundle)
    sets = _sets(lora, manifest)
    place = place_of(manifest.world)
    _check_given(manifest, inputs, outputs, folder, rest)
    check_named(named := Original(rest.pop("model"), rest.pop("weights")), manifest)
    with tempfile.TemporaryDirectory(prefix="cp-convert-run-") as scratch:
        request = {
            "bundle": str(folder.resolve()),
            "inputs": None if inputs is None else str(inputs.resolve()),
            "outputs": str(Path(scratch, "outputs.safetensors")),
            "timeout": timeout or (600.0 if rest["compiled"] else 60.0),
            "lora": sets,
            **_ranks(devices, manifest.world, place),
            **rest,
        }
        with options.others_aside(screen):
            reports = _run(manifest, request, place, Path(scratch), screen)
            if place is not None and place.rank:
                return
            checked = _checked(manifest, request, reports[0]["executor"], named)
        if outputs is not None:
            _keep(Path(str(request["outputs"])), outputs)
        ran(screen, manifest, reports, checked, outputs, sets, _variant(manifest, request))


def _sets(given: Sequence[str], manifest: Manifest) -> dict[str, float | None]:
    """Every set with its strength; what cannot be is told before any rank is started."""
    found: dict[str, float | None] = {}
    for one in given:
        name, told, scale = one.partition("=")
        try:
            strength = float(scale) if told else None
        except ValueError:
            raise UsageError(f"--lora {one}: {scale!r} is no number.") from None
        if name in found:
            raise UsageError(f"--lora {name} is given twice.")
        found[name] = strength
    if found:
        from ..lora.choose import chosen  # late: torch

        chosen(manifest, found)
    return found


def _check_given(
    manifest: Manifest,
    inputs: Path | None,
    outputs: Path | None,
    folder: Path,
    rest: Mapping[str, Any],
) -> None:
    """What would fail after minutes is told before."""
    _check_steps(rest["step_cache"], manifest)
    if rest["variant"] is not None:
        variant_of(manifest, rest["variant"])  # there is one
    _check_outputs(outputs, folder)
    if inputs is not None and not inputs.is_file():
        raise UsageError(f"--inputs: there is no file {inputs}.")


def _check_outputs(outputs: Path | None, bundle: Path) -> None:
    """A file that can be written, and is none of the bundle's."""
    if outputs is None:
        return
    if not outputs.absolute().parent.is_dir():
        raise UsageError(f"--outputs: there is no folder {outputs.absolute().parent}.")
    if outputs.is_dir():
        raise UsageError(f"--outputs: {outputs} is a folder.", hint="name a file in it.")
    if bundle.resolve() in outputs.resolve().parents:
        raise UsageError(
            f"--outputs {outputs}: it lies in the bundle, whose files are what was proven.",
            hint="name a file elsewhere.",
        )


def _check_steps(threshold: float | None, manifest: Manifest) -> None:
    """A bundle of which nothing can be skipped has no step cache."""
    reasons = map(why_no_step, all_variants(manifest))
    why_not = next(filter(None, reasons), None)
    if threshold is not None and why_not is not None:
        raise UsageError(f"--step-cache: {why_not}.", hint=TO_SKIP)


def _ranks(devices: str | None, world: int, place: Place | None) -> dict[str, Any]:
    """Those of this machine."""
    local = world if place is None else place.local_world
    return {"devices": _devices(devices, world, place), "local_world": local}


def _devices(given: str | None, world: int, place: Place | None) -> list[str]:
    """One for each local rank; empty: chosen by the rank itself."""
    local = world if place is None else place.local_world
    if given is None:
        return []
    if given.strip() == "cpu":
        return ["cpu"] * local
    numbers = options.gpus_named(given, "; --devices cpu needs none")
    if len(numbers) != local:
        raise UsageError(
            f"--devices {given}: {len(numbers)} GPUs for {local} ranks.",
            hint="name one GPU for each rank; --devices cpu needs none.",
        )
    return [f"cuda:{number}" for number in numbers]


def _run(
    manifest: Manifest, request: dict[str, Any], place: Place | None, scratch: Path, screen: Any
) -> list[dict[str, Any]]:
    from ..show.progress import running  # late: rich

    if place is not None:
        from ..runtime.guarded import run_guarded  # late: torch

        return run_guarded(request, place.rank, place.world, place.local)
    from ..runtime.launch import launch  # late: other commands start quickly

    request["store"] = str(scratch / "store")
    with running(screen) as told:
        return launch(request, manifest.world, timeout=float(request["timeout"]), told=told)


def _checked(manifest: Manifest, request: dict[str, Any], by: str, named: Original) -> Any:
    """The outputs against the dense model, where that is wanted."""
    if not request["check"]:
        return None
    from ..runtime.dense import compare  # late: torch

    return compare(manifest, request, by, named)


def _variant(manifest: Manifest, request: dict[str, Any]) -> str | None:
    """The variant that was run, where the bundle has several."""
    if not manifest.variants and manifest.dynamic is None:
        return None
    from ..runtime.given import asked_variant  # late: torch

    return asked_variant(manifest, request["variant"], request["inputs"]).request.variant


def _keep(written: Path, outputs: Path) -> None:
    """Put the outputs where they were asked for."""
    with whole(outputs) as beside:
        shutil.copyfile(written, beside)
