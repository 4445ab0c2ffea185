"""`DFLARE_STATES=FOLDER`: a server that leaves hidden states of prompts for a trainer to read.

For targets that do not fit beside the drafter that is trained: SGLang taps the layers
(`--enable-return-aux-hidden-states`) on as many ranks as it takes, and what it would send as JSON
is left in a folder that the trainer sees, with the final states that it has no way to send.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from dflare.engine.named_folder import named_folder
from dflare.training.data.state_files import is_wanted, write_error, write_states

logger = logging.getLogger(__name__)

VARIABLE = "DFLARE_STATES"


def states_folder() -> Path | None:
    """The folder that the environment names, made if it is not there; None to leave no states.

    Raises:
        UnsupportedError: it cannot be written to.
    """
    return named_folder(VARIABLE, "to leave hidden states in")


def leave_states(
    original: Any,
    self: Any,
    input_ids: Any,
    hidden_states: Any,
    lm_head: Any,
    logits_metadata: Any,
    aux_hidden_states: Any = None,
    hidden_states_before_norm: Any = None,
) -> Any:
    """Around `LogitsProcessor.forward`, the one place that sees tapped and final states alike."""
    rids = getattr(logits_metadata, "rids", None) or ()
    if logits_metadata.forward_mode.is_extend() and any(map(is_wanted, rids)):
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().tp_rank == 0:
            try:
                _leave(logits_metadata, rids, hidden_states, aux_hidden_states)
            except OSError as error:
                logger.error("DFLARE: hidden states cannot be left: %s", error)
    return original(
        self,
        input_ids,
        hidden_states,
        lm_head,
        logits_metadata,
        aux_hidden_states,
        hidden_states_before_norm,
    )


def _leave(batch: Any, rids: Any, final: torch.Tensor, taps: Any) -> None:
    """Leave the states of each request of a prefill that asks for them.

    Args:
        batch: SGLang's `ForwardBatch`.
        rids: ids of its requests.
        final: [tokens, H], normed.
        taps: [tokens, T * H], or T of [tokens, H]; None where the server taps no layers.
    """
    folder, start = Path(os.environ[VARIABLE]), 0
    for rid, length, before in zip(
        rids, batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu, strict=True
    ):
        rows = slice(start, start + length)
        start += length
        if not is_wanted(rid):
            continue
        if taps is None:
            write_error(folder, rid, "it taps no layers; see --enable-return-aux-hidden-states")
        elif before:
            write_error(
                folder,
                rid,
                f"{before} tokens of the prompt were read in an earlier pass; start it with "
                "--disable-radix-cache --chunked-prefill-size -1",
            )
        else:
            parts = [taps] if isinstance(taps, torch.Tensor) else list(taps)
            write_states(folder, rid, torch.cat([part[rows] for part in (*parts, final)], -1))
