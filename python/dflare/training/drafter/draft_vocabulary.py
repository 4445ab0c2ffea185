"""Choose the tokens that a drafter drafts: the most frequent ones of what its target says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dflare.checkpoint import (
    DRAFT_TO_TARGET,
    load_tensors,
    read_config,
    save_checkpoint,
)
from dflare.training.data.corpus import load_corpus
from dflare.training.errors import ConfigError


def write_draft_vocabulary(
    draft: str | Path, destination: Path, files: Sequence[Path], size: int, *, force: bool = False
) -> float:
    """Write a copy of a drafter that drafts the most frequent tokens alone.

    Its weights keep their bits: the draft head is rows of the target's.

    Args:
        draft: Folder or hub id of a DFlare drafter.
        destination: Folder to write.
        files: What `dflare synth` wrote with the target; answers are counted.
        size: Tokens to draft, V'.
        force: Replace a checkpoint that is there already.

    Returns:
        Share of the answers' tokens that may be drafted.

    Raises:
        ConfigError: More tokens than the data has.
        CheckpointError: A drafter that cannot be read, or a destination in use.
        DataError: Data of another target.
    """
    config = read_config(draft)
    tensors = load_tensors(draft, config)
    corpus = load_corpus(files, config.vocab_size, max_length=2**31)
    counts = np.bincount(corpus.ids[corpus.supervised], minlength=config.vocab_size)
    seen = int((counts > 0).sum())
    if not 0 < size <= seen:
        raise ConfigError(
            f"--size is {size}, expected 1 to {seen}, as many as occur in the answers; "
            "give another size or more data"
        )
    ids = np.sort(np.argsort(-counts, kind="stable")[:size])
    tensors[DRAFT_TO_TARGET] = torch.from_numpy(ids - np.arange(size))
    written = config.model_copy(update={"dialect": "angelslim", "draft_vocab_size": size})
    save_checkpoint(destination, written, tensors, force=force)
    return float(counts[ids].sum() / counts.sum())
