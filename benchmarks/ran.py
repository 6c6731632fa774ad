"""A bundle that is run by ``cp-convert run``: a process a rank, over gloo, by torch's executor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def ran(bundle: Path) -> dict[str, Any]:
    """How far ranks are apart, and the outputs from the dense model; or what was said.

    In this process, so that what :mod:`.formats` has put in diffusers' place is there.
    """
    from click.testing import CliRunner

    from cp_convert.cli.root import cli
    from cp_convert.errors import ConvertError

    words = ["run", str(bundle), "--executor", "torch", "--devices", "cpu", "--json"]
    done = CliRunner().invoke(cli, words)
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
