"""D-PACE and decay weights against hand-computed cases and a slow, obvious loss."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dflare.training.loss.block_loss import block_loss
from dflare.training.loss.objective import Objective, decay_weights, dpace_weights


def test_dpace_of_three_slots_by_hand():
    # qs = (1 - .5) q + .5 = .75, .6, .9; P = .75, .45, .405
    q = torch.tensor([0.5, 0.2, 0.8])
    weights = dpace_weights(q, torch.ones(3, dtype=torch.bool), alpha=0.5)
    expected = torch.tensor([0.75 + 0.45 + 0.405, 0.45 + 0.405, 0.405])
    torch.testing.assert_close(weights, expected)


def test_dpace_counts_a_masked_slot_as_certain_and_worthless():
    # Slot 2 is masked: qs = .75, 1, .9; P = .75, -, .675; its own weight is 0.
    q = torch.tensor([0.5, 0.2, 0.8])
    weights = dpace_weights(q, torch.tensor([True, False, True]), alpha=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.75 + 0.675, 0.0, 0.675]))


def test_dpace_of_one_slot_is_its_smoothed_probability():
    weights = dpace_weights(torch.tensor([0.25]), torch.tensor([True]), alpha=0.4)
    torch.testing.assert_close(weights, torch.tensor([0.6 * 0.25 + 0.4]))


def test_dpace_of_certain_slots_counts_the_slots_left():
    weights = dpace_weights(torch.ones(15), torch.ones(15, dtype=torch.bool), alpha=0.5)
    torch.testing.assert_close(weights, torch.arange(15.0, 0.0, -1.0))


def test_dpace_of_hopeless_slots_halves_from_slot_to_slot():
    weights = dpace_weights(torch.zeros(15), torch.ones(15, dtype=torch.bool), alpha=0.5)
    halving = 0.5 ** torch.arange(15.0)  # 2^(1-j), short by the tail that the block cuts off
    torch.testing.assert_close(weights, halving - 2.0**-15)


def test_dpace_without_supervised_slots_is_zero():
    weights = dpace_weights(torch.rand(2, 7), torch.zeros(2, 7, dtype=torch.bool), alpha=0.5)
    assert not weights.any()


def test_decay_by_hand():
    weights = decay_weights(torch.tensor([True, True, False, True]), gamma=7.0)
    expected = torch.tensor([1.0, math.exp(-1 / 7), 0.0, math.exp(-3 / 7)])
    torch.testing.assert_close(weights, expected)


def test_gamma_grows_linearly():
    objective = Objective(name="decay", gamma=4.5, gamma_end=10.5)
    assert [objective.gamma_at(p) for p in (0.0, 0.5, 1.0)] == [4.5, 7.5, 10.5]
    assert Objective(name="decay", gamma=7.0).gamma_at(0.9) == 7.0


@pytest.mark.parametrize("name", ["dpace", "decay"])
def test_slots_that_extend_a_block_count_three_times(name):
    """A block of 3, slots 0 to 2, becomes one of 6."""
    q, supervised = torch.rand(2, 5), torch.tensor([[True] * 5, [True] * 4 + [False]])
    plain = Objective(name=name).weights(q, supervised, 7.0)
    extended = Objective(name=name, extends=3).weights(q, supervised, 7.0)
    torch.testing.assert_close(extended, plain * torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0]))


@pytest.mark.parametrize(
    "bad", [{"name": "ce"}, {"alpha": 1.5}, {"gamma": 0.0}, {"gamma_end": -1.0}, {"soft_labels": 2}]
)
def test_a_bad_objective_is_refused_by_name(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Objective(**bad)


def slow_loss(hidden, head, labels, supervised, objective, gamma, normaliser, teacher):
    """The definition, slot by slot, in Python; autograd gives the gradient."""
    total = 0.0 * hidden.sum()  # has a gradient even if nothing is supervised
    for n in range(hidden.shape[0]):
        log_q = torch.log_softmax(hidden[n] @ head.T, -1)
        slots = range(hidden.shape[1])
        q = [log_q[j, labels[n, j]].exp().item() for j in slots]
        for j in slots:
            if not supervised[n, j]:
                continue
            if objective.name == "decay":
                weight = math.exp(-j / gamma)
            else:
                weight = 0.0
                for i in range(j, len(q)):
                    if supervised[n, i]:
                        weight += math.prod(
                            (1 - objective.alpha) * q[k] + objective.alpha
                            for k in range(i + 1)
                            if supervised[n, k]
                        )
            label = torch.nn.functional.one_hot(labels[n, j], head.shape[0]).to(hidden.dtype)
            if teacher is not None:
                soft = torch.softmax(teacher[n, j] @ head.T, -1)
                label = (1 - objective.soft_labels) * label + objective.soft_labels * soft
            total = total - weight * (label * log_q[j]).sum()
    return total / normaliser


@settings(deadline=None, max_examples=25)
@given(
    blocks=st.integers(1, 5),
    slots=st.integers(1, 6),
    chunk_blocks=st.integers(1, 4),
    name=st.sampled_from(["dpace", "decay"]),
    soft=st.sampled_from([None, 0.0, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_loss_and_gradient_equal_those_of_the_definition(
    blocks, slots, chunk_blocks, name, soft, seed
):
    torch.manual_seed(seed)
    hidden = torch.randn(blocks, slots, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, dtype=torch.float64)
    labels = torch.randint(11, (blocks, slots))
    supervised = torch.rand(blocks, slots) < 0.8
    teacher = None if soft is None else torch.randn(blocks, slots, 5, dtype=torch.float64)
    objective = Objective(name=name, soft_labels=soft or 0.0)
    arguments = (head, labels, supervised, objective)

    expected = slow_loss(hidden, *arguments, 7.0, 13.0, teacher)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    result = block_loss(
        hidden,
        *arguments,
        torch.tensor(7.0),
        torch.tensor(13.0),
        teacher=teacher,
        chunk_blocks=chunk_blocks,
    )
    (gradient,) = torch.autograd.grad(result.loss, hidden)

    torch.testing.assert_close(result.loss.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    hits = ((hidden @ head.T).argmax(-1) == labels) & supervised
    assert torch.equal(result.correct, hits)


def test_the_chunk_size_does_not_change_the_loss():
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 7, 16), torch.randn(50, 16)
    labels, supervised = torch.randint(50, (9, 7)), torch.rand(9, 7) < 0.9
    losses = [
        block_loss(
            hidden,
            head,
            labels,
            supervised,
            Objective(),
            torch.tensor(7.0),
            supervised.sum(),
            chunk_blocks=size,
        ).loss
        for size in (1, 4, 9)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


@pytest.mark.parametrize("name", ["dpace", "decay"])
def test_a_row_that_stands_for_three_tokens_counts_as_three(name):
    """As if each of them had a row: the gradient is the same."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True)
    head, teacher = torch.randn(6, 8, dtype=torch.float64), torch.randn(4, 3, 8).double()
    labels, supervised = torch.randint(5, (4, 3)), torch.ones(4, 3, dtype=torch.bool)
    objective = Objective(name=name, soft_labels=0.5)
    gradients = []
    log_weight = torch.tensor([0.0] * 5 + [math.log(3)])
    for rows, weight in ((head, log_weight), (torch.cat([head, head[5:], head[5:]]), None)):
        loss = block_loss(
            hidden,
            rows,
            labels,
            supervised,
            objective,
            torch.tensor(2.5),
            torch.tensor(12.0),
            teacher=teacher,
            log_weight=weight,
        ).loss
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)
