"""`dflare inspect` and `dflare convert`: what they print, and exit status 1 with one clear line."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from checkpoints import (
    random_draft_config,
    random_tensors,
    write_random_draft,
    write_random_target,
    write_tensors,
)

from dflare.checkpoint import read_config
from dflare.cli import main

SHIPPED = Path(__file__).parents[2] / "assets" / "smollm2-135m-dflare"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; give exit status, standard output and error."""

    def run_command(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["dflare", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run_command


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("target"), architecture="qwen3")


def test_the_shipped_drafter_is_sound(run):
    status, out, err = run("inspect", SHIPPED)
    assert (status, err) == (0, "")
    assert "angelslim" in out
    assert "failed" not in out
    assert (SHIPPED / "model.safetensors").stat().st_size <= 16 * 2**20


def test_a_sound_pair_is_shown_in_full(run, tmp_path, target):
    draft = write_random_draft(tmp_path / "draft", shards=2)
    status, out, err = run("inspect", draft, "--target", target)
    assert (status, err) == (0, "")
    for text in ("3: 1, 3, 5", "dominant tap", "K/V a token, target", "hidden size", "mask token"):
        assert text in out
    assert "failed" not in out


def test_json_has_what_the_tables_have(run, tmp_path, target):
    config = random_draft_config()
    draft = write_random_draft(tmp_path / "draft", config=config)
    status, out, _ = run("inspect", draft, "--target", target, "--json")
    content = json.loads(out)
    assert status == 0
    assert content["config"]["block_size"] == config.block_size
    assert content["parameters"] == sum(t.numel() for t in random_tensors(config).values())
    assert content["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert content["target_kv_bytes_per_token"] == 2 * 8 * 2 * 16 * 4
    shares = torch.softmax(random_tensors(config)["layer_fusion_weights"], -1)
    torch.testing.assert_close(torch.tensor(content["fusion"]), shares)
    taps = torch.tensor(config.target_layer_ids)[shares.argmax(-1)]
    assert content["dominant_taps"] == taps.tolist()
    assert {check["status"] for check in content["checks"]} == {"ok", "note"}


def test_a_pair_that_does_not_fit_fails_in_one_line(run, tmp_path, target):
    draft = write_random_draft(tmp_path / "draft", hidden_size=32)
    status, out, err = run("inspect", draft, "--target", target)
    assert status == 1
    assert "failed" in out
    assert err.startswith(f"dflare: {draft}: hidden size: the drafter's is 32 and the target's")
    assert err.count("\n") == 1


def test_nan_weights_fail(run, tmp_path):
    tensors = random_tensors(random_draft_config())
    tensors["norm.weight"][0] = float("nan")
    draft = write_random_draft(tmp_path / "draft")
    write_tensors(draft, tensors)
    status, _, err = run("inspect", draft)
    assert status == 1
    assert "NaN or infinite weights in `norm.weight` (1 of 64)" in err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_draft_that_is_not_there_fails(run, tmp_path, command):
    arguments = [tmp_path / "nowhere"] + ([tmp_path / "out"] if command == "convert" else [])
    status, out, err = run(command, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"dflare: {tmp_path / 'nowhere'}: no such folder; give a folder")
    assert err.count("\n") == 1


def test_convert_writes_what_serving_reads(run, tmp_path):
    source = write_random_draft(tmp_path / "source", dialect="angelspec", shards=2)
    status, out, err = run("convert", source, tmp_path / "out")
    assert (status, err) == (0, "")
    assert "2 layers, 3 taps, block 4" in out
    assert read_config(tmp_path / "out").dialect == "angelslim"

    status, _, err = run("convert", source, tmp_path / "out")
    assert status == 1
    assert "--force" in err
    assert run("convert", source, tmp_path / "out", "--force")[0] == 0


def inspect_from_hub(folder: Path, **environment: str) -> str:
    """Run `dflare inspect` with a hub id in a fresh process; return its one line of error."""
    command = "from dflare.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "inspect", "AngelSlim/Qwen3-4b-dflare"],
        env=os.environ | {"HF_HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("dflare: AngelSlim/Qwen3-4b-dflare: no such folder, and ")
    return done.stderr


def test_a_hub_that_cannot_be_reached_fails_in_one_line(tmp_path):
    text = inspect_from_hub(tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub cannot be reached and nothing is cached: check the network" in text


def test_a_repository_that_the_hub_does_not_have_fails_in_one_line(tmp_path):
    class EmptyHub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_args):
            pass

    with HTTPServer(("127.0.0.1", 0), EmptyHub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        text = inspect_from_hub(
            tmp_path,
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HUB_OFFLINE="0",
            NO_PROXY="127.0.0.1",
        )
        server.shutdown()
    assert "the hub has no such repository or revision, or it is private" in text


def test_a_window_is_explained_where_there_is_one(run, tmp_path):
    types = ("sliding_attention", "full_attention")
    windowed = write_random_draft(tmp_path / "windowed", layer_types=types, sliding_window=16)
    status, out, _ = run("inspect", windowed, "--json")
    notes = [c for c in json.loads(out)["checks"] if c["status"] == "note"]
    assert status == 0 and [note["name"] for note in notes] == ["sliding window"]
    for words in ("layers 0 see 16 tokens", "causal inside the block", "full_attention"):
        assert words in notes[0]["detail"]
    _, out, _ = run("inspect", write_random_draft(tmp_path / "full"), "--json")
    assert "note" not in [check["status"] for check in json.loads(out)["checks"]]
