"""The page of quantized formats, from results; and engines that multiply something else."""

from typing import Any

import pytest

from benchmarks.formats_page import page
from benchmarks.quantized_formats import _three, _types, _wrong

FORMATS = {"modelopt-fp8": "ModelOpt's FP8", "quantize-nvfp4": "`--quantize nvfp4`"}


def proven(**more: Any) -> dict[str, Any]:
    told = {
        "error": 3e-7, "control": 0.2, "targets": ["8.9", "12.0"], "layout": "shared",
        "products": {"fp8_e4m3": 17, "bf16": 5}, "attentions": {"bf16": 2},
        "rounded": 2e-4, "rounded_bound": 5e-3, "codes": 2000, "flipped": 30, "loss": 0.034,
        "linears": {"fp8": 17, "bf16": 13}, "seconds": 3.1,
    }  # fmt: skip
    return told | more


def test_cells_of_a_format_are_one_row() -> None:
    fp4 = {
        "targets": ["12.0"], "products": {"fp4_e2m1": 17, "bf16": 5},
        "linears": {"nvfp4": 17, "bf16": 13},
    }  # fmt: skip
    told = {"8.9": "NVFP4 is multiplied from 10.0 on. Hint: leave it out."}
    results: dict[str, Any] = {
        "FLUX.1": {
            "modelopt-fp8": {
                "ulysses 2": {"proven": proven(), "without": {}},
                "ring 4": {"proven": proven(error=4e-7, flipped=40, control=0.1), "without": {}},
            },
            "quantize-nvfp4": {"ulysses 2": {"proven": proven(**fp4), "without": told}},
        },
        "Wan": {
            "modelopt-fp8": {
                "ulysses 2": {"refused": "more ranks | than heads [blocks.0]"},
                "ring 4": {"failed": "the engine multiplies half"},
            }
        },
    }
    runs = results["FLUX.1"]["modelopt-fp8"]
    runs["ulysses 2"]["ran"] = {"apart": 0.0, "error": 0.02, "bound": 0.05}
    runs["ring 4"]["ran"] = {"apart": 1e-7, "error": 0.04, "bound": 0.05}
    results["FLUX.1"]["quantize-nvfp4"]["ulysses 2"] |= {
        "ran": {"failed": "rank 1 hangs"}, "bf16": "nothing can be proven. Hint: fp16",
    }  # fmt: skip
    text = page(results, FORMATS)
    assert "| precision | 8.9, 12.0 | 2: 4e-02 of 5e-02 |" in text
    assert "| 12.0 | 1 of 1 failed |" in text
    assert "3 bundles were run, 1 of them failed, 2 were compared; ranks are 1e-07 apart" in text
    assert "- quantize-nvfp4: nothing can be proven. (ulysses 2: FLUX.1)" in text
    assert "5 of 24\ncells were run: 3 proven, 1 refused, 1 failed" in text
    assert "(4e-07 at most in all cells; without communication it is\n1e-01 at least)" in text
    assert "| ulysses | 2 | 2 | 1 | 0 |" in text
    assert "| ring | 4 | 1 | 0 | 1 |" in text
    assert (
        "| modelopt-fp8 | 2 |  |  | 4e-07 | 2e-04 of 5e-03 | 40 of 2,000 | 3.4% | fp8 17 of 30 "
        "| precision | 8.9, 12.0 |" in text
    )
    assert "| nvfp4 17 of 30 | precision | 12.0 |" in text
    assert "| modelopt-fp8 |  | 1 | 1 |  |  |  |  |  |  |  |" in text
    assert "- 8.9: NVFP4 is multiplied from 10.0 on. (quantize-nvfp4: FLUX.1)" in text
    assert "- refused, modelopt-fp8: more ranks / than heads (ulysses 2: Wan)" in text
    assert "- failed, modelopt-fp8: the engine multiplies half (ring 4: Wan)" in text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"products": {"fp8_e4m3": 16, "bf16": 6}}, "multiplies 16 times fp8_e4m3, not 17"),
        ({"products": {"fp8_e4m3": 17, "bf16+fp8_e4m3": 1}}, "multiplies bf16.fp8_e4m3"),
        ({"products": {"fp8_e4m3": 17, "int8": 1}}, "multiplies 1 times int8, not 0"),
        ({"attending": {"fp8": 2}}, "2 are said to read codes"),
        ({"attentions": {"fp8_e4m3": 2}}, "0 are said to read codes"),
    ],
)
def test_engines_that_multiply_something_else_have_failed(
    changed: dict[str, Any], told: str
) -> None:
    assert _wrong(proven()) == ""
    assert told in _wrong(proven(**changed)).replace("+", ".")


def test_a_mask_is_no_operand() -> None:
    fp8 = "fp8_e4m3"
    kernels = [(fp8, fp8, "bf16", fp8, "int32"), 4 * ("bf16",), (fp8, fp8, "bf16")]
    assert _types(map(_three, kernels)) == {fp8: 1, "bf16": 1, f"bf16+{fp8}": 1}
