"""What an engine says of itself: operators and the types of their operands, in the text it holds.

TensorRT-RTX's ahead-of-time step leaves its program in the engine as text. Its form is nowhere
documented, so this is for tests alone; they fail where it finds nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

_TEXT = re.compile(rb"[\x20-\x7e]{6,}")
_TENSOR = re.compile(r'\s*(?:sub_)?tensor=\{.* name="([^"]*)".* type=(\w+)')
_OPERATOR = re.compile(r"\s*([a-z][a-z_]*)=\{ name=")
_NAMES = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Operator:
    """One line of the program: what it is, and the types of what it reads and writes."""

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    tensors: dict[str, str]
    operators: tuple[Operator, ...]

    def products(self) -> list[tuple[str, ...]]:
        """The types of both operands of every matrix product."""
        return [o.reads[:2] for o in self.operators if o.kind in ("fully_connected", "gemm")]

    def sent(self, kind: str) -> list[str]:
        """The types of what every collective of one kind moves.

        A broadcast is no operator of the program but stands between two of its pieces; what passes
        from one to the other is named after it.
        """
        name = f"comm_{kind.replace('_', '')}"
        if kind == "broadcast":
            return [t for n, t in self.tensors.items() if re.match(r"broadcast .*_output\.", n)]
        return [o.reads[0] for o in self.operators if o.kind == name]


def read_plan(engine: Path) -> Plan:
    lines = [found.group().decode() for found in _TEXT.finditer(engine.read_bytes())]
    tensors = dict(m.groups() for line in lines if (m := _TENSOR.match(line)))
    operators = []
    for line in lines:
        kind = _OPERATOR.match(line)
        if kind and kind[1] not in ("tensor", "sub_tensor"):
            reads, writes = _operands(line, "input", tensors), _operands(line, "output", tensors)
            operators.append(Operator(kind[1], reads, writes))
    assert tensors
    assert operators
    return Plan(tensors, tuple(operators))


def _operands(line: str, side: str, tensors: dict[str, str]) -> tuple[str, ...]:
    found = re.search(side + r"(?:_args)?=\{([^}]*)\}", line)
    names = _NAMES.findall(found[1]) if found else []
    return tuple(tensors.get(name, "?") for name in names)
