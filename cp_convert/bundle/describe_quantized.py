"""What is quantized, out of the stages' records, as the manifest has it."""

from __future__ import annotations

from collections import Counter

from ..ir.attentions8 import Attentions
from ..ir.linear8 import Linears
from ..ir.proof import Error
from ..ir.records import Made
from . import quantized as q


def quantization(made: Made) -> q.Quantization | None:
    """Of a finished conversion; ``None`` where nothing is."""
    eight, linears = made.rewritten.eight, made.captured.linears
    if not eight and linears is None:
        return None
    codes = None if made.proof is None else made.proof.codes
    networks = () if made.network_proof is None else made.network_proof.codes
    return q.Quantization(
        exchange=q.Exchange(codes="int8", operands=list(eight))  # type: ignore[arg-type]
        if eight
        else None,
        linears=None if linears is None else _linears(linears, made.loaded.source.precision),
        codes=None
        if codes is None
        else q.Codes(
            ranks=[_error(e) for e in codes.ranks],
            networks=[_error(e) for e in networks],
            bound=_error(codes.bound),
            codes=codes.codes,
            flipped=codes.flipped,
        ),
        loss=None if codes is None else _error(codes.loss),
        attentions=_attentions(made.captured.attentions, made.loaded.source.precision),
    )


def _linears(linears: Linears, precision: str) -> q.Linears:
    products = Counter[str](one.codes for one in linears.layers)
    products[precision] += len(linears.kept)
    return q.Linears(
        codes=linears.kinds[0] if len(linears.kinds) == 1 else "mixed",
        layers=[
            q.Layer(
                module=one.module,
                input_scale=one.input_scale,
                weight_scale=one.weight_scale,
                loss=one.loss,
                given=one.given,
                rows=one.rows,
                smooth=one.smooth,
                codes=one.codes,
            )
            for one in linears.layers
        ],
        kept=[q.Kept(module=one.module, reason=one.reason) for one in linears.kept],
        sets=linears.sets,
        products={name: count for name, count in products.items() if count},
    )


def _attentions(told: Attentions | None, precision: str) -> q.Attentions | None:
    if told is None:
        return None
    products = {"fp8": len(told.eight), precision: len(told.kept)}
    return q.Attentions(
        codes="fp8",
        layers=[
            q.CodedAttention(
                module=one.module,
                query_scale=one.steps[0],
                key_scale=one.steps[1],
                value_scale=one.steps[2],
                loss=one.loss,
                given="both" if one.given == "both" else "none",
            )
            for one in told.eight
        ],
        kept=[q.Kept(module=one.module, reason=one.reason) for one in told.kept],
        sets=told.sets,
        products={name: count for name, count in products.items() if count},
    )


def _error(error: Error) -> q.Error:
    return q.Error(max=error.max, rms=error.rms)
