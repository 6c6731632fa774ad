"""What is quantized and what it costs, in words."""

from __future__ import annotations

from collections import Counter

from ..bundle.manifest import Manifest
from ..bundle.quantized import Attentions, Linears
from .words import plural


def quantized_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """A row for what is quantized and what it costs, if anything is."""
    told = manifest.quantization
    if told is None:
        return []
    what = []
    if told.linears is not None:
        what.append(_linears(told.linears))
    if told.attentions is not None:
        what.append(_attentions(told.attentions))
    if told.exchange is not None:
        what.append(f"{', '.join(told.exchange.operands)} of attention sent in 8 bits")
    if told.loss is not None and told.codes is not None:
        what.append(
            f"which costs {told.loss.rms:.1e} of the output (largest {told.loss.max:.1e}); all "
            f"ranks are {max(e.max for e in told.codes.ranks):.1e} off the dense model that rounds "
            f"alike (bound {told.codes.bound.max:.1e}: {told.codes.flipped} of "
            f"{told.codes.codes} codes lie at a tie)"
        )
    return [("quantized", ", ".join(what))]


def _linears(told: Linears) -> str:
    alone = sum(one.reason.startswith("only its weight") for one in told.kept)
    counts = Counter(one.codes or told.codes for one in told.layers) or {told.codes: 0}
    what = " and ".join(f"{n} linear layers in {kind.upper()}" for kind, n in counts.items())
    what += f", {len(told.kept) - alone} left as they are"
    if alone:
        what += f", {alone} that read codes and multiply in the precision"
    lost = {one.module: one.loss for one in told.layers if one.loss is not None}
    if not lost:
        return f"{what}; what that loses was not computed" if told.layers else what
    worst = max(lost, key=lost.__getitem__)
    return f"{what}; the layer that loses most is {worst} ({lost[worst]:.1e} of its output)"


def _attentions(told: Attentions) -> str:
    what = f"{plural(len(told.layers), 'attention')} over FP8 codes"
    if told.kept:
        reasons = "; ".join(dict.fromkeys(one.reason for one in told.kept))
        what += f", {len(told.kept)} in the precision ({reasons})"
    lost = {one.module: one.loss for one in told.layers if one.loss is not None}
    if not lost:
        return what
    worst = max(lost, key=lost.__getitem__)
    return f"{what}; the one that loses most is {worst} ({lost[worst]:.1e} of its output)"
