"""Draft trees: built from a drafter's marginals, walked by the target's tokens.

A tree of n drafted nodes has n + 1 rows: row 0 is the anchor, the last token that is known, and
each further row one drafted token behind its parent, which has a lower row. A chain is the tree in
which row i - 1 is the parent of row i.

These operators run outside of compilers only: they have no fake implementations. On CUDA values in
device memory are the caller's promise, as checking them would wait for the device.
"""

import torch
from torch import Tensor


def build_draft_tree(
    anchors: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    nodes: int,
    branch: Tensor | None = None,
    branch_log_probs: Tensor | None = None,
    branch_lens: Tensor | None = None,
    *,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `nodes` prefixes of a factorised draft (DDTree, arXiv 2604.12989).

    A block drafter gives each depth one distribution, whatever stands before. A node's score is the
    product of its prefix's probabilities; the tree that grows by the best score has the most
    expected accepted tokens of its size.

    Args:
        anchors: [bs] int64.
        tokens: [bs, D, K] int64, the most probable tokens of each depth, best first, K >= `nodes`.
        log_probs: [bs, D, K] float32, theirs over the whole vocabulary.
        nodes: drafted nodes a request, n; on CUDA at most 255.
        branch: [bs, L] int64, tokens that something else proposes behind the anchor, say a look-up:
            at each of its prefixes the next of them is one more candidate.
        branch_log_probs: [bs, L] float32, of each given those before it. Where the drafter has the
            same token, the higher probability counts.
        branch_lens: [bs] int32, how many of each row count; all three are given, or none.
        scores: [bs, n + 1] float32, written in place on the CPU: log-probability of each node's
            prefix, 0 for the anchor; along a row they do not rise.

    Returns:
        tokens [bs, n + 1] int64, parents [bs, n + 1] int32 with -1 for the anchor, and depths
        [bs, n + 1] int32 with 0 for it.

    Raises:
        RuntimeError: a shape, dtype, device, stride or length that does not fit.
    """
    branches = branch, branch_log_probs, branch_lens
    return torch.ops.dflare.build_draft_tree.default(
        anchors, tokens, log_probs, nodes, *branches, scores
    )


def cut_draft_tree(
    tokens: Tensor, parents: Tensor, depths: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the first so many rows of each tree; on the CPU.

    Args:
        tokens, parents, depths: as `build_draft_tree` gives them.
        counts: [bs] int64, from 1 to n + 1 each; the largest is W.

    Returns:
        The three with W columns, in which rows that a request does not have stand on no way from
        the anchor: token -1, their own parents, depth 0. And [N] int64, the other rows, in the
        order of [bs * W].

    Raises:
        RuntimeError: a shape, dtype, device, stride or count that does not fit.
    """
    return torch.ops.dflare.cut_draft_tree.default(tokens, parents, depths, counts)


def walk_draft_tree(
    tokens: Tensor, parents: Tensor, target_tokens: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the target's tokens from the anchor as far as the tree has them.

    Args:
        tokens: [bs, n + 1] int64.
        parents: [bs, n + 1] int32.
        target_tokens: [bs, n + 1] int64, the target's choice behind each node.
        stride: S, above the depth of every node.

    Returns:
        path [bs, S] int32, the rows that were reached, from the anchor on, the last one repeated;
        commit_lens [bs] int32, how many they are; and committed [bs, S] int64, the target's tokens
        behind them, the last one the bonus token, zeros from there on.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit, or a path beyond `stride`.
    """
    return torch.ops.dflare.walk_draft_tree.default(tokens, parents, target_tokens, stride)


def write_tree_mask(parents: Tensor, seq_lens: Tensor, mask: Tensor) -> None:
    """Write which nodes each node sees, where SGLang's attention looks for it; on CUDA.

    Args:
        parents: [bs, n + 1] int32.
        seq_lens: [bs] int64 or int32, tokens of each request before its anchor.
        mask: uint8, at least the sum over requests of (n + 1) * (seq_lens + n + 1); written in
            place: a matrix [n + 1, seq_lens + n + 1] a request, one behind the other, of which
            the last n + 1 columns become 1 for a node itself and its ancestors, else 0.

    Raises:
        RuntimeError: a shape, dtype, device or stride that does not fit.
    """
    torch.ops.dflare.write_tree_mask.default(parents, seq_lens, mask)


def move_tree_path(path: Tensor, commit_lens: Tensor, slots: Tensor, pools: list[Tensor]) -> None:
    """Move what a cache holds of the path's nodes to the front, as a chain would; on the CPU.

    Args:
        path: [bs, S] int32, ascending rows of the tree, from 0 on.
        commit_lens: [bs] int32, how many of each path count.
        slots: [bs, n + 1] int64, the pools' slots of the tree's rows.
        pools: [slots, heads, head_dim] each, of any dtype; written in place: slot i of a request
            gets what slot `path[i]` holds.

    Raises:
        RuntimeError: a shape, dtype, device, stride, row or slot that does not fit; no pool has
            been written to then.
    """
    torch.ops.dflare.move_tree_path.default(path, commit_lens, slots, pools)


def tree_ancestors(parents: Tensor) -> Tensor:
    """Which nodes stand on the way to which.

    Args:
        parents: [bs, n + 1] int32.

    Returns:
        [bs, n + 1, n + 1] bool, entry [b, i, j]: j is i or an ancestor of it.
    """
    width = parents.shape[1]
    own = torch.eye(width, dtype=torch.bool, device=parents.device)
    ancestors = own.repeat(len(parents), 1, 1)
    for row in range(1, width):
        above = parents[:, row].long()[:, None, None].expand(-1, 1, width)
        ancestors[:, row] |= ancestors.gather(1, above)[:, 0]
    return ancestors
