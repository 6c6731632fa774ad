"""What a command found, as a CI system reads it: JUnit's XML, or Markdown.

JUnit's format as its users share it: https://github.com/testmoapp/junitxml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from ..bundle.manifest import Manifest, Proof
from ..bundle.variants import all_variants
from ..errors import ConvertError

SUFFIXES: Final = (".xml", ".md")
_NOT_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no way to write, section 2.2."""


@dataclass(frozen=True)
class Case:
    """One thing that was looked at or done.

    Attributes:
        name: what.
        seconds: that it took.
        text: what was found, for a person.
        failure: what is wrong with it; ``None``: nothing.
        skipped: it was not done, by request; ``text`` says so.
    """

    name: str
    seconds: float = 0.0
    text: str = ""
    failure: str | None = None
    skipped: bool = False


def failure_of(error: ConvertError) -> str:
    """An error as a case's failure, a line each for what, where and what to try."""
    told = (f"{error.title}: {error.message}", error.where, error.hint)
    return "\n".join(one for one in told if one)


def cases_of(manifest: Manifest) -> list[Case]:
    """A conversion that came to its end: one case a stage, and the verdict on every variant."""
    stages = [Case(name, seconds) for name, seconds in manifest.timings.items()]
    verdicts = [_proof(one.proof, one.request.variant) for one in all_variants(manifest)]
    return [*stages, *verdicts]


def _proof(proof: Proof, variant: str | None) -> Case:
    name = "verdict" if variant is None else f"verdict on {variant}"
    if proof.status == "skipped":
        return Case(name, text="the proof was skipped by request", skipped=True)
    assert proof.bound is not None
    worst = max(error.max for error in proof.ranks)
    text = f"relative error {worst:.1e}, bound {proof.bound.max:.1e} ({proof.level})"
    return Case(name, text=text)


def summary(path: Path, suite: str, cases: Sequence[Case]) -> str:
    """The text of the file ``path``, by its suffix, one of :data:`SUFFIXES`."""
    return _junit(suite, cases) if path.suffix == ".xml" else _markdown(suite, cases)


def _junit(suite: str, cases: Sequence[Case]) -> str:
    failed = sum(case.failure is not None for case in cases)
    skipped = sum(case.skipped for case in cases)
    head = (
        f'name="{_xml(suite)}" tests="{len(cases)}" failures="{failed}" errors="0" '
        f'skipped="{skipped}" time="{sum(case.seconds for case in cases):.3f}"'
    )
    rows = "".join(_testcase(suite, case) for case in cases)
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n<testsuite {head}>\n{rows}'
        "</testsuite>\n</testsuites>\n"
    )


def _testcase(suite: str, case: Case) -> str:
    told = f"<system-out>{_xml(case.text)}</system-out>" if case.text else ""
    if case.failure is not None:
        first = case.failure.splitlines()[0] if case.failure else ""
        told = f'<failure message="{_xml(first)}">{_xml(case.failure)}</failure>{told}'
    elif case.skipped:
        told = f'<skipped message="{_xml(case.text)}"/>'
    return (
        f'<testcase classname="{_xml(suite)}" name="{_xml(case.name)}" '
        f'time="{case.seconds:.3f}">{told}</testcase>\n'
    )


def _xml(text: str) -> str:
    return escape(_NOT_XML.sub("\ufffd", text))


def _markdown(suite: str, cases: Sequence[Case]) -> str:
    failed = sum(case.failure is not None for case in cases)
    verdict = f"{failed} of {len(cases)} failed" if failed else "passed"
    rows = "".join(
        f"| {_cell(case.name)} | {_state(case)} | {case.seconds:.1f} | "
        f"{_cell(case.failure or case.text)} |\n"
        for case in cases
    )
    head = "| what | result | seconds | |\n|---|---|---:|---|\n"
    return f"### {_cell(suite)}: {verdict}\n\n{head}{rows}"


def _state(case: Case) -> str:
    return "**failed**" if case.failure is not None else "skipped" if case.skipped else "passed"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, in one cell of a table."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(text)).replace("\n", "<br>")
