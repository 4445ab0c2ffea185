"""Pairs and prompts that the engine tests share."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The reference's matrices are tiny, and the cores belong to the engine under test.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import write_random_draft, write_random_target  # noqa: E402
from demo_answers import (  # noqa: E402
    FLAGS,
    NEW_TOKENS,
    ask_everything,
    coming_and_going,
    generate,
)
from engines import ALL_ARMS, running_engine  # noqa: E402
from prompts import chat_prompts  # noqa: E402
from reference_drafter import ReferencePair  # noqa: E402


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
