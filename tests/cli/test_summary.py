"""`--summary`: what a CI system reads of a command that succeeded or failed."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from cp_convert import bundle
from cp_convert.cli import cli
from cp_convert.errors import UsageError
from cp_convert.show.summary import Case, cases_of, summary
from tests.bundle.test_folder import written


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], standalone_mode=False)


def suite(text: str) -> ElementTree.Element:
    found = ElementTree.fromstring(text).find("testsuite")
    assert found is not None
    return found


def test_verify_writes_what_is_whole_and_what_is_not(tmp_path: Path) -> None:
    out, told = written(tmp_path / "out"), tmp_path / "told.xml"
    assert run("verify", out, "--summary", told).exit_code == 0
    assert suite(told.read_text()).attrib["failures"] == "0"
    (out / "rank1.engine").write_bytes(b"x")
    assert run("verify", out, "--summary", told).exception is not None
    found = suite(told.read_text())
    assert (found.attrib["tests"], found.attrib["failures"]) == ("4", "1")
    failed = found.find("testcase[failure]")
    assert failed is not None
    assert failed.attrib["name"] == "rank1.engine"
    run("verify", tmp_path / "absent", "--summary", told)
    assert suite(told.read_text()).attrib["failures"] == "1"


def test_a_conversion_that_is_refused_is_a_failure(tmp_path: Path) -> None:
    told = tmp_path / "told.md"
    done = run("convert", "absent.py", "-s", "ring", "-w", 2, "--summary", told)
    assert isinstance(done.exception, UsageError)
    assert "1 of 1 failed" in told.read_text()
    assert "there is no file absent.py" in told.read_text()


def test_a_conversion_is_its_stages_and_its_verdict(tmp_path: Path) -> None:
    cases = cases_of(bundle.read(written(tmp_path / "out"))[0])
    assert [case.name for case in cases] == ["trace", "verdict"]
    assert cases[1].text == "relative error 1.0e-07, bound 1.0e-07 (program)"


def test_nothing_leaves_its_place() -> None:
    odd = [Case('a|b<c>&"\x00', failure="x\n]]><y> | `z`")]
    found = suite(summary(Path("a.xml"), 'one "two"', odd))
    assert found.attrib["name"] == 'one "two"'
    assert [case.attrib["name"] for case in found] == ['a|b<c>&"\ufffd']
    row = summary(Path("a.md"), "one", odd).splitlines()[-1]
    assert row.replace(r"\|", "").count("|") == 5
    assert "<y>" not in row


@pytest.mark.parametrize("name", ["told.txt", "absent/told.xml"])
def test_a_file_that_could_not_be_written_is_told_first(tmp_path: Path, name: str) -> None:
    done = run("verify", written(tmp_path / "out"), "--summary", tmp_path / name)
    assert isinstance(done.exception, UsageError)
    assert "--summary" in done.exception.message
