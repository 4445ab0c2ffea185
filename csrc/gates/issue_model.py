"""Issue cycles of a main loop: an in-order model of one SM of sm_90, with memory never late.

Each of the SM's four schedulers issues one instruction a cycle, of the warp that issued last if it
can, else of the one that is furthest ahead. A warp waits for the stall count and the barriers that
the compiler wrote, for the unit it needs, and for the other warps at a block barrier. The units'
costs below are from published microbenchmarks (Luo et al., arXiv 2402.13499) and the instruction
rates of NVIDIA's programming guide; nothing here was calibrated on a GPU. A warpgroup's product
(HGMMA) is issued and goes on by itself, on all four tensor cores, for as long as they multiply or
its operands take from shared memory at 128 bytes a cycle. What comes out are issue cycles, to
compare two versions of a loop: a limit where memory is fast enough, never a time.
"""

import re

from sass import Instruction

# Cycles that an instruction keeps a scheduler's unit busy, by opcode.
_TENSOR, _ALU, _FMA_HEAVY, _FMA, _SPECIAL = range(5)
_ALU_OPCODES = (
    *("LOP3", "ISETP", "FMNMX", "IADD3", "VIADD", "SEL", "FSEL", "LEA", "SHF", "VIMNMX", "F2FP"),
    *("VIADDMNMX", "PLOP3", "PRMT", "FSETP", "MOV", "IABS"),
)
_UNITS = (
    {"HMMA": (_TENSOR, 6), "MUFU": (_SPECIAL, 8), "IMAD": (_FMA_HEAVY, 2)}
    | dict.fromkeys(_ALU_OPCODES, (_ALU, 2))
    | dict.fromkeys(("FMUL", "FFMA", "FADD", "CS2R", "HFMA2"), (_FMA, 1))
)
# Of the port to shared memory, which the four schedulers share: cycles it is busy, then latency.
_SHARED = {"LDSM": (4, 29), "LDGSTS": (4, 0), "LDS": (1, 29), "STS": (1, 0), "SHFL": (2, 22)}
_SHARED |= {"SYNCS": (1, 29)}
_LATENCY = {"MUFU": 23, "LDG": 500}
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\b")
_PRODUCT_LATENCY = 32  # beyond the cycles that its tensor core is busy
_GROUPS = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)")
_FIXED, _OPERANDS_READ, _BARRIER = 6, 10, 18  # latencies
_ITERATIONS, _WARM_UP = 12, 3
_STAGGER = 700  # cycles that one block starts after another


class _Warp:
    def __init__(self, block: int, starts: int) -> None:
        self.block, self.ready = block, starts
        self.at = self.iteration = 0
        self.barriers = [0] * 8
        self.groups: list[float] = []  # when the products of each group are done
        self.at_block_barrier = False


def issue_cycles(loop: list[Instruction], warps: int, blocks: int) -> int:
    """Cycles that an iteration takes a block of `warps` warps, with `blocks` of them on the SM."""
    all_warps = [_Warp(block, block * _STAGGER) for block in range(blocks) for _ in range(warps)]
    schedulers = [all_warps[i::4] for i in range(4)]
    unit_free = [[0.0] * 5 for _ in range(4)]
    last: list[_Warp | None] = [None] * 4
    port_free = 0
    cycle = 0
    window: tuple[int, int] | None = None  # when all warps are warm, and their progress then
    iterations = _ITERATIONS
    if any(_PRODUCT.match(each.text) for each in loop):
        iterations *= 4  # up to one of them is issued ahead of its products
    while max(w.iteration for w in all_warps) < iterations:
        if window is None and min(w.iteration for w in all_warps) == _WARM_UP:
            window = cycle, sum(w.iteration * len(loop) + w.at for w in all_warps)
        issued, soonest = False, cycle + 1000
        for scheduler in range(4):
            queue = sorted(
                schedulers[scheduler],
                key=lambda w, latest=last[scheduler]: (w is not latest, -w.iteration, -w.at),
            )
            for warp in queue:
                if warp.at_block_barrier:
                    continue
                instruction = loop[warp.at]
                free = warp.ready
                for barrier in range(6):
                    if instruction.waits >> barrier & 1:
                        free = max(free, warp.barriers[barrier])
                if groups := _GROUPS.match(instruction.text):
                    free = max(free, *warp.groups[: len(warp.groups) - int(groups[1])], 0)
                unit = _UNITS.get(instruction.opcode)
                if unit:
                    free = max(free, int(unit_free[scheduler][unit[0]]))
                if free > cycle:
                    soonest = min(soonest, free)
                    continue
                if unit:
                    unit_free[scheduler][unit[0]] = cycle + unit[1]
                result, operands = cycle + _FIXED, cycle + _OPERANDS_READ
                if instruction.opcode in _SHARED and "[RZ]" not in instruction.text:
                    busy, latency = _SHARED[instruction.opcode]
                    begins = max(port_free, cycle + 4)
                    port_free = begins + busy
                    result, operands = begins + latency, begins
                if product := _PRODUCT.match(instruction.text):
                    tokens = int(product[1])
                    busy = max(tokens / 2, (64 + tokens) * 32 / 128)
                    done = max(unit_free[scheduler][_TENSOR], cycle) + busy
                    unit_free[scheduler][_TENSOR] = done
                    if instruction.text.endswith("gsb0"):
                        warp.groups.append(done + _PRODUCT_LATENCY)
                result = max(result, cycle + _LATENCY.get(instruction.opcode, 0))
                for signal, done in zip(instruction.signals, (result, operands), strict=True):
                    warp.barriers[signal] = max(warp.barriers[signal], done)
                warp.ready = cycle + max(1, instruction.stall)
                last[scheduler], issued = warp, True
                warp.at += 1
                if warp.at == len(loop):
                    warp.at, warp.iteration = 0, warp.iteration + 1
                if instruction.opcode == "BAR":
                    warp.at_block_barrier = True
                    siblings = [w for w in all_warps if w.block == warp.block]
                    if all(w.at_block_barrier for w in siblings):
                        for sibling in siblings:
                            sibling.at_block_barrier = False
                            sibling.ready = max(sibling.ready, cycle + _BARRIER)
                break
        cycle = cycle + 1 if issued else max(cycle + 1, soonest)
    assert window, "the warps drift apart by more than the iterations of a run"
    progress = sum(w.iteration * len(loop) + w.at for w in all_warps)
    passed = (progress - window[1]) / len(loop) / len(all_warps)
    return round((cycle - window[0]) / passed)
