"""Sets of three models, switched within one process on each of two ranks, against fused models."""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cp_convert.lora.add import add
from tests.lora.conftest import Made
from tests.lora.files import Factors, diffusers_names, factors, fused, kohya_names, linears

WANTED = {
    "flux": lambda name: "attn" in name or "proj_" in name or "embedder" in name,
    "wan": lambda name: "attn" in name or "ffn" in name,
    "qwen": lambda name: "attn" in name or "mlp" in name,
}


def outputs_of(bundles: Sequence[Path], asked: Sequence[Any], folder: Path) -> list[list[Tensor]]:
    """By rank, what every bundle returns with each of these sets, one after the other."""
    context = multiprocessing.get_context("forkserver")
    work = [
        context.Process(target=_rank, args=(list(bundles), list(asked), rank, folder))
        for rank in range(2)
    ]
    for one in work:
        one.start()
    for one in work:
        one.join(120)
    assert [one.exitcode for one in work] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(bundles: list[Path], asked: list[Any], rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from cp_convert import runtime
    from cp_convert.errors import ConvertError
    from cp_convert.runtime.join import joined

    torch.set_num_threads(1)
    found: list[Any] = []
    with joined(rank, 2, torch.device("cpu"), store=str(folder / "store"), timeout=60):
        for bundle in bundles:
            inputs = torch.load(bundle.parent / "inputs.pt")
            with runtime.open(bundle, executor="torch", device="cpu", lora=asked[0]) as opened:
                found.append(opened(**inputs)[0].clone())
                for one in asked[1:]:
                    one = one[rank] if isinstance(one, tuple) else one
                    try:
                        opened.use_lora(one)
                    except ConvertError as error:
                        found.append(f"{type(error).__name__}: {error.message}")
                    else:
                        found.append(opened(**inputs)[0].clone())
    torch.save(found, folder / f"{rank}.pt")


def _sets(model: nn.Module, name: str, folder: Path) -> tuple[Factors, Factors]:
    """Two sets in the bundle at ``folder/out``: ``a`` at 0.8, and ``b`` with an alpha of 3."""
    layers = linears(model, WANTED[name])
    first, second = factors(layers, 1), factors(dict(list(layers.items())[::2]), 2, rank=4)
    add(folder / "out", diffusers_names(first, folder / "a.safetensors"), scale=0.8)
    add(folder / "out", kohya_names(second, folder / "second.safetensors", alpha=3.0), name="b")
    return first, second


ASKED: list[Any] = [None, "a", "b", {"a": None, "b": 0.5}, {"a": -0.3}, None, "a", {"b": 1.0}]


def test_switching_within_one_process(made: Callable[[str], Made], tmp_path: Path) -> None:
    bundles, wanted = [], []
    for name in WANTED:
        folder = tmp_path / name
        bundles.append(made(name).copy(folder))
        model, inputs = made(name).model(), made(name).inputs()
        torch.save(inputs, folder / "inputs.pt")
        a, b = _sets(model, name, folder)
        first, second = (a, 0.8), (b, 3 / 4)
        for sets in (
            [],
            [first],
            [second],
            [first, (b, 3 / 8)],
            [(a, -0.3)],
            [],
            [first],
            [second],
        ):
            dense = fused(copy.deepcopy(model), sets)
            with torch.no_grad():
                wanted.append(dense(**inputs, return_dict=False)[0])
    per = len(ASKED)
    for rank in outputs_of(bundles, ASKED, tmp_path):
        for number, (found, want) in enumerate(zip(rank, wanted, strict=True)):
            assert (found - want).abs().max() <= 1e-5 * want.abs().max(), (number // per, number)
            if number % per in range(1, 5):  # every set matters
                assert (found - wanted[number // per * per]).abs().max() > 1e-2 * want.abs().max()
            if number % per == 5:  # and leaves nothing behind
                assert torch.equal(found, rank[number // per * per])


def test_ranks_that_ask_for_different_sets(made: Callable[[str], Made], tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path / "x")
    torch.save(made("flux").inputs(), bundle.parent / "inputs.pt")
    _sets(made("flux").model(), "flux", bundle.parent)
    asked = ["a", ("a", "b"), ("nothing", "b"), "b", {"a": float("nan")}, ({"a": 1}, {"a": 2})]
    first, second = outputs_of([bundle], asked, tmp_path)
    for rank in (first, second):
        assert rank[1] == "RunFailed: rank 1 asks for the LoRA b=1, and rank 0 for a=0.8."
        assert rank[4].startswith("UsageError: the strength of a is nan")
        assert "rank 1 asks for the LoRA a=2, and rank 0 for a=1" in rank[5]
        assert torch.equal(rank[3], first[3])
    assert first[2] == "UsageError: the bundle has no LoRA set 'nothing'."
    assert second[2].startswith("RunFailed: rank 0 cannot use the LoRA that was asked for: the bu")
    assert not torch.equal(first[0], first[3])
