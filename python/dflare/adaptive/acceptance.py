"""Online estimates of how many proposed tokens the target will accept.

A logistic model, one a proposer: given that the proposed tokens before it were accepted, position
``i`` of request ``r`` is accepted with

    logit P = level + shape[i] + tilt[r]

``level`` is the server's, ``shape`` tells the positions apart, ``tilt`` says how much easier or
harder a request is than the others. Each term is a Gaussian that widens while nothing is
observed, so that stale knowledge counts for less and what recovered is tried again; one extended
Kalman step for each run of equal steps updates all of them. What a step does not show never enters:
positions beyond those that were compared, and positions behind the first rejected one.
"""

from collections.abc import Hashable, Sequence

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


class AcceptanceModel:
    """Acceptance by position: a prior shared by the server and a posterior per request."""

    def __init__(
        self,
        block_size: int,
        memory: int,
        prior: float = 0.6,
        rise: float = 0.0,
        request_memory: int | None = None,
    ):
        """
        Args:
            block_size: Largest width; positions ``1 .. block_size - 1`` hold proposed tokens.
            memory: Steps without observation until a term is as uncertain as at the start.
            prior: Acceptance of the first position that is assumed before anything was observed.
            rise: By how many logits the positions behind it are taken to be better.
            request_memory: The same as `memory`, of what tells a request apart.
        """
        self._memory = memory
        self._request_memory = request_memory or memory
        self._position = np.arange(1, block_size)
        self._level = float(np.log(prior / (1 - prior)))
        self._level_var = _LEVEL_VAR
        self._shape = np.where(self._position > 1, rise, 0.0)
        self._shape_var = np.full(block_size - 1, _SHAPE_VAR)
        self._spread = _FIRST_SPREAD
        self._tilt = np.zeros(64)
        self._tilt_var = np.full(64, self._spread)
        self._slot_of: dict[Hashable, int] = {}
        self._free = list(range(1, 64))  # slot 0 stands for requests that have ended

    def finish(self, request_id: Hashable) -> None:
        """Drop a request and learn from its tilt how much requests differ."""
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return
        seen_spread = float(self._tilt[slot] ** 2 + self._tilt_var[slot])
        spread = self._spread + _SPREAD_GAIN * (seen_spread - self._spread)
        self._spread = min(max(spread, _SPREAD_RANGE[0]), _SPREAD_RANGE[1])
        self._free.append(slot)

    def expected_tokens(
        self, request_ids: Sequence[Hashable], remaining: Ints
    ) -> tuple[Array, Array]:
        """Expected committed tokens of the batch for every width.

        Args:
            request_ids: [bs]; unknown ones start from the prior.
            remaining: [bs] tokens that each request may still produce.

        Returns:
            Two arrays [block_size], the value at the estimates and the value if all requests turn
            out easier than estimated; element ``w - 1`` is for width ``w``. (The mean over what is
            not known would favour wide steps for every new request, and measured worse.)
        """
        slot_of = self._slot_of
        slots = np.array(
            [slot_of[rid] if rid in slot_of else self._admit(rid) for rid in request_ids]
        )
        logits, var = self._logits(slots, len(self._position))
        accept = _sigmoid(np.stack((logits, logits + _HOPE * np.sqrt(var))))
        reached = np.cumprod(accept, axis=2) * (self._position < remaining[:, None])
        tokens = np.empty((2, len(self._position) + 1))
        tokens[:, 0] = len(slots)
        tokens[:, 1:] = reached.sum(axis=1)
        expected, hoped = np.cumsum(tokens, axis=1)
        return expected, hoped

    def observe(
        self,
        request_ids: Sequence[Hashable],
        shown: int,
        accepted: Sequence[Sequence[int]] | Ints,
        known: Ints | None = None,
    ) -> None:
        """Learn from verified batches of the same requests.

        Args:
            request_ids: [bs]; what ended meanwhile teaches the shared terms alone.
            shown: Positions that were proposed; 0 shows nothing and only lets knowledge age.
            accepted: [steps, bs] how many proposed tokens were right before the first wrong one.
            known: [steps, bs] positions of which it is known what was right; all by default.
        """
        self._age(request_ids, len(accepted))
        if not shown:
            return
        slots = np.array([self._slot_of.get(rid, 0) for rid in request_ids])
        position = self._position[:shown]
        shape = slice(0, len(position))
        logits, var = self._logits(slots, len(position))
        accept = _sigmoid(logits)
        hits = np.array(accepted)[..., None]
        reached = position <= hits + 1
        if known is not None:
            reached &= position <= known[..., None]
        seen = reached.sum(axis=0)
        right = (position <= hits).sum(axis=0)
        info = seen * accept * (1 - accept)
        error = right - seen * accept

        level_move, level_var = _kalman(self._level_var, info, error, var, (0, 1))
        shape_move, shape_var = _kalman(self._shape_var[None, shape], info, error, var, (0,))
        tilt_move, tilt_var = _kalman(self._tilt_var[slots, None], info, error, var, (1,))
        self._level = float(_clip(self._level + level_move))
        self._level_var = float(level_var)
        self._shape[shape] = _clip(self._shape[shape] + shape_move)
        self._shape_var[shape] = shape_var
        self._tilt[slots] = _clip(self._tilt[slots] + tilt_move)
        self._tilt_var[slots] = tilt_var
        self._tilt[0] = 0.0

    def _age(self, request_ids: Sequence[Hashable], steps: int) -> None:
        """Let knowledge age by so many steps of a batch."""
        rate = steps / self._memory
        self._level_var = min(self._level_var + rate * _LEVEL_VAR, _LEVEL_VAR)
        np.minimum(self._shape_var + rate * _SHAPE_VAR, _SHAPE_VAR, out=self._shape_var)
        slots = np.array([self._slot_of.get(rid, 0) for rid in request_ids])
        tilt_var = self._tilt_var[slots] + steps / self._request_memory * self._spread
        self._tilt_var[slots] = np.minimum(tilt_var, self._spread)

    def conditional(self) -> Array:
        """Acceptance by position given that the position is reached, [block_size - 1]."""
        return _sigmoid(self._level + self._shape)

    def _logits(self, slots: Ints, positions: int) -> tuple[Array, Array]:
        mean = _clip((self._level + self._shape[:positions]) + self._tilt[slots, None])
        var = (self._level_var + self._shape_var[:positions]) + self._tilt_var[slots, None]
        return mean, var

    def _admit(self, request_id: Hashable) -> int:
        if not self._free and len(self._tilt) >= _MAX_REQUESTS:
            self._free.append(self._slot_of.pop(next(iter(self._slot_of))))
        elif not self._free:
            known = len(self._tilt)
            self._free = list(range(known, 2 * known))
            self._tilt = np.resize(self._tilt, 2 * known)
            self._tilt_var = np.resize(self._tilt_var, 2 * known)
        slot = self._free.pop()
        self._slot_of[request_id] = slot
        self._tilt[slot] = 0.0
        self._tilt_var[slot] = self._spread
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
