"""Compiles and links; every object is cached by what it is made of."""

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "cuda_device"


def compile_all(commands: list[list[str]], depends: str = "") -> list[Path]:
    """Objects of commands that end with a source file; `depends` is what else they are made of."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda command: _compile(command, depends), commands))


def _compile(command: list[str], depends: str) -> Path:
    text = _with_includes(Path(command[-1]), set())
    target = CACHE / f"{_digest(repr(command), text, depends)}.o"
    if not target.exists():
        _run([*command, "-o", str(target.with_suffix(".part"))])
        target.with_suffix(".part").rename(target)
    return target


def compile_text(command: list[str], text: str) -> Path:
    """The object of a generated C file."""
    source = CACHE / f"{_digest(text)}.c"
    source.write_text(text)
    return _compile([*command, str(source)], "")


def link(objects: list[Path], name: str, flags: list[str]) -> Path:
    """A shared library of this file name, in a folder of its own."""
    parts = [*(path.name for path in objects), *flags]
    target = CACHE / _digest(*parts) / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        part = target.with_suffix(".part")
        _run(["g++", "-shared", *map(str, objects), *flags, "-o", str(part)])
        part.rename(target)
    return target


def _with_includes(path: Path, seen: set[Path]) -> str:
    """The text of a source file and of the files beside it that it includes."""
    if path in seen or not path.exists():
        return ""
    seen.add(path)
    text = path.read_text()
    for name in re.findall(r'#include "(.+)"', text):
        text += _with_includes((path.parent / name).resolve(), seen)
    return text


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LANG": "C"})
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
