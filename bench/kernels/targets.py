"""What the kernels are to reach, and whether lines of a benchmark say that they do.

A cell is one operator at one shape in one run of a script: arms that took turns. Only those are
compared.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

SHAPE = ("model", "dtype", "rows", "commit_lens", "batch", "context", "page")
LIBRARIES = ("fa3", "flashinfer_fa2", "flashinfer_fa3", "flashinfer_uniform")
ACCURACY = {"bfloat16": 2e-2, "float16": 5e-3, "float32": 1e-5}
OVER_EAGER = 1.5  # times PyTorch's own error

Line = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    op: str
    shape: tuple[tuple[str, Any], ...]
    run: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join(f"{name} {value}" for name, value in self.shape)


@dataclass(frozen=True)
class Verdict:
    """met is None where an arm that it takes was not measured; why says which."""

    target: str
    cell: Cell
    value: float | None
    met: bool | None
    why: str = ""


def cell_of(line: Line) -> Cell:
    shape = tuple((name, line[name]) for name in SHAPE if name in line)
    return Cell(line["op"], shape, (line["time"], line["command"]))


def cells(lines: Iterable[Line]) -> dict[Cell, dict[str, Line]]:
    """Measured lines by arm, by cell; lines of arms that failed are left out."""
    found: dict[Cell, dict[str, Line]] = {}
    for line in lines:
        arms = found.setdefault(cell_of(line), {})
        if "failure" not in line:
            arms[line["arm"]] = line
    return found


@dataclass(frozen=True)
class LayerTime:
    """Microseconds that one attention layer takes with an arm, whatever the arm leaves out added.

    prologue: norm, RoPE and the block's K/V write, for arms that are attention alone.
    per_step: what is made once a step for all layers, by layers: dflare's schedule, a plan.
    """

    kernel: float
    prologue: float
    per_step: float

    @property
    def total(self) -> float:
        return self.kernel + self.prologue + self.per_step


def layer_times(arms: dict[str, Line]) -> dict[str, LayerTime]:
    """Of every attention arm of a cell on a GPU whose parts were all measured."""
    times = {}
    for name, line in arms.items():
        us, layers = line["us"], line["layers"]
        if name in LIBRARIES and "prologue" in arms:
            plan = (line["plan_us"] or 0.0) / layers
            times[name] = LayerTime(us, arms["prologue"]["us"], plan)
        elif name == "dflare" and "schedule" in arms:
            times[name] = LayerTime(us, 0.0, arms["schedule"]["us"] / layers)
        elif name in ("eager", "compile"):
            times[name] = LayerTime(us, 0.0, 0.0)
    return times


def at_most(target: str, cell: Cell, value: float | None, limit: float, why: str) -> Verdict:
    return Verdict(target, cell, value, None if value is None else value <= limit, why)


def at_least(target: str, cell: Cell, value: float | None, limit: float, why: str) -> Verdict:
    return Verdict(target, cell, value, None if value is None else value >= limit, why)


def ratio(arms: dict[str, Line], above: str, below: str) -> tuple[float | None, str]:
    """Time of one arm over another's, or which of them has none to compare.

    On a GPU both must have run in a graph, or launches of the host are in one of them.
    """
    for name in (above, below):
        if name not in arms:
            return None, f"{name} not measured"
        if arms[name]["device"] == "cuda" and not arms[name]["cuda_graph"]:
            return None, f"{name} not in a CUDA graph"
    return arms[above]["us"] / arms[below]["us"], ""


def best_baseline(arms: dict[str, Line], names: tuple[str, ...]) -> tuple[float | None, str]:
    """Layer time of the best of these arms over dflare's; which it was, which are missing."""
    times = layer_times({name: x for name, x in arms.items() if x["cuda_graph"]})
    if "dflare" not in times:
        return None, "dflare and its schedule not both measured in CUDA graphs"
    known = {name: times[name].total for name in names if name in times}
    missing = [name for name in names if name not in times]
    if not any(name in known for name in LIBRARIES):
        return None, f"none of {', '.join(LIBRARIES)} measured"
    best = min(known, key=lambda name: known[name])
    without = f", without {', '.join(missing)}" if missing else ""
    return known[best] / times["dflare"].total, f"against {best}{without}"


def append_verdicts(cell: Cell, arms: dict[str, Line]) -> Iterator[Verdict]:
    rows, dflare = dict(cell.shape)["rows"], arms.get("dflare")
    if 16 <= rows <= 256:
        value = dflare["times_floor"] if dflare else None
        why = "" if dflare else "dflare not measured"
        yield at_most("op 1, N 16..256: at most 1.5 x floor", cell, value, 1.5, why)
        value, why = ratio(arms, "dspark", "dflare")
        yield at_least("op 1, N 16..256: 2 x faster than DSpark's way", cell, value, 2, why)
    if rows >= 1024:
        value, why = ratio(arms, "dflare", "bmm")
        yield at_most("op 1, N >= 1024: at most 1.25 x the GEMM alone", cell, value, 1.25, why)


def attention_verdicts(cell: Cell, arms: dict[str, Line]) -> Iterator[Verdict]:
    shape = dict(cell.shape)
    batch, context = shape["batch"], shape["context"]
    if batch <= 8 and 1024 <= context <= 4096:
        value, why = best_baseline(arms, LIBRARIES)
        name = "op 2, batch 1..8, context 1K..4K: 1.5 x faster than FA3 and FlashInfer"
        yield at_least(name, cell, value, 1.5, why)
    if batch >= 32 and context >= 4096:
        value = arms["dflare"]["percent_of_bandwidth"] if "dflare" in arms else None
        why = "" if "dflare" in arms else "dflare not measured"
        name = "op 2, batch >= 32, context >= 4K: 85 % of measured bandwidth"
        yield at_least(name, cell, value, 85, why)
        value, why = best_baseline(arms, (*LIBRARIES, "compile", "eager"))
        name = "op 2, batch >= 32, context >= 4K: never slower than the best baseline"
        yield at_least(name, cell, value, 1, why)


def cpu_verdicts(cell: Cell, arms: dict[str, Line]) -> Iterator[Verdict]:
    if dict(cell.shape)["model"] == "smollm2-135m":
        value, why = ratio(arms, "eager", "dflare")
        yield at_least("CPU, demo drafter's shapes: 2 x faster than PyTorch", cell, value, 2, why)


def accuracy_verdicts(cell: Cell, arms: dict[str, Line]) -> Iterator[Verdict]:
    """Of cells that were checked against float64."""
    errors = {name: line["relative_error"] for name, line in arms.items()}
    error, eager = errors.get("dflare"), errors.get("eager")
    if error is None:
        return
    dtype = dict(cell.shape)["dtype"]
    yield at_most(
        f"error, {dtype}: at most {ACCURACY[dtype]:.0e}", cell, error, ACCURACY[dtype], ""
    )
    value = None if eager is None else error / eager
    why = "" if eager is not None else "eager not checked"
    yield at_most("error: at most 1.5 x PyTorch's own", cell, value, OVER_EAGER, why)


GPU_VERDICTS: dict[str, Callable[[Cell, dict[str, Line]], Iterator[Verdict]]] = {
    "append_context_kv": append_verdicts,
    "block_attention": attention_verdicts,
}


def verdicts(lines: Iterable[Line]) -> list[Verdict]:
    """One for every target and cell that it speaks of."""
    lines = list(lines)
    devices = {cell_of(line): line["device"] for line in lines}
    found: list[Verdict] = []
    for cell, arms in cells(lines).items():
        on_gpu = devices[cell] == "cuda"
        found += (GPU_VERDICTS[cell.op] if on_gpu else cpu_verdicts)(cell, arms)
        found += accuracy_verdicts(cell, arms)
    return found


def inaccurate(errors: dict[str, float | None], dtype: str) -> list[str]:
    """Sentences on the arms whose error against float64 is too large, NaN included."""
    found = [
        f"{name}: error {error:.1e}, at most {ACCURACY[dtype]:.0e} expected in {dtype}"
        for name, error in errors.items()
        if error is not None and not error <= ACCURACY[dtype]
    ]
    dflare, eager = errors.get("dflare"), errors.get("eager")
    if dflare is not None and eager is not None and dflare > OVER_EAGER * eager:
        found.append(f"dflare: error {dflare:.1e} is {dflare / eager:.1f} x eager's {eager:.1e}")
    return found


def summary(found: list[Verdict]) -> list[tuple[str, str, str]]:
    """Rows (target, verdict, detail), a row a target, in the order in which they came."""
    rows = []
    for target in dict.fromkeys(verdict.target for verdict in found):
        of_target = [verdict for verdict in found if verdict.target == target]
        met = sum(verdict.met is True for verdict in of_target)
        missed = [verdict for verdict in of_target if verdict.met is False]
        open_ = [verdict for verdict in of_target if verdict.met is None]
        said = "missed" if missed else "undecided" if open_ else "met"
        detail = f"{met} of {len(of_target)} cells met"
        if open_:
            detail += f", {len(open_)} undecided ({'; '.join(sorted({v.why for v in open_}))})"
        partial = {verdict.why for verdict in of_target if "without" in verdict.why}
        if partial:
            said += " against what was measured" if said == "met" else ""
            detail += f"; {'; '.join(sorted(partial))}"
        if missed:
            detail += f"; missed: {'; '.join(f'{v.value:.3g} at {v.cell}' for v in missed)}"
        rows.append((target, said, detail))
    return rows
