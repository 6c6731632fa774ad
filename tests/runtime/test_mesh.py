"""Guidance and context parallelism on one mesh: bundles run by processes, against dense models."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_convert import bundle as bundles
from cp_convert import cli
from cp_convert.job import Job
from cp_convert.model.load import load, surroundings
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.ranks import outputs_of

MODELS = {"flux": FLUX, "wan": WAN, "qwen": QWEN}


@dataclass(frozen=True)
class Case:
    name: str
    strategy: str
    world: int
    combine: str | None = None
    mode: str = "embedded"
    tp: int = 1

    def made(self, folder: Path) -> tuple[Path, Any]:
        """The bundle, with its inputs beside it, and what the dense model returns for them."""
        folder.mkdir()
        model = folder / "model.py"
        model.write_text(MODELS[self.name])
        converted(
            model, folder / "out", self.strategy, self.world, cfg=2, combine=self.combine,
            weights_mode=self.mode, tp=self.tp,
        )  # fmt: skip
        job = Job(model, "ring", 2, Path(), cfg=2, combine=self.combine, precision="fp32")
        with surroundings(job):
            source = load(job)
        with torch.no_grad():
            (dense,) = source.module(**source.inputs, return_dict=False)
        torch.save(source.all_inputs, folder / "inputs.pt")
        if self.combine is not None:
            uncond, cond = dense.chunk(2)
            dense = uncond + 4.0 * (cond - uncond)
        return folder / "out", dense


CASES = [
    Case("flux", "ulysses", 2),
    Case("wan", "ulysses", 2, "guidance_scale", "external"),
    Case("qwen", "ring", 2),
    Case("flux", "ulysses", 4, mode="external"),
    Case("wan", "ring", 4),
    Case("qwen", "allgather-kv", 4, "guidance_scale"),
    Case("wan", "ulysses", 8, mode="external", tp=2),
]
THREE_AXES = CASES[-1]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4, 8])
def test_all_ranks_return_what_the_dense_model_does(world: int, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.world == world]
    made, expected = zip(
        *(case.made(tmp_path / str(number)) for number, case in enumerate(cases)), strict=True
    )
    for out, case in zip(made, cases, strict=True):
        manifest, _ = bundles.read(out)
        tensor = {"tp": 2} if case.tp == 2 else {}
        assert manifest.axes == {"cfg": 2, "cp": world // 2 // case.tp, **tensor}
        guidance = manifest.guidance
        assert guidance is not None
        assert (guidance.branches, guidance.rows, guidance.pairs) == (2, 1, True)
        assert {"hidden_states", "encoder_hidden_states"} <= set(guidance.inputs)
        assert guidance.combine == case.combine
    for rank in outputs_of(made, world, tmp_path):
        for one, dense in zip(rank, expected, strict=True):
            assert one[0].shape == dense.shape
            assert (one[0] - dense).abs().max() <= 1e-5 * dense.abs().max()


@pytest.mark.parametrize(
    "case",
    [
        Case("wan", "ulysses", 2, "guidance_scale"),
        pytest.param(THREE_AXES, marks=pytest.mark.slow),
    ],
    ids=["cfg", "cfg, cp, tp"],
)
def test_run_compares_with_the_dense_model(
    case: Case, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, _ = case.made(tmp_path / "made")
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", str(out), "--executor", "torch", "--devices", "cpu", "--json"])
    assert stop.value.code == 0
    told = json.loads(capfd.readouterr().out)
    assert told["check"]["error"] <= 1e-5, told
