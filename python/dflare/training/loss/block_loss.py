"""Cross-entropy of blocks against a frozen head, in chunks.

Full-vocabulary logits never exist for more than a chunk of blocks. The head does not train and the
slot weights carry no gradient, so the gradient by the hidden states is known as soon as a chunk's
logits are: it is computed in the forward pass and the logits are dropped. That is one product with
the head for the loss and one for its gradient, and no recomputation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dflare.training.loss.objective import Objective


@dataclass(frozen=True)
class BlockLoss:
    """What a step wants to know about its blocks.

    Args:
        loss: Scalar float32 with a gradient by the hidden states.
        correct: ``[N, B-1]`` bool, the drafter's first choice is the label.
    """

    loss: Tensor
    correct: Tensor


def chunk_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    supervised: Tensor,
    teacher: Tensor | None,
    objective: Objective,
    gamma: Tensor,
    normaliser: Tensor,
    log_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient by ``hidden``, and hits of one chunk of blocks; see :func:`block_loss`."""
    logits = (hidden @ head.T).float()
    weighted = logits if log_weight is None else logits + log_weight
    log_probs = weighted.log_softmax(-1)
    of_label = log_probs.gather(-1, labels[..., None])[..., 0]
    weights = objective.weights(of_label.exp(), supervised, gamma) / normaliser
    hard = 1.0 if teacher is None else 1.0 - objective.soft_labels
    cross_entropy = -hard * of_label
    # d CE / d logits = drafter's distribution - label, whatever mixture the label is.
    gradient = log_probs.exp()
    gradient = gradient.scatter_add(
        -1, labels[..., None], torch.full_like(of_label, -hard)[..., None]
    )
    if teacher is not None:
        wanted = (teacher @ head.T).float()
        wanted = (wanted if log_weight is None else wanted + log_weight).softmax(-1)
        cross_entropy = cross_entropy - objective.soft_labels * (wanted * log_probs).sum(-1)
        gradient = gradient - objective.soft_labels * wanted
    gradient = (gradient * weights[..., None]).to(head.dtype)
    correct = (logits.argmax(-1) == labels) & supervised
    return (weights * cross_entropy).sum(), gradient @ head, correct


class _ChunkedBlockLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, chunk_blocks, run_chunk, labels, supervised, teacher):
        hidden = hidden.contiguous()  # or a product with the head is one of many small matrices
        loss = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        correct = torch.empty_like(supervised)
        for start in range(0, hidden.shape[0], chunk_blocks):
            part = slice(start, start + chunk_blocks)
            part_loss, gradient[part], correct[part] = run_chunk(
                hidden[part],
                labels[part],
                supervised[part],
                None if teacher is None else teacher[part],
            )
            loss += part_loss
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, grad_correct):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None, None


def block_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    supervised: Tensor,
    objective: Objective,
    gamma: Tensor,
    normaliser: Tensor,
    *,
    teacher: Tensor | None = None,
    log_weight: Tensor | None = None,
    chunk_blocks: int = 256,
    run_chunk: Callable = chunk_loss,
) -> BlockLoss:
    """Weighted cross-entropy L = sum_j m_j w_j CE_j / normaliser over N blocks.

    Args:
        hidden: ``[N, B-1, H]``, the drafter's final hidden states of slots 1 .. B-1.
        head: ``[V, H]``, rows of the target's head (all of them, or the reduced vocabulary's).
        labels: ``[N, B-1]`` int64, row of ``head`` that each slot should predict.
        supervised: ``[N, B-1]`` bool.
        objective: Gives the slot weights and the share of soft labels.
        gamma: Scalar, decay length now (``objective.gamma_at``); D-PACE does not read it.
        normaliser: Scalar, supervised slots of the whole step over all ranks and micro-batches.
        teacher: ``[N, B-1, H]``, the target's own final hidden states for the same slots, whose
            distribution over the rows of ``head`` makes the soft part of the label; without it
            the labels are hard.
        log_weight: ``[V']`` float32, log of the tokens that each row of ``head`` stands for
            (``LossHead``); none for one each.
        chunk_blocks: Blocks whose logits exist at once.
        run_chunk: ``chunk_loss`` or a compiled form of it.

    Returns:
        Loss and hits.
    """

    def run(hidden, labels, supervised, teacher):
        return run_chunk(
            hidden, head, labels, supervised, teacher, objective, gamma, normaliser, log_weight
        )

    loss, correct = _ChunkedBlockLoss.apply(hidden, chunk_blocks, run, labels, supervised, teacher)
    return BlockLoss(loss, correct)
