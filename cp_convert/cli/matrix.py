"""``--matrix``: a TOML file of jobs in; one conversion each, one report and one exit code out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from ..backends import Backend, select
from ..bundle.ended import Ended
from ..errors import ConvertError, UsageError
from ..job import Job
from ..progress import Progress
from . import config, options
from .summary import summarised

if TYPE_CHECKING:  # torch and rich are imported late
    from collections.abc import Callable

    from ..show.screen import Screen

option: Final = click.option(
    "--matrix", type=click.Path(path_type=Path), metavar="FILE",
    help="A TOML file of several jobs: these options for all, [matrix] with lists of values whose "
    "combinations are a job each, and [[job]] for single ones. Flags win. What fails keeps no "
    "other from being done.",
)  # fmt: skip

_OWN: Final = frozenset({"matrix", "config", "summary", "as_json", "quiet", "verbose"})
"""Options that are the whole run's."""


_NAMED: Final = frozenset({"model", "strategy", "world", "cfg", "tp"})
"""Options that a bundle's usual folder is named after."""


def jobs_of(path: Path, made: Callable[[dict[str, Any]], Job]) -> list[tuple[Job, Backend]]:
    """All jobs of the file, checked as far as can be without loading a model.

    Args:
        path: the file.
        made: a job from the options of ``convert`` by name.

    Raises:
        UsageError: the file cannot be read, has no jobs, or names what no job can be; two jobs
            write to the same folder.
        BackendMissing: a job's is not installed.
    """
    context = click.get_current_context()
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and name not in _OWN
    }
    jobs: list[tuple[Job, Backend]] = []
    for index, (values, suffix) in enumerate(_told(config.read(path, "--matrix"), path)):
        where = f"--matrix {path}, job {index + 1}"
        with _blamed(where), _context(context, values, given, where) as own:
            asked = {name: v for name, v in {**own.params, **given}.items() if name not in _OWN}
            job = made(asked | {"model": Path(asked["model"])})
            if asked["out"] is None:
                job = replace(job, out=job.out.with_name(job.out.name + suffix))
            jobs.append((job, select(job.backend, job.compute_capabilities)))
    _check_apart([job for job, _ in jobs], path)
    return jobs


def _told(values: Mapping[str, Any], path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """What the file says of every job, combinations first, and what its folder's name ends in."""
    shared = {name: one for name, one in values.items() if name not in ("matrix", "job")}
    lists, single = values.get("matrix", {}), values.get("job", [])
    if not isinstance(lists, dict) or not all(isinstance(one, list) for one in lists.values()):
        raise UsageError(
            f"--matrix {path}: [matrix] has a list of values for every option.",
            hint='[matrix] strategy = ["ulysses", "ring"].',
        )
    if not isinstance(single, list) or not all(isinstance(one, dict) for one in single):
        raise UsageError(f"--matrix {path}: jobs are tables, each under [[job]].")
    if (not lists and not single) or not all(lists.values()):
        raise UsageError(
            f"--matrix {path} has no jobs.", hint="[matrix] with lists, or [[job]] tables."
        )
    if lists:
        for combined in product(*lists.values()):
            own = dict(zip(lists, combined, strict=True))
            yield {**shared, **own}, "".join(_words(name, value) for name, value in own.items())
    for one in single:
        yield {**shared, **one}, ""


def _words(name: str, value: object) -> str:
    """What a combination's folder is told apart by, beside what its name has anyway."""
    if name in _NAMED:
        return ""
    text = value if isinstance(value, str) else f"{name}-{value}"
    return "-" + re.sub(r"[^\w.]+", "-", text).strip("-")


def _context(
    context: click.Context, values: dict[str, Any], given: dict[str, Any], where: str
) -> click.Context:
    """One of ``convert`` for this job alone, whose options' defaults are the file's."""
    model = given.get("model") or values.pop("model", None)
    if not isinstance(model, str | Path):
        raise UsageError(
            f"{where} names no model.", hint='model = "flux.1-dev", or the path of a Python file.'
        )
    known = config.defaults(context.command, values, where)
    if wrong := sorted(known.keys() & _OWN):
        raise UsageError(f"{where}: --{wrong[0].removeprefix('as_')} is for the whole run.")
    defaults = {**(context.default_map or {}), **known}
    return context.command.make_context(
        context.info_name, [str(model)], parent=context.parent, default_map=defaults
    )


@contextmanager
def _blamed(where: str) -> Iterator[None]:
    """What is wrong with a job is told with its place."""
    try:
        yield
    except click.ClickException as error:
        raise UsageError(f"{where}: {error.format_message()}") from error
    except ConvertError as error:
        if not error.message.startswith("--matrix"):
            error.message = f"{where}: {error.message}"
        raise


def _check_apart(jobs: list[Job], path: Path) -> None:
    folders = [job.out.resolve() for job in jobs]
    for (first, one), (second, other) in combinations(enumerate(folders), 2):
        if one == other:
            what = f"both write to {jobs[second].out}"
        elif one in other.parents or other in one.parents:
            what = f"write to {jobs[first].out} and {jobs[second].out}, one within the other"
        else:
            continue
        raise UsageError(
            f"--matrix {path}: jobs {first + 1} and {second + 1} {what}.",
            hint="give one of them another `out`.",
        )


def run(jobs: list[tuple[Job, Backend]], path: Path, summary: Path | None, screen: Screen) -> int:
    """Convert all and report.

    Returns:
        the exit code: that of the first job of the file that failed, else 0.
    """
    from ..show.matrix import case_of, reported, told  # late: rich

    ended: list[Ended] = []
    with summarised(summary, f"convert --matrix {path}") as cases:
        try:
            for one in _converted(jobs, screen):
                ended.append(one)
                cases.append(case_of(one))
                told(screen, one)
        except KeyboardInterrupt:
            done = sum(one.error is None for one in ended)
            click.echo(f"Interrupted; {done} of {len(jobs)} jobs are done and stay.", err=True)
            return 130
    ended.sort(key=lambda one: one.index)
    reported(screen, ended)
    return next((one.error.exit_code for one in ended if one.error is not None), 0)


def _converted(jobs: list[tuple[Job, Backend]], screen: Screen) -> Iterator[Ended]:
    from ..show.matrix import beginning  # late: rich
    from ..show.progress import shown

    @contextmanager
    def shown_as(index: int, job: Job) -> Iterator[Progress]:
        beginning(screen, index, len(jobs), job)
        with shown(screen) as progress:
            yield progress

    with options.others_aside(screen):
        from ..matrix import convert_all  # late: torch

        yield from convert_all(jobs, shown_as)
