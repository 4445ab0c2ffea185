"""One buffer for the tapped states that the target's CUDA graphs leave behind.

Every captured graph keeps its outputs, and the tapped states are by far the largest: T * H values a
token, in each graph of each width (sglang/srt/model_executor/runner_backend/
full_cuda_graph_backend.py, `_outputs`). A step reads them before the next graph runs, so all graphs
may write to the same place, as they do for the few models that pack them themselves
(`resolve_aux_hidden_states_width`).
"""

from typing import Any

import torch


class SharedTaps:
    """A hook for `ModelRunner.capture_tail_hooks`: the last node of a graph copies the states."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size of the buffer."""
        return 0 if self._buffer is None else self._buffer.nbytes

    def __call__(self, runner: Any, out: Any, forward_batch: Any, num_tokens: int) -> None:
        """Let `out.hidden_states` [tokens, T * H] live in the shared buffer.

        SGLang runs a graph's body twice before it captures it, the largest graph of the largest
        width first: there the buffer is made, outside of any graph's memory.
        """
        states = getattr(out, "hidden_states", None)
        if states is None:
            return
        if self._buffer is None or len(self._buffer) < len(states):
            self._buffer = torch.empty_like(states)
        shared = self._buffer[: len(states)]
        shared.copy_(states)
        out.hidden_states = shared
