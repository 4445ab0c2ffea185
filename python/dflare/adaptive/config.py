"""What a user may set about adaptive verification."""

import json
import os
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from dflare.adaptive.arms import PLAIN, Arm
from dflare.errors import UnsupportedError

VARIABLE = "DFLARE_ADAPTIVE"
_LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class AdaptiveConfig(BaseModel):
    """Settings of :class:`dflare.adaptive.ArmPolicy`.

    A width counts the tokens of one request that the target verifies in a step: the anchor and
    ``width - 1`` proposed tokens. Width 1 is plain decoding without any proposal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: tuple[int, ...] = Field(
        description="Widths to choose from, ascending, from 1 to at most the block size. Each "
        "costs one set of CUDA graphs.",
    )
    proposers: tuple[Literal["chain", "lookup", "tree"], ...] = Field(
        default=("chain", "lookup", "tree"),
        min_length=1,
        description="Who may propose: the drafter (`chain`), the request's own text (`lookup`), "
        "alone and, with the others, beside drafted tokens, and the drafter's several best "
        "continuations (`tree`; on CUDA with `--attention-backend triton`).",
    )
    trees: tuple[int, ...] = Field(
        default=(),
        description="Tokens of a request that trees verify, ascending, at most twice the block "
        "size; where requests may differ, their mean.",
    )
    lookups: tuple[int, ...] = Field(
        default=(),
        description="Tokens of a request that look-ups alone verify, ascending, at most twice the "
        "block size. Where requests may not differ, those that are no widths are left out; where "
        "they may, each verifies what is worth its time, at most the largest of them.",
    )
    explore: float = Field(
        default=0.003,
        ge=0.0,
        le=0.2,
        description="Share of the decode time that may be spent on arms that the estimates "
        "call slower, in order to learn whether they still are. 0 never explores: acceptance "
        "that recovers while nothing is drafted then goes unnoticed.",
    )
    patience: float = Field(
        default=0.02,
        ge=0.0,
        description="How much predicted gain must pile up, in step times, before the arm "
        "changes: 0.1 changes at once for a gain of 10 % and after 10 steps for one of 1 %.",
    )
    memory: int = Field(
        default=3000,
        ge=4,
        description="Steps without an observation after which an acceptance estimate counts as "
        "unknown again. Shorter follows changes faster and is noisier.",
    )

    _most: int = PrivateAttr(0)

    @field_validator("widths")
    @classmethod
    def _check_widths(cls, widths: tuple[int, ...]) -> tuple[int, ...]:
        if not widths or widths[0] != 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must ascend from 1 without repeats, got {list(widths)}")
        return widths

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if len(self.widths) < 2:
            raise ValueError(
                f"widths {list(self.widths)} leave nothing to choose; give at least two, "
                "or turn adaptive verification off"
            )
        return self

    @property
    def ragged(self) -> bool:
        """Whether the requests of a batch may verify different numbers of tokens."""
        return self._most > 0

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The plain step first, then each proposer's arms by width."""
        lookups = tuple(n for n in self.lookups if self.ragged or n in self.widths)
        sizes = {"chain": self.widths[1:], "lookup": lookups, "tree": self.trees}
        return (PLAIN, *(Arm(who, nodes) for who in self.proposers for nodes in sizes[who]))

    def as_tree(self, arm: Arm) -> bool:
        """Whether an arm's steps are run as trees: look-ups too, if requests may differ."""
        return arm.proposer == "tree" or (arm.proposer == "lookup" and self.ragged)

    def most(self, arm: Arm) -> int:
        """Tokens that one request may verify in a step of an arm."""
        return self._most if self.ragged and arm.proposer == "tree" else arm.nodes

    def sharing(self, block_size: int, most: int) -> Self:
        """The settings of a server whose requests may verify different numbers of tokens.

        The nodes of its trees are a mean, so that small ones are worth having too.

        Args:
            block_size: Tokens of a draft block.
            most: What slots are reserved for, of one request.
        """
        trees = self.trees
        if trees == _ladder(block_size // 2 + 1, 2 * block_size):
            trees = _ladder(2, 2 * block_size)
        kept = {"trees": trees, "lookups": self.lookups}
        update = {name: tuple(n for n in sizes if n <= most) for name, sizes in kept.items()}
        shared = self.model_copy(update=update)
        shared._most = most
        return shared

    @classmethod
    def for_block_size(cls, block_size: int, **settings: object) -> Self:
        """Return the settings for a drafter's block size.

        Args:
            block_size: Tokens of a draft block, anchor included; at least 2.
            **settings: Fields to set explicitly. ``widths`` defaults to the members of
                1, 2, 3, 4, 6, 8, 12, 16, 24, 32 below the block size, and the block size;
                ``trees`` to those above half the block size, up to twice it; ``lookups`` to the
                widths above 1 and those above the block size, up to twice it.

        Raises:
            ValueError: The block size is below 2, or a width or a tree exceeds what it allows.
        """
        if block_size < 2:
            raise ValueError(f"a block of {block_size} tokens has nothing to verify; expected >= 2")
        sizes = {"widths": (*_ladder(1, block_size - 1), block_size)}
        sizes["trees"] = _ladder(block_size // 2 + 1, 2 * block_size)
        config = cls.model_validate({**sizes, **settings})
        if "lookups" not in settings:
            wider = _ladder(block_size + 1, 2 * block_size) if "widths" not in settings else ()
            config = config.model_copy(update={"lookups": (*config.widths[1:], *wider)})
        if config.widths[-1] > block_size:
            raise ValueError(
                f"width {config.widths[-1]} exceeds the drafter's block size {block_size}; "
                "lower the widths"
            )
        for name in ("trees", "lookups"):
            given = getattr(config, name)
            if any(not 2 <= nodes <= 2 * block_size for nodes in given):
                raise ValueError(
                    f"{name} {list(given)} must verify 2 to {2 * block_size} tokens, twice the "
                    "drafter's block size"
                )
        return config

    @classmethod
    def from_environment(cls, block_size: int) -> Self | None:
        """Read the settings from the environment variable ``DFLARE_ADAPTIVE``.

        ``off`` verifies the whole block at every step; ``on``, or no such variable, adapts with the
        defaults; a JSON object sets fields, as in ``{"widths": [1, 4, 8]}``.

        Args:
            block_size: Tokens of a draft block.

        Returns:
            The settings, or None for ``off``.

        Raises:
            UnsupportedError: The value is none of these.
        """
        value = os.environ.get(VARIABLE, "on").strip()
        if value == "off":
            return None
        try:
            settings = {} if value == "on" else json.loads(value)
            if not isinstance(settings, dict):
                raise TypeError("not an object")
            return cls.for_block_size(block_size, **settings)
        except ValidationError as error:
            reason = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'widths'}: {e['msg']}" for e in error.errors()
            )
        except (TypeError, ValueError) as error:
            reason = str(error)
        raise UnsupportedError(
            f"{VARIABLE}={value!r} ({reason}); expected off, on, or a JSON object with any of "
            f"{sorted(cls.model_fields)}"
        )


def _ladder(least: int, most: int) -> tuple[int, ...]:
    """The sizes that are worth choosing between, from the least to the most."""
    return tuple(size for size in _LADDER if least <= size <= most)
