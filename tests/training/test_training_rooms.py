"""The rooms of the training code."""

import ast
from pathlib import Path

import dflare.training

ROOMS = ("data", "drafter", "loss", "run")
FOLDER = Path(dflare.training.__file__).parent


def imported(file: Path) -> set[str]:
    """Rooms and modules of the training code that a file imports anywhere."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.removeprefix("dflare.training.") for name in names if "dflare.training." in name}


def test_each_room_imports_only_the_rooms_before_it():
    drawn = {
        "data": 0,
        "drafter": 1,
        "loss": 1,
        "run": 2,
    }  # drafter and loss do not know each other
    assert sorted(p.name for p in FOLDER.iterdir() if (p / "__init__.py").exists()) == list(ROOMS)
    for room in ROOMS:
        for file in (FOLDER / room).glob("*.py"):
            others = {name.split(".")[0] for name in imported(file)} & set(ROOMS) - {room}
            assert all(drawn[other] < drawn[room] for other in others), file


def test_no_module_of_a_room_reaches_itself():
    needs = {
        f"{room}.{file.stem}": imported(file)
        for room in ROOMS
        for file in (FOLDER / room).glob("*.py")
    }

    def reach(name: str, seen: set[str]) -> set[str]:
        for other in needs.get(name, set()) - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    circles = [name for name in needs if name in reach(name, set())]
    assert not circles
