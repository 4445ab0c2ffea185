"""What the commands refuse at once, and how they end when they are interrupted."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from checkpoints import write_random_draft, write_random_target
from transformers import AutoTokenizer

from dflare.apps.launch import check_before_start, read_prompts
from dflare.cli import main
from dflare.errors import DFlareError, UnsupportedError
from dflare.text_file import parse_json_line, read_text

DFLARE = [sys.executable, "-m", "dflare.cli"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target, draft = write_random_target(folder / "target"), write_random_draft(folder / "draft")
    return str(target), str(draft)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DFLARE, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("port", ["--port={}", "--port {}"])
def test_a_port_in_use_is_refused_before_anything_is_loaded(pair, port):
    target, draft = pair
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        flags = port.format(number).split()
        refused = run("serve", "--model-path", target, "--draft", draft, *flags)
    (line,) = refused.stderr.strip().splitlines()
    assert refused.returncode == 1
    assert line.startswith(f"dflare: cannot listen on 127.0.0.1 port {number} (")
    assert "--port" in line


def test_wrong_adaptive_settings_are_refused_before_anything_is_loaded(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("DFLARE_ADAPTIVE", '{"widths": [1, 99]}')
    draft = write_random_draft(tmp_path / "draft")
    (draft / "model.safetensors").unlink()  # weights are read later: this would be wrong too
    with pytest.raises(UnsupportedError, match=r"DFLARE_ADAPTIVE=.*exceeds the drafter's block"):
        check_before_start(pair[0], str(draft))


@pytest.mark.parametrize("temperature", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused_by_verify(pair, temperature, monkeypatch, capsys):
    command = ["dflare", "verify", "--model", pair[0], "--draft", pair[1]]
    monkeypatch.setattr(sys, "argv", [*command, f"--temperature={temperature}"])
    with pytest.raises(SystemExit) as stop:
        main()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 1
    assert f"--temperature {float(temperature)}; expected" in line


def test_the_line_of_a_text_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes("run: ä\n".encode() + b"\x00\xff\x00\n")
    with pytest.raises(DFlareError, match=r"config\.yaml, line 2: byte 0xff at 1 is not UTF-8"):
        read_text(file, DFlareError)


def test_half_a_surrogate_pair_is_refused_and_a_whole_one_is_not(pair, tmp_path):
    assert parse_json_line('"\\ud83d\\ude00"') == "😀"
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(DFlareError, match=r"line 2: .*\\ud83d is half a surrogate pair"):
        read_prompts(file, AutoTokenizer.from_pretrained(pair[0]))


@pytest.mark.parametrize("key", ["question", "problem"])
def test_a_question_of_a_benchmark_is_a_user_turn(pair, tmp_path, key):
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    file = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "what is 2 + 2?"}]}
    file.write_text(json.dumps({key: "what is 2 + 2?", "answer": "4"}) + "\n" + json.dumps(chat))
    first, second = read_prompts(file, tokenizer)
    assert first == second


WAITS = """
import subprocess, sys, time
from dflare.apps.interrupt import ends_quietly_at_ctrl_c
with ends_quietly_at_ctrl_c():
    subprocess.Popen([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"])
    time.sleep(60)
"""


def test_ctrl_c_ends_every_process_without_a_word():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)  # the child holds the pipes: it has ended too
    assert (process.returncode, errors) == (130, "")
    assert time.monotonic() - start < 10


def test_ctrl_c_is_pythons_own_again_afterwards():
    code = WAITS.split("with")[0] + (
        # Python leaves a signal alone that was ignored when it started, as in a shell's background.
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with ends_quietly_at_ctrl_c():\n    pass\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "except KeyboardInterrupt:\n    print('as ever')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("as ever\n", "")


def test_the_doctor_does_not_import_sglang():
    """Its imports alone take longer than the three seconds that a diagnosis may."""
    code = (
        "import sys; from dflare.apps.diagnosis import diagnose; diagnose();"
        "print([m for m in ('sglang', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
