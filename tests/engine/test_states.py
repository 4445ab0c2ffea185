"""A server leaves the hidden states of prompts; a trainer reads them as if they were its own."""

from types import SimpleNamespace

import pytest
import torch

from dflare.apps.server_process import ServerProcess
from dflare.engine.states import leave_states, states_folder
from dflare.errors import DFlareError, UnsupportedError
from dflare.training.data import state_files
from dflare.training.data.files import Record, write_records
from dflare.training.data.served_target import ServedTarget
from dflare.training.data.state_files import is_wanted, new_name, read_states, write_states
from dflare.training.data.target import Target, load_target
from dflare.training.errors import ConfigError, TrainingError
from dflare.training.run.config import parse_config
from dflare.training.run.trainer import Trainer

TAPS = (0, 1)
FLAGS = (
    "--dtype float32 --context-length 256 --max-total-tokens 4096 --skip-server-warmup "
    "--enable-return-aux-hidden-states --speculative-algorithm DFLASH "
    "--return-aux-hidden-state-layer-ids 0 1 "
    "--disable-radix-cache --chunked-prefill-size -1 --disable-cuda-graph"
)


def test_states_of_a_server_are_those_of_the_target(random_pair, tmp_path):
    path, cpu = str(random_pair[0]), torch.device("cpu")
    own = Target(load_target(path).model, TAPS)
    folder = tmp_path / "states"
    arguments = ["--model-path", path, *FLAGS.split()]
    with ServerProcess(arguments, tmp_path / "log", {"DFLARE_STATES": str(folder)}) as server:
        server.wait_until_healthy()
        served = ServedTarget(path, TAPS, server.url, folder, cpu, torch.float32)
        ids = torch.randint(5, own.config.vocab_size, (3, 40))
        found, expected = served.read(ids), own.read(ids)
        trainer = Trainer(config(random_pair[0], server.url, folder, tmp_path))
        trainer.train_step()
        assert not list(folder.iterdir())
        with pytest.raises(ConfigError, match="--return-aux-hidden-state-layer-ids 1 0 "):
            ServedTarget(path, (1, 0), server.url, folder, cpu, torch.float32)
        with pytest.raises(TrainingError, match="DFLARE_STATES"):
            other = ServedTarget(path, TAPS, server.url, tmp_path, cpu, torch.float32)
            other.read(ids)
        with pytest.raises(DFlareError, match="--resume"):
            served.read(torch.full((1, 300), 5))
    assert isinstance(trainer.target, ServedTarget) and trainer.take_window().loss > 0
    # bfloat16 on the way
    torch.testing.assert_close(found.taps, expected.taps, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(found.final, expected.final, atol=1e-3, rtol=1e-2)
    assert len(served.decoder.layers) == 0 and served.config.num_hidden_layers > 0
    assert torch.equal(served.head, own.head) and torch.equal(served.embed(ids), own.embed(ids))


def config(target, url, folder, tmp_path):
    """A run of a few sequences on the server's states."""
    header = {"target": "random", "vocab_size": load_target(str(target)).config.vocab_size}
    records = [Record(list(range(5, 25 + i)), [(10, 25 + i)]) for i in range(4)]
    write_records(tmp_path / "data.xz", header, records)
    return parse_config(
        {
            "target": {"name": str(target)},
            "drafter": {
                "architecture": "dflare",
                "layers": 1,
                "taps": list(TAPS),
                "block_size": 4,
                "mask_token_id": 3,
                "init": "random",
            },
            "data": {
                "files": [str(tmp_path / "data.xz")],
                "max_length": 64,
                "batch_size": 2,
                "anchors": 4,
                "held_out": 1,
                "server": url,
                "states": str(folder),
            },
            "objective": {"name": "dpace"},
            "run": {"output": str(tmp_path / "run"), "device": "cpu"},
        },
        "test",
    )


def batch(rids, lengths, prefixes):
    return SimpleNamespace(
        rids=rids,
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=prefixes,
        forward_mode=SimpleNamespace(is_extend=lambda: True),
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLARE_STATES", str(tmp_path))
    parallel = SimpleNamespace(tp_rank=0)
    monkeypatch.setattr("sglang.srt.runtime_context.get_parallel", lambda: parallel)
    return tmp_path


def leave(forward, taps):
    """As SGLang's processor calls the hook, with states that name their tokens."""
    states = torch.arange(float(sum(forward.extend_seq_lens_cpu)))[:, None]
    taps = [states + 100, states + 200] if taps else None
    return leave_states(lambda *args: args[2], None, None, states, None, forward, taps)


def test_only_requests_of_a_trainer_leave_states(folder):
    first, second = new_name(), new_name()
    kept = leave(batch([first, "user", second], [2, 3, 1], [0, 0, 0]), taps=True)
    assert kept.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert len(list(folder.iterdir())) == 2
    assert read_states(folder, second, 1, 3).tolist() == [[105, 205, 5]]
    assert read_states(folder, first, 2, 3).tolist() == [[100, 200, 0], [101, 201, 1]]
    assert not list(folder.iterdir())
    assert not is_wanted("dflare-states-../../etc") and not is_wanted(first + "0")


@pytest.mark.parametrize(
    ("taps", "prefix", "reason"), [(True, 4, "--disable-radix-cache"), (False, 0, "taps no layers")]
)
def test_a_trainer_learns_why_there_are_no_states(folder, taps, prefix, reason):
    name = new_name()
    leave(batch([name], [2], [prefix]), taps=taps)
    with pytest.raises(TrainingError, match=reason):
        read_states(folder, name, 2, 3)
    assert not list(folder.iterdir())


def test_states_do_not_fill_the_disk(folder, monkeypatch):
    monkeypatch.setattr(state_files, "_MOST_BYTES", 20)
    first, second = new_name(), new_name()
    write_states(folder, first, torch.zeros(2, 3))
    write_states(folder, second, torch.zeros(2, 3))
    with pytest.raises(TrainingError, match="12 bytes of states wait"):
        read_states(folder, second, 2, 3)
    with pytest.raises(TrainingError, match=r"differ from drafter\.taps"):
        read_states(folder, first, 2, 4)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFLARE_STATES", str(tmp_path / "file" / "folder"))
    with pytest.raises(UnsupportedError, match="DFLARE_STATES"):
        states_folder()
