"""What a calibration measured, as a hardware file. No torch.

In: what rank 0 reported, and the published rates of the same GPU. Out: a hardware with curves, and
its TOML, which :func:`.hardware.read` takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ..errors import UsageError
from ..runtime.curve import Curve, Curves
from .hardware import Hardware, Measured, names, read


def like(gpu: str, name: str | None) -> Hardware:
    """The published rates of what was measured: those named, else those whose title names it.

    Args:
        gpu: as the driver calls it, such as ``NVIDIA H200``.
        name: of a hardware, or a TOML file.

    Raises:
        UsageError: none is named, and none or several are known.
    """
    if name is not None:
        return read(name)
    words = gpu.upper().replace("-", " ").split()
    known = {one: read(one).title.upper().replace("-", " ").split() for one in names()}
    fitting = [one for one, title in known.items() if all(word in title for word in words[:2])]
    if len(fitting) != 1:
        raise UsageError(
            f"which published rates belong to {gpu}? {', '.join(fitting) or 'None'} would fit.",
            hint=f"--like one of {', '.join(names())}, or a TOML file: it says how large the "
            "memory is and what joins the GPUs.",
        )
    return read(fitting[0])


def measured(found: Mapping[str, Any], base: Hardware, by: str) -> Hardware:
    """The hardware with what was measured on it.

    Args:
        found: see :class:`cp_convert.runtime.calibrate.Found`.
        base: published rates of the same GPU.
        by: what is to be known of how it was measured.
    """
    known = (field.name for field in msgspec.structs.fields(Curves))
    curves = msgspec.convert({"by": by} | {name: found[name] for name in known}, Measured)
    return msgspec.structs.replace(base, measured=curves)


def to_toml(hardware: Hardware) -> str:
    """The text of a hardware file; :func:`.hardware.read` gives back the same."""
    rates = msgspec.to_builtins(hardware)
    lines = [f"{key} = {_value(rates[key])}" for key in rates if key != "measured"]
    if hardware.measured is not None:
        lines += _measured(hardware.measured)
    return "\n".join(lines) + "\n"


def _measured(curves: Measured) -> list[str]:
    lines = ["", "[measured]  # times in microseconds", f"by = {_value(curves.by)}"]
    lines += [f"processors = {curves.processors}"]
    lines += ["# products in bfloat16: 1e9 operations", *_curve("matmul", curves.matmul)]
    lines += ["# bytes read and written: 1e6", *_curve("copies", curves.copies)]
    lines += _curve("fused", curves.fused)
    lines += ["", "[measured.attention]  # in bfloat16, by head size: 1e9 operations"]
    for dim, curve in curves.attention.items():
        lines += _curve(dim, curve)
    for kind, by_size in curves.collectives.items():
        lines += ["", f"[measured.collectives.{kind}]  # by ranks: 1e6 bytes that one sends"]
        for size, curve in by_size.items():
            lines += _curve(size, curve)
    return lines


def _value(value: object) -> str:
    """Strings are written alike in JSON and TOML but for what no name of a GPU has."""
    return json.dumps(value) if isinstance(value, str) else str(value)


def _curve(name: str, curve: Curve) -> list[str]:
    pairs = ", ".join(f"[{size:g}, {spent:g}]" for size, spent in curve)
    return [f"{name} = [{pairs}]"]
