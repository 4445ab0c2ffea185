"""Which part of the package may import which: rooms that a reader can tell apart."""

import ast
from pathlib import Path

import pytest

import dflare

PACKAGE = Path(dflare.__file__).parent
# Whoever is not named may import anything but `cli`.
MAY_IMPORT = {
    "ops": {"errors"},
    "checkpoint": {"errors", "text_file"},
    "adaptive": {"errors", "text_file"},
    "engine": {"ops", "checkpoint", "adaptive", "branch", "errors", "processor", "text_file"},
    "cpu": {"ops", "engine"},
}
# The entry point of SGLang's plug-ins offers the attention backends of all devices, and what a
# server keeps of its traffic, or leaves of its states, is written as training reads it.
DOORS = [PACKAGE / "engine" / name for name in ("plugin.py", "traffic.py", "states.py")]


def imported(file: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(file: Path) -> set[str]:
    """Rooms of the package that a file imports from."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("dflare.")}


def files(room: str) -> list[Path]:
    return [f for f in sorted((PACKAGE / room).rglob("*.py")) if f not in DOORS]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_those_below_it_alone(room):
    assert files(room)
    strangers = {
        str(f): extra for f in files(room) if (extra := rooms(f) - MAY_IMPORT[room] - {room})
    }
    assert not strangers


@pytest.mark.parametrize("room", ["ops", "checkpoint", "adaptive", "training", "cli"])
def test_sglang_is_met_in_engine_cpu_and_apps_alone(room):
    users = {f.name for f in files(room) if any(n.split(".")[0] == "sglang" for n in imported(f))}
    # The one that generates training data with SGLang.
    assert users <= {"sglang_generator.py"}


@pytest.mark.parametrize(
    "room", ["ops", "checkpoint", "adaptive", "engine", "cpu", "apps", "training"]
)
def test_nobody_imports_the_command_line(room):
    assert not {f.name for f in files(room) if "cli" in rooms(f)}
