"""Notices a drafter that hardly ever guesses right: nothing is wrong then but the speed."""

from collections.abc import Callable, Sequence

_WINDOW = 128  # first drafts of a block that are judged together
_LOW = 0.15  # of them accepted; a drafter trained for its target has 0.4 and more

ADVICE = (
    "Likely causes, the likeliest first: (1) the target is another revision or fine-tune than the "
    "drafter was trained for: compare them with the drafter's model card; (2) the target is "
    "quantised, and too coarsely for its hidden states to look as in training: try its original "
    "weights; (3) requests come in another chat template, or another thinking mode, than the "
    "drafter was trained on: ask through /v1/chat/completions, and try "
    'chat_template_kwargs {"enable_thinking": false}; (4) the drafter taps the wrong layers of the '
    "target: `dflare inspect` shows target_layer_ids"
)


class AcceptanceWatch:
    """Judges windows of decode steps by how many first drafts were accepted, and says so once.

    The first draft of a block is judged because it does not depend on the width of the steps, nor
    on the other drafts.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        """
        Args:
            report: takes the one line that may have to be said.
        """
        self._report = report
        self._drafts = self._accepted = 0
        self._said = False
        self.low = False  # in the latest whole window

    def observe(self, commit_lens: Sequence[int]) -> None:
        """Count one decode step of a batch that drafted.

        Args:
            commit_lens: tokens that each request committed, or would have by its drafts alone.
        """
        self._drafts += len(commit_lens)
        self._accepted += sum(length > 1 for length in commit_lens)
        if self._drafts < _WINDOW:
            return
        rate = self._accepted / self._drafts
        self._drafts = self._accepted = 0
        self.low = rate < _LOW
        if self.low and not self._said:
            self._said = True
            self._report(low_acceptance(rate))


def low_acceptance(rate: float) -> str:
    """The line about a share of first drafts that is too small."""
    return (
        f"hardly any draft is accepted: {100 * rate:.0f} % of the first ones of a block, where a "
        f"drafter that fits has 40 % and more. {ADVICE}"
    )


def is_low(first_draft_rate: float) -> bool:
    """Whether a share of accepted first drafts calls for a look at the pair."""
    return first_draft_rate < _LOW
