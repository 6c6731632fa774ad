"""Several conversions: each as it ends, and all of them as one table, document or summary."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.markup import escape

from ..bundle.ended import Ended
from ..bundle.variants import all_variants
from ..job import Job
from .screen import Screen
from .summary import Case, failure_of
from .words import plural, table_of


def beginning(screen: Screen, index: int, count: int, job: Job) -> None:
    """Which job it is whose progress follows."""
    if screen.verbosity >= 0:
        text = f"job {index + 1} of {count}: {job.name} into {job.out}"
        screen.err.print(escape(text), soft_wrap=True)


def told(screen: Screen, ended: Ended) -> None:
    """A job that failed, at once; what it made is told in the end."""
    if ended.error is not None:
        screen.said(ended.error, f"job {ended.index + 1}: ")


def reported(screen: Screen, all_ended: Sequence[Ended]) -> None:
    """All jobs, in the file's order."""
    if screen.as_json:
        failed = any(one.error is not None for one in all_ended)
        jobs = [_document(one) for one in all_ended]
        screen.document({"status": "error" if failed else "ok", "jobs": jobs})
        return
    if screen.verbosity < 0:
        return
    table = table_of("", "job", "bundle", "result", "seconds", right=("job", "seconds"))
    for one in all_ended:
        colour = "green" if one.error is None else "red"
        table.add_row(
            str(one.index + 1),
            escape(str(one.job.out)),
            f"[{colour}]{escape(_result(one))}[/]",
            f"{one.seconds:.1f}",
        )
    screen.out.print(table)
    good = sum(one.error is None for one in all_ended)
    screen.out.print(f"{good} of {plural(len(all_ended), 'job')} converted.")


def _result(ended: Ended) -> str:
    if ended.manifest is None:
        assert ended.error is not None
        return f"{ended.error.title} (exit {ended.error.exit_code})"
    proofs = [one.proof for one in all_variants(ended.manifest)]
    if proofs[0].status == "skipped":
        return f"converted, not proven{_sharing(ended)}"
    worst = max(error.max for proof in proofs for error in proof.ranks)
    return f"proven, error {worst:.1e}{_sharing(ended)}"


def _sharing(ended: Ended) -> str:
    return "; the model of a job before" if ended.is_shared else ""


def _document(ended: Ended) -> dict[str, object]:
    told: dict[str, object] = {
        "job": ended.index + 1,
        "bundle": str(ended.job.out),
        "status": "ok" if ended.error is None else "error",
        "seconds": round(ended.seconds, 3),
        "shared": ended.is_shared,
    }
    if ended.error is not None:
        return {**told, "exit_code": ended.error.exit_code, "error": ended.error.as_dict()}
    return {**told, "manifest": msgspec.to_builtins(ended.manifest)}


def case_of(ended: Ended) -> Case:
    """A job as a CI system's case."""
    name = f"job {ended.index + 1}: {ended.job.out}"
    if (error := ended.error) is None:
        return Case(name, ended.seconds, _result(ended))
    return Case(name, ended.seconds, failure=failure_of(error))
