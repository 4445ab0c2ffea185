"""What the CUDA graphs of several widths take, by arithmetic and by what their builder keeps."""

from types import SimpleNamespace

import pytest
import torch

from dflare.engine import width_states
from dflare.engine.shared_taps import SharedTaps
from dflare.engine.width_states import (
    WidthStates,
    _Budget,
    batches_to_capture,
    check_nothing_is_shared,
    tensors_of,
)
from dflare.errors import UnsupportedError

pytestmark = pytest.mark.slow  # imports SGLang

QWEN3_8B_TOKEN = 9 * 4096 * 2  # taps x hidden size x bytes of bfloat16
WIDTHS = [1, 2, 3, 4, 6, 8, 12, 16]  # of a drafter of block 16
# SGLang's batch sizes for 48 requests (server_args, _generate_cuda_graph_bs)
BATCHES = [*range(1, 9), 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 36, 40, 44, 46, 48]


def graph_memory(
    token_bytes: int, batch_sizes: list[int], widths: list[int], *, shared: bool
) -> int:
    """Bytes of tapped states that the graphs of all widths keep.

    Args:
        token_bytes: T * H values of one token.
        batch_sizes: captured, for every width.
        widths: tokens a request.
        shared: whether they share one buffer.
    """
    tokens = [batch * width for batch in batch_sizes for width in widths]
    return token_bytes * (max(tokens) if shared else sum(tokens))


def test_taps_of_all_widths_take_at_most_what_dflash_takes():
    ours = graph_memory(QWEN3_8B_TOKEN, BATCHES, WIDTHS, shared=True)
    dflash = graph_memory(QWEN3_8B_TOKEN, BATCHES, [16], shared=False)
    pinned = graph_memory(QWEN3_8B_TOKEN, BATCHES, WIDTHS, shared=False)
    assert len(BATCHES) == 23 and pinned > 3 * dflash
    assert ours <= 1.2 * dflash
    assert ours == 48 * 16 * QWEN3_8B_TOKEN


def test_at_most_150_graphs_for_48_requests():
    graphs = 2 * len(BATCHES)  # the block: target and drafter
    for width in WIDTHS[:-1]:
        graphs += (1 + (width > 1)) * len(batches_to_capture(BATCHES, width))
    assert graphs <= 150


@pytest.mark.parametrize("width", [1, 8])
def test_every_batch_up_to_the_largest_still_has_a_graph(width):
    kept = batches_to_capture(BATCHES, width)
    assert kept[0] == 1 and kept[-1] == 48 and set(kept) <= set(BATCHES)
    assert batches_to_capture([3], width) == [3]


def test_all_graphs_leave_their_taps_in_one_place():
    taps = SharedTaps()
    outputs = []
    for tokens in (12, 12, 4, 12):  # the largest first, as SGLang captures
        out = SimpleNamespace(hidden_states=torch.full((tokens, 6), float(tokens)))
        taps(None, out, None, tokens)
        assert (out.hidden_states == tokens).all() and out.hidden_states.shape == (tokens, 6)
        outputs.append(out.hidden_states)
    assert len({states.data_ptr() for states in outputs}) == 1
    assert taps.nbytes == 12 * 6 * 4
    taps(None, SimpleNamespace(hidden_states=None), None, 3)


class Builder(WidthStates):
    """Builds nothing; every width takes what `sizes` says."""

    def __init__(self, free, sizes, widths):
        self.memory, self.sizes = free, sizes
        worker = SimpleNamespace(block_size=widths[-1], device="cuda")
        super().__init__(worker, widths)

    def _free_memory_gb(self):
        return self.memory

    def _attributes(self, width):
        self.memory -= self.sizes
        return []


@pytest.fixture
def no_buffers(monkeypatch):
    monkeypatch.setattr(width_states, "_sized_attributes", lambda *_: {})


def test_widths_without_memory_are_left_out_and_named(no_buffers, caplog):
    """11 GB free: 5 are for graphs, of 2 GB each."""
    built = Builder(11.0, 2.0, [1, 2, 4, 8, 16])
    assert built.widths == (1, 2, 16)
    assert built.graph_gb == 4.0
    assert "verify widths 4, 8, which are left out: 4.00 of 5.00 GB are spent" in caplog.text


def test_with_memory_for_all_nothing_is_said(no_buffers, caplog):
    assert Builder(80.0, 2.0, [1, 2, 4, 8, 16]).widths == (1, 2, 4, 8, 16)
    assert not caplog.records


def test_on_a_cpu_nothing_is_counted():
    assert _Budget(None).has_room()


def test_an_unknown_buffer_of_the_worker_is_refused():
    """A new SGLang's, which all widths would share."""
    worker = SimpleNamespace(_draft_block_ids_buf=None, kept=torch.ones(2), block_size=4)
    before = tensors_of(worker)
    worker._draft_block_ids_buf = torch.ones(4, 4)
    check_nothing_is_shared(before, worker)
    worker._new_buf = [torch.ones(4, 4), torch.ones(4, 4)]
    with pytest.raises(UnsupportedError, match="makes _new_buf in a decode step"):
        check_nothing_is_shared(before, worker)
