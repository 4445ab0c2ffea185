"""The kernel benchmarks end to end on the CPU, and what the GPU session would run."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from bench.kernels import __main__ as bench
from bench.kernels import append, attention, prebuild, table, timing

from dflare import ops

KERNELS = Path(timing.__file__).parent
SMALL = ["--device", "cpu", "--model", "smollm2-135m", "--rounds", "2"]
APPEND = ["append", *SMALL, "--rows", "18"]
ATTENTION = ["attention", *SMALL, "--batch", "2", "--context", "20"]
PAGED = ["paged", *SMALL, "--batch", "2", "--context", "20"]


@pytest.fixture(autouse=True)
def small_machine(tmp_path, monkeypatch):
    """A cache so small that few buffer sets exceed it, short turns, peaks that are not measured."""
    (tmp_path / "cache_size").write_text("128K\n")
    monkeypatch.setattr(timing, "LAST_LEVEL_CACHE", tmp_path / "cache_size")
    monkeypatch.setattr(timing, "CPU_SECONDS", 0.002)
    monkeypatch.setattr(bench, "measure_peaks", lambda *_: timing.Peaks(20.0, 0.5))


def lines_of(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_operator_is_checked_and_measured_and_the_table_holds_it(tmp_path, capsys):
    assert bench.main([*APPEND, "--commit-lens", "none", "full", "3"]) == 0
    assert bench.main([*ATTENTION, "--page", "1", "4"]) == 0
    assert bench.main(PAGED) == 0
    lines = lines_of(capsys)
    two = ["dflare", "eager"]
    arms = [*two, "bmm"] * 3 + two * 2 + [*two, "sdpa"] * 2
    assert [line["arm"] for line in lines] == arms
    for line in lines:
        assert line["us_p20"] <= line["us"] <= line["us_p80"] and line["measurements"] >= 2
        assert line["arm"] == "bmm" or 0 < line["relative_error"] < 1e-5
        assert line["floor_us"] > 0 and not line["cuda_graph"]
    assert lines[6]["committed"] == 9 and lines[0]["committed"] == 18
    assert lines[6]["bytes"] < lines[0]["bytes"] and lines[6]["flops"] < lines[0]["flops"]
    assert lines[8]["flops"] == lines[2]["flops"]  # the GEMM computes all rows

    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bench.main(["table", str(tmp_path / "lines.jsonl")]) == 0
    text = capsys.readouterr().out
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + len(lines)


def test_arms_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "times", lambda run, *_: [run() or 5.0])
    order: list[str] = []
    arms = [timing.Arm(name, lambda i, name=name: order.append(f"{name}{i}")) for name in "ab"]
    timing.take_turns(arms, sets=2, rounds=3, device="cpu")
    assert "".join(order) == "a0a1b0b1" + "b0b1a0a1" + "a0a1b0b1"
    assert arms[0].us == [2.5] * 3


def test_a_wrong_result_is_an_error_of_the_run(monkeypatch, capsys):
    right = ops.append_context_kv

    def wrong(*arguments):
        right(*arguments)
        arguments[-1].v[1].mul_(1.001)

    monkeypatch.setattr(ops, "append_context_kv", wrong)
    assert bench.main(APPEND) == 1
    assert "dflare: error" in capsys.readouterr().err


def test_a_write_to_a_row_that_was_not_committed_is_an_error(monkeypatch, capsys):
    right = ops.append_context_kv

    def careless(*arguments):
        right(*arguments)
        *_, cache_loc, _, _, pools = arguments
        pools.k[0][cache_loc[3]] = 0

    monkeypatch.setattr(ops, "append_context_kv", careless)
    assert bench.main([*APPEND, "--commit-lens", "3"]) == 1
    assert lines_of(capsys)[0]["relative_error"] == float("inf")


@pytest.mark.parametrize("broken, status", [("dflare", 1), ("bmm", 0)])
def test_an_arm_that_fails_leaves_the_others_measured(broken, status, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("no kernel image\nfor this device")

    where, name = (ops, "append_context_kv") if broken == "dflare" else (append, "bmm_arm")
    monkeypatch.setattr(where, name, fail)
    assert bench.main(APPEND) == status
    lines = {line["arm"]: line for line in lines_of(capsys)}
    assert lines[broken]["failure"] == "RuntimeError: no kernel image"
    assert all("us" in line for arm, line in lines.items() if arm != broken)


def test_a_shape_that_does_not_fit_is_said_and_the_others_are_measured(monkeypatch, capsys):
    make = attention.case

    def short_of_memory(pair, batch, context, *rest):
        if context == 40:
            raise torch.OutOfMemoryError("out of memory")
        return make(pair, batch, context, *rest)

    monkeypatch.setattr(attention, "case", short_of_memory)
    assert bench.main([*ATTENTION, "--context", "40", "20"]) == 1
    captured = capsys.readouterr()
    assert {json.loads(line)["context"] for line in captured.out.splitlines()} == {20}
    assert "'context': 40, 'page': 1}: not measured, out of memory" in captured.err


@pytest.mark.parametrize(
    "command, message",
    [
        (["append", "--arms", "dflair"], "invalid choice: 'dflair'"),
        (["append", "--device", "cpu", "--dtype", "float16"], "on cpu float32 or bfloat16"),
        (["append", "--device", "cpu", "--profile", "dflare"], "needs --device cuda"),
        (["attention", "--device", "cpu", "--arms", "fa3"], "none of these on a CPU"),
        (["paged"], "add --device cpu"),
    ],
)
def test_options_that_cannot_be_are_named(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.parse(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_layer_takes_prologue_and_its_share_of_schedule_or_plan():
    us = {"dflare": 40.0, "schedule": 7.0, "prologue": 10.0, "fa3": 60.0, "flashinfer_fa2": 50.0}
    arms = {name: {"arm": name, "us": time, "layers": 7} for name, time in us.items()}
    arms["flashinfer_fa2"]["plan_us"] = 70.0
    assert table.layer_us(arms, "dflare") == pytest.approx(41.0)
    assert table.layer_us(arms, "fa3") == pytest.approx(70.0)
    assert table.layer_us(arms, "flashinfer_fa2") == pytest.approx(70.0)
    del arms["prologue"]
    assert table.layer_us(arms, "fa3") is None


def test_flashinfer_loads_what_was_compiled_before(tmp_path, monkeypatch):
    jit = pytest.importorskip("flashinfer.jit")
    env = jit.env
    monkeypatch.setattr(jit.core, "check_cuda_arch", lambda: None)  # there is no GPU
    for name in ("FLASHINFER_AOT_DIR", "FLASHINFER_GEN_SRC_DIR", "FLASHINFER_JIT_DIR"):
        monkeypatch.setattr(env, name, tmp_path / name)
    wanted = prebuild.module("fa2", 128)
    assert not wanted.is_aot
    prebuild.use_prebuilt(tmp_path)
    (tmp_path / wanted.name).mkdir()
    (tmp_path / wanted.name / f"{wanted.name}.so").touch()
    assert wanted.is_aot and wanted.get_library_path().is_relative_to(tmp_path)


@pytest.mark.parametrize("call", ["first", "second"])
def test_gpu_session_runs_commands_that_exist_within_ten_minutes(call, tmp_path):
    """With stand-ins for Python and `timeout` that note how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/commands\n')
    (programs / "timeout").write_text(
        f'#!/bin/sh\necho "$3" >>{tmp_path}/limits\nshift 3\nexec "$@"\n'  # --kill-after 10 LIMIT
    )
    (programs / "compute-sanitizer").write_text("#!/bin/sh\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": "python"}
    command = ["bash", str(KERNELS / "gpu_session.sh"), str(tmp_path / "out"), call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    assert sum(map(int, (tmp_path / "limits").read_text().split())) <= 600
    commands = [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    asked = [line[2:] for line in commands if line[:2] == ["-m", "bench.kernels"]]
    assert len(asked) >= 4
    for line in asked:
        arguments = bench.parse(line)
        if arguments.op != "table":
            assert arguments.device == "cuda" and "dflare" in arguments.arms
