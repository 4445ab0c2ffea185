import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dflare.adaptive import PLAIN, CostTable, StepTime, chain, save_step_times

WIDTHS = (1, 2, 4, 8)
ARMS = [chain(width) for width in WIDTHS]


def steps(seconds, batches=(1, 2, 4, 8, 16)):
    return [StepTime(n, chain(w), seconds(n, w)) for n in batches for w in WIDTHS]


def linear(batch, width):
    return 10e-3 + 1e-3 * batch * width


def test_measured_cells_are_returned_and_others_interpolated():
    table = CostTable(ARMS, steps(linear))
    for batch in (1, 3, 8, 12, 32):
        expected = [linear(batch, w) for w in WIDTHS]
        assert table.seconds(batch) == pytest.approx(expected)


def test_a_width_without_measurements_lies_between_its_neighbours():
    table = CostTable(ARMS, [s for s in steps(linear) if s.arm.nodes != 4])
    assert table.seconds(4) == pytest.approx([linear(4, w) for w in WIDTHS])


def test_repeats_count_by_their_median():
    repeats = [*steps(linear), *steps(linear), *steps(lambda n, w: 1.0)]
    assert CostTable(ARMS, repeats).seconds(2) == pytest.approx([linear(2, w) for w in WIDTHS])


def test_a_stalled_step_teaches_next_to_nothing():
    table = CostTable(ARMS, steps(linear))
    for _ in range(50):
        table.observe(4, chain(2), [linear(4, 2)])
    before = table.seconds(4)
    table.observe(4, chain(2), [50 * linear(4, 2)])
    assert table.seconds(4) == pytest.approx(before, rel=0.05)


def test_a_stall_in_the_first_step_of_a_width_is_undone_by_the_next_ones():
    table = CostTable(ARMS, steps(linear))
    for _ in range(20):
        table.observe(4, chain(1), [linear(4, 1)])
    table.observe(4, chain(8), [5 * linear(4, 8)])
    table.observe(4, chain(1), [linear(4, 1)])
    table.observe(4, chain(8), [linear(4, 8)])
    assert table.seconds(4) == pytest.approx([linear(4, w) for w in WIDTHS], rel=0.1)


def test_a_lasting_slowdown_reaches_the_widths_that_are_not_in_use():
    table = CostTable(ARMS, steps(linear))
    rng = np.random.default_rng(0)
    for step in range(300):
        slowdown = 2 if step >= 100 else 1
        table.observe(4, chain(2), [slowdown * linear(4, 2) * rng.lognormal(0, 0.05)])
    slow = table.seconds(4) / [linear(4, w) for w in WIDTHS]
    assert slow[1] == pytest.approx(2, rel=0.05)
    assert slow == pytest.approx(2, rel=0.25)


def test_other_work_is_not_charged_to_the_width_that_it_met():
    table = CostTable(ARMS, steps(linear))
    rng = np.random.default_rng(0)
    for i in range(400):
        width, slow = (1, 1.5) if 200 <= i < 240 else (WIDTHS[i // 4 % 2], 1)
        table.observe(4, chain(width), [slow * linear(4, width) * rng.lognormal(0, 0.05)])
    plain, wider = table.seconds(4)[:2]
    assert wider / plain == pytest.approx(linear(4, 2) / linear(4, 1), rel=0.05)


def test_several_steps_at_once_teach_what_they_teach_one_by_one():
    at_once, one_by_one = (CostTable(ARMS, steps(linear)) for _ in range(2))
    for _ in range(10):
        at_once.observe(4, chain(1), [1.04 * linear(4, 1)] * 8)
        for _ in range(8):
            one_by_one.observe(4, chain(1), [1.04 * linear(4, 1)])
    assert at_once.seconds(4)[0] == pytest.approx(1.04 * linear(4, 1), rel=0.01)
    assert at_once.seconds(4) == pytest.approx(one_by_one.seconds(4), rel=0.02)


def test_a_width_that_is_dear_at_one_batch_size_is_suspected_at_the_others():
    table = CostTable(ARMS, steps(linear))
    for i in range(300):
        width = WIDTHS[i // 4 % 2]
        table.observe(4, chain(width), [linear(4, width) * (1.2 if width == 2 else 1)])
    ratio = table.seconds(16)[1] / table.seconds(16)[0] / (linear(16, 2) / linear(16, 1))
    assert 1.05 < ratio < 1.2


def test_a_cell_that_was_measured_wrong_is_corrected_alone():
    wrong = [s._replace(seconds=1.4 * s.seconds) if s[:2] == (4, 4) else s for s in steps(linear)]
    table = CostTable(ARMS, wrong)
    rng = np.random.default_rng(0)
    for i in range(300):
        width = WIDTHS[i % 4]
        table.observe(4, chain(width), [linear(4, width) * rng.lognormal(0, 0.03)])
    assert table.seconds(4) == pytest.approx([linear(4, w) for w in WIDTHS], rel=0.04)


def test_doubt_shrinks_where_widths_were_served_side_by_side():
    table = CostTable(ARMS, steps(linear))
    for _ in range(50):
        table.observe(4, chain(2), [linear(4, 2)])
    doubt = table.doubt(4, against=1)
    assert doubt[1] == 1
    # However long a width is served alone: against it the others are as unknown as at first.
    assert (doubt[[0, 2, 3]] < 0.8).all()
    for i in range(200):
        width = WIDTHS[i // 5 % 2]
        table.observe(4, chain(width), [linear(4, width)])
    doubt = table.doubt(4, against=1)
    assert doubt[0] > 0.92
    assert (doubt[[2, 3]] < 0.85).all()


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.tuples(st.integers(1, 64), st.integers(1, 16)),
        st.floats(1e-4, 1.0),
        min_size=1,
        max_size=30,
    ),
    st.lists(
        st.tuples(st.integers(1, 100), st.sampled_from(WIDTHS), st.floats(1e-5, 10.0)), max_size=60
    ),
)
def test_predictions_stay_positive_and_monotone(cells, served):
    table = CostTable(ARMS, (StepTime(n, chain(w), s) for (n, w), s in cells.items()))
    for batch, width, seconds in served:
        table.observe(batch, chain(width), [seconds])
    grid = np.array([table.seconds(batch) for batch in range(1, 100, 3)])
    slack = 1e-9 * grid.max()
    assert (grid > 0).all()
    assert (np.diff(grid, axis=0) >= -slack).all()
    assert (np.diff(grid, axis=1) >= -slack).all()
    assert (table.doubt(5, against=2) <= 1).all()


@pytest.mark.parametrize("bad", [[], [StepTime(1, PLAIN, 0.0)], [StepTime(0, PLAIN, 1.0)]])
def test_useless_measurements_are_refused(bad):
    with pytest.raises(ValueError, match=r"measured step|batch, nodes and seconds"):
        CostTable(ARMS, bad)


def test_a_saved_table_reads_back(tmp_path):
    path = tmp_path / "steps.json"
    save_step_times(path, steps(linear), about="two cores")
    table = CostTable.load(path, ARMS)
    assert table.seconds(3) == pytest.approx(CostTable(ARMS, steps(linear)).seconds(3))


def test_the_table_fits_on_a_line():
    arms = [chain(1), chain(4)]
    table = CostTable(arms, [StepTime(n, a, 0.001 * n * a.nodes) for n in (1, 2) for a in arms])
    assert (
        table.describe()
        == "batch 1: plain 1 1.00, chain 4 4.00; batch 2: plain 1 2.00, chain 4 8.00"
    )


def test_larger_batches_than_measured_have_cells_of_their_own():
    table = CostTable(ARMS, steps(linear), largest=64)
    assert table.seconds(64) == pytest.approx([linear(64, w) for w in WIDTHS])
    for _ in range(300):
        table.observe(16, chain(2), [linear(16, 2)])
        table.observe(64, chain(2), [1.5 * linear(64, 2)])
    assert table.seconds(16)[1] == pytest.approx(linear(16, 2), rel=0.1)
    assert table.seconds(64)[1] == pytest.approx(1.5 * linear(64, 2), rel=0.1)
