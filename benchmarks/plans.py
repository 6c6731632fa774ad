"""What an engine says of itself: operators and the types of their operands, in the text it holds.

TensorRT-RTX's ahead-of-time step leaves its program in the engine as text. Its form is nowhere
documented, so this is for tests and benchmarks alone; they fail where it finds nothing.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TEXT = re.compile(rb"[\x20-\x7e]{6,}")
_TENSOR = re.compile(r'\s*(?:sub_)?tensor=\{.* name="([^"]*)".* type=(\w+)')
_OPERATOR = re.compile(r"\s*([a-z][a-z_]*)=\{ name=\"?([^\" ]*)")
_STEP = re.compile(
    r'\s*(signal|wait|function|comm_\w+)=\{ name="?([^"]+?)"? (?:fqn|stream|output)='
)
_NAMES = re.compile(r'"([^"]*)"')


@dataclass(frozen=True)
class Operator:
    """One line of the program: what it is, and the types of what it reads and writes."""

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    name: str = ""


@dataclass(frozen=True)
class Step:
    """A kernel, a collective, or a signal or wait between streams, as they are issued."""

    kind: str
    name: str
    stream: int
    event: int


@dataclass(frozen=True)
class Plan:
    """All of it: types by tensor, operators, and the steps that issue them."""

    tensors: dict[str, str]
    operators: tuple[Operator, ...]
    steps: tuple[Step, ...]

    def beside(self) -> dict[str, int]:
        """Of every collective, how many attentions may run while it does.

        That is those which neither end before it begins nor begin after it has ended, by the order
        within streams and by the events that they wait for.
        """
        before = _ancestors(self.steps)
        attentions = [n for n, one in enumerate(self.steps) if "_mha" in one.name]
        return {
            one.name: sum(n not in before[m] and m not in before[n] for m in attentions)
            for n, one in enumerate(self.steps)
            if one.kind.startswith("comm_")
        }

    def products(self) -> list[tuple[str, ...]]:
        """The types of both operands of every matrix product."""
        return [o.reads[:2] for o in self.operators if o.kind in ("fully_connected", "gemm")]

    def attentions(self) -> list[tuple[str, ...]]:
        """What every fused attention reads, masks of numbers among it."""
        return [o.reads for o in self.operators if "_mha" in o.name]

    def sent(self, kind: str) -> list[str]:
        """The types of what every collective of one kind moves."""
        name = f"comm_{kind.replace('_', '')}"
        return [o.reads[0] for o in self.operators if o.kind == name]


def read_plan(engine: Path) -> Plan:
    """What the engine's file holds; of pieces of text that look like operators."""
    lines = [found.group().decode() for found in _TEXT.finditer(engine.read_bytes())]
    tensors = dict(m.groups() for line in lines if (m := _TENSOR.match(line)))
    operators = []
    for line in lines:
        kind = _OPERATOR.match(line)
        if kind and kind[1] not in ("tensor", "sub_tensor"):
            reads, writes = _operands(line, "input", tensors), _operands(line, "output", tensors)
            operators.append(Operator(kind[1], reads, writes, kind[2]))
    assert tensors
    assert operators
    return Plan(tensors, tuple(operators), tuple(_steps(lines)))


def _steps(lines: list[str]) -> Iterator[Step]:
    for line in lines:
        found = _STEP.match(line)
        if found:
            stream, event = (_number(line, what) for what in ("stream", "event"))
            yield Step(found[1], found[2], stream, event)


def _number(line: str, what: str) -> int:
    found = re.search(rf" {what}=(\d+)", line)
    return int(found[1]) if found else -1


def _ancestors(steps: tuple[Step, ...]) -> list[set[int]]:
    """Of every step, which others have ended before it begins."""
    found: list[set[int]] = []
    last: dict[int, int] = {}
    signalled: dict[int, int] = {}
    for number, one in enumerate(steps):
        direct = {last[one.stream]} if one.stream in last else set()
        if one.kind == "wait":
            direct.add(signalled[one.event])
        if one.kind == "signal":
            signalled[one.event] = number
        last[one.stream] = number
        found.append(direct.union(*(found[n] for n in direct)))
    return found


def _operands(line: str, side: str, tensors: dict[str, str]) -> tuple[str, ...]:
    found = re.search(side + r"(?:_args)?=\{([^}]*)\}", line)
    names = _NAMES.findall(found[1]) if found else []
    return tuple(tensors.get(name, "?") for name in names)
