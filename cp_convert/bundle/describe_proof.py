"""A proof, as the manifest tells it."""

from __future__ import annotations

from ..ir.proof import Error, NetworkProof, Proof
from . import manifest as m


def proof_entry(proof: Proof | None, network: NetworkProof | None, reference: str) -> m.Proof:
    """What was proven, or that nothing was."""
    if proof is None:
        return m.Proof(
            status="skipped",
            level="none",
            device="cpu",
            reference=None,
            against="reference",
            algebra=[],
            ranks=[],
            dense=None,
            spread=[],
            bound=None,
            control=None,
            controls={},
            network=None,
            seconds=0,
            recalled=False,
        )
    return m.Proof(
        status="passed",
        level="program" if network is None else "network",
        device=proof.reference[0].device.type,  # type: ignore[arg-type]
        reference=reference,
        against="reference" if proof.rounded is None else "rounded",
        algebra=[error_entry(e) for e in proof.algebra],
        ranks=[error_entry(e) for e in proof.ranks],
        dense=error_entry(proof.dense),
        spread=[error_entry(e) for e in proof.spread],
        bound=error_entry(proof.bound),
        control=None if proof.control is None else error_entry(proof.control),
        controls={axis: error_entry(error) for axis, error in proof.controls.items()},
        network=None
        if network is None
        else m.NetworkProof(
            algebra=[error_entry(e) for e in network.algebra],
            ranks=[error_entry(e) for e in network.ranks],
            seconds=round(network.seconds, 3),
        ),
        seconds=round(proof.seconds, 3),
        recalled=False,
    )


def error_entry(error: Error) -> m.Error:
    """An error, as the manifest has it."""
    return m.Error(max=error.max, rms=error.rms)
