"""Holds the blocks that an engine proposed against the independent reference, step by step."""

from typing import Any

from reference_drafter import ReferencePair

# Two fp32 implementations may order tokens differently whose logits are closer than this.
_TIE = 1e-4


def assert_same_drafts(
    pair: ReferencePair,
    prompt: list[int],
    output: list[int],
    steps: list[dict[str, Any]],
    window: int | None = None,
    tie: float = _TIE,
    mixed: bool = False,
) -> int:
    """Check every verify step of one finished greedy request.

    The anchors, the committed lengths and all proposed tokens must be what the reference
    computes from the text alone, whatever the engine did to its caches on the way.

    Args:
        window: tokens of context that the drafter may see, None for all.
        tie: logits closer than this may be ordered differently.
        mixed: some tokens may have come from steps beside the prefill of others, which draft
            nothing.

    Returns:
        Number of draft tokens that were accepted.
    """
    assert steps, "the engine proposed nothing for this request"
    tokens = prompt + output
    states = pair.tapped_states(tokens)
    expected_prefix = len(prompt)
    accepted_in_all = 0
    for step in steps:
        length, block = step["prefix"], step["block"]
        skipped = mixed and length > expected_prefix
        assert skipped or length == expected_prefix, f"step at {length}, not {expected_prefix}"
        assert block[0] == tokens[length], f"anchor {block[0]} at {length}"
        first = 0 if window is None else max(0, length - window)
        logits = pair.propose(states, block[0], length, first, width=len(block))
        for slot, token in enumerate(block[1:], start=1):
            best = logits[slot - 1].max()
            gap = (best - logits[slot - 1, token]).item()
            assert gap <= tie, (
                f"context {length}, slot {slot}: engine drafted {token}, the reference "
                f"{logits[slot - 1].argmax().item()} (logits {gap:.4f} apart)"
            )
        accepted = 0
        for drafted, real in zip(block[1:], tokens[length + 1 :], strict=False):
            if drafted != real:
                break
            accepted += 1
        accepted_in_all += accepted
        expected_prefix = length + accepted + 1
    # The last step may overshoot what the client asked for, but never stop short of it.
    assert mixed or expected_prefix >= len(tokens) - 1
    return accepted_in_all
