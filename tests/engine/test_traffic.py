"""Token ids of what was served are kept where somebody asked for it, and nothing else is."""

import logging
import time
from types import SimpleNamespace

import pytest

from dflare.engine import traffic
from dflare.engine.traffic import TrafficLog, traffic_folder
from dflare.errors import UnsupportedError
from dflare.training.data.corpus import load_corpus
from dflare.training.data.files import read_records
from dflare.training.errors import DataError


class Request(SimpleNamespace):
    """As much of SGLang's `Req` as is read."""


def served(log, number, prompt=(5, 6), answer=(7, 8, 9), steps=2):
    request = Request(
        rid=str(number),
        origin_input_ids=list(prompt),
        output_ids=list(answer),
        spec_verify_ct=steps,
    )
    log.note([request])
    log.finish(request.rid)


def kept(folder, count):
    """The records by kind of file, once there are as many."""
    for _ in range(100):
        found = {
            kind: [record for file in sorted(folder.glob(f"{kind}-*")) for record in read(file)]
            for kind in ("traffic", "held-back")
        }
        if sum(map(len, found.values())) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def read(file):
    try:
        return list(read_records(file)) if file.suffix == ".xz" else []
    except DataError:  # removed just now, to make room
        return []


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "_IDLE_SECONDS", 0.05)
    return TrafficLog(tmp_path, "target", 100)


def test_prompts_and_answers_are_kept_as_training_data(log, tmp_path):
    for number in range(60):
        served(log, number, prompt=(5, number))
    served(log, 60, prompt=(5, 59))  # the same prompt again
    found = kept(tmp_path, 61)
    assert 1 <= len(found["held-back"]) <= 20
    own, others = (
        {tuple(r.ids[: r.answers[0][0]]) for r in found[kind]} for kind in ("traffic", "held-back")
    )
    assert not own & others and len(own | others) == 60
    corpus = load_corpus(sorted(tmp_path.glob("traffic-*.xz")), 100, 512)
    assert corpus.tokens(0)[2:].tolist() == [7, 8, 9] and corpus.mask(0).tolist()[:3] == [0, 0, 1]
    assert {r.steps for r in found["traffic"]} == {2}


def test_requests_that_never_decoded_or_hold_images_are_left_out(log, tmp_path):
    log.finish("unknown")
    served(log, 1, prompt=(5, 10**9))
    served(log, 2)
    assert sum(map(len, kept(tmp_path, 1).values())) == 1


def test_the_oldest_files_make_room(log, tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "_FILE_CONVERSATIONS", 2)
    monkeypatch.setattr(traffic, "_MOST_BYTES", 4000)
    for number in range(60):
        served(log, number, prompt=(5, number))
        time.sleep(0.005)
    newest = (5, 59)
    for _ in range(100):
        records = [r for rows in kept(tmp_path, 1).values() for r in rows]
        if any(tuple(r.ids[:2]) == newest for r in records):
            break
        time.sleep(0.05)
    assert any(tuple(r.ids[:2]) == newest for r in records) and len(records) < 40


def test_a_disk_that_fails_ends_the_record_and_nothing_else(log, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(
        traffic.DataFile, "add", lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    )
    served(log, 1)
    for _ in range(100):
        if caplog.messages:
            break
        time.sleep(0.05)
    assert caplog.messages == [
        "DFLARE: serving goes on, but no more traffic is kept: no space left"
    ]
    served(log, 2)


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("DFLARE_TRAFFIC", raising=False)
    assert traffic_folder() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFLARE_TRAFFIC", str(tmp_path / "file/folder"))
    with pytest.raises(UnsupportedError, match=r"DFLARE_TRAFFIC=.*expected a folder"):
        traffic_folder()
