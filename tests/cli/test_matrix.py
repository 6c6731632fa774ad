"""`--matrix`: the jobs of a file, what they share, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cp_convert import bundle as bundles
from cp_convert.bundle.difference import differences
from cp_convert.model import load

Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
QUICK = 'precision = "fp32"\nproof = "program"\n'


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the strategy of every job that loads its model."""
    from cp_convert import pipeline

    known: list[str] = []

    def counted(job):
        known.append(job.strategy)
        return load.load(job)

    monkeypatch.setattr(pipeline, "load", counted)
    return known


def written(text: str) -> Path:
    path = Path("jobs.toml")
    path.write_text(text)
    return path


def test_jobs_of_one_model_load_it_once_and_make_what_each_makes_alone(
    run: Run, model_file: Write, loads: list[str]
) -> None:
    model_file()
    jobs = written(
        f'model = "model.py"\nworld = 2\n{QUICK}[matrix]\nstrategy = ["ulysses", "ring"]\n'
        '[[job]]\nstrategy = "allgather-kv"\nworld = 4\nout = "wide"\n'
    )
    code, out, err = run("convert", "--matrix", jobs, "--no-cache")
    assert (code, loads) == (0, ["ulysses"])
    assert "3 of 3 jobs converted." in out
    assert out.count("the model of a job before") == 2
    assert "job 3 of 3: model into wide" in err
    alone = ("-p", "fp32", "--proof", "program", "--no-cache", "-q", "--out")
    for folder, args in (("model-ring-w2", ("ring", "-w", 2)), ("wide", ("allgather-kv", "-w", 4))):
        assert run("convert", "model.py", "-s", *args, *alone, f"{folder}-alone")[0] == 0
        both = [bundles.read(Path(one))[0] for one in (folder, f"{folder}-alone")]
        assert {one.part for one in differences(*both)} <= {"files"}
        assert both[0].proof.ranks == both[1].proof.ranks


def test_the_same_jobs_again_are_recalled(run: Run, model_file: Write) -> None:
    model_file()
    jobs = written(
        f'model = "model.py"\nworld = 2\n{QUICK}cache = "kept"\n'
        '[matrix]\nstrategy = ["ulysses", "ring"]\n'
    )
    assert run("convert", "--matrix", jobs, "-q")[0] == 0
    first = [bundles.read(Path(f"model-{one}-w2"))[0] for one in ("ulysses", "ring")]
    code, out, _ = run("convert", "--matrix", jobs, "--force", "--json")
    assert code == 0
    again = [bundles.read(Path(f"model-{one}-w2"))[0] for one in ("ulysses", "ring")]
    assert [one.proof.recalled for one in (*first, *again)] == [False, False, True, True]
    assert all(not differences(*both) for both in zip(first, again, strict=True))
    assert [one["shared"] for one in json.loads(out)["jobs"]] == [False, True]


def test_a_new_job_beside_a_recalled_one_is_measured(
    run: Run, model_file: Write, loads: list[str]
) -> None:
    model_file()
    text = f'model = "model.py"\nworld = 2\n{QUICK}cache = "kept"\n[matrix]\nstrategy = '
    assert run("convert", "--matrix", written(text + '["ulysses"]'), "-q")[0] == 0
    loads.clear()
    jobs = written(text + '["ulysses", "ring"]')
    assert run("convert", "--matrix", jobs, "-q", "--force")[0] == 0
    ulysses, ring = (bundles.read(Path(f"model-{one}-w2"))[0] for one in ("ulysses", "ring"))
    assert (ulysses.proof.recalled, ring.proof.recalled) == (True, False)
    assert ring.proof.ranks[0].max < 1e-5


def test_what_fails_keeps_no_other_from_being_done(
    run: Run, model_file: Write, loads: list[str]
) -> None:
    path = model_file()
    path.with_name("broken.py").write_text("def build_model(): return 1\n")
    jobs = written(
        f"world = 2\n{QUICK}"
        '[[job]]\nmodel = "model.py"\nstrategy = "ulysses"\nout = "a"\n'
        '[[job]]\nmodel = "broken.py"\nstrategy = "ulysses"\nout = "b"\n'
        '[[job]]\nmodel = "model.py"\nstrategy = "ring"\nout = "c"\n'
        '[[job]]\nmodel = "model.py"\nstrategy = "ring"\nout = "d"\nprecision = "bf16"\n'
    )
    code, out, err = run("convert", "--matrix", jobs, "--no-cache", "--summary", "told.xml")
    assert code == 2
    assert loads == ["ulysses", "ulysses", "ring"]  # a for c too, broken.py, d: another precision
    assert "job 2: " in err
    assert "3 of 4 jobs converted." in out
    assert [Path(one).is_dir() for one in "abcd"] == [True, False, True, True]
    cases = ElementTree.parse("told.xml").findall("testsuite/testcase")
    assert sum(case.find("failure") is not None for case in cases) == 1
    code, out, _ = run("convert", "--matrix", jobs, "--no-cache", "--json")
    document = json.loads(out)
    assert (code, document["status"]) == (2, "error")  # a, c and d are there already
    assert [one["exit_code"] for one in document["jobs"]] == [2, 2, 2, 2]


def test_flags_win_over_the_file_and_the_file_over_nothing(run: Run, model_file: Write) -> None:
    model_file()
    jobs = written('strategy = "ring"\nworld = 2\nproof = "none"\n[[job]]\nworld = 3\n')
    code, _, _ = run("convert", "model.py", "--matrix", jobs, "-s", "ulysses", "--no-cache", "-q")
    assert code == 0
    (made,) = (one for one in Path().iterdir() if one.is_dir() and one.name.startswith("model-"))
    assert made.name == "model-ulysses-w3"
    assert bundles.read(made)[0].proof.status == "skipped"


HEAD = 'model = "model.py"\nworld = 2\n'


TWO = 2 * '[[job]]\nstrategy = "ring"\nout = "{}"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no jobs"),
        (HEAD, "has no jobs"),
        (HEAD + "[matrix]\nstrategy = []", "has no jobs"),
        (HEAD + '[matrix]\nstrategy = "ring"', "has a list of values"),
        (HEAD + "job = 3", "jobs are tables"),
        (HEAD + "[[job]]\nstrategy = 3", "job 1: strategy = 3 is not what"),
        (HEAD + '[[job]]\nstrategy = "rings"', "'rings' is not one of"),
        (HEAD + '[[job]]\nstrategies = "ring"', "no option 'strategies'"),
        (HEAD + '[[job]]\nstrategy = "ring"\nquiet = true', "--quiet is for the whole run"),
        (HEAD + '[[job]]\nstrategy = "ring"\nmatrix = "jobs.toml"', "no option 'matrix'"),
        (HEAD + "[[job]]", "job 1: Missing option '-s' / '--strategy'"),
        ('[[job]]\nstrategy = "ring"\nworld = 2', "job 1 names no model"),
        (HEAD + '[[job]]\nmodel = 3\nstrategy = "ring"', "job 1 names no model"),
        (HEAD + '[[job]]\nmodel = "absent.py"\nstrategy = "ring"', "there is no file absent.py"),
        (HEAD + '[matrix]\nstrategy = ["ring", "ring"]', "jobs 1 and 2 both write to"),
        (HEAD + '[[job]]\nstrategy = "ring"\nworld = 0', "job 1: --world 0"),
        (HEAD + TWO.format("a", "./b/../a"), "jobs 1 and 2 both write to"),
        (HEAD + TWO.format("a", "a/b"), "jobs 1 and 2 write to a and a/b, one within the other"),
        ("model = ", "is not valid TOML"),
    ],
)
def test_a_file_that_is_wrong_is_told_before_anything_is_done(
    run: Run, model_file: Write, text: str, message: str
) -> None:
    model_file()
    jobs = written(text)
    code, out, err = run("convert", "--matrix", jobs)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert {one.name for one in Path().iterdir()} == {"jobs.toml", "model.py"}


def test_combinations_have_folders_of_their_own(run: Run, model_file: Write) -> None:
    model_file()
    jobs = written(
        HEAD + 'strategy = "ring"\nproof = "none"\n[matrix]\nprecision = ["fp32", "bf16"]\n'
        "world = [1, 2]\n"
    )
    assert run("convert", "--matrix", jobs, "--no-cache", "-q")[0] == 0
    assert {one.name for one in Path().iterdir() if one.is_dir()} >= {
        f"model-ring-w{world}-{precision}" for world in (1, 2) for precision in ("fp32", "bf16")
    }


def test_a_model_is_asked_for_without_a_matrix(run: Run) -> None:
    code, _, err = run("convert", "-s", "ring", "-w", 2)
    assert code == 2
    assert "Missing argument 'MODEL'" in err


def test_an_interrupt_leaves_what_is_done(
    run: Run, model_file: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cp_convert import matrix

    whole = matrix.convert

    def interrupted(job, *rest):
        if job.strategy == "ring":
            raise KeyboardInterrupt
        return whole(job, *rest)

    monkeypatch.setattr(matrix, "convert", interrupted)
    model_file()
    jobs = written(HEAD + QUICK + '[matrix]\nstrategy = ["ulysses", "ring"]')
    code, _, err = run("convert", "--matrix", jobs, "--no-cache", "--summary", "told.md")
    assert code == 130
    assert "1 of 2 jobs are done and stay." in err
    assert Path("model-ulysses-w2").is_dir()
    assert not Path("model-ring-w2").exists()
    assert "job 1: model-ulysses-w2" in Path("told.md").read_text()
