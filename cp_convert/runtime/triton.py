"""A bundle as a model of a Triton repository; no torch, no tensorrt.

Triton's TensorRT backend runs an engine over several GPUs in one process: it makes NCCL's
communicators, gives every rank the request's inputs and answers with rank 0's outputs (its
``docs/multi_device.md``). What is written here is that backend's layout; ``docs/triton.md`` tells
what follows from it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ..bundle.folder import check_space, read
from ..bundle.manifest import Io, Manifest
from ..bundle.variants import variant_of
from ..errors import DamagedBundle, UsageError
from ..files import place
from .again import command_with
from .new_folder import check_new, new_folder
from .triton_text import config, readme

TYPES: Final = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
"""The manifest's types that Triton's TensorRT backend knows, by Triton's name."""
PLAN: Final = "model.plan"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def export(
    bundle: Path, repository: Path, name: str | None = None, variant: str | None = None
) -> Path:
    """Write the bundle into a Triton repository as one model, whole or not at all.

    Args:
        bundle: its folder or its manifest.
        repository: Triton's model repository; made when it is not there.
        name: what the model is called there; the bundle's model otherwise.
        variant: which of the bundle's; a model of Triton's has one shape.

    Returns:
        the model's folder.

    Raises:
        UsageError: Triton cannot serve this bundle; the message says why.
        OutputError: the repository cannot be written, or has such a model already.
        DamagedBundle: the bundle is incomplete.
    """
    manifest, folder = read(bundle)
    manifest = variant_of(manifest, variant)
    check_servable(manifest, bundle)
    name = checked_name(name or manifest.model.name)
    out = repository / name
    check_new(out)
    files = plan_files(manifest, folder)
    check_space(out, 0 if _linkable(folder, repository) else sum(_sizes(manifest)))
    with new_folder(out) as model:
        _fill(model, manifest, files, name)
    return out


def check_servable(manifest: Manifest, bundle: Path) -> None:
    """Refuse what Triton's TensorRT backend cannot serve.

    Raises:
        UsageError: with every reason, and the command that converts what can be served.
    """
    reasons: list[str] = []
    options: dict[str, str | None] = {}
    if manifest.weights_mode == "external":
        reasons.append(
            f"its {len(manifest.weights)} external weights are inputs of the engines, and Triton "
            "takes inputs from the request alone, the same for all ranks"
        )
        options["--weights-mode"] = "embedded"
    if manifest.backend.name != "tensorrt":
        reasons.append(
            f"its engines are of {manifest.backend.name} {manifest.backend.version}, and Triton's "
            "backend loads those of tensorrt"
        )
        options["--backend"] = "tensorrt"
    if manifest.dynamic is not None:
        reasons.append(
            f"its engines are for a range of sizes ({manifest.dynamic.words}), which was never "
            "tried there"
        )
        options["--dynamic"] = None
    if manifest.pieces:
        reasons.append(
            f"every rank has {len(manifest.pieces)} engines, and a model of Triton's is one"
        )
        options["--split-after"] = None
    if reasons:
        out = f"{bundle.absolute().name}-triton"
        command = command_with(manifest.command, {**options, "--out": out})
        raise UsageError(
            f"Triton cannot serve {bundle}: {'; and '.join(reasons)}.",
            hint=f"convert for it: {command}",
        )
    for io in manifest.io:
        if problem := _io_problem(io):
            raise UsageError(f"Triton cannot serve {bundle}: the {io.mode} {io.name} {problem}.")


def _io_problem(io: Io) -> str | None:
    """Why Triton has no place for a binding; its ``ValidateIOShape`` asks for the two shapes."""
    if io.dtype not in TYPES:
        return f"is of type {io.dtype}; Triton's backend knows {', '.join(TYPES)}"
    if not io.shape:
        return "has no dimension; without batching Triton needs at least one"
    if 0 in io.shape:
        return f"has the shape {io.shape}; Triton needs dimensions of 1 or more"
    return None


def checked_name(name: str) -> str:
    """A name that can be a folder's, and a model's in a URL.

    Raises:
        UsageError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: Triton's model name is a folder's name and part of a URL.",
            hint="use letters, digits, '_', '-' and '.'.",
        )
    return name


def plan_files(manifest: Manifest, folder: Path) -> dict[str, Path]:
    """The bundle's file behind every name of the model's version folder.

    A shared engine is one ``model.plan``. Engines of their own are one file a rank, and rank 0's
    is ``model.plan`` too, for which Triton looks before it asks the backend.

    Raises:
        DamagedBundle: an engine is missing, or not of its size.
    """
    engines = sorted(manifest.engines, key=lambda engine: engine.rank)
    for engine in engines:
        path = folder / engine.file
        if not path.is_file() or path.stat().st_size != engine.bytes:
            raise DamagedBundle(
                f"{path} is missing or not of {engine.bytes} bytes.",
                hint=f"cp-convert verify {folder}",
            )
    files = {PLAN: folder / engines[0].file}
    if manifest.layout == "per-rank" and manifest.world > 1:
        files |= {f"{PLAN}.rank{engine.rank}": folder / engine.file for engine in engines}
    return files


def _fill(model: Path, manifest: Manifest, files: dict[str, Path], name: str) -> None:
    (model / "1").mkdir()
    for target, file in files.items():
        place(file, model / "1" / target)
    (model / "config.pbtxt").write_text(config(manifest, name, TYPES))
    (model / "README.md").write_text(readme(manifest, name))


def _linkable(folder: Path, repository: Path) -> bool:
    """Whether the engines may be linked: both are on one file system."""
    there = repository.absolute()
    while not there.exists():
        there = there.parent
    return folder.stat().st_dev == there.stat().st_dev


def _sizes(manifest: Manifest) -> list[int]:
    return [engine.bytes for engine in manifest.engines] + [manifest.engines[0].bytes]
