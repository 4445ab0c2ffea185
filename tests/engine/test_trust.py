"""What a served pair may not do: run a checkpoint's code, open its pickles, record its users."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
from checkpoints import write_random_draft, write_random_target
from sglang.srt.server_args import ServerArgs

from dflare.apps.launch import check_before_start
from dflare.checkpoint import find_folder
from dflare.errors import CheckpointError


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("trust") / "target")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "training_args.bin"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_in_a_checkpoint_is_not_opened(target, tmp_path, name, alone):
    opened = tmp_path / "opened"
    draft = write_random_draft(tmp_path / "draft")
    (draft / name).write_bytes(pickle.dumps(Payload(opened)))
    if alone:
        (draft / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="safetensors"):
            check_before_start(str(target), str(draft))
    else:
        check_before_start(str(target), str(draft))
    assert not opened.exists()
    pickle.loads((draft / name).read_bytes())
    assert opened.exists(), "the payload does nothing: this test could not fail"


def test_code_of_a_drafter_does_not_run(target, tmp_path):
    draft = write_random_draft(tmp_path / "draft")
    ran = tmp_path / "ran"
    (draft / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n")
    file = draft / "config.json"
    code = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    check_before_start(str(target), str(draft))
    assert find_folder(draft) == draft and not ran.exists()


@pytest.mark.parametrize(
    ("flag", "off"),
    [
        ("trust_remote_code", False),
        ("log_requests", False),
        ("crash_dump_folder", None),
        ("export_metrics_to_file", False),
        ("enable_trace", False),
        ("enable_custom_logit_processor", False),
    ],
)
def test_is_off_unless_asked_for(flag, off):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert getattr(parser.parse_args(["--model-path", "x"]), flag) == off
