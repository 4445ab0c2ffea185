"""Pairs and prompts that the engine tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The reference's matrices are tiny, and the cores belong to the engine under test.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import write_random_draft, write_random_target  # noqa: E402
from demo_answers import (  # noqa: E402
    FEW_TOKENS,
    FLAGS,
    NEW_TOKENS,
    ask_everything,
    coming_and_going,
    copy,
    generate,
)
from engines import ALL_ARMS, running_engine  # noqa: E402
from prompts import chat_prompts  # noqa: E402
from reference_drafter import ReferencePair  # noqa: E402
from served import Served  # noqa: E402

from dflare.adaptive.config import VARIABLE  # noqa: E402
from dflare.engine.step_timing import TRACE_ENV  # noqa: E402


@pytest.fixture(scope="session")
def random_pair(tmp_path_factory) -> tuple[Path, Path]:
    """A small random Llama and a random drafter for it: cheap, and nearly nothing is accepted."""
    folder = tmp_path_factory.mktemp("random_pair")
    return write_random_target(folder / "target"), write_random_draft(folder / "draft")


@pytest.fixture(scope="session")
def random_reference(random_pair) -> ReferencePair:
    return ReferencePair(*random_pair)


@pytest.fixture(scope="session")
def demo_pair() -> tuple[Path, Path]:
    """SmolLM2-135M-Instruct and the drafter that the repository ships."""
    from dflare.demo import demo_draft, demo_target

    return demo_target(), demo_draft()


@pytest.fixture(scope="session")
def demo_reference(demo_pair) -> ReferencePair:
    return ReferencePair(*demo_pair)


@pytest.fixture(scope="session")
def demo_tokenizer(demo_pair) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_pair[0])


@pytest.fixture(scope="session")
def alone(demo_pair, demo_tokenizer) -> dict[str, Any]:
    """What the demo target answers without speculation, by the name of what it was asked."""
    with running_engine(demo_pair[0], **FLAGS) as engine:
        return ask_everything(engine, demo_tokenizer)


@pytest.fixture(scope="session")
def dflare(demo_pair, demo_tokenizer) -> dict[str, Any]:
    """The same with its drafter, look-ups and trees, and of requests that come, go and wait."""
    chats = chat_prompts(demo_tokenizer, 4)
    with running_engine(*demo_pair, ALL_ARMS, **FLAGS) as engine:
        asked = ask_everything(engine, demo_tokenizer)
        asked["aborted"] = coming_and_going(engine, chats, "aborted")
        engine.flush_cache()
        asked["one by one"] = generate(engine, chats, concurrency=1, max_new_tokens=NEW_TOKENS)
    return asked


@pytest.fixture(scope="session")
def whole_blocks(demo_pair, demo_tokenizer) -> dict[str, Any]:
    """The same pair where every step drafts and verifies the whole block."""
    chats = chat_prompts(demo_tokenizer, 3)
    with running_engine(*demo_pair, widths="off") as engine:
        sampling = {"temperature": 0, "max_new_tokens": FEW_TOKENS}
        rids = [f"whole-blocks-{i}" for i in range(len(chats))]
        return {
            "chats": engine.generate(input_ids=chats, sampling_params=sampling, rid=rids),
            "copies": copy(engine, demo_tokenizer),
        }


@pytest.fixture(scope="session")
def measured(demo_pair, demo_tokenizer) -> dict[str, Any]:
    """The same pair with nothing set: step times are measured at start, and the policy chooses."""
    with running_engine(*demo_pair, widths="on", max_running_requests=8) as engine:
        copies = [copy(engine, demo_tokenizer) for _ in range(3)]
        aborted = coming_and_going(engine, chat_prompts(demo_tokenizer, 4), "doomed")
    return {"copies": copies[-1], "aborted": aborted}


@pytest.fixture(scope="session")
def random_server(random_pair, tmp_path_factory) -> Iterator[Served]:
    """`dflare serve` that traces its steps beside its log; test_server_end.py ends it."""
    folder = tmp_path_factory.mktemp("server")
    environment = {VARIABLE: '{"proposers": ["chain"]}', TRACE_ENV: str(folder / "trace")}
    more = "--enable-metrics --max-running-requests 4"
    with Served(*random_pair, folder / "log", more, **environment) as running:
        yield running
