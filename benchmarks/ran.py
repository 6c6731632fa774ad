"""A bundle that is run by ``cp-convert run``: a process a rank, over gloo, by torch's executor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def ran(bundle: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """How far ranks are apart, and the outputs from the dense model; or what was said.

    In this process, so that what :mod:`.formats` has put in diffusers' place is there.

    Args:
        bundle: that is run.
        inputs: the model's example inputs, by which scales were made that are constant.
    """
    import torch
    from click.testing import CliRunner
    from safetensors.torch import save_file

    from cp_convert import bundle as bundles
    from cp_convert.cli.root import cli
    from cp_convert.errors import ConvertError
    from cp_convert.runtime.arguments import inputs_of

    file = bundle.with_suffix(".safetensors")
    wanted = inputs_of(bundles.read(bundle)[0])
    given = {n: inputs[n].to(getattr(torch, one.dtype)) for n, one in wanted.items()}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, file)
    words = ["run", str(bundle), "--executor", "torch", "--devices", "cpu", "--json"]
    done = CliRunner().invoke(cli, [*words, "--inputs", str(file)])
    if isinstance(done.exception, ConvertError):
        return {"failed": " ".join(str(done.exception).split()).replace(f"{bundle.parent}/", "")}
    if done.exception is not None:
        raise done.exception
    told = json.loads(done.stdout)
    check = told["check"]
    found = {"apart": max(max(one["apart"]) for one in told["ranks"])}
    if check["reason"] is not None:
        return found | {"not_compared": check["reason"].replace(f"{bundle.parent}/", "")}
    return found | {"error": check["error"], "bound": check["bound"]}
