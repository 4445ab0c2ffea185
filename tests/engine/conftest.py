"""Pairs and prompts that the engine tests share."""

import sys
from pathlib import Path

import pytest
import torch

# The reference's matrices are tiny, and the cores belong to the engine under test.
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))

from checkpoints import write_random_draft, write_random_target  # noqa: E402
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
