"""The decode step that verifies a tree of drafts.

The drafter's block gives each depth a distribution; the best prefixes of their product are verified
in one forward of the target, each node behind its own ancestors (DDTree, arXiv 2604.12989). What
the target says is followed from the anchor on. Then the path's K/V, states and tokens are moved to
where a chain would have left them: whatever comes after the step sees no difference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.logprob_processor import compute_spec_logprobs
from sglang.srt.lora.layers import unwrap_lora_layer
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.platforms import current_platform
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import is_dense_head_weight
from sglang.srt.speculative.dflash_worker_v2 import _is_all_greedy
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from dflare import ops
from dflare.adaptive import AdaptiveConfig, Arm
from dflare.engine.lookups import Proposal
from dflare.engine.sampling import argmax, sample_verify_positions
from dflare.engine.tree_proposal import DraftTree, TreeProposals
from dflare.engine.verify_step import adjust_logits, run_target, step_result

# Those of the target that mask a tree.
_BACKENDS = {"CpuAttentionBackend", "TritonAttnBackend"}


@dataclass
class TreeVerifyInput(DFlashVerifyInput):
    """A verification whose tokens form one tree a request.

    Attributes:
        parents: [N] int32, as `ops.paged_attention` takes them, None for chains; `custom_mask` says
            the same to SGLang's attention.
        counts: [bs] int64, tokens of each request; None if each has `draft_token_num`.
    """

    parents: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def why_no_trees(worker: Any) -> str | None:
    """What keeps a pair from being served trees; None if nothing does.

    Args:
        worker: a `DFlareWorker` with its pools and attention backends.
    """
    runner = worker.model_runner
    backend, pool = runner.attn_backend, runner.token_to_kv_pool
    if worker._need_mamba_verify_commit:
        return "the target's recurrent states know one path only"
    if type(pool) not in (MHATokenToKVPool, current_platform.get_kv_pool_cls(kind="mha")):
        return f"nothing moves slots of a {type(pool).__name__}"
    if type(backend).__name__ not in _BACKENDS:
        return f"{type(backend).__name__} would take a tree for a chain"
    if getattr(backend, "sliding_window_size", None):
        return "a sliding window would count all nodes before a node, not its ancestors alone"
    head = unwrap_lora_layer(getattr(runner.model, "lm_head", None))
    shard = getattr(head, "shard_indices", None)
    if not is_dense_head_weight(getattr(head, "weight", None)) or shard is None:
        return "the target's head gives no logits of a drafter's states"
    if shard.num_added_elements:
        return "the target's head has added tokens"
    return None


class TreeStep:
    """Runs decode steps that verify trees, for a `DFlareWorker` at its block's width.

    Attributes:
        tree: what the latest step verifies.
        proposals: makes the trees.
    """

    tree: DraftTree

    def __init__(self, worker: Any, config: AdaptiveConfig) -> None:
        """
        Args:
            worker: for which `why_no_trees` gives no reason.
            config: says how many nodes a request may have, and whether they may differ.
        """
        self._worker, self._config = worker, config
        longest = max(config.lookups, default=1) - 1
        self.proposals = TreeProposals(worker, ragged=config.ragged, longest=longest)

    def runs(self, arm: Arm) -> bool:
        """Whether steps of an arm are run here."""
        return self._config.as_tree(arm)

    def most(self, arm: Arm, batch: Any) -> int:
        """Tokens that one request may verify in a step of an arm.

        Near the end of the context the table of slots has no room for the largest trees. Where all
        requests verify as many, the policy asks for no more than they may still produce.
        """
        most = self._config.most(arm)
        if not self._config.ragged:
            return most
        table = self._worker.model_runner.req_to_token_pool.req_to_token
        return min(most, table.shape[1] - int(batch.seq_lens.max()))

    def run(
        self,
        batch: Any,
        arm: Arm,
        slots: torch.Tensor,
        look_up: Proposal | None,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        grammar_barrier: Any = None,
    ) -> GenerationBatchResult:
        """Draft, verify, accept and append.

        Args:
            batch: SGLang's `ScheduleBatch` in decode mode, with the anchors in its `spec_info`.
            arm: of the step.
            slots: [bs, n + 1] int64, behind each request's tokens, for the most nodes of one.
            look_up: what may be one more branch of each tree, or all of it.
            on_publish: told the new lengths as soon as they are known.
            grammar_barrier: waits until the grammars have seen the previous step.
        """
        worker, draft_input, lens = self._worker, batch.spec_info, batch.seq_lens
        tree = self.tree = self.proposals.make(batch, arm, look_up, slots.shape[1])
        width = tree.width
        grammar_tree = tree.for_grammar() if batch.has_grammar else None
        positions = lens.long()[:, None] + tree.depths
        verify = TreeVerifyInput(
            draft_token=tree.packed(tree.tokens),
            positions=tree.packed(positions),
            draft_token_num=width,
            parents=None if arm.proposer == "lookup" else tree.packed(tree.parents),
            counts=tree.counts,
            custom_mask=None if lens.is_cpu else self._mask(batch, tree.parents),
        )
        target, plan = run_target(worker, batch, verify, tree.packed(slots[:, :width]))
        output = target.logits_output
        chosen = adjust_logits(
            worker, batch, output, grammar_tree, grammar_barrier, tree.spread, tree.rows
        )
        if chosen is None:
            counts = width if tree.counts is None else tree.counts
            chosen = _target_tokens(
                output.next_token_logits, batch.sampling_info, verify.positions, counts
            )
        worker._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_GREEDY, chosen)
        # Drafts end with the block, look-ups go on.
        stride = width if look_up else min(int(worker.block_size), width)
        path, commit_lens, tokens = ops.walk_draft_tree(
            tree.tokens, tree.parents, tree.spread(chosen).view(positions.shape), stride
        )
        rows = (path + tree.starts()[:, None]).flatten()
        _add_outputs(batch, output, draft_input, chosen, tokens, commit_lens, rows)
        new_lens = lens + commit_lens
        if on_publish is not None:
            on_publish(new_lens)
        self._commit(batch, plan, output.hidden_states[rows], path, commit_lens)
        bonus = tokens.gather(1, commit_lens.long()[:, None] - 1)[:, 0]
        return step_result(worker, target, tokens, commit_lens, bonus, new_lens)

    def _mask(self, batch: Any, parents: torch.Tensor) -> torch.Tensor:
        """Where the target's attention reads which nodes each node sees: uint8, see the operator.

        Args:
            parents: [bs, n + 1] int32.
        """
        requests, width = parents.shape
        shared = self._worker.model_runner.attn_backend.verify_mask
        if shared is not None and shared.fits(requests):
            mask = shared.buffer  # the one that graphs read
        else:
            bound = batch.spec_info.nxt_kv_lens_sum
            longest = batch.seq_lens_sum if bound is None else int(bound)
            mask = parents.new_empty(width * (longest + requests * width), dtype=torch.uint8)
        ops.write_tree_mask(parents, batch.seq_lens, mask)
        return mask

    def _commit(
        self,
        batch: Any,
        plan: Any,
        states: torch.Tensor,
        path: torch.Tensor,
        commit_lens: torch.Tensor,
    ) -> None:
        """Move the path's K/V to the front and append its states to the drafter's context.

        Args:
            states: [bs * S, T * H] tapped states along the path.
            path: [bs, S] int32; commit_lens: [bs] int32.
        """
        worker, stride = self._worker, path.shape[1]
        pool = worker.model_runner.token_to_kv_pool
        slots = self.tree.spread(worker._draft_write_ids(plan)).view(len(path), -1)
        front = slots[:, :stride].flatten()
        if slots.is_cpu:
            ops.move_tree_path(path, commit_lens, slots, [*pool.k_buffer, *pool.v_buffer])
        else:  # what lies behind the path is written again later
            pool.move_kv_cache(front, slots.gather(1, path.long()).flatten())
        depth = torch.arange(stride, device=slots.device)
        worker.context.append(
            states,
            front,
            (batch.seq_lens.long()[:, None] + depth).flatten(),
            block_size=stride,
            commit_lens=commit_lens,
        )


def _target_tokens(
    logits: torch.Tensor, sampling_info: Any, positions: torch.Tensor, counts: int | torch.Tensor
) -> torch.Tensor:
    """The target's choice behind every node, [N] int64.

    With temperature it is a sample at every node. Nodes of one depth have one position, so with a
    seed they share the noise that plain decoding would meet there.
    """
    if _is_all_greedy(sampling_info):
        return argmax(logits)
    return sample_verify_positions(logits, sampling_info, positions, counts)


def _add_outputs(
    batch: Any,
    output: Any,
    draft_input: Any,
    chosen: torch.Tensor,
    tokens: torch.Tensor,
    commit_lens: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Logprobs and sampling masks of the path, for requests that ask for them.

    Args:
        chosen: [N] the target's tokens; tokens: [bs, S] those of the path.
        commit_lens: [bs].
        rows: [bs * S] rows of the logits along the path.
    """
    info, (bs, stride) = batch.sampling_info, tokens.shape
    if info is not None and info.sampling_mask_batch_indices is not None:
        capture = SpeculativeSamplingMaskCapture.from_logits(
            info,
            next_token_logits=output.next_token_logits[rows],
            draft_input=draft_input,
            draft_token_num=stride,
            bs=bs,
        )
        output.sampling_mask_output = capture.build_output(
            out_tokens=tokens, commit_lens=commit_lens
        )
    if batch.return_logprob:
        compute_spec_logprobs(batch, output, chosen, accept_index=rows.view(bs, stride))
