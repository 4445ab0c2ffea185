"""Accept length of a drafter on answers of its target, beside prompt lookup on the same answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dflare.adaptive.lookup import SpliceRule
from dflare.branch import BranchOdds
from dflare.errors import DFlareError
from dflare.training.data.target import Target
from dflare.training.drafter.model import Drafter
from dflare.training.run.draft_table import DraftTable, draft_table
from dflare.training.run.look_ups import look_ups
from dflare.training.run.prompt_lookup import simulate
from dflare.training.run.speculate import decode

_SPLICE_MEMORY = 3000  # steps, as the engine's policy has it
TREE_TOKENS = (6, 8, 12, 16, 32)  # verified tokens: the anchor and drafted nodes


@dataclass(frozen=True)
class Score:
    """Acceptance over all verify steps of a set of prompts.

    Args:
        steps: Verify steps.
        tokens: Tokens that they added.
        histogram: For 1 .. B tokens, how many steps added that many.
    """

    steps: int
    tokens: int
    histogram: list[int]

    @classmethod
    def of(cls, emitted: Sequence[Sequence[int]], block_size: int) -> "Score":
        """Count steps; ``emitted`` has the tokens of each step of each prompt."""
        histogram = [0] * block_size
        for prompt in emitted:
            for tokens in prompt:
                histogram[tokens - 1] += 1
        tokens = sum(count * size for size, count in enumerate(histogram, 1))
        return cls(sum(histogram), tokens, histogram)

    @property
    def accept_length(self) -> float:
        """Tokens a verify step, the target's own included."""
        return self.tokens / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``reached[j-1]``: share of steps that kept j drafts or more."""
        reached = [sum(self.histogram[j:]) / max(self.steps, 1) for j in range(1, self.block_size)]
        return {
            "accept_length": round(self.accept_length, 4),
            "steps": self.steps,
            "tokens": self.tokens,
            "reached": [round(share, 4) for share in reached],
            "histogram": self.histogram,
        }

    @property
    def block_size(self) -> int:
        """B."""
        return len(self.histogram)


def evaluate(
    target: Target, drafter: Drafter, answers: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """Draft at every position of answers, and walk over them in every way.

    Args:
        target: Tapped as the drafter wants.
        drafter: On the same device.
        answers: From :func:`dflare.training.run.answers.known_answers`.

    Returns:
        Scores of the whole block as a chain (``drafter``) and of prompt lookup; accept lengths of
        chains and trees by verified tokens, without and with the engine's look-ups; tokens and
        steps of each prompt.
    """
    started = time.monotonic()
    size = drafter.config.block_size
    walks = _Walks(size)
    for prompt, answer in answers:
        walks.add(prompt, answer, draft_table(target, drafter, prompt, answer))
    whole = walks.chain[size]
    return {
        "prompts": len(answers),
        "block_size": size,
        "drafter": Score.of(whole, size).to_dict(),
        "prompt_lookup": Score.of(walks.looked_up, size).to_dict(),
        **walks.accept_lengths(),
        "by_prompt": [[sum(emitted), len(emitted)] for emitted in whole],
        "seconds": round(time.monotonic() - started, 1),
        "device": str(target.device.type),
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


class _Walks:
    """Tokens of each step of each answer, by way of drafting and verified tokens.

    What look-ups are worth is learned from answer to answer, as a server does.
    """

    def __init__(self, block_size: int) -> None:
        self._slots = block_size - 1
        self.chain: dict[int, list[list[int]]] = {n: [] for n in range(2, block_size + 1)}
        self._spliced: dict[int, list[list[int]]] = {n: [] for n in self.chain}
        self._tree: dict[int, list[list[int]]] = {n: [] for n in TREE_TOKENS}
        self._branched: dict[int, list[list[int]]] = {n: [] for n in TREE_TOKENS}
        self.looked_up: list[list[int]] = []
        self._odds, self._rule = BranchOdds(), SpliceRule(_SPLICE_MEMORY)

    def add(self, prompt: list[int], answer: list[int], table: DraftTable) -> None:
        """Walk over one answer in every way."""
        found = look_ups(prompt, answer, max(TREE_TOKENS) - 1)
        seen = table.compare(found)
        for width in self.chain:
            self.chain[width].append(table.chain(width))
            spliced = table.spliced(width, seen, self._rule.least_strength())
            self._spliced[width].append(spliced)
        for walks, branches in ((self._tree, None), (self._branched, found.branches(self._odds))):
            for tokens, steps in table.tree(TREE_TOKENS, branches).items():
                walks[tokens].append(steps)
        found.teach(self._odds)
        self._rule.observe(seen, self._slots)
        self.looked_up.append(simulate(prompt, answer, self._slots))

    def accept_lengths(self) -> dict[str, dict[str, float]]:
        """Tokens a step by way of drafting, then by verified tokens."""
        walks = {
            "chain": self.chain,
            "tree": self._tree,
            "chain_and_lookup": self._spliced,
            "tree_and_lookup": self._branched,
        }
        return {
            name: {
                str(tokens): round(sum(map(sum, emitted)) / max(sum(map(len, emitted)), 1), 4)
                for tokens, emitted in of_name.items()
            }
            for name, of_name in walks.items()
        }


def compare(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compare two drafters on the same prompts.

    Args:
        own: ``by_prompt`` of :func:`evaluate`: tokens and steps of each prompt.
        other: The same of the one that it is compared with.

    Returns:
        ``gain``, by how much the accept length is higher (0.05: 5 %), and the 95 % interval of a
        bootstrap over prompts, each with both its results.
    """
    from scipy.stats import bootstrap

    a, b = np.asarray(own, float), np.asarray(other, float)

    def gain(tokens, steps, other_tokens, other_steps, axis=-1):
        length = tokens.sum(axis) / steps.sum(axis)
        return length / (other_tokens.sum(axis) / other_steps.sum(axis)) - 1.0

    columns = (*a.T, *b.T)
    interval = bootstrap(
        columns, gain, paired=True, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return {
        "gain": round(float(gain(*columns)), 4),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def check_by_decoding(
    target: Target,
    drafter: Drafter,
    answers: Sequence[tuple[list[int], list[int]]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> None:
    """Decode greedily with draft, verify and commit, and hold the walks against it.

    Raises:
        DFlareError: Text or steps differ.
    """
    size = drafter.config.block_size
    decoded = decode(target, drafter, [p for p, _ in answers], max_new_tokens, stop_ids)
    for number, ((prompt, answer), real) in enumerate(zip(answers, decoded, strict=True)):
        walked = draft_table(target, drafter, prompt, answer).chain(size)
        if real.ids != answer or real.emitted != walked:
            raise DFlareError(
                f"prompt {number}: decoding adds {real.emitted} tokens a step, the walk {walked}"
                f"{'' if real.ids == answer else ', and another text'}; in float32 they are equal"
            )
