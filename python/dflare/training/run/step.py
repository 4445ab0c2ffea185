"""One training step's computation: target states, drafted blocks, their loss."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from dflare.checkpoint import DraftConfig
from dflare.training.data.batches import Batch
from dflare.training.data.tap_cache import TapCache
from dflare.training.data.target import Target, TargetOutput
from dflare.training.drafter.block_mask import dense_block_mask, flex_block_mask
from dflare.training.drafter.model import Mask
from dflare.training.loss.block_loss import BlockLoss, block_loss, chunk_loss
from dflare.training.loss.objective import Objective
from dflare.training.loss.vocabulary import LossHead


def draft_blocks(
    drafter: nn.Module,
    config: DraftConfig,
    target: Target,
    ids: Tensor,
    anchors: Tensor,
    taps: Tensor,
    make_mask: Callable[[Tensor, int, int, int], Mask] = dense_block_mask,
) -> Tensor:
    """Run many blocks of each sequence at once, each seeing the context before its anchor.

    Args:
        drafter: The module to call, wrapped or not.
        config: The drafter's.
        target: Whose embedding it shares.
        ids: ``[N, S]`` int64, the sequences.
        anchors: ``[N, A]`` int64, index of each block's slot 0.
        taps: ``[N, S, T*H]``, tapped states of the sequences.
        make_mask: Dense mask or flex attention's.

    Returns:
        Final hidden states ``[N, A, B, H]``.
    """
    size = config.block_size
    rows, blocks = anchors.shape
    tokens = torch.full((rows, blocks, size), config.mask_token_id, device=ids.device)
    tokens[:, :, 0] = ids.gather(1, anchors)
    positions = (anchors[:, :, None] + torch.arange(size, device=ids.device)).flatten(1)
    masks = {
        window: make_mask(anchors, taps.shape[1], size, window)
        for window in {config.window(d) for d in range(config.num_hidden_layers)}
    }
    hidden = drafter(taps, target.embed(tokens.flatten(1)), positions, masks)
    return hidden.view(rows, blocks, size, -1)


class BlockStep:
    """Computes the loss of batches of blocks.

    Args:
        target: Frozen, tapped as the drafter wants.
        config: The drafter's.
        objective: What is minimised.
        chunk_tokens: Slots whose logits exist at once.
        flex: Flex attention's mask instead of a dense one (compiled, on CUDA).
        cache: Keeps target states between epochs.
        run_chunk: The loss of a chunk, possibly compiled.
        tap_noise: Noise on the taps where it is asked for, as a share of each state's size.
    """

    def __init__(
        self,
        target: Target,
        config: DraftConfig,
        objective: Objective,
        chunk_tokens: int,
        flex: bool,
        cache: TapCache | None = None,
        run_chunk: Callable = chunk_loss,
        tap_noise: float = 0.0,
    ) -> None:
        self._tap_noise = tap_noise
        self.target, self.config, self.objective = target, config, objective
        self._chunk_blocks = max(1, chunk_tokens // (config.block_size - 1))
        self._cache, self._run_chunk = cache, run_chunk
        self._make_mask = flex_block_mask if flex else dense_block_mask

    def target_states(self, batch: Batch, sequences: np.ndarray) -> TargetOutput:
        """Read the target's states of a batch, from the cache where it has them."""
        if self._cache is None:
            return self.target.read(batch.ids)
        unknown = self._cache.unknown(sequences)
        if len(unknown):
            rows = torch.from_numpy(np.flatnonzero(np.isin(sequences, unknown)))
            output = self.target.read(batch.ids[rows.to(batch.ids.device)])
            self._cache.put(sequences[rows.numpy()], torch.cat([output.taps, output.final], -1))
        states = self._cache.get(sequences, batch.ids.shape[1])
        states = states.to(self.target.device)
        if not torch.is_autocast_enabled(states.device.type):  # which takes them as they are
            states = states.to(self.target.dtype)
        width = self.config.num_taps * self.config.hidden_size
        return TargetOutput(states[..., :width], states[..., width:])

    def _noisy(self, taps: Tensor, noise: torch.Generator) -> Tensor:
        """Disturb every tapped state by noise of ``tap_noise`` times its own root mean square."""
        states = taps.unflatten(-1, (self.config.num_taps, -1))
        size = states.float().square().mean(-1, keepdim=True).sqrt()
        drawn = torch.empty(states.shape, device=states.device).normal_(generator=noise)
        return (states + self._tap_noise * size * drawn).to(taps.dtype).flatten(-2)

    def loss(
        self,
        drafter: nn.Module,
        batch: Batch,
        sequences: np.ndarray,
        head: LossHead,
        gamma: Tensor,
        normaliser: Tensor,
        noise: torch.Generator | None = None,
    ) -> BlockLoss:
        """Loss of a batch.

        Args:
            drafter: The module to call, wrapped or not.
            batch: On the target's device.
            sequences: Its sequences' indices in the training corpus, for the cache.
            head: What the loss looks at of the target's head.
            gamma: Scalar, decay length.
            normaliser: Scalar, supervised slots of the whole step.
            noise: Where noise on the taps comes from; none for no noise.
        """
        with record_function("target"):
            states = self.target_states(batch, sequences)
            taps = states.taps if noise is None else self._noisy(states.taps, noise)
        with record_function("draft"):
            hidden = draft_blocks(
                drafter,
                self.config,
                self.target,
                batch.ids,
                batch.anchors,
                taps,
                self._make_mask,
            ).flatten(0, 1)
        labels, supervised = batch.labels.flatten(0, 1), batch.supervised.flatten(0, 1)
        if head.rows is not None:
            # A padded or unsupervised label may not be among the rows: any row will do for it.
            labels = torch.searchsorted(head.rows, labels).clamp_(max=len(head.rows) - 1)
        teacher = None
        if self.objective.soft_labels:
            # The state at n0 + j - 1 is the one from which the target predicts slot j.
            slots = torch.arange(self.config.block_size - 1, device=batch.ids.device)
            at = (batch.anchors[:, :, None] + slots).clamp_(max=batch.ids.shape[1] - 1)
            row = torch.arange(len(at), device=at.device)[:, None, None]
            teacher = states.final[row, at].flatten(0, 1)
        with record_function("loss"):
            return block_loss(
                hidden[:, 1:],
                head.weight,
                labels,
                supervised,
                self.objective,
                gamma,
                normaliser,
                teacher=teacher,
                log_weight=head.log_weight,
                chunk_blocks=self._chunk_blocks,
                run_chunk=self._run_chunk,
            )
