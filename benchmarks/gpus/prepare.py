"""The programs of every case, on a machine with the toolchain; no weights, no GPU."""

from __future__ import annotations

from pathlib import Path

from cp_convert.bundle.program import write_program
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.ir.serialize import pack
from cp_convert.mesh import Mesh
from cp_convert.model.cast import DTYPES, cast_inputs, cast_module
from cp_convert.model.instantiate import build, example_inputs
from cp_convert.model.meta import stand_in, unallocated
from cp_convert.model.preset import path_of, read
from cp_convert.sharding.shard import shard
from cp_convert.strategies import choose
from cp_convert.strategies.rewrite import rewrite
from cp_convert.trt.libraries import decompositions

from .cases import Case


def prepare(case: Case, folder: Path, world: int) -> None:
    """Write the program of every strategy of ``case`` into ``folder``, as a bundle holds it."""
    path = path_of(case.preset)
    assert path is not None, case.preset
    preset = read(path)
    config, dtype = case.config(preset.config), DTYPES[case.precision]
    with unallocated():
        module = build(preset, config, tiny=False, random=False, bytes_each=0)
    cast_module(module.eval().requires_grad_(False), dtype)
    stand_in(module)
    given = example_inputs(preset, config, case.resolution, tiny=False)
    inputs = cast_inputs(given, dtype, keep=tuple(preset.keep_float32))
    traced, _ = trace(module, inputs, {}, tuple(preset.freeze))
    table, axis = decompositions(), Mesh.line(world).whole
    sharded = shard(decompose(traced, table), axis)
    for strategy in case.strategies:
        name, _, factor = strategy.partition("-of-")
        chosen = choose(name, int(factor) if factor else None)
        program, _ = rewrite(sharded, chosen, name, axis, table)
        target = folder / case.name / strategy
        target.mkdir(parents=True, exist_ok=True)
        packed = pack(program, described=traced.parameters)
        write_program(packed, traced.parameters, target)
