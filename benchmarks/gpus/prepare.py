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
from cp_convert.sharding.others import along_others
from cp_convert.sharding.shard import shard
from cp_convert.strategies import choose
from cp_convert.strategies.rewrite import rewrite
from cp_convert.trt.libraries import decompositions

from .cases import GUIDED, IN_CODES, Case


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
    given = example_inputs(preset, config, case.resolution, tiny=False, batch=case.batch)
    inputs = cast_inputs(given, dtype, keep=tuple(preset.keep_float32))
    traced, _ = trace(module, inputs, {}, tuple(preset.freeze))
    table = decompositions()
    dense = decompose(traced, table)
    for strategy in (one for one in case.strategies if not one.endswith(IN_CODES)):
        name, _, factor = strategy.partition("-of-")
        branches = int(name.removeprefix(GUIDED)) if name.startswith(GUIDED) else 1
        name = "ulysses" if branches > 1 else name
        mesh = Mesh.of(world, branches, 1)
        axis, (_, divided) = mesh.sequence(()), along_others(dense, mesh)
        chosen = choose(name, int(factor) if factor else None)
        program, _ = rewrite(shard(divided.program, axis), chosen, name, axis, table)
        target = folder / case.name / strategy
        target.mkdir(parents=True, exist_ok=True)
        packed = pack(program, described=traced.parameters)
        write_program(packed, traced.parameters, target)
