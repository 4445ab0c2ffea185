"""The model of main loops: what it reads from machine code, and what it makes of it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "csrc" / "gates"))

from issue_model import issue_cycles
from loops import Loop, faults
from sass import Instruction, count, load_depth, main_loop, parse


def instruction(
    text: str, stall: int = 1, signals: tuple[int, int] = (7, 7), waits: int = 0
) -> str:
    """A line of `nvdisasm -c -hex`, as far as the model reads it."""
    control = stall | signals[0] << 5 | signals[1] << 8 | waits << 11
    first = f"        /*0000*/  {text} ;  /* 0x{0:016x} */"
    return f"{first}\n        /* 0x{control << 41:016x} */"


KERNEL = "\n".join(
    [
        ".text.kernel:",
        instruction("LDG.E R2, desc[UR4][R4.64]"),
        instruction("ACQBULK"),
        instruction("LDG.E R6, desc[UR4][R8.64]"),
        instruction("IMAD.WIDE R10, R6, 0x2, R12"),
        instruction("LDG.E.128 R16, desc[UR4][R10.64]"),
        instruction("STS.128 [R3], R16"),
        ".L_x_1:",
        instruction("BAR.SYNC.DEFER_BLOCKING 0x0"),
        instruction("@P1 BRA `(.L_x_2)"),
        instruction("FSEL R20, R20, -INF , P2"),
        ".L_x_2:",
        instruction("@!P3 BRA `(.L_x_3)"),
        instruction("LDGSTS.E.BYPASS.128 [R3], desc[UR4][R10.64]"),
        ".L_x_3:",
        instruction("@!PT LDS RZ, [RZ]"),
        instruction("LDSM.16.M88.4 R24, [R3]", signals=(0, 7)),
        instruction("HMMA.16816.F32.BF16 R28, R24, R26, R28", waits=1),
        instruction("@!P0 BRA `(.L_x_1)"),
        instruction("EXIT"),
    ]
)


def test_the_main_loop_is_the_way_past_masks_and_through_copies() -> None:
    path = main_loop(parse(KERNEL)["kernel"])
    assert [each.opcode for each in path] == ["BAR", "BRA", "BRA", "LDGSTS", "LDSM", "HMMA", "BRA"]
    counts = count(path)
    assert (counts["copies"], counts["matrix_loads"], counts["products"]) == (1, 1, 1)


def test_a_function_without_tensor_cores_has_no_main_loop() -> None:
    assert main_loop(parse(KERNEL.replace("HMMA", "FFMA"))["kernel"]) == []


def test_the_depth_of_loads_starts_at_the_wait_and_follows_registers_and_shared_memory() -> None:
    function = parse(KERNEL.replace("LDGSTS", "NOP"))["kernel"]
    assert load_depth(function, ("HMMA",)) == 2
    independent = KERNEL.replace("LDGSTS", "NOP").replace("R6, 0x2", "R7, 0x2")
    assert load_depth(parse(independent)["kernel"], ("HMMA",)) == 1


def test_the_depth_of_loads_takes_the_deeper_of_two_ways_to_a_value() -> None:
    choice = [
        instruction("@P0 BRA `(.L_x_8)"),
        instruction("LDG.E R6, desc[UR4][R8.64]"),
        instruction("BRA `(.L_x_9)"),
        ".L_x_8:",
        instruction("LDC R6, c[0x0][0x2c0]"),
        ".L_x_9:",
    ]
    text = KERNEL.replace("LDGSTS", "NOP").replace(instruction("LDG.E R6, desc[UR4][R8.64]"), "{}")
    assert load_depth(parse(text.format("\n".join(choice)))["kernel"], ("HMMA",)) == 2


def test_products_wait_for_boxes_that_stand_behind_them() -> None:
    """As in a warp of their own, which requests them once it knows that there is something."""
    lines = [
        ".text.kernel:",
        instruction("ACQBULK"),
        instruction("LDG.E R6, desc[UR4][R8.64]"),
        instruction("ISETP.GE.AND P1, PT, R6, 0x1, PT"),
        instruction("@!P1 EXIT"),
        instruction("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24"),
        instruction("EXIT"),
        instruction("UTMALDG.3D [UR8], [UR6]"),
    ]
    assert load_depth(parse("\n".join(lines))["kernel"], ("HGMMA",)) == 2
    assert load_depth(parse("\n".join(lines[:-1]))["kernel"], ("HGMMA",)) == 1


def loop_of(*opcodes: str, waits: dict[int, int] | None = None) -> list[Instruction]:
    return [
        Instruction(
            opcode, opcode, "", 1, (0 if opcode == "LDSM" else 7, 7), (waits or {}).get(i, 0)
        )
        for i, opcode in enumerate(opcodes)
    ]


def test_tensor_cores_bound_a_loop_of_products() -> None:
    """Eight warps, two a scheduler, twenty products of six cycles each; then the barrier."""
    cycles = issue_cycles(loop_of("BAR", *["HMMA"] * 20), warps=8, blocks=1)
    assert 2 * 20 * 6 <= cycles <= 2 * 20 * 6 + 40


def test_the_port_of_shared_memory_bounds_a_loop_of_matrix_loads() -> None:
    """It is one for all schedulers: 8 warps, 20 loads, 4 cycles each; then one product."""
    loop = loop_of("BAR", *["LDSM"] * 20, "HMMA", waits={21: 1})
    assert 8 * 20 * 4 <= issue_cycles(loop, warps=8, blocks=1) <= 8 * 20 * 4 + 80


def test_waiting_for_a_load_costs_its_latency_where_no_other_warp_hides_it() -> None:
    hidden = issue_cycles(loop_of("LDSM", "HMMA"), warps=4, blocks=1)
    waited = issue_cycles(loop_of("LDSM", "HMMA", waits={1: 1}), warps=4, blocks=1)
    assert waited >= hidden + 20


@pytest.mark.parametrize(("tokens", "busy"), [(16, 20), (64, 32), (128, 64)])
def test_a_warpgroups_product_takes_what_tensor_cores_or_its_operands_take(
    tokens: int, busy: int
) -> None:
    """Two warpgroups, four products each; 16 tokens' operands are 2.5 KiB, 128 bytes a cycle."""
    product = f"HGMMA.64x{tokens}x16.F32.BF16 R24, gdesc[UR8], R24"
    texts = [*[product] * 3, f"{product}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    loop = [Instruction(text, text.split(".")[0], "", 1, (7, 7), 0) for text in texts]
    cycles = issue_cycles(loop, warps=8, blocks=1)
    assert cycles == pytest.approx(2 * 4 * busy, rel=0.05)


BUDGET = Loop(500, 80, 64, 16, 128, 2800, 2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"issue_cycles": 2884}, None),
        ({"issue_cycles": 2885}, "2885 issue cycles a tile, budget 2800"),
        ({"integer": 83}, "83 integer a tile, budget 80"),
        ({"matrix_loads": 60, "instructions": 480}, None),
    ],
)
def test_three_percent_above_its_budget_is_a_fault(
    change: dict[str, int], fault: str | None
) -> None:
    loop = Loop(**(vars(BUDGET) | change))
    assert faults(loop, BUDGET) == ([fault] if fault else [])


def test_a_loop_without_a_budget_is_a_fault() -> None:
    assert faults(BUDGET, None) == ["its loop is not in loops.csv: run with --update"]
