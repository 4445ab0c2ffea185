"""What a drafter's block says of each depth: its most probable tokens, for a tree of drafts."""

from typing import Any

import torch
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

from dflare import ops
from dflare.engine.swapping import swapped


class MarginalsSampler:
    """What a captured draft of trees ends with: the best tokens of each depth, left in place.

    Attributes:
        tokens, log_probs: [rows, K], int64 and float32, of the latest replay.
    """

    def __init__(self, worker: Any, count: int, max_batch: int) -> None:
        """
        Args:
            worker: a `DFlareWorker` at its block's width.
            count: K, of the largest tree.
            max_batch: largest batch that is captured.
        """
        self._worker, self._block = worker, int(worker.block_size)
        self._group = get_parallel().tp_group  # a draft's own scope may hide it
        rows = max_batch * (self._block - 1)
        self.tokens = torch.zeros(rows, count, dtype=torch.long, device=worker.device)
        self.log_probs = torch.zeros(rows, count, device=worker.device)

    def __call__(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> None:
        """Take the tokens of final hidden states [bs * B, H]."""
        rows = _masked_rows(hidden_states, self._block)
        found = best_tokens(self._worker, rows, self.tokens.shape[1], self._group)
        for buffer, values in zip((self.tokens, self.log_probs), found, strict=True):
            buffer[: len(rows)] = values


def draft_marginals(worker: Any, batch: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the drafter over a block and take the best tokens of each depth, the same on all ranks.

    Args:
        worker: a `DFlareWorker` at its block's width.
        batch: SGLang's `ScheduleBatch` in decode mode.
        count: K, at least.

    Returns:
        tokens [bs, B - 1, K] int64, best first, and their log-probabilities [bs, B - 1, K] float32
        over all that may be drafted.
    """
    block = int(worker.block_size)
    output = _block_output(worker, batch)
    sampler = worker._draft_sampler
    if output.can_run_graph and isinstance(sampler, MarginalsSampler):
        drafted = len(batch.seq_lens) * (block - 1)
        found = sampler.tokens[:drafted], sampler.log_probs[:drafted]
    else:
        hidden = _masked_rows(output.logits_output.hidden_states, block)
        found = best_tokens(worker, hidden, count, get_parallel().tp_group)
    tokens, log_probs = (x.unflatten(0, (-1, block - 1)) for x in found)
    return tokens, log_probs


class _Drafted(Exception):
    """Carries what the drafter gave out of DFLASH's step."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _block_output(worker: Any, batch: Any) -> Any:
    """What the drafter's runner gives for a block.

    DFLASH prepares the block, its embeddings, its window and its batch in the middle of one long
    method, and is left where the drafter has run.
    """
    runner, forward = worker.draft_model_runner, worker.draft_model_runner.forward

    def leave(*args: Any, **kwargs: Any) -> None:
        raise _Drafted(forward(*args, **kwargs))

    with swapped(runner, forward=leave):
        try:
            DFlashWorkerV2.forward_batch_generation(worker, batch)
        except _Drafted as drafted:
            return drafted.output
    raise AssertionError("DFLASH's step did not run the drafter")


def _masked_rows(states: torch.Tensor, block: int) -> torch.Tensor:
    """[bs * B, H] states of blocks without those of the anchors, [bs * (B - 1), H]."""
    return states.view(-1, block, states.shape[-1])[:, 1:].flatten(0, 1)


def best_tokens(
    worker: Any, hidden: torch.Tensor, count: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each row, best first.

    Args:
        hidden: [rows, H].
        count: K.
        group: of the ranks that hold the head.

    Returns:
        tokens [rows, K] int64 and log-probabilities [rows, K] float32.
    """
    drafted, head = worker.draft_head, unwrap_lora_layer(worker.model_runner.model.lm_head)
    shard = head.shard_indices
    weight = drafted.weight if drafted else head.weight[: shard.num_org_elements]
    if hidden.is_cpu:
        logits = ops.any_linear(hidden, weight).float()
    else:
        logits = (hidden.to(weight.dtype) @ weight.T).float()
    values, tokens = logits.topk(count, -1)
    total = logits.logsumexp(-1, keepdim=True)
    if drafted:  # whole on every rank
        return drafted.ids[tokens], values - total
    if group.world_size > 1:
        # Ids below 2^24 are exact in float32: one collective carries it all.
        own = torch.cat((values, (tokens + shard.org_vocab_start_index).float(), total), -1)
        every = own.new_empty(group.world_size, *own.shape)
        group.all_gather_into_tensor(every.flatten(0, 1), own)
        parts = every.transpose(0, 1)
        values, best = parts[..., :count].flatten(1).topk(count, -1)
        tokens = parts[..., count:-1].flatten(1).gather(1, best).long()
        total = parts[..., -1].logsumexp(-1, keepdim=True)
    return tokens, values - total
