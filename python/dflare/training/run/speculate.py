"""Speculative decoding with a transformers target: what training code thinks the engine does.

All rows draft, verify and commit together, each at its own length. It is made to measure
acceptance, not to be fast: the engine is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dflare.training.data.generate import sample
from dflare.training.data.slot_cache import SlotCache
from dflare.training.data.target import Target
from dflare.training.drafter.model import Drafter, Mask


@dataclass(frozen=True)
class Decoded:
    """One prompt's answer.

    Args:
        ids: The answer, the stop token included.
        emitted: Tokens that each verify step added: accepted drafts and one of the target's own,
            cut where the answer ends. The first token comes from the prompt and is in none.
        blocks: The tokens drafted in each step, slots 1 .. B-1.
    """

    ids: list[int]
    emitted: list[int]
    blocks: list[list[int]]

    def add(self, block: list[int], new: list[int], limit: int, stop_ids: tuple[int, ...]) -> bool:
        """Note a step that drafted ``block`` and verified ``new``; true if the answer goes on."""
        new = new[: limit - len(self.ids)]
        ends = [at for at, token in enumerate(new) if token in stop_ids]
        new = new[: ends[0] + 1] if ends else new
        self.ids.extend(new)
        self.emitted.append(len(new))
        self.blocks.append(block)
        return not ends and len(self.ids) < limit


class ContextCache:
    """The drafter's context K/V, one row a sequence.

    Args:
        drafter: Gives the sizes.
        rows: Sequences.
        max_length: Positions a row.
        like: A tensor of the dtype and on the device wanted.
    """

    def __init__(self, drafter: Drafter, rows: int, max_length: int, like: Tensor) -> None:
        config = drafter.config
        shape = (rows, config.num_key_value_heads, max_length, config.head_dim)
        self._drafter = drafter
        self._layers = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]

    def append(self, taps: Tensor, positions: Tensor) -> None:
        """Write K/V of tokens with these tapped states ``[rows, Q, T*H]`` at their positions."""
        row = torch.arange(len(positions), device=positions.device)[:, None]
        new = self._drafter.context_kv(taps, positions)
        for (keys, values), (key, value) in zip(self._layers, new, strict=True):
            keys[row, :, positions] = key.transpose(1, 2).to(keys.dtype)
            values[row, :, positions] = value.transpose(1, 2).to(values.dtype)

    def draft(self, target: Target, anchors: Tensor, lengths: Tensor) -> Tensor:
        """Run a block behind each row's context.

        Args:
            target: Embeds the block.
            anchors: ``[rows]``, the last committed token of each row.
            lengths: ``[rows]``, tokens with context K/V; the anchor's index.

        Returns:
            ``[rows, B-1, H]``, final hidden states of slots 1 .. B-1, for the target's head.
        """
        config = self._drafter.config
        size = config.block_size
        slots = torch.arange(size, device=anchors.device)
        tokens = torch.full((len(anchors), size), config.mask_token_id, device=anchors.device)
        tokens[:, 0] = anchors
        positions = lengths[:, None] + slots
        limit = int(lengths.max())
        keys = torch.arange(limit, device=anchors.device)
        there = (keys < lengths[:, None])[:, None, None].expand(-1, 1, size, -1)
        own = there.new_ones(len(anchors), 1, size, size)
        masks: dict[int, Mask] = {}
        for window in set(self._drafter.windows):
            mask = torch.cat([there, own], -1)
            if window >= 0:  # a sliding layer: windowed, and causal in the block as well
                index = torch.cat([keys.expand(len(anchors), -1), positions], -1)
                distance = positions[:, None, :, None] - index[:, None, None]
                mask = mask & (distance >= 0) & (distance <= window)
            masks[window] = mask
        context = [(keys[:, :, :limit], values[:, :, :limit]) for keys, values in self._layers]
        return self._drafter.draft(target.embed(tokens), positions, context, masks)[:, 1:]


@torch.no_grad()
def decode(
    target: Target,
    drafter: Drafter,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
) -> list[Decoded]:
    """Answer prompts side by side with speculative decoding.

    A drafted token is accepted if it is the one that the target draws at its place, which is
    lossless at every temperature.

    Args:
        target: Tapped as the drafter wants, loaded with its own attention.
        drafter: On the same device.
        prompts: Token ids.
        max_new_tokens: Tokens after which an answer is cut.
        stop_ids: Tokens that end an answer.
        temperature: 0 for greedy.

    Returns:
        An answer for each prompt.
    """
    device, size = target.device, drafter.config.block_size
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    room = int(lengths.max()) + max_new_tokens + size
    cache, context, last = _read_prompts(target, drafter, prompts, room)
    anchors = sample(last @ target.head.T, temperature)

    answers = [Decoded([token], [], []) for token in anchors.tolist()]
    going = [answer.ids[0] not in stop_ids and max_new_tokens > 1 for answer in answers]
    while any(going):
        drafts = drafter.logits(context.draft(target, anchors, lengths), target.head).argmax(-1)
        positions = lengths[:, None] + torch.arange(size, device=device)
        mask = cache.extend(positions, min(room, int(lengths.max()) + size))
        states = target.read(
            torch.cat([anchors[:, None], drafts], 1),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        chosen = sample(states.final @ target.head.T, temperature)
        accepted = (drafts == chosen[:, :-1]).long().cumprod(-1).sum(-1)
        # States of rejected tokens are written too: they lie behind `lengths`, where nothing
        # looks, until a later block overwrites them.
        context.append(states.taps, positions)
        lines = zip(answers, chosen.tolist(), drafts.tolist(), accepted.tolist(), strict=True)
        for row, (answer, own, block, count) in enumerate(lines):
            if going[row]:
                new = [*block[:count], own[count]]
                going[row] = answer.add(block, new, max_new_tokens, stop_ids)
        moving = torch.tensor(going, device=device)
        anchors = torch.where(moving, chosen.gather(1, accepted[:, None])[:, 0], anchors)
        lengths = torch.where(moving, lengths + accepted + 1, lengths)
    return answers


def _read_prompts(
    target: Target, drafter: Drafter, prompts: list[list[int]], room: int
) -> tuple[SlotCache, ContextCache, Tensor]:
    """The caches of target and drafter behind the prompts, and the states ``[rows, H]`` there."""
    rows = torch.arange(len(prompts), device=target.device)
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    cache = SlotCache(len(prompts), room, target.config.num_hidden_layers)
    cache.fill(rows)
    every = torch.arange(ids.shape[1], device=target.device).expand(len(prompts), -1)
    states = target.read(
        ids.to(target.device), position_ids=every, past_key_values=cache, use_cache=True
    )
    context = ContextCache(drafter, len(prompts), room, states.taps)
    context.append(states.taps, every)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=target.device)
    return cache, context, states.final[rows, ends]
