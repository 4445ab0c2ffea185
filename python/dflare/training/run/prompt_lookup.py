"""Prompt lookup decoding: the baseline that costs nothing, simulated on answers that are known."""


def propose(text: list[int], count: int, longest: int = 3) -> list[int]:
    """Continue as the text did after the last earlier occurrence of its own ending.

    Args:
        text: Prompt and answer so far.
        count: Tokens wanted.
        longest: Tokens of the ending to look for first; then fewer, down to one.

    Returns:
        At most ``count`` tokens, none if the ending is new.
    """
    for size in range(min(longest, len(text) - 1), 0, -1):
        ending = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == ending:
                return text[start + size : start + size + count]
    return []


def simulate(prompt: list[int], answer: list[int], drafted: int) -> list[int]:
    """Return the tokens that each verify step would have added to reach an answer.

    A verified answer does not depend on how it was drafted, so no model is needed.

    Args:
        prompt: Token ids.
        answer: What the target says; its first token comes from the prompt.
        drafted: Tokens drafted a step (B - 1 for a fair comparison with blocks).
    """
    emitted, done = [], 1
    while done < len(answer):
        drafts = propose([*prompt, *answer[:done]], drafted)
        accepted = 0
        while (
            accepted < len(drafts)
            and done + accepted < len(answer)
            and drafts[accepted] == answer[done + accepted]
        ):
            accepted += 1
        step = min(accepted + 1, len(answer) - done)
        emitted.append(step)
        done += step
    return emitted
