"""Compiles every CUDA kernel for every architecture and holds it to a table.

Exit status 1 if a kernel does not compile, spills registers to local memory, needs more registers
than `budget.csv` grants it, lacks the instructions that it is built on, or if its main loop costs
more than `loops.csv` grants it (loops.py). Needs nvcc and nvdisasm
(of the CUDA toolkit or of triton), not a GPU; without nvcc it says so and exits with 0, because the
package then builds its CPU part alone.

    python csrc/gates/check.py             # check and print the table
    python csrc/gates/check.py --update    # write what was measured to both files
    python csrc/gates/check.py --only attention_bf16    # the sources that have this in their name
"""

import argparse
import csv
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import loops
from sass import Function, parse

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
BUDGET = Path(__file__).with_name("budget.csv")
BUILD = ROOT / "build" / "gates"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OWN_UNITS = {"wgmma": ("sm_90a",)}  # sources that are for these architectures alone
FLAGS = ["-std=c++17", "-O3", "-cubin", "-Xptxas", "-v"]

# What a kernel's machine code must hold: tensor cores, asynchronous copies and matrix loads, or
# 16-byte loads. Any local memory access is a spill or an array that is not in registers.
REQUIRED = {
    "block_attention_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDSM.16.M88", "LDSM.16.MT88"),
    "block_attention_wgmma_kernel": ("HGMMA.64x", "LDGSTS.E.BYPASS", "FENCE.VIEW.ASYNC"),
    "kv_project_write_kernel": ("HMMA.16816.F32", "LDGSTS.E.BYPASS", "LDSM.16.M88"),
    "kv_project_wgmma_kernel": ("HGMMA.64x", "UTMALDG", "UTMAPF", "SYNCS.PHASECHK"),
    "fuse_norm_kernel": ("LDGSTS.E.BYPASS", "STG.E.128"),
    "head_argmax_kernel": ("LDG.E.128",),
}
FORBIDDEN = ("LDL", "STL")


@dataclass
class Kernel:
    """One kernel compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    spilled_bytes: int  # stack frame, spill stores and spill loads
    instructions: Counter[str] = field(default_factory=Counter)
    loop: loops.Loop | None = None
    faults: list[str] = field(default_factory=list)

    def check(self, budget: dict[tuple[str, str], int]) -> None:
        granted = budget.get((self.name, self.architecture))
        if granted is None:
            self.faults.append("not in budget.csv: run with --update")
        elif self.registers > granted:
            self.faults.append(f"{self.registers} registers, budget {granted}")
        if self.spilled_bytes:
            self.faults.append(f"{self.spilled_bytes} bytes spilled")
        for prefix in REQUIRED.get(self.name.split("<")[0], ()):
            if not any(opcode.startswith(prefix) for opcode in self.instructions):
                self.faults.append(f"no {prefix}")
        for prefix in FORBIDDEN:
            if any(opcode.split(".")[0] == prefix for opcode in self.instructions):
                self.faults.append(f"{prefix} in the machine code")


def find_tool(name: str) -> str | None:
    """A CUDA tool on the PATH, or the one that the triton package carries."""
    found = shutil.which(name)
    if found is None and (triton := importlib.util.find_spec("triton")) and triton.origin:
        carried = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(carried) if carried.exists() else None
    return found


def readable(mangled: str) -> str:
    """block_attention_kernel<Bf16,128,4> from its mangled name."""
    match = re.search(r"\d([a-z_]+_kernel)(I\w+E)?", mangled)
    assert match, f"unknown kernel {mangled}"
    parameters = re.findall(r"\d(Bf16|Fp16)|Li(\d+)E", match[2] or "")
    joined = ",".join(element or number for element, number in parameters)
    return f"{match[1]}<{joined}>" if joined else match[1]


def compile_one(nvcc: str, source: Path, architecture: str, key: str) -> tuple[Path, str]:
    """The cubin and the report of ptxas; compiled once per state of the sources."""
    cubin = BUILD / f"{source.stem}.{architecture}.{key}.cubin"
    log = cubin.with_suffix(".log")
    if not cubin.exists():
        target = f"arch=compute_{architecture[3:]},code={architecture}"
        command = [nvcc, *FLAGS, "-gencode", target, str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{source.relative_to(ROOT)} for {architecture}:\n{result.stderr}")
        log.write_text(result.stderr)
    return cubin, log.read_text()


def parse_report(report: str, architecture: str) -> list[Kernel]:
    kernels = []
    for entry in report.split("Compiling entry function")[1:]:
        mangled = re.search(r"'(\w+)'", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        )
        assert mangled and registers and spills, f"unexpected report of ptxas:\n{entry}"
        spilled = sum(int(size) for size in spills.groups())
        kernels.append(Kernel(readable(mangled[1]), architecture, int(registers[1]), spilled))
    return kernels


def disassemble(nvdisasm: str, cubin: Path) -> dict[str, Function]:
    """The kernels in a cubin."""
    command = [nvdisasm, "-c", "-hex", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {readable(mangled): function for mangled, function in parse(text).items()}


def kernel_sizes() -> dict[str, tuple[int, int, int]]:
    """Threads, dynamic shared memory and blocks an SM of every kernel, from heuristics.h."""
    program = BUILD / "kernel_sizes"
    source = Path(__file__).with_name("kernel_sizes.cpp")
    subprocess.run(["g++", "-std=c++17", str(source), "-o", str(program)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in lines.splitlines())
    return {name: (int(threads), int(size), int(n)) for name, threads, size, n in rows}


def architectures(source: Path) -> tuple[str, ...]:
    """What a source is compiled for."""
    own = (each for name, each in OWN_UNITS.items() if name in source.name)
    return next(own, ARCHITECTURES)


def compile_all(nvcc: str, nvdisasm: str, only: str, jobs: int) -> list[Kernel]:
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("instantiations/*.cu")]
    sources = sorted(source for source in sources if only in source.name)
    if not sources:
        sys.exit(f"--only {only}: no source in {SOURCES} has this in its name")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    contents = [path.read_bytes() for path in sorted(SOURCES.rglob("*.*"))]
    key = hashlib.sha256(version.encode() + b"".join(contents)).hexdigest()[:12]
    for stale in BUILD.glob("*.sm_*"):
        if key not in stale.name:
            stale.unlink()

    sizes = kernel_sizes()

    def build(task: tuple[Path, str]) -> list[Kernel]:
        source, architecture = task
        cubin, report = compile_one(nvcc, source, architecture, key)
        kernels = parse_report(report, architecture)
        functions = disassemble(nvdisasm, cubin)
        for kernel in kernels:
            function = functions[kernel.name]
            kernel.instructions = Counter(each.text.split()[0] for each in function.instructions)
            threads, _, blocks = sizes[kernel.name]
            kernel.loop = loops.measure(function, kernel.name, architecture, threads // 32, blocks)
        return kernels

    tasks = [(source, each) for source in sources for each in architectures(source)]
    with ThreadPoolExecutor(jobs) as pool:
        found = [kernel for kernels in pool.map(build, tasks) for kernel in kernels]
    order = [*ARCHITECTURES, *(each for own in OWN_UNITS.values() for each in own)]
    return sorted(found, key=lambda k: (k.name, order.index(k.architecture)))


def read_budget() -> dict[tuple[str, str], int]:
    with BUDGET.open() as file:
        return {
            (row["kernel"], row["architecture"]): int(row["registers"])
            for row in csv.DictReader(file)
        }


def write_budget(kernels: list[Kernel]) -> None:
    """Registers are handed out in eights, so a budget is the next multiple."""
    with BUDGET.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "architecture", "registers"])
        for k in kernels:
            writer.writerow([k.name, k.architecture, min(-(-k.registers // 8) * 8, 255)])


def print_table(kernels: list[Kernel], budget: dict[tuple[str, str], int]) -> None:
    sizes = kernel_sizes()
    header = ("kernel", "architecture", "threads", "registers", "budget", "spills", "shared memory")
    table = [header]
    for k in kernels:
        threads, shared, _ = sizes[k.name]
        granted = budget.get((k.name, k.architecture), "-")
        row = (k.name, k.architecture, threads, k.registers, granted, k.spilled_bytes, shared)
        table.append(tuple(str(cell) for cell in row))
    print_columns(table)
    print()
    shown = [
        (k.name, k.architecture, *asdict(k.loop).values()) for k in kernels if k.loop is not None
    ]
    names = (each.name.replace("_", " ") for each in fields(loops.Loop))
    print_columns(
        [("main loop, a tile", "architecture", *names)] + [tuple(map(str, row)) for row in shown]
    )


def print_columns(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        left = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}"
        print(left, *(f"{c:>{w}}" for c, w in zip(row[2:], widths[2:], strict=True)), sep="  ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--update", action="store_true", help="write budget.csv")
    what.add_argument("--only", default="", help="check sources with this in their name")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    nvcc, nvdisasm = shutil.which("nvcc"), find_tool("nvdisasm")
    if nvcc is None:
        print("nvcc is not on the PATH: no CUDA kernel was compiled or checked")
        return 0
    if nvdisasm is None:
        print(
            f"found {nvcc}, but no nvdisasm to read its machine code with: put the CUDA toolkit's "
            "bin folder on the PATH, or pip install triton"
        )
        return 1
    kernels = compile_all(nvcc, nvdisasm, arguments.only, arguments.jobs)
    if arguments.update:
        write_budget(kernels)
        loops.write_budget({(k.name, k.architecture): k.loop for k in kernels if k.loop})
    budget, loop_budget = read_budget(), loops.read_budget()
    for kernel in kernels:
        kernel.check(budget)
        if kernel.loop:
            granted = loop_budget.get((kernel.name, kernel.architecture))
            kernel.faults += loops.faults(kernel.loop, granted)
    print_table(kernels, budget)
    faults = [f"{k.name} {k.architecture}: {fault}" for k in kernels for fault in k.faults]
    if not arguments.only and (missing := {name for name, _ in budget} - {k.name for k in kernels}):
        faults.append(f"budget.csv holds kernels that do not exist: {', '.join(sorted(missing))}")
    print("\n".join(faults) or f"{len(kernels)} kernels within budget, none spills")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
