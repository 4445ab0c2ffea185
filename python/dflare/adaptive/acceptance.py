"""Online estimates of how many proposed tokens the target will accept.

A logistic model of each proposer: given that the proposed tokens before it were accepted, position
``i`` of request ``r`` is accepted with

    logit P = level + shape[i] + tilt[r]

``level`` is the server's, ``shape`` tells the positions apart, ``tilt`` says how much easier or
harder a request is than the others. Each term is a Gaussian that widens while nothing is
observed, so that stale knowledge counts for less and what recovered is tried again; one extended
Kalman step for each run of equal steps updates all of them. What a step does not show never enters:
positions beyond those that were compared, and positions behind the first rejected one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_LEVEL_VAR = 1.0  # prior, and the most that forgetting restores
_SHAPE_VAR = 0.5
_SPREAD_RANGE = (0.05, 4.0)  # variance of tilts between requests
_SPREAD_GAIN = 0.05  # share of one finished request in the learned spread
_MAX_MOVE = 2.0  # logits that one step may move a term
_MAX_LOGIT = 3.5  # of a term: acceptance is never taken for impossible or certain
_FIRST_SPREAD = 0.3
_HOPE = 3**0.5  # standard deviations by which requests may turn out easier
_MAX_REQUESTS = 4096  # beyond it the longest-known request is forgotten: it never said goodbye


@dataclass(frozen=True)
class Prior:
    """What is taken for granted of a proposer before anything was observed.

    Attributes:
        accept: Acceptance of the first position.
        rise: By how many logits the positions behind it are taken to be better.
        memory: Steps without observation until a request is as uncertain as a new one; None for as
            many as of the other terms.
    """

    accept: float = 0.6
    rise: float = 0.0
    memory: int | None = None


class AcceptanceModel:
    """Acceptance by proposer and position: a prior shared by the server, a posterior a request."""

    def __init__(self, block_size: int, memory: int, proposers: Sequence[Prior] = (Prior(),)):
        """
        Args:
            block_size: Largest width; positions ``1 .. block_size - 1`` hold proposed tokens.
            memory: Steps without observation until a term is as uncertain as at the start.
            proposers: What is taken for granted of each, P of them.
        """
        self._memory = memory
        self._request_memory = np.array([p.memory or memory for p in proposers], dtype=float)
        self._position = np.arange(1, block_size)
        accept = np.array([p.accept for p in proposers])
        rise = np.array([p.rise for p in proposers])
        self._level = np.log(accept / (1 - accept))
        self._level_var = np.full(len(proposers), _LEVEL_VAR)
        self._shape = np.where(self._position > 1, rise[:, None], 0.0)
        self._shape_var = np.full(self._shape.shape, _SHAPE_VAR)
        self._spread = np.full(len(proposers), _FIRST_SPREAD)
        self._tilt = np.zeros((len(proposers), 64))
        self._tilt_var = np.full(self._tilt.shape, _FIRST_SPREAD)
        self._slot_of: dict[Hashable, int] = {}
        self._free = list(range(1, 64))  # slot 0 stands for requests that have ended

    def finish(self, request_id: Hashable) -> None:
        """Drop a request and learn from its tilts how much requests differ."""
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return
        seen_spread = self._tilt[:, slot] ** 2 + self._tilt_var[:, slot]
        spread = self._spread + _SPREAD_GAIN * (seen_spread - self._spread)
        self._spread = np.minimum(np.maximum(spread, _SPREAD_RANGE[0]), _SPREAD_RANGE[1])
        self._free.append(slot)

    def expected_tokens(
        self, request_ids: Sequence[Hashable], remaining: Ints
    ) -> tuple[Array, Array]:
        """Expected committed tokens of the batch by every proposer, for every width.

        Args:
            request_ids: [bs]; unknown ones start from the prior.
            remaining: [bs] tokens that each request may still produce.

        Returns:
            Two arrays [P, block_size], the value at the estimates and the value if all requests
            turn out easier than estimated; column ``w - 1`` is for width ``w``. (The mean over what
            is not known would favour wide steps for every new request, and measured worse.)
        """
        slot_of = self._slot_of
        slots = np.array(
            [slot_of[rid] if rid in slot_of else self._admit(rid) for rid in request_ids]
        )
        shape, shape_var = self._shape[:, None], self._shape_var[:, None]  # [P, 1, positions]
        level, level_var = self._level[:, None, None], self._level_var[:, None, None]
        logits = _clip(level + shape + self._tilt[:, slots, None])
        var = level_var + shape_var + self._tilt_var[:, slots, None]
        accept = _sigmoid(np.stack((logits, logits + _HOPE * np.sqrt(var))))
        reached = np.cumprod(accept, axis=3) * (self._position < remaining[:, None])
        tokens = np.empty((2, len(self._level), len(self._position) + 1))
        tokens[..., 0] = len(slots)
        tokens[..., 1:] = reached.sum(axis=2)
        expected, hoped = np.cumsum(tokens, axis=2)
        return expected, hoped

    def observe(
        self,
        proposer: int,
        request_ids: Sequence[Hashable],
        shown: int,
        accepted: Sequence[Sequence[int]] | Ints,
        known: Ints | None = None,
    ) -> None:
        """Learn from verified batches of the same requests.

        Args:
            proposer: Whose tokens were compared, its index.
            request_ids: [bs]; what ended meanwhile teaches the shared terms alone.
            shown: Positions that were proposed.
            accepted: [steps, bs] how many proposed tokens were right before the first wrong one.
            known: [steps, bs] positions of which it is known what was right; all by default.
        """
        slots = self._slots(request_ids)
        position = self._position[:shown]
        shape, shape_var = self._shape[proposer, :shown], self._shape_var[proposer, :shown]
        tilt, tilt_var = self._tilt[proposer], self._tilt_var[proposer]
        level_var = self._level_var[proposer]
        accept = _sigmoid(_clip(self._level[proposer] + shape + tilt[slots, None]))
        var = level_var + shape_var + tilt_var[slots, None]
        hits = np.array(accepted)[..., None]
        reached = position <= hits + 1
        if known is not None:
            reached &= position <= known[..., None]
        seen = reached.sum(axis=0)
        right = (position <= hits).sum(axis=0)
        info = seen * accept * (1 - accept)
        error = right - seen * accept

        level_move, level_new = _kalman(level_var, info, error, var, (0, 1))
        shape_move, shape_new = _kalman(shape_var[None], info, error, var, (0,))
        tilt_move, tilt_new = _kalman(tilt_var[slots, None], info, error, var, (1,))
        self._level[proposer] = _clip(self._level[proposer] + level_move)
        self._level_var[proposer] = level_new
        shape[:], shape_var[:] = _clip(shape + shape_move), shape_new
        tilt[slots], tilt_var[slots] = _clip(tilt[slots] + tilt_move), tilt_new
        tilt[0] = 0.0

    def age(self, request_ids: Sequence[Hashable], steps: int) -> None:
        """Let knowledge age by so many steps of a batch."""
        rate = steps / self._memory
        np.minimum(self._level_var + rate * _LEVEL_VAR, _LEVEL_VAR, out=self._level_var)
        np.minimum(self._shape_var + rate * _SHAPE_VAR, _SHAPE_VAR, out=self._shape_var)
        slots, spread = self._slots(request_ids), self._spread[:, None]
        tilt_var = self._tilt_var[:, slots] + (steps / self._request_memory)[:, None] * spread
        self._tilt_var[:, slots] = np.minimum(tilt_var, spread)

    def conditional(self, proposer: int = 0) -> Array:
        """Acceptance by position given that the position is reached, [block_size - 1]."""
        return _sigmoid(self._level[proposer] + self._shape[proposer])

    def _slots(self, request_ids: Sequence[Hashable]) -> Ints:
        return np.array([self._slot_of.get(rid, 0) for rid in request_ids])

    def _admit(self, request_id: Hashable) -> int:
        if not self._free and self._tilt.shape[1] >= _MAX_REQUESTS:
            self._free.append(self._slot_of.pop(next(iter(self._slot_of))))
        elif not self._free:
            known = self._tilt.shape[1]
            self._free = list(range(known, 2 * known))
            self._tilt = np.tile(self._tilt, 2)  # slots are filled when they are given away
            self._tilt_var = np.tile(self._tilt_var, 2)
        slot = self._free.pop()
        self._slot_of[request_id] = slot
        self._tilt[:, slot] = 0.0
        self._tilt_var[:, slot] = self._spread
        return slot


def _kalman(
    own_var: Array | float, info: Array, error: Array, total_var: Array, axes: tuple[int, ...]
) -> tuple[Array, Array]:
    """One term's move and new variance; doubt about the other terms counts as noise."""
    weight = 1 / (1 + info * (total_var - own_var))
    prior = np.squeeze(own_var, axis=axes) if isinstance(own_var, np.ndarray) else own_var
    var = 1 / (1 / prior + (info * weight).sum(axis=axes))
    move = var * (error * weight).sum(axis=axes)
    return np.minimum(np.maximum(move, -_MAX_MOVE), _MAX_MOVE), var


def _clip(logits: Array) -> Array:
    return np.minimum(np.maximum(logits, -_MAX_LOGIT), _MAX_LOGIT)


def _sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))
