"""The kernel benchmarks end to end on the CPU, and what the GPU session would run."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import append_context_kv
import block_attention
import cpu_ops
import device
import plot
import pytest
import torch

from dflare import ops

KERNELS = Path(append_context_kv.__file__).parent
SMALL = ["--device", "cpu", "--model", "smollm2-135m", "--dtype", "float32", "--rounds", "2"]
APPEND = [*SMALL, "--rows", "18", "--without", "compile", "--refcheck"]
ATTENTION = [*SMALL, "--batch", "2", "--context", "20", "--without", "compile", "--refcheck"]


@pytest.fixture(autouse=True)
def small_machine(tmp_path, monkeypatch):
    """A cache so small that few buffer sets exceed it, and peaks that take no time to measure."""
    size = tmp_path / "cache_size"
    size.write_text("128K\n")
    monkeypatch.setattr(device, "LAST_LEVEL_CACHE", size)
    monkeypatch.setattr("session.measure_peaks", lambda *_: device.Peaks(20.0, 18.0, 0.5))


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_both_scripts_and_the_plot_run_on_the_cpu(tmp_path, capsys):
    commits = ["--commit-lens", "none", "full", "random", "3"]
    assert append_context_kv.main([*APPEND, *commits]) == 0
    append = lines_of(capsys)
    assert block_attention.main([*ATTENTION, "--page", "1", "4"]) == 0
    attention = lines_of(capsys)

    assert [line["arm"] for line in append] == ["dflare", "eager", "bmm"] * 4
    assert [line["arm"] for line in attention] == ["dflare", "eager"] * 2
    assert [line["committed"] for line in append[::3]][:2] == [18, 18]
    assert append[9]["committed"] == 9
    assert append[9]["bytes"] < append[0]["bytes"] and append[9]["flops"] < append[0]["flops"]
    assert append[11]["flops"] == append[2]["flops"]  # the GEMM computes all rows
    for line in append + attention:
        assert line["us_p20"] <= line["us"] <= line["us_p80"] and line["rounds"] == 2
        assert line["arm"] == "bmm" or 0 < line["relative_error"] < 1e-5

    files = tmp_path / "append.jsonl", tmp_path / "attention.jsonl"
    for file, lines in zip(files, (append, attention), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot.main([*map(str, files), "--png", str(tmp_path / "roofline.png")]) == 0
    table = capsys.readouterr().out
    assert "CPU, demo drafter's shapes: 2 x faster than PyTorch" in table
    assert table.count("| append_context_kv |") == len(append)
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_the_cpu_operators_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(cpu_ops, "cases", lambda dtype: [cpu_ops.append_context_kv(8, dtype)])
    command = ["cpu_ops.py", "--threads", "1", "--rounds", "2", "--round-ms", "0.1"]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    cpu_ops.main()
    torch.set_num_threads(threads)
    (line,) = lines_of(capsys)
    assert line["op"] == "append_context_kv" and line["speedup_over_eager"] > 0


def test_a_wrong_result_is_an_error_of_the_run(monkeypatch, capsys):
    right = ops.append_context_kv

    def wrong(**arguments):
        right(**arguments)
        arguments["v_pools"][1] *= 1.001

    monkeypatch.setattr(ops, "append_context_kv", wrong)
    assert append_context_kv.main(APPEND) == 1
    assert "dflare: error" in capsys.readouterr().err


def test_a_write_to_a_row_that_was_not_committed_is_an_error(monkeypatch, capsys):
    right = ops.append_context_kv

    def careless(**arguments):
        right(**arguments)
        arguments["k_pools"][0][arguments["cache_loc"][3]] = 0

    monkeypatch.setattr(ops, "append_context_kv", careless)
    assert append_context_kv.main([*APPEND, "--commit-lens", "3"]) == 1
    assert lines_of(capsys)[0]["relative_error"] == float("inf")


@pytest.mark.parametrize("broken, status", [("dflare", 1), ("eager", 0)])
def test_an_arm_that_fails_leaves_the_others_measured(broken, status, monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("no kernel image\nfor this device")

    name = "append_context_kv" if broken == "dflare" else "append_context_kv_reference"
    monkeypatch.setattr(ops, name, fail)
    command = [argument for argument in APPEND if argument != "--refcheck"]
    assert append_context_kv.main(command) == status
    lines = {line["arm"]: line for line in lines_of(capsys)}
    assert lines[broken]["failure"] == "RuntimeError: no kernel image"
    assert all("us" in line for arm, line in lines.items() if arm != broken)


def test_a_result_that_could_not_be_checked_is_measured_and_said(monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(block_attention, "reference", out_of_memory)
    assert block_attention.main(ATTENTION) == 1
    captured = capsys.readouterr()
    assert "not checked, OutOfMemoryError: out of memory" in captured.err
    assert all("us" in json.loads(line) for line in captured.out.splitlines())


def test_a_shape_that_does_not_fit_is_skipped(monkeypatch, capsys):
    make_sets = block_attention.make_sets

    def short_of_memory(shape, count):
        if shape.context == 40:
            raise torch.OutOfMemoryError("out of memory")
        return make_sets(shape, count)

    monkeypatch.setattr(block_attention, "make_sets", short_of_memory)
    assert block_attention.main([*ATTENTION, "--context", "40", "20"]) == 0
    captured = capsys.readouterr()
    assert {json.loads(line)["context"] for line in captured.out.splitlines()} == {20}
    assert "skipped: smollm2-135m, batch 2, context 40" in captured.err


@pytest.mark.parametrize(
    "script, command, message",
    [
        (append_context_kv, ["--arms", "dflair"], "invalid choice: 'dflair'"),
        (block_attention, ["--profile", "fa4"], "invalid choice: 'fa4'"),
        (append_context_kv, ["--device", "cpu", "--dtype", "float16"], "take float32 and bfloat16"),
        (append_context_kv, ["--device", "cpu", "--profile", "dflare"], "needs --device cuda"),
        (append_context_kv, ["--commit-lens", "some"], "expected none, full, random or 1 to 16"),
        (append_context_kv, ["--commit-lens", "17"], "expected none, full, random or 1 to 16"),
        (append_context_kv, ["--rows", "24", "--commit-lens", "full"], "a multiple of 16"),
        (block_attention, ["--context", "0"], "--context 0: expected 1"),
        (block_attention, ["--device", "cpu", "--arms", "fa3"], "leave no arm"),
    ],
)
def test_options_that_cannot_be_are_named(script, command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_dspark_is_left_out_where_its_writer_would_store_the_wrong_dtype(capsys):
    assert "dspark" not in append_context_kv.parse(["--dtype", "float16"]).arms
    assert "dspark left out: its writer stores bfloat16" in capsys.readouterr().err
    assert "dspark" in append_context_kv.parse([]).arms


def test_plot_says_when_there_is_nothing_to_show(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    assert plot.main([str(tmp_path / "empty.jsonl")]) == 1
    assert "nothing was measured" in capsys.readouterr().err


PHASES = ("bench", "compile", "append", "small", "large", "shapes")


@pytest.mark.parametrize("phase", PHASES)
def test_gpu_session_runs_commands_that_the_scripts_take_within_ten_minutes(phase, tmp_path):
    """With stand-ins for Python and `timeout` that note how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/commands\n')
    (programs / "timeout").write_text(
        f'#!/bin/sh\necho "$3" >>{tmp_path}/limits\nshift 3\nexec "$@"\n'  # --kill-after 10 LIMIT
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": "python"}
    command = ["bash", str(KERNELS / "gpu_session.sh"), str(tmp_path / "out"), phase]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    limits = [int(line) for line in (tmp_path / "limits").read_text().split()]
    assert sum(limits) < 600
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) == len(limits)
    scripts = {"append_context_kv.py": append_context_kv, "block_attention.py": block_attention}
    for line in commands:
        script, *arguments = shlex.split(line)
        chosen = scripts[Path(script).name].parse(arguments)
        assert chosen.device == "cuda" and "dflare" in chosen.arms
        assert ("compile" in chosen.arms) == (phase == "compile")
