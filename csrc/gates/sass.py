"""Reads a disassembly: instructions with their scheduling fields, the main loop, dependent loads.

An instruction of sm_70 and later is 128 bits; its upper bits hold what the compiler tells the
issue stage (Jia et al., arXiv 1804.06826, section 2.1): cycles to stall, the barrier that the
result or the operand reads signal, and the barriers to wait for.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

TENSOR, COPIES = ("HMMA", "HGMMA"), ("LDGSTS", "UBLKCP", "UTMALDG")
INTEGER = (
    *("IMAD", "IADD3", "IADD", "LEA", "LOP3", "SHF", "ISETP", "VIADD", "VIMNMX", "VIADDMNMX"),
    *("PRMT", "SEL", "MOV", "IABS", "SGXT", "LDC", "S2R", "CS2R", "UIADD3", "UIMAD", "ULEA"),
    *("ULOP3", "USHF", "UISETP", "UMOV", "USEL", "ULDC", "S2UR", "R2UR", "UPRMT"),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: without its predicate. opcode: its first word up to the first dot.
        predicate: "" or as written, "@!P0".
        stall: cycles until the warp may issue again.
        signals: barriers that completion (result, operands read) signals; 7 is none.
        waits: bit mask of barriers to wait for.
    """

    text: str
    opcode: str
    predicate: str
    stall: int
    signals: tuple[int, int]
    waits: int


@dataclass
class Function:
    """A kernel's instructions in order, and where its labels point."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_INSTRUCTION = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/"
)
_UPPER_HALF = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def parse(disassembly: str) -> dict[str, Function]:
    """Functions by mangled name, from the output of `nvdisasm -c -hex`."""
    functions: dict[str, Function] = {}
    function, first_half = Function(), None
    for line in disassembly.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            function = functions[match[1]] = Function()
        elif match := re.match(r"(\.L_\w+):", line):
            function.labels[match[1]] = len(function.instructions)
        elif match := _INSTRUCTION.match(line):
            first_half = match
        elif first_half and (match := _UPPER_HALF.match(line)):
            control = int(match[1], 16) >> 41
            text = first_half[2]
            function.instructions.append(
                Instruction(
                    text=text,
                    opcode=text.split()[0].split(".")[0],
                    predicate=(first_half[1] or "").strip(),
                    stall=control & 15,
                    signals=(control >> 5 & 7, control >> 8 & 7),
                    waits=control >> 11 & 63,
                )
            )
            first_half = None
    return functions


def _target(function: Function, at: int) -> int | None:
    instruction = function.instructions[at]
    match = re.search(r"`\((\.L_\w+)\)", instruction.text)
    return function.labels.get(match[1]) if match and instruction.opcode == "BRA" else None


def _returns(function: Function) -> set[int]:
    """Where the copies of code for a diverged warp ("BRA.DIV") go back to the code itself."""
    code, found = function.instructions, set()
    for at, instruction in enumerate(code):
        if instruction.text.startswith("BRA.DIV"):
            copy = range(_target(function, at) or 0, len(code))
            found.add(next(n for n in copy if re.match(r"BRA `", code[n].text)))
    return found


def main_loop(function: Function) -> list[Instruction]:
    """One iteration of the innermost loop with tensor-core instructions, along its usual path.

    Of several loops it is the one with the most of them. The usual path has the most tensor-core
    instructions, then the most copies, then the fewest instructions: past the masks of a tile at an
    edge. Empty if there is no such loop. Instructions under a predicate that is never true are left
    out.
    """
    code, spans = function.instructions, []
    returns = _returns(function)
    for end in range(len(code)):
        begin = _target(function, end)
        if begin is None or begin > end or end in returns:
            continue
        if any(each.opcode in TENSOR for each in code[begin : end + 1]):
            spans.append((begin, end))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    if not innermost:
        return []
    begin, end = max(
        innermost, key=lambda s: sum(each.opcode in TENSOR for each in code[s[0] : s[1] + 1])
    )
    nothing = (0, 0, 0)
    best: dict[int, tuple[int, int, int]] = {end + 1: nothing}
    follows: dict[int, int] = {}
    for at in range(end, begin - 1, -1):
        each, target = code[at], _target(function, at)
        always = not each.predicate and re.match(r"BRA `", each.text)
        ahead = [] if always else [at + 1]
        # "BRA.DIV" leaves for a copy of the code that a diverged warp would run.
        if target is not None and at < target <= end and "DIV" not in each.text.split()[0]:
            ahead.append(target)
        follows[at] = max(ahead, key=lambda n: best[n], default=end + 1)
        tensor, copies, length = best[follows[at]]
        best[at] = (
            tensor + (each.opcode in TENSOR),
            copies + (each.opcode in COPIES),
            length - 1,
        )
    path, at = [], begin
    while at <= end:
        if code[at].predicate != "@!PT":
            path.append(code[at])
        at = follows[at]
    return path


def count(path: list[Instruction]) -> dict[str, int]:
    """What a warp issues in one iteration, by kind."""
    opcodes = Counter(each.opcode for each in path)
    return {
        "instructions": len(path),
        "integer": sum(opcodes[opcode] for opcode in INTEGER),
        "matrix_loads": opcodes["LDSM"],
        "copies": sum(opcodes[opcode] for opcode in COPIES),
        "products": opcodes["HMMA"] + opcodes["HGMMA"],
    }


_NO_RESULT = ("ST", "LDGSTS", "LDGDEPBAR", "DEPBAR", "BAR", "BRA", "EXIT", "RED", "BS", "WARPSYNC")
_REGISTER = re.compile(r"(?<![\w.])(UR\d+|R\d+|UP\d+|P\d+)(?:\.(64|128))?")
_WIDE = {"64": 2, "128": 4}
_SHORT = 5  # instructions of the "else" of a choice of values


def _registers(text: str, width: int = 1) -> list[str]:
    """Registers of an operand; [R2.64] names two of them."""
    found = []
    for name, wide in _REGISTER.findall(text):
        kind, number = re.match(r"([A-Z]+)(\d+)", name).groups()  # type: ignore[union-attr]
        span = max(_WIDE.get(wide, 1), width if kind in ("R", "UR") else 1)
        found += [f"{kind}{int(number) + i}" for i in range(span)]
    return found


def load_depth(function: Function, until: tuple[str, ...]) -> int:
    """Global loads that have to return one after another before the first instruction of `until`.

    Follows registers, predicates and shared memory (as one cell) along the order of the code, each
    instruction once. What was requested before the wait for the kernel before (ACQBULK) counts as
    there by then. Boxes that one warp requests for others' products (UTMALDG) may stand behind
    them.
    """
    depth: dict[str, int] = {}
    shared = control = deepest = boxes = 0
    reached: int | None = None
    other_way = 0  # up to here the code is the other of two ways to the same values
    ways = ((each, _target(function, at)) for at, each in enumerate(function.instructions))
    elses = {target for each, target in ways if each.predicate}
    for at, instruction in enumerate(function.instructions):
        operands = instruction.text.split(None, 1)[1] if " " in instruction.text else ""
        opcode, full = instruction.opcode, instruction.text.split()[0]
        if opcode == "ACQBULK":
            depth.clear()
            shared = control = deepest = boxes = 0
            continue
        if opcode == "UTMALDG":
            boxes = max(boxes, control + 1)
        width = 4 if ".128" in full else 2 if ".64" in full or "WIDE" in full else 1
        parts = [part.strip() for part in operands.split(",")]
        # Results come first: a register, then predicates of comparisons and carries.
        results = 0 if opcode.startswith(_NO_RESULT) else 1
        while results and results < len(parts) and re.fullmatch(r"U?P[0-9T]", parts[results]):
            results += 1
        value = control
        names = _registers(instruction.predicate)
        for part in parts[results:]:
            names += _registers(part, width if opcode in ("STG", "STS") else 1)
        if opcode in TENSOR:
            names = [name for part in parts[results:] for name in _registers(part, 4)]
        for name in names:
            value = max(value, depth.get(name, 0))
        if opcode in ("LDS", "LDSM"):
            value = max(value, shared)
        if opcode in until and reached is None:
            reached = value
        if opcode in ("LDG", "ATOMG", "LDGSTS"):
            value += 1
            deepest = max(deepest, value)
        if opcode in ("STS", "LDGSTS"):
            shared = max(shared, value)
        if opcode == "EXIT" or (opcode == "BRA" and (instruction.predicate or "P" in parts[0])):
            control = max(control, value)
        for index, part in enumerate(parts[:results]):
            for name in _registers(part, width if index == 0 else 1):
                depth[name] = max(value, depth.get(name, 0) if at < other_way else 0)
        if opcode == "BRA" and not instruction.predicate and at + 1 in elses:
            end = _target(function, at) or 0
            other_way = end if end - at <= _SHORT else other_way
    return deepest if reached is None else max(reached, boxes)
