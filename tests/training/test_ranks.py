"""Two processes (gloo) do what one does."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import write_random_target
from tiny_models import train_config, write_data

from dflare.apps.server_process import free_port
from dflare.training.run.config import load_config
from dflare.training.run.loop import train
from dflare.training.run.trainer import Trainer

_COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
_DFLARE = [sys.executable, "-c", "from dflare.cli import main; main()", "train"]


def write_config(folder, output, **changes):
    """Write the configuration of a run over a target and data in this folder."""
    config = train_config(
        folder,
        target__name=str(folder / "target"),
        drafter__mask_token_id=3,
        drafter__taps=[0, 1, 2],
        optimizer__eps=1e-5,  # Adam's first steps multiply the rounding of a gradient by lr / eps
        run__output=str(output),
        **changes,
    )
    file = folder / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    return file


def train_here(folder, **changes):
    """Train without other ranks; the weights of the snapshot, and the log."""
    output = folder / "run"
    train(Trainer(load_config(write_config(folder, output, run__steps=2, **changes))))
    return result_of(output)


def train_two(folder, **changes):
    """Run `dflare train` under torchrun."""
    output = folder / f"run{len(list(folder.iterdir()))}"
    file = write_config(folder, output, run__steps=2, **changes)
    command = [*_COMMAND, "2", "--no-python", *_DFLARE, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result_of(output)


def result_of(output):
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.load(output / "snapshot.pt", weights_only=True)["model"], log


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"objective__frequent": 40, "objective__random": 9, "run__accumulate": 2},
    ],
    ids=["plain", "reduced vocabulary, micro-batches"],
)
def test_two_ranks_give_the_weights_of_one(tmp_path, changes):
    write_random_target(tmp_path / "target", num_layers=4, vocab_size=512)
    write_data(tmp_path / "data.xz", 14, vocab_size=512)
    one, log = train_here(tmp_path, **changes)
    for shard in (False, True):
        two, log_of_two = train_two(tmp_path, run__shard=shard, **changes)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
        for a, b in zip(log, log_of_two, strict=True):
            assert a["accept_length"] == pytest.approx(b["accept_length"], abs=1e-4)
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_step_at_hand(tmp_path):
    write_random_target(tmp_path / "target", num_layers=4, vocab_size=512)
    write_data(tmp_path / "data.xz", 14, vocab_size=512)
    output = tmp_path / "run"
    changes = {"run__steps": 10**6, "run__log_every": 10**6, "run__validate_every": 1}
    file = write_config(tmp_path, output, **changes)
    port = str(free_port())
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "RANK": str(rank),
        }
        with (tmp_path / f"rank{rank}").open("w") as out:
            processes.append(
                subprocess.Popen([*_DFLARE, str(file)], env=environment, stdout=out, stderr=out)
            )
    try:
        deadline = time.monotonic() + 300
        while not (output / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    snapshot = torch.load(output / "snapshot.pt", weights_only=True)
    assert codes == [1, 1], texts
    assert all(f"stopped after step {snapshot['step']};" in text for text in texts), texts
    assert snapshot["window"]["steps"] == snapshot["step"], "nothing was logged so far"
