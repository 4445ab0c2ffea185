"""How far a run is: by its steps or by its time, whichever is further."""

from dataclasses import dataclass


@dataclass
class Clock:
    """Steps and time of a run, over all its parts.

    Args:
        total_steps: Steps after which it ends.
        max_minutes: Minutes after which it ends, none for no limit.
        steps: Steps done.
        minutes: Minutes spent.
        cold_minutes: Those of them that went into steps that compiled code or were a process's
            first.
    """

    total_steps: int
    max_minutes: float | None
    steps: int = 0
    minutes: float = 0.0
    cold_minutes: float = 0.0

    def progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self._progress(self.steps)

    def schedule(self) -> float:
        """Progress in the middle of the next step, which its learning rate goes by: never 0."""
        return self._progress(self.steps + 0.5)

    def _progress(self, steps: float) -> float:
        share = steps / self.total_steps
        if self.max_minutes is not None:
            if self.minutes >= self.max_minutes:
                return 1.0
            # Compiling leaves less time to train in; counted as training it would be the warm-up.
            warm = self.max_minutes - self.cold_minutes
            share = max(share, (self.minutes - self.cold_minutes) / warm)
        return min(1.0, share)
