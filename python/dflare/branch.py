"""How likely a look-up's tokens are right: what lets them compete with the drafter's in a tree."""

import torch
from torch import Tensor

_LONGEST = 16  # matches beyond it are one class
_AT_ONCE = 16  # steps: to learn from one takes some twenty operations, whatever its size
_WEIGHT = 8.0  # observations that the prior of a class is worth


class BranchOdds:
    """Learns from every step how often a token is right behind a match of so many tokens.

    The first token of a look-up stands behind its match; the second, if the first was right, behind
    one token more. Tokens that were not reached teach nothing. Counts stay on the device, where a
    step's proposals and results are, so that nothing waits for them. What is learned depends on
    committed tokens alone: tensor-parallel ranks agree without a word.
    """

    def __init__(self, device: torch.device | str = "cpu", memory: int = 3000) -> None:
        """
        Args:
            device: Of matches and results.
            memory: Observed tokens after which a count has faded to a third.
        """
        self._length = torch.arange(_LONGEST + 1, device=device)
        right = 1 - 0.6 * 0.85**self._length  # 0.6 right behind 3 tokens, 0.88 behind 10
        self._prior = _WEIGHT * torch.stack((right, torch.ones_like(right)))
        self._counts = self._prior.clone()  # right ones, all that were seen
        self._log_fade = -1 / memory
        self._log_probs: Tensor | None = None  # by match and token, until more was learned
        self._worth: dict[tuple[int, int], Tensor] = {}  # by match, as long
        self._noted: list[tuple[Tensor, Tensor, Tensor]] = []  # what nothing was learned from yet
        self._longest = 0  # tokens of a look-up among them

    def log_probs(self, match: Tensor, count: int) -> Tensor:
        """Log-probability of each token of look-ups, given that those before it are right.

        Args:
            match: [bs] int32, tokens of each match.
            count: Tokens of a look-up, L.

        Returns:
            [bs, L] float32.
        """
        if self._log_probs is None or self._log_probs.shape[1] != count:
            right, seen = self._counts
            self._log_probs = (right / seen).log()[_classes(self._length, count)]
        return self._log_probs.index_select(0, match.clamp(max=_LONGEST))

    def branches(self, found: Tensor, match: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look-ups as `ops.build_draft_tree` takes branches.

        Args:
            found: [bs, L] int64, their tokens.
            match: [bs] int32, tokens of each match; 0: there is no proposal.

        Returns:
            Tokens and log-probabilities [bs, L], and lengths [bs] int32.
        """
        count = found.shape[1]
        return found, self.log_probs(match, count), match.clamp(max=1) * count

    def worth(self, match: Tensor, count: int, odds: int) -> Tensor:
        """How many tokens of each look-up are right with a probability of at least `odds`.

        Args:
            match: [bs] int32, tokens of each match; 0: there is no proposal.
            count: Tokens of a look-up.
            odds: In thousandths.

        Returns:
            [bs] int64.
        """
        if (count, odds) not in self._worth:
            right, seen = self._counts
            chance = (right / seen)[_classes(self._length, count)].cumprod(1)
            worth = (chance >= odds / 1000).sum(1)
            self._worth[count, odds] = worth.index_fill_(0, self._length[:1], 0)
        return self._worth[count, odds].index_select(0, match.clamp(max=_LONGEST))

    def note(self, match: Tensor, proposed: Tensor, right: Tensor, count: int) -> None:
        """As `observe`, but learns from several steps at once."""
        self._noted.append((match, proposed, right))
        self._longest = max(self._longest, count)
        if len(self._noted) == _AT_ONCE:
            matches, shown, were_right = (torch.cat(x) for x in zip(*self._noted, strict=True))
            self.observe(matches, shown, were_right, self._longest)
            self._noted, self._longest = [], 0

    def observe(self, match: Tensor, proposed: Tensor, right: Tensor, count: int) -> None:
        """Learn from a step.

        Args:
            match: [bs] tokens of each match; 0: there was no proposal.
            proposed: [bs] tokens of each look-up of which it is known whether they were right up to
                the first wrong one.
            right: [bs] how many of them were right before the first wrong one.
            count: No fewer than were proposed.
        """
        known = proposed.where(match > 0, 0)
        ends = torch.stack((right.minimum(known), (right + 1).minimum(known)))
        counted = torch.arange(count, device=match.device) < ends[..., None]
        classes = _classes(match, count).flatten()
        seen = torch.zeros_like(self._counts).index_add_(1, classes, counted.flatten(1).float())
        fade = (seen[1].sum() * self._log_fade).exp()
        self._counts = self._prior + (self._counts - self._prior) * fade + seen
        self._log_probs, self._worth = None, {}


def _classes(match: Tensor, count: int) -> Tensor:
    """[bs, count] int64, the class of each token of look-ups."""
    return (match.long()[:, None] + torch.arange(count, device=match.device)).clamp(max=_LONGEST)
