"""Widths that change in the middle of requests change nothing else; and the real policy chooses."""

import asyncio
import json
import re
from collections import Counter

import pytest
import requests
from engines import TURNS, proposals, running_engine
from prompts import chat_prompts
from test_same_drafts import check, random_prompts
from transformers import AutoTokenizer

from dflare.adaptive import AdaptiveConfig, CostTable
from dflare.adaptive.config import VARIABLE
from dflare.engine.launch import pair_args
from dflare.engine.server_process import ServerProcess
from dflare.engine.step_timing import TRACE_ENV

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


def widths_of(rid: str) -> list[int]:
    return [len(step["block"]) for step in proposals(rid)]


def test_every_request_meets_many_widths(random_pair, random_reference):
    """Other tests rely on it: the harness does change widths within requests."""
    with running_engine(*random_pair, page_size=16) as engine:
        check(engine, random_reference, random_prompts(4, 5, 60), 60, "many")
    block = random_reference.block_size
    expected = {min(width, block) for width in TURNS}
    for i in range(4):
        assert set(widths_of(f"many-{i}")) == expected


def test_drafting_resumes_after_a_long_time_at_width_1(random_pair, random_reference):
    """The context that plain steps leave behind is what the drafter needs."""
    turns = [1] * 37 + [4] * 5
    with running_engine(*random_pair, widths=turns) as engine:
        check(engine, random_reference, random_prompts(3, 5, 60), 100, "resume")
    assert {1, 4} == set(widths_of("resume-0"))


def test_draft_window_after_plain_steps(random_pair, random_reference):
    with running_engine(
        *random_pair, widths=[1, 1, 1, 4], speculative_draft_window_size=32
    ) as engine:
        check(engine, random_reference, random_prompts(3, 5, 90), 50, "window-widths", window=32)


def test_the_policy_finds_a_useless_drafter_out(random_pair):
    """A random drafter is never right: after a while nearly all steps are plain ones."""
    with running_engine(*random_pair, widths='{"proposers": ["chain"]}') as engine:
        rids = [f"useless-{i}" for i in range(6)]
        for rid in rids:
            engine.generate(
                input_ids=[5, 6, 7], sampling_params=GREEDY | {"max_new_tokens": 100}, rid=rid
            )
    last = widths_of(rids[-1])
    assert last.count(1) > 0.8 * len(last), last


def test_a_joining_request_does_not_disturb_the_others(demo_pair):
    """Batches grow and shrink while widths change, and a request is aborted in between."""
    tokenizer = AutoTokenizer.from_pretrained(demo_pair[0])
    prompts = chat_prompts(tokenizer, 4)

    async def staggered(engine):
        async def late(ids, delay):
            await asyncio.sleep(delay)
            return await engine.async_generate(input_ids=ids, sampling_params=GREEDY)

        async def doomed():
            stream = await engine.async_generate(
                input_ids=prompts[0],
                sampling_params=GREEDY | {"max_new_tokens": 2000},
                rid="doomed-widths",
                stream=True,
            )
            async for chunk in stream:
                if chunk["meta_info"]["completion_tokens"] >= 12:
                    engine.tokenizer_manager.abort_request("doomed-widths")

        tasks = (late(ids, 0.3 * i) for i, ids in enumerate(prompts))
        answers = await asyncio.gather(*tasks, doomed())
        return [answer["output_ids"] for answer in answers[:-1]]

    with running_engine(demo_pair[0]) as engine:
        alone = [
            engine.generate(input_ids=ids, sampling_params=GREEDY)["output_ids"] for ids in prompts
        ]
    for widths in (TURNS, "on"):
        with running_engine(*demo_pair, widths=widths) as engine:
            assert engine.loop.run_until_complete(staggered(engine)) == alone, widths


METRICS = {
    "dflare_verify_width",
    "dflare_accept_length",
    "dflare_accept_rate_position",
    "dflare_step_seconds_predicted",
    "dflare_step_seconds_actual",
    "dflare_verify_steps_total",
    "dflare_exploring_steps_total",
    "dflare_request_steps_total",
    "dflare_verified_tokens_total",
    "dflare_committed_tokens_total",
    "dflare_drafts_reached_total",
    "dflare_drafts_accepted_total",
    "dflare_accepted_tokens_total",
    "dflare_acceptance_low",
}


def test_a_server_measures_chooses_and_reports(random_pair, tmp_path, monkeypatch):
    """The real server: step times and a line a second in the log, Prometheus, a step trace."""
    monkeypatch.setenv(VARIABLE, '{"proposers": ["chain"]}')
    monkeypatch.setenv(TRACE_ENV, str(tmp_path / "trace"))
    target, draft = map(str, random_pair)
    flags = ["--model-path", target, *pair_args(draft), "--skip-tokenizer-init"]
    flags += ["--enable-metrics", "--max-running-requests", "4", "--max-total-tokens", "4096"]
    with ServerProcess(flags, tmp_path / "log") as server:
        server.wait_until_healthy()
        body = {"input_ids": [[5, 6, 7], [8, 9]], "sampling_params": GREEDY}
        body["sampling_params"] |= {"max_new_tokens": 400}
        for _ in range(3):
            assert requests.post(f"{server.url}/generate", json=body, timeout=120).ok
        text = requests.get(f"{server.url}/metrics", timeout=30).text
        log = server.log.read_text()
    assert len(re.findall(r"step time in ms by arm, batch 1: plain 1 \d", log)) == 1
    assert re.search(r"DFLARE: verify width [\d.]+, accept length [\d.]+, step [\d.]+ ms", log)
    assert re.search(r"DFLARE: verify width .*, acceptance by position [\d.]+", log)
    samples = [line for line in text.splitlines() if line.startswith("dflare_")]
    assert {re.split(r"[{ ]", line)[0] for line in samples} - {"dflare_created"} == METRICS
    assert all('model_name="' in line and 'tp_rank="0"' in line for line in samples)
    positions = re.findall(r'accept_rate_position\{[^}]*position="(\d+)"', text)
    assert sorted(positions) == ["1", "2", "3"], "one for each drafted token of a block of four"
    check_step_trace(tmp_path / "trace")
    (times,) = (tmp_path / "trace").glob("step-times-*.json")
    (batch_1,) = re.findall(r"step time in ms by arm, batch 1: ([^;]+);", log)
    logged = [float(cell.split(" ")[2]) / 1e3 for cell in batch_1.split(", ")]
    arms = AdaptiveConfig.for_block_size(4, proposers=["chain"]).arms
    assert CostTable.load(times, arms).seconds(1) == pytest.approx(logged, rel=0.01)


def check_step_trace(folder):
    """Every part of the steps of both kinds is in the trace and, of the frequent, in the table."""
    (trace,) = (json.loads(file.read_text()) for file in folder.glob("trace-*.json"))
    spans = [
        (event["name"], event["ts"], event["ts"] + event["dur"], event["args"])
        for event in trace
        if event["ph"] == "X"
    ]
    parts_by_kind = {"plain": Counter(), "drafting": Counter()}
    inside = 0
    for name, start, end, args in spans:
        if name == "step":
            parts = [part for part, *times, _ in spans if start <= times[0] and times[1] <= end]
            parts_by_kind["plain" if args["width"] == 1 else "drafting"].update(parts)
            inside += len(parts) - 1
    counts = Counter(name for name, *_ in spans)
    assert inside == counts.total() - counts["step"] - counts["schedule"], "parts of no step"
    plain, drafting = parts_by_kind["plain"], parts_by_kind["drafting"]
    assert plain["step"] == plain["verify"] == plain["sampling"] > plain["append"] > 0
    assert plain["draft"] == 0
    assert drafting["step"] == drafting["verify"] == drafting["sampling"] > 0
    assert drafting["draft"] == 2 * drafting["step"], "the forward, and the head with its argmax"
    assert drafting["append"] >= drafting["step"]

    (table,) = (file.read_text().splitlines() for file in folder.glob("steps-*.md"))
    columns = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = [dict(zip(columns, row.strip("|").split("|"), strict=True)) for row in table[2:]]
    by_cell = {(int(row["batch"]), int(row["width"])): row for row in rows}
    row = by_cell[2, 1]
    assert float(row["draft"]) == 0
    assert float(row["verify"]) > float(row["sampling"]) > 0
    assert float(row["step"]) > float(row["other"]) > 0
