"""Two processes (gloo) do what one does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import write_random_target
from tiny_models import train_config, write_data

_COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
_DFLARE = [sys.executable, "-c", "from dflare.cli import main; main()", "train"]


def train(folder, ranks, **changes):
    """Run `dflare train` under torchrun; the weights of its snapshot."""
    output = folder / f"run{ranks}-{len(list(folder.iterdir()))}"
    config = train_config(
        folder,
        target__name=str(folder / "target"),
        drafter__mask_token_id=3,
        drafter__taps=[0, 1, 2],
        optimizer__eps=1e-6,
        run__output=str(output),
        run__steps=4,
        **changes,
    )
    file = folder / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [*_COMMAND, str(ranks), "--no-python", *_DFLARE, str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return torch.load(output / "snapshot.pt", weights_only=True)["model"], log


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"objective__frequent": 40, "objective__random": 9, "run__accumulate": 2}],
    ids=["plain", "reduced vocabulary, micro-batches"],
)
def test_two_ranks_give_the_weights_of_one(tmp_path, changes):
    write_random_target(tmp_path / "target", num_layers=4, vocab_size=512)
    write_data(tmp_path / "data.jsonl", 14, vocab_size=512)
    one, log = train(tmp_path, 1, **changes)
    for shard in (False, True):
        two, log_of_two = train(tmp_path, 2, run__shard=shard, **changes)
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=0)
        for a, b in zip(log, log_of_two, strict=True):
            assert a["accept_length"] == pytest.approx(b["accept_length"], abs=1e-4)
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
