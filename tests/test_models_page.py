"""The page of what converts, from results."""

from typing import Any

from benchmarks.models_page import Run, page

SHAPE = {"attentions": 2, "split": 2, "gathers": 1, "all_reduces": 0, "freeze": []}


def proven(**numbers: float) -> dict[str, Any]:
    return {"status": "proven", "network": 3e-7, **numbers}


def test_a_result_without_a_precision_is_float32() -> None:
    assert Run.named("FluxTransformer2DModel inferred 2") == Run(
        "FluxTransformer2DModel", "inferred", 2, "fp32"
    )
    run = Run("FluxTransformer2DModel", "declared", 4, "bf16")
    assert Run.named(run.key) == run


def test_precisions_stand_beside_one_another() -> None:
    lost = {"status": "failed", "reason": "the networks go astray"}
    results: dict[Run, dict[str, Any]] = {
        Run("A", "inferred", 2): {
            **SHAPE, "allgather-kv": proven(), "ring": proven(), "ulysses": proven(),
        },
        Run("A", "inferred", 2, "fp16"): {**SHAPE, "ulysses": proven(ranks=1e-3, bound=2e-3)},
        Run("A", "inferred", 2, "bf16"): {**SHAPE, "ulysses": lost},
        Run("B", "inferred", 2): {"refused": "no attention"},
        Run("B", "inferred", 2, "fp16"): {"refused": "no attention"},
    }  # fmt: skip
    text = page(results)
    assert "7 conversions: 3 proven, 4 refused, 0 failed" in text, "float32 by strategy"
    assert "| A | proven, 3e-07 | proven, 1e-03 of 2e-03 | failed: the networks go astray |" in text
    assert "| B | refused: no attention | refused, as in fp32 |  |" in text
    assert "fp16: 2 conversions: 1 proven, 1 refused, 0 failed" in text
    assert "### ring" not in text, "it was run in float32 alone"
