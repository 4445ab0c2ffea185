"""The decode step that verifies a tree of drafts, on the CPU.

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
from sglang.srt.managers.scheduler import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.dflash_utils import is_dense_head_weight
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2, _is_all_greedy
from sglang.srt.speculative.spec_sampling_mask import SpeculativeSamplingMaskCapture
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite
from sglang.srt.speculative.spec_utils import GrammarTree

from dflare import ops
from dflare.adaptive import BranchOdds
from dflare.engine.attention import CpuAttentionBackend
from dflare.engine.cpu_layers import head_logits
from dflare.engine.cpu_memory import CpuKVPool
from dflare.engine.draft_head import DraftHead
from dflare.engine.lookups import Proposal
from dflare.engine.sampling import sample_verify_positions
from dflare.engine.swapping import swapped
from dflare.engine.verify_step import adjust_logits, run_target, step_result


@dataclass
class TreeVerifyInput(DFlashVerifyInput):
    """A verification whose tokens form one tree a request.

    Attributes:
        parents: [bs * (n + 1)] int32, as `ops.paged_attention` takes them.
    """

    parents: torch.Tensor | None = None


@dataclass(frozen=True)
class DraftTree:
    """Trees of n drafted nodes, one a request; row 0 is the anchor.

    Attributes:
        tokens: [bs, n + 1] int64.
        parents: [bs, n + 1] int32, -1 for the anchor.
        depths: [bs, n + 1] int32.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    depths: torch.Tensor

    def for_grammar(self) -> GrammarTree:
        """As SGLang walks it: first child and next sibling of each node, -1 for none."""
        child = torch.full_like(self.tokens, -1)
        sibling = torch.full_like(self.tokens, -1)
        rows = torch.arange(len(self.tokens))
        for node in range(self.tokens.shape[1] - 1, 0, -1):
            above = self.parents[:, node].long()
            sibling[:, node] = child[rows, above]
            child[rows, above] = node
        return GrammarTree.from_device(child, sibling, self.tokens)


def why_no_trees(worker: Any) -> str | None:
    """What keeps a pair from being served trees; None if nothing does.

    Args:
        worker: a `DFlareWorker` with its pools and attention backends.
    """
    runner = worker.model_runner
    if torch.device(worker.device).type != "cpu":
        return "they are verified on a CPU only so far"
    if get_parallel().tp_size > 1:
        return "tensor-parallel ranks hold the head in parts"
    if worker._need_mamba_verify_commit:
        return "the target's recurrent states know one path only"
    if type(runner.token_to_kv_pool) is not CpuKVPool:
        return f"nothing moves slots of a {type(runner.token_to_kv_pool).__name__}"
    if not isinstance(runner.attn_backend, CpuAttentionBackend):
        return f"{type(runner.attn_backend).__name__} would take a tree for a chain"
    head = getattr(runner.model, "lm_head", None)
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
    """

    tree: DraftTree

    def __init__(self, worker: Any) -> None:
        """
        Args:
            worker: for which `why_no_trees` gives no reason.
        """
        self._worker = worker
        self._odds = BranchOdds()

    def run(
        self,
        batch: Any,
        width: int,
        look_up: Proposal | None,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        grammar_barrier: Any = None,
    ) -> GenerationBatchResult:
        """Draft, verify, accept and append.

        Args:
            batch: SGLang's `ScheduleBatch` in decode mode, with the anchors in its `spec_info`.
            width: tokens of a request that are verified, n + 1; at most twice the block, for which
                slots are reserved.
            look_up: what may be one more branch of each tree.
            on_publish: told the new lengths as soon as they are known.
            grammar_barrier: waits until the grammars have seen the previous step.
        """
        worker, draft_input, lens = self._worker, batch.spec_info, batch.seq_lens
        tree = self.tree = self._propose(batch, width - 1, look_up)
        grammar_tree = tree.for_grammar() if batch.has_grammar else None
        positions = lens.long()[:, None] + tree.depths
        verify = TreeVerifyInput(
            draft_token=tree.tokens.flatten(),
            positions=positions.flatten(),
            draft_token_num=width,
            parents=tree.parents.flatten(),
        )
        target, plan = run_target(worker, batch, verify)
        output = target.logits_output
        chosen = adjust_logits(worker, batch, output, grammar_tree, grammar_barrier)
        if chosen is None:
            chosen = _target_tokens(output.next_token_logits, batch.sampling_info, positions)
        worker._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_GREEDY, chosen)
        # Drafts end with the block, look-ups go on.
        stride = width if look_up else min(int(worker.block_size), width)
        path, commit_lens, tokens = ops.walk_draft_tree(
            tree.tokens, tree.parents, chosen.view(positions.shape), stride
        )
        rows = (path + torch.arange(len(lens))[:, None] * width).flatten().long()
        _add_outputs(batch, output, draft_input, chosen, tokens, commit_lens, rows)
        new_lens = lens + commit_lens
        if on_publish is not None:
            on_publish(new_lens)
        self._commit(batch, plan, output.hidden_states[rows], path, commit_lens)
        if look_up and batch.reqs:  # none of them sent what start-up measures
            right, match = look_up.right(tokens, commit_lens), look_up.match
            known = commit_lens.where(match > 0, 0)
            self._odds.observe(match.tolist(), known.tolist(), right.tolist())
        bonus = tokens.gather(1, commit_lens.long()[:, None] - 1)[:, 0]
        return step_result(worker, target, tokens, commit_lens, bonus, new_lens)

    def _propose(self, batch: Any, nodes: int, look_up: Proposal | None) -> DraftTree:
        """The best prefixes of the drafter's block and the look-up."""
        worker = self._worker
        hidden, head = _block_states(worker, batch)
        tokens, log_probs = _best_tokens(worker.draft_head, hidden, head, nodes)
        shape = len(batch.seq_lens), int(worker.block_size) - 1, -1
        anchors = batch.spec_info.bonus_tokens.view(-1).long().contiguous()
        branch: tuple[torch.Tensor, ...] = ()
        if look_up:
            found, match = look_up.found[:, :nodes].contiguous(), look_up.match
            odds = torch.from_numpy(self._odds.log_probs(match.numpy(), found.shape[1]))
            branch = found, odds, torch.full_like(match, found.shape[1]).where(match > 0, 0)
        grown = ops.build_draft_tree(
            anchors, tokens.view(shape), log_probs.view(shape), nodes, *branch
        )
        return DraftTree(*grown)

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
        slots = worker._draft_write_ids(plan).view(len(path), -1)
        ops.move_tree_path(path, commit_lens, slots, [*pool.k_buffer, *pool.v_buffer])
        worker.context.append(
            states,
            slots[:, :stride].flatten(),
            (batch.seq_lens.long()[:, None] + torch.arange(stride)).flatten(),
            block_size=stride,
            commit_lens=commit_lens,
        )


def _target_tokens(
    logits: torch.Tensor, sampling_info: Any, positions: torch.Tensor
) -> torch.Tensor:
    """The target's choice behind every node, [bs * (n + 1)] int64.

    With temperature it is a sample at every node. Nodes of one depth have one position, so with a
    seed they share the noise that plain decoding would meet there.
    """
    if _is_all_greedy(sampling_info):
        return logits.argmax(-1)
    width = positions.shape[1]
    return sample_verify_positions(logits, sampling_info, positions.flatten(), width)


class _Drafted(Exception):
    """Carries what the drafter gave out of DFLASH's step."""

    def __init__(self, hidden: torch.Tensor, head: Any) -> None:
        super().__init__()
        self.hidden, self.head = hidden, head


def _block_states(worker: Any, batch: Any) -> tuple[torch.Tensor, Any]:
    """Run the drafter over a block.

    DFLASH prepares the block, its embeddings, its window and its batch in the middle of one long
    method, and calls the head as the last thing before it verifies: there it is left.

    Returns:
        The final states [bs * (B - 1), H] of the masked tokens, and the target's head.
    """

    def leave(*, hidden_states: torch.Tensor, lm_head: Any, **_: Any) -> None:
        raise _Drafted(hidden_states, lm_head)

    with swapped(worker, _greedy_sample_from_vocab_parallel_head=leave):
        try:
            DFlashWorkerV2.forward_batch_generation(worker, batch)
        except _Drafted as drafted:
            return drafted.hidden, drafted.head
    raise AssertionError("DFLASH's step did not call the target's head for its draft")


def _best_tokens(
    draft_head: DraftHead | None, hidden: torch.Tensor, head: Any, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable tokens of each row over all that may be drafted, best first.

    Args:
        draft_head: rows of the target's head for the tokens that are drafted; None for all.
        hidden: [rows, H].
        head: the target's.
        count: K.

    Returns:
        tokens [rows, K] int64 and log-probabilities [rows, K] float32.
    """
    weight = head.weight[: head.shard_indices.num_org_elements]
    logits = head_logits(hidden, draft_head.weight if draft_head else weight).float()
    values, tokens = logits.topk(count, -1)
    if draft_head:
        tokens = draft_head.ids[tokens]
    return tokens, values - logits.logsumexp(-1, keepdim=True)


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
        chosen: [bs, n + 1] the target's tokens; tokens: [bs, S] those of the path.
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
        compute_spec_logprobs(batch, output, chosen.flatten(), accept_index=rows.view(bs, stride))
