"""One program and one engine for a range of sizes: what is made, found again, told and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cp_convert import bundle as bundles
from cp_convert import making
from cp_convert.backends import select
from cp_convert.errors import CannotLift
from cp_convert.job import Job, Span
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from tests.runtime.bundles import FLUX, QWEN, WAN, converted

Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
SIZED = (
    ("def example_inputs():", "def example_inputs(tokens=16, batch=1):"),
    ("torch.randn(1, 16, 8)", "torch.randn(batch, tokens, 8)"),
)
BASE = ("-s", "ulysses", "-w", 2, "--weights-mode", "external", "-p", "fp32", "-q")


@pytest.mark.usefixtures("forked_ranks")
def test_a_bundle_for_a_range(run: Run, model_file: Write, tmp_path: Path) -> None:
    """The engine is built, and its network replayed at sizes that divide and that do not."""
    out, model = tmp_path / "out", model_file(*SIZED)
    command = ("convert", model, *BASE, "--proof", "network", "-o", out, "--dynamic",
               "tokens=17:64")  # fmt: skip
    code, _, said = run(*command)
    assert code == 0, said
    manifest, _ = bundles.read(out)
    told = manifest.dynamic
    assert told is not None and told.words == "tokens from 17 to 64"
    sizes = {one.size for one in told.proven}
    assert {17, 64} < sizes and any(n % 4 == 0 for n in sizes) and any(n % 4 for n in sizes)
    for one in told.proven:
        assert None not in (one.algebra, one.network)
        assert max(one.algebra or 0, one.network or 0) <= 1e-5
    assert manifest.io[0].shape == [1, 64, 8]
    assert manifest.request.variant is None and not manifest.variants
    assert len({(out / one.file).stat().st_ino for one in manifest.engines}) == 1
    assert all(one.bytes_sent > 0 for one in manifest.collectives)
    assert not [check for check in bundles.verify(out) if check.problem]
    code, said, _ = run("inspect", out)
    assert code == 0 and "1 x 17..64 x 8" in said and "tokens from 17 to 64" in said
    code, answer, said = run(*command, "--force", "--json")
    assert code == 0, said
    again = json.loads(answer)["manifest"]
    assert "recall" in again["timings"] and again["dynamic"]["last"] == 64
    code, _, said = run("export", "triton", out, "--repository", tmp_path / "r")
    assert code == 2 and "a range of sizes" in said
    _run_at(run, out, tmp_path)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize(
    ("model", "span", "strategy"),
    [
        (FLUX, Span("text", 9, 40), "ulysses"),
        (QWEN, Span("text", 9, 39), "ulysses"),
        (WAN, Span("frames", 3, 11), "ulysses"),
    ],
    ids=["flux-text", "qwen-text", "wan-frames"],
)
def test_networks_of_published_models(
    model: str, span: Span, strategy: str, tmp_path: Path
) -> None:
    """Built, read back and replayed by all ranks at every size that the program was proven at."""
    path = tmp_path / "model.py"
    path.write_text(model)
    job = Job(
        model=path, out=tmp_path / "out", strategy=strategy, world=2, precision="fp32",
        weights_mode="external", proof="network", dynamic=span,
    )  # fmt: skip
    told = convert(job, select("auto"), Progress()).dynamic
    assert told is not None and {span.first, span.last} < {one.size for one in told.proven}
    assert len(told.proven) >= 4
    for one in told.proven:
        assert None not in (one.algebra, one.network)
        assert max(one.algebra or 0, one.network or 0) <= 1e-5


def _run_at(run: Run, out: Path, folder: Path) -> None:
    """By name, and by the shapes of a file, at sizes that nothing was lifted from."""
    own = {"qkv.lora_A.weight": torch.randn(2, 64), "qkv.lora_B.weight": torch.randn(192, 2)}
    save_file(own, folder / "style.safetensors")
    code, _, error = run("lora", out, folder / "style.safetensors", "--scale", "0.1")
    assert code == 0, error
    code, said, error = run("run", out, "--variant", "tokens-30", "--devices", "cpu", "--json",
                            "--lora", "style=0.2")  # fmt: skip
    assert code == 0, error
    report = json.loads(said)
    assert report["variant"] == "tokens-30" and report["check"]["error"] <= 1e-5
    save_file({"x": torch.randn(1, 43, 8)}, folder / "i.safetensors")
    code, said, error = run("run", out, "--inputs", folder / "i.safetensors", "--devices", "cpu",
                            "--outputs", folder / "o.safetensors", "--json")  # fmt: skip
    assert code == 0, error
    assert json.loads(said)["check"]["error"] <= 1e-5
    assert load_file(folder / "o.safetensors")["output"].shape == (1, 43, 8)
    for name, words in (("tokens-65", "tokens=65; the bundle serves tokens from 17 to 64"),
                        ("long", "no variant 'long'; it serves tokens")):  # fmt: skip
        code, _, said = run("run", out, "--variant", name, "--devices", "cpu")
        assert code == 2 and words in said
    save_file({"x": torch.randn(1, 16, 8)}, folder / "i.safetensors")
    code, _, said = run("run", out, "--inputs", folder / "i.safetensors", "--devices", "cpu")
    assert code == 2 and "the nearest size is 17" in said


def test_an_argument_that_is_not_there(run: Run, model_file: Write, tmp_path: Path) -> None:
    code, _, said = run("convert", model_file(*SIZED), *BASE, "-o", tmp_path / "out", "--dynamic",
                        "token=17:64")  # fmt: skip
    assert code == 2 and "example_inputs() of" in said and "tokens" in said
    assert not (tmp_path / "out").exists()


OTHER = {
    "another program": (
        ("return self.leave(mixed", "return self.leave((mixed if x.shape[1] < 30 else -mixed)"),
        "the program has aten",
    ),
    "a number of the size": (("8 * q, k, v", "8 / x.shape[1] * q, k, v"), "whole numbers"),
}


@pytest.mark.parametrize("what", list(OTHER))
def test_models_that_are_others_from_size_to_size(
    what: str, model_file: Write, tmp_path: Path
) -> None:
    """Refused with the line of the model, and nothing is written."""
    change, words = OTHER[what]
    path = model_file(*SIZED, change)
    with pytest.raises(CannotLift, match=words) as refused:
        converted(path, tmp_path / "out", "allgather-kv", 2, dynamic=Span("tokens", 16, 40))
    assert "model.py:" in str(refused.value.where)
    assert "variants" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


def test_an_argument_that_is_part_of_the_program(model_file: Write, tmp_path: Path) -> None:
    path = model_file(
        *SIZED, ("def forward(self, x):", "def forward(self, x, count):"),
        ('{"x": torch', '{"count": tokens, "x": torch'),
    )  # fmt: skip
    with pytest.raises(CannotLift, match=r"the argument count is part of the program, .* 40 and"):
        converted(path, tmp_path / "out", "allgather-kv", 3, dynamic=Span("tokens", 16, 40))


def test_a_range_in_which_a_rank_has_no_tokens(
    model_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told when two sizes of several say how long the sequence is."""
    begun: list[object] = []
    begin = making.begin

    def counted(*given: Any, **more: Any) -> Any:
        begun.append(given)
        return begin(*given, **more)

    monkeypatch.setattr(making, "begin", counted)
    with pytest.raises(CannotLift, match="at tokens=9 the last of 4 ranks holds padding alone"):
        converted(
            model_file(*SIZED), tmp_path / "out", "allgather-kv", 4,
            dynamic=Span("tokens", 5, 40),
        )  # fmt: skip
    assert 2 <= len(begun) <= 3 < len(Span("tokens", 5, 40).proven(4))


def test_a_ring_cuts_tokens_by_steps(model_file: Write, tmp_path: Path) -> None:
    """More ranks than two: how long the parts are that it gathers is no multiple of the size."""
    path = model_file(*SIZED)
    with pytest.raises(CannotLift, match="tokens in 3 parts"):
        converted(path, tmp_path / "out", "ring", 3, dynamic=Span("tokens", 13, 64))
    assert not (tmp_path / "out").exists()
