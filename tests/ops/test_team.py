"""The threads of the CPU operators, as a program of their own: with races watched, and without."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("sanitizer", [None, "thread"])
def test_the_team_runs_every_range_once_and_ends_cleanly(tmp_path, sanitizer):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    assert compiler, "a C++ compiler built the extension, but none is on the PATH now"
    program = tmp_path / "team_checks"
    sources = [ROOT / "tests/ops/team_checks.cpp", ROOT / "csrc/cpu/team.cpp"]
    flags = ["-std=gnu++20", "-O1", "-Wall", "-pthread", f"-I{ROOT / 'csrc'}"]
    flags += [f"-fsanitize={sanitizer}"] if sanitizer else []
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    arguments = ["without-fork"] if sanitizer else []
    run = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (0, "all hold\n"), run.stdout + run.stderr
