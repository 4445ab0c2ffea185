"""Sizes of the code, held to the goals that the project has set itself: `make counts`.

Raw lines of what git tracks. The product is python/ and csrc/ less the emulator and the gates;
tests are counted without the device that stands in for a GPU (tests/cuda_device).
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
LONG = 60  # lines of a function that is too long to be read at once
CPU = ("csrc/cpu/", "python/dflare/cpu/")
# A C++ function as clang-format lays it out: `{` ends its head, `}` stands below the head.
HEAD = re.compile(
    r"^(\s*)(?!namespace|struct|class|enum|union|if|for|while|switch|else|do\b|\}).*\{$"
)


def files(*folders: str) -> list[Path]:
    """Source files that git tracks under these folders."""
    listed = subprocess.run(
        ["git", "ls-files", *folders], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [Path(name) for name in listed.splitlines() if Path(name).suffix in SOURCE]


def lines(path: Path) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def total(paths: Iterable[Path]) -> int:
    return sum(len(lines(path)) for path in paths)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function of a file."""
    text = lines(path)
    if path.suffix == ".py":
        for node in ast.walk(ast.parse("\n".join(text))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1
        return
    for start, line in enumerate(text):
        head = HEAD.match(line)
        if head and "(" in "".join(text[max(0, start - 12) : start + 1]):
            close = (n for n in range(start, len(text)) if text[n].startswith(head[1] + "}"))
            first = start
            while first and text[first - 1].startswith(head[1] + " "):
                first -= 1  # arguments on lines of their own
            yield text[first].strip(), next(close, start) - first + 1


def imports(path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a module imports, wherever in it, but for the type checker."""
    tree = ast.parse("\n".join(lines(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def module(path: Path) -> str:
    return ".".join(path.relative_to("python").with_suffix("").parts).removesuffix(".__init__")


def circles(paths: Iterable[Path]) -> list[list[str]]:
    """Circles of imports; each is broken to find the next."""
    modules = {module(path): path for path in paths if path.suffix == ".py"}
    graph = {name: imports(path, set(modules)) - {name} for name, path in modules.items()}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
            return found
        except CycleError as error:
            circle = error.args[1]
            found.append(circle)
            graph[circle[1]].discard(circle[0])


def main() -> None:
    product = files("python", "csrc")
    product = [p for p in product if not str(p).startswith(("csrc/emulation/", "csrc/gates/"))]
    cpu = [p for p in product if str(p).startswith(CPU)]
    tests = [p for p in files("tests") if not str(p).startswith("tests/cuda_device/")]
    long = [(n, f"{p}: {name}") for p in product for name, n in functions(p) if n >= LONG]
    largest = max(product, key=lambda path: len(lines(path)))
    found = circles(product)
    rows = [
        ("product, lines", total(product), "14,500"),
        ("of these the CPU platform and its kernels", total(cpu), ""),
        ("bench, lines", total(files("bench")), "3,000"),
        ("tests, lines", total(tests), "10,000"),
        (f"functions of {LONG} lines and more", len(long), "3"),
        (f"largest file ({largest})", len(lines(largest)), "under 400"),
        ("import circles", len(found), "0"),
    ]
    for name, value, goal in rows:
        print(f"{name:60} {value:>7,}   {goal and f'goal {goal}'}")
    for length, name in sorted(long, reverse=True):
        print(f"  {length} lines: {name}")
    for circle in found:
        print(f"  circle: {' <- '.join(circle)}")


if __name__ == "__main__":
    main()
