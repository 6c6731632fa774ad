"""What `cp-convert diff` calls a difference, and what not."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from cp_convert import bundle
from cp_convert.bundle import manifest as m
from cp_convert.bundle.difference import differences
from cp_convert.cli import cli
from tests.bundle.test_folder import written

replace = msgspec.structs.replace


def plain(tmp_path: Path) -> m.Manifest:
    return bundle.read(written(tmp_path / "a"))[0]


def weight(sha256: str, file: str = "weights.safetensors") -> m.Weight:
    return m.Weight(
        name="w", dtype="float16", shape=[2], file=file, offset=8, bytes=4, sha256=sha256
    )


def told(before: m.Manifest, after: m.Manifest) -> list[tuple[str, str]]:
    return [(one.part, one.name) for one in differences(before, after)]


def test_when_and_where_is_no_difference(tmp_path: Path) -> None:
    one = replace(plain(tmp_path), weights=[weight("0" * 64)])
    later = replace(
        one, created="2030", command="other", timings={"trace": 9.0},
        weights=[weight("0" * 64, "/elsewhere/w.safetensors")],
        proof=replace(one.proof, seconds=9.0, recalled=True),
        engines=[replace(engine, recalled=True) for engine in one.engines],
        model=replace(one.model, source="/elsewhere/x.py"),
    )  # fmt: skip
    assert told(one, later) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"strategy": "ring"}, ("strategy", "name")),
        ({"torch": "3"}, ("release", "torch")),
        ({"precision": "bf16"}, ("model", "precision")),
        ({"collectives": []}, ("collectives", "all_to_all by ALL_TO_ALL")),
        ({"frozen": []}, ("inputs", "frozen flag")),
        ({"plan": []}, ("strategy", "plan 0")),
        ({"weights_mode": "external"}, ("weights", "mode")),
        ({"weights": [weight("1" * 64)]}, ("weights", "w")),
    ],
)
def test_each_part_is_told(
    tmp_path: Path, change: dict[str, Any], expected: tuple[str, str]
) -> None:
    one = replace(plain(tmp_path), weights=[weight("0" * 64)])
    assert told(one, replace(one, **change)) == [expected]


def test_proof_and_engines_are_told(tmp_path: Path) -> None:
    one = plain(tmp_path)
    proof = replace(one.proof, algebra=[m.Error(max=1e-6, rms=1e-7)])
    assert told(one, replace(one, proof=proof)) == [("proof", "algebra")]
    first, second = one.engines
    larger = [first, replace(second, bytes=8, sha256="1" * 64)]
    assert told(one, replace(one, engines=larger)) == [
        ("sizes", "rank 1"), ("files", "rank1.engine"),
    ]  # fmt: skip


def test_the_command_answers_by_exit_code(tmp_path: Path) -> None:
    same, twin = written(tmp_path / "a"), written(tmp_path / "b")
    other = written(tmp_path / "c", b"other!")
    run = CliRunner().invoke
    equal = run(cli, ["diff", str(same), str(twin)], standalone_mode=False)
    assert equal.return_value == 0
    assert "are equal" in equal.output
    changed = run(cli, ["diff", str(same), str(other), "--json"], standalone_mode=False)
    assert changed.return_value == 1
    document = json.loads(changed.output)
    assert document["status"] == "different"
    before, after = (bundle.read(out)[0].engines for out in (same, other))
    assert document["differences"] == [
        {"part": "files", "name": f"rank{r}.engine", "before": b.sha256, "after": a.sha256}
        for r, (b, a) in enumerate(zip(before, after, strict=True))
    ]
