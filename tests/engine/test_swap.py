"""Another drafter in a running server: where it is better, and only while it is."""

import threading
import time

import pytest
import requests
import torch
from checkpoints import write_random_draft, write_tensors
from counting_pair import counting_drafter, rings, write_counting_target
from served import ADMIN, CLIENT, KEY, Served, kill_and_watch

from dflare.engine import online_update
from dflare.errors import DFlareError, UnsupportedError
from dflare.training.data.files import Record, read_records, write_records
from dflare.training.run import swap as module
from dflare.training.run.swap import Server, swap


def write_drafter(folder, change=None, **settings):
    """The drafter that is nearly always right, with its weights changed."""
    config, tensors = counting_drafter()
    config = config.model_copy(update=settings)
    if change:
        change(tensors)
    write_random_draft(folder, config=config)
    write_tensors(folder, tensors)
    return folder


def blind(tensors):
    tensors["layers.0.self_attn.o_proj.weight"].zero_()


def damaged(tensors):
    tensors["norm.weight"].fill_(torch.nan)


def ask(server, firsts, tokens=24):
    """Continue a ring from several places at once; each answer and its tokens a step."""
    ring = rings()[0]
    prompts = [[ring[(first + i) % len(ring)] for i in range(8)] for first in firsts]
    params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": params}
    reply = requests.post(f"{server.url}/generate", json=body, headers=KEY, timeout=120).json()
    return [(answer["output_ids"], answer["meta_info"]["spec_accept_length"]) for answer in reply]


def held_back(traffic):
    return sum(len(list(read_records(file))) for file in traffic.glob("held-back-*.xz"))


@pytest.mark.slow
def test_a_better_drafter_goes_into_a_running_server_which_ends_when_its_detokenizer_is_killed(
    tmp_path,
):
    target = write_counting_target(tmp_path / "target")
    old, new = write_drafter(tmp_path / "old", blind), write_drafter(tmp_path / "new")
    nan = write_drafter(tmp_path / "nan", damaged)
    other = write_drafter(tmp_path / "other", block_size=3)
    traffic = tmp_path / "traffic"
    environment = {"DFLARE_TRAFFIC": str(traffic), "DFLARE_ADAPTIVE": "off"}
    with Served(target, old, tmp_path / "log", **environment) as server:
        answers = ask(server, range(60))
        assert all(length < 1.2 for _, length in answers)
        long_answer = ask(server, [0], 200)
        while held_back(traffic) < 4:  # written when nothing has ended for a while
            time.sleep(0.5)
        running = []
        thread = threading.Thread(target=lambda: running.extend(ask(server, [0], 200)))
        thread.start()
        client = Server(server.url, CLIENT, ADMIN)
        assert swap(client, new, traffic, watch_minutes=0)
        thread.join()
        assert running[0][0] == long_answer[0][0]
        again = ask(server, range(60))
        assert [ids for ids, _ in again] == [ids for ids, _ in answers]
        assert all(length > 1.8 for _, length in again)
        assert client.pair() == (str(target), str(new))
        models = requests.get(f"{server.url}/v1/models", headers=KEY, timeout=10).json()
        assert models["data"][0]["id"] == str(target)
        for draft, reason in (
            (old, "not surely better"),
            (tmp_path / "none", "no such folder"),
        ):
            with pytest.raises(DFlareError, match=reason):
                swap(client, draft, traffic, watch_minutes=0)
        # What the server itself says, and it goes on as it was.
        for draft, reason in ((nan, "NaN"), (other, r"block_size is 3, served is 2.*restart")):
            with pytest.raises(DFlareError, match=f"400.*the drafter stays as it is.*{reason}"):
                client.load(str(draft))
        assert ask(server, [3])[0][0] == again[3][0]
        kill_and_watch(server, "sglang::detokenizer")


class Scripted(Server):
    """A server that drafts worse with the new drafter, or better."""

    def __init__(self, traffic, steps):
        self.traffic, self.steps, self.loaded = traffic, steps, []

    def pair(self):
        return "target", "old"

    def load(self, draft):
        self.loaded.append(draft)
        write_served(self.traffic, len(self.loaded), self.steps)


def write_served(traffic, number, steps):
    records = [Record(range(20), [(8, 20)], key, steps=steps) for key in range(40)]
    write_records(traffic / f"traffic-{number}.xz", {"vocab_size": 100}, records)


@pytest.mark.parametrize(("steps", "stays"), [(5, True), (9, False)])
def test_what_is_served_afterwards_has_the_last_word(tmp_path, monkeypatch, steps, stays):
    monkeypatch.setattr(module, "_gain", lambda *_: (0.1, (0.05, 0.15)))
    write_served(tmp_path, 0, 6)
    server = Scripted(tmp_path, steps)
    assert swap(server, tmp_path / "new", tmp_path, watch_minutes=1) is stays
    assert server.loaded == [str(tmp_path / "new"), "old"][: 1 if stays else 2]


def test_nothing_is_swapped_where_nothing_was_held_back(tmp_path):
    server = Scripted(tmp_path, 5)
    with pytest.raises(DFlareError, match=r"0 conversations held back.*DFLARE_TRAFFIC"):
        swap(server, tmp_path / "new", tmp_path, watch_minutes=0)
    assert not server.loaded


def test_a_quantised_drafter_stays(tmp_path):
    served = torch.nn.Linear(2, 2)
    served.weight = torch.nn.Parameter(
        served.weight.data.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedError, match=r"quantised its drafter.*restart"):
        online_update._read(served, str(tmp_path))
