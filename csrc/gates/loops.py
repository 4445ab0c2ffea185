"""What the main loops cost, held to loops.csv: a count or a figure 3 % above its budget fails.

Counts are of a warp and one tile (one stage of the pipeline), read from the machine code; issue
cycles are a model's (issue_model.py), of a block where as many as usual share an SM of sm_90. None
of them is a time.
"""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from issue_model import issue_cycles
from sass import Function, count, load_depth, main_loop

BUDGET = Path(__file__).with_name("loops.csv")
MODELLED = ("sm_90", "sm_90a")
_TOLERANCE = 1.03


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel, a tile.

    Attributes:
        instructions, integer: issued by a warp; address arithmetic is integer.
        matrix_loads, copies, products: LDSM; LDGSTS or bulk copies; HMMA or HGMMA.
        issue_cycles: modelled, for bf16 on sm_90; 0 elsewhere.
        load_depth: global loads one after another, from the wait for the kernel before to the
            first product, or to the end of a kernel without products.
    """

    instructions: int
    integer: int
    matrix_loads: int
    copies: int
    products: int
    issue_cycles: int
    load_depth: int


def measure(
    function: Function, kernel: str, architecture: str, warps: int, blocks: int
) -> Loop | None:
    """The load depth alone for fuse_norm, which the projection waits for; None for other kernels
    without tensor-core instructions.
    """
    path = main_loop(function)
    if not path:
        alone = Loop(0, 0, 0, 0, 0, 0, load_depth(function, ()))
        return alone if kernel.startswith("fuse_norm") else None
    # A tile has one block barrier or, without any, one wait for products; loops are unrolled.
    barriers = sum(each.text.startswith("BAR.") for each in path)
    tiles = barriers or sum(each.text.startswith("WARPGROUP.DEPBAR") for each in path)
    modelled = architecture in MODELLED and "Bf16" in kernel
    # Whole warpgroups multiply; a producer's warp beside them is left out.
    cycles = issue_cycles(path, warps // 4 * 4, blocks) / tiles if modelled else 0
    per_tile = {kind: round(number / tiles) for kind, number in count(path).items()}
    depth = load_depth(function, ("HMMA", "HGMMA"))
    return Loop(**per_tile, issue_cycles=round(cycles), load_depth=depth)


def faults(loop: Loop, budget: Loop | None) -> list[str]:
    """What is above budget, in words."""
    if budget is None:
        return ["its loop is not in loops.csv: run with --update"]
    return [
        f"{value} {name.replace('_', ' ')} a tile, budget {granted}"
        for (name, value), granted in zip(
            asdict(loop).items(), asdict(budget).values(), strict=True
        )
        if value > granted * _TOLERANCE
    ]


def read_budget() -> dict[tuple[str, str], Loop]:
    with BUDGET.open() as file:
        return {
            (row.pop("kernel"), row.pop("architecture")): Loop(
                **{k: int(v) for k, v in row.items()}
            )
            for row in csv.DictReader(file)
        }


def write_budget(loops: dict[tuple[str, str], Loop]) -> None:
    with BUDGET.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "architecture", *(each.name for each in fields(Loop))])
        for key, loop in loops.items():
            writer.writerow([*key, *asdict(loop).values()])
