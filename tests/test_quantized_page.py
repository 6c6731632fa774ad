"""The page of what is quantized, from results."""

from typing import Any

from benchmarks.quantized_page import page


def proven(**more: Any) -> dict[str, Any]:
    told = {
        "layers": 17, "kept": {"an embedder or the output": 10, "modulation": 3}, "error": 3e-7,
        "rounded": 2e-4, "bound": 5e-3, "codes": 100, "flipped": 2, "loss": 0.034, "control": 0.1,
    }  # fmt: skip
    return {"proven": told | more}


def test_classes_stand_beside_one_another() -> None:
    stopped = {"refused": "no linear layer | none"}
    results: dict[str, dict[str, dict[str, Any]]] = {
        "A": {"fp8": proven(), "int8": proven(loss=0.012, control=None)},
        "B": {"fp8": stopped, "int8": stopped},
        "C": {"fp8": {"failed": "took longer than 900 s"}},
    }  # fmt: skip
    text = page(results, 75)
    assert "3 of the 75\nclasses" in text
    assert "| fp8 | 1 | 1 | 1 |\n| int8 | 1 | 1 | 0 |" in text
    assert (
        "| A | 17 | 13 | 3e-07 | 2e-04 of 5e-03 | 3.4% | 17 | 13 | 3e-07 | 2e-04 of 5e-03 | 1.2% |"
        in text
    )
    assert "| B | refused |  |  |  |  | refused |  |  |  |  |" in text
    assert "| C | failed |  |  |  |  |  |  |  |  |  |" in text
    assert "communication it is 1e-01 at least" in text
    assert "- an embedder or the output: 10\n- modulation: 3" in text
    assert "- B (fp8, int8): refused: no linear layer / none" in text
    assert "- C (fp8): failed: took longer than 900 s" in text
