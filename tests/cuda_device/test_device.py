"""PyTorch alone on the test device: what is CUDA's behaviour is seen, what is missing is named."""

import os

import pytest
import torch

import cuda_device
from cuda_device.children import in_child

SEEDS = range(30)


def capture(function) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


# ---------------------------------------------------------------- operators


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_operators_compute_what_they_do_on_the_cpu(seed: int | None) -> None:
    def compute(where: str) -> list[torch.Tensor]:
        x = torch.arange(24.0, device=where).view(4, 6)
        out = torch.empty(0, device=where)
        torch.add(x, 1, out=out)
        x[1:3, 2] = -1
        x.index_put_((torch.tensor([0], device=where), torch.tensor([1], device=where)), out[3, 3])
        top = torch.topk(x @ x.T, 2)
        mask = x > 5
        return [out, x, top.values, top.indices, x[mask], torch.nonzero(mask), x.sum(0).cumsum(0)]

    expected = compute("cpu")
    if seed is None:
        computed = compute("cuda")
    else:
        with cuda_device.lazy(seed):
            computed = compute("cuda")
    for a, b in zip(computed, expected, strict=True):
        assert a.is_cuda
        assert torch.equal(a.cpu(), b)


def test_gradients_flow() -> None:
    layer = torch.nn.Linear(8, 8, device="cuda")
    layer(torch.ones(3, 8, device="cuda")).sum().backward()
    assert torch.equal(layer.weight.grad.cpu(), torch.full((8, 8), 3.0))


def test_a_kernel_without_stand_in_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="stderr names it"):
        torch.cuda._sleep(1)
    assert "has no stand-in" in capfd.readouterr().err


# ---------------------------------------------------------------- waits of the host


def test_waits_are_counted_where_they_happen() -> None:
    x = torch.ones(4, device="cuda")
    with cuda_device.count_waits() as waits:
        x.sum().item()
        x[x > 0]
        x[torch.tensor([1, 2], device="cuda", dtype=torch.long)]
        torch.empty(4, pin_memory=True).copy_(x, non_blocking=True)
    here = "test_waits_are_counted_where_they_happen"
    assert {operation for operation, _ in waits} >= {"aten::_local_scalar_dense", "aten::index"}
    assert all(here in site for _, site in waits)
    assert waits.total() == 3  # the third is the copy of [1, 2] from pageable memory


# ---------------------------------------------------------------- streams and events


def missing_wait(seed: int, wait: bool) -> list[float]:
    """What a second stream reads while the first one writes."""
    with cuda_device.lazy(seed):
        side, x = torch.cuda.Stream(), torch.zeros(2, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        x.fill_(7)
        if wait:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        torch.cuda.current_stream().wait_stream(side)
        return y.tolist()


def test_a_missing_wait_between_streams_shows_in_some_order() -> None:
    assert {tuple(missing_wait(seed, wait=False)) for seed in SEEDS} == {(1.0, 1.0), (8.0, 8.0)}
    assert all(missing_wait(seed, wait=True) == [8.0, 8.0] for seed in SEEDS)


def test_an_event_stands_for_its_last_record_before_the_wait() -> None:
    for seed in SEEDS:
        with cuda_device.lazy(seed):
            first, second = torch.cuda.Stream(), torch.cuda.Stream()
            event, x = torch.cuda.Event(), torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                event.record()
                x.fill_(1)
                event.record()
            with torch.cuda.stream(second):
                event.wait()
                y = x + 1
            event.record(second)
            event.synchronize()
            assert event.query()
            assert y.tolist() == [2.0]


def test_a_pinned_buffer_overwritten_before_its_copy_shows() -> None:
    seen = set()
    for seed in SEEDS:
        with cuda_device.lazy(seed):
            host, x = torch.ones(1, pin_memory=True), torch.zeros(1, device="cuda")
            x.copy_(host, non_blocking=True)
            host.fill_(2)
            seen.add(x.item())
    assert 2.0 in seen


def test_pageable_memory_is_staged_before_a_copy_returns() -> None:
    for seed in SEEDS:
        with cuda_device.lazy(seed):
            host, x = torch.ones(1), torch.zeros(1, device="cuda")
            x.copy_(host, non_blocking=True)
            host.fill_(2)
            assert x.item() == 1


def freed_while_used(seed: int, record: bool) -> list[float]:
    with cuda_device.lazy(seed):
        side = torch.cuda.Stream()
        x = torch.full((1024,), 3.0, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        if record:
            x.record_stream(side)
        del x
        torch.zeros(1024, device="cuda")  # takes the memory, if it is free
        side.synchronize()
        return y[:2].tolist()


def test_memory_freed_while_another_stream_reads_it_shows() -> None:
    assert (1.0, 1.0) in {tuple(freed_while_used(seed, record=False)) for seed in SEEDS}
    assert all(freed_while_used(seed, record=True) == [4.0, 4.0] for seed in SEEDS)


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_a_graph_replays_on_new_inputs(seed: int | None) -> None:
    x, weight = torch.zeros(4, 8, device="cuda"), torch.randn(8, 3, device="cuda")
    outputs: list[torch.Tensor] = []
    graph = capture(lambda: outputs.append(torch.relu(x @ weight).argmax(-1)))
    for _ in range(3):
        given = torch.randn(4, 8)
        with cuda_device.lazy(seed) if seed else torch.no_grad():
            x.copy_(given)
            graph.replay()
            assert outputs[0].tolist() == torch.relu(given @ weight.cpu()).argmax(-1).tolist()


def test_branches_of_a_graph_run_in_any_order_that_its_edges_allow() -> None:
    x = torch.zeros(1, device="cuda")
    seen = set()

    def branches() -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2)
        x.add_(1)
        torch.cuda.current_stream().wait_stream(side)

    graph = capture(branches)
    for seed in SEEDS:
        with cuda_device.lazy(seed):
            x.fill_(1)
            graph.replay()
            seen.add(x.item())
    assert seen == {3.0, 4.0}


def test_a_stream_waits_for_an_external_event_inside_a_graph() -> None:
    """The graph records it in the middle; who waits for it sees what ran before, at each replay."""
    x, seen = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    event, other = torch.cuda.Event(external=True), torch.cuda.Stream()

    def body() -> None:
        x.add_(1)
        event.record()

    graph = capture(body)
    for seed in SEEDS:
        x.zero_()
        torch.cuda.synchronize()
        with cuda_device.lazy(seed):
            for replays in (1, 2):
                graph.replay()
                with torch.cuda.stream(other):
                    event.wait()
                    seen.copy_(x)
                other.synchronize()
                assert seen.item() == replays


def test_a_graph_keeps_addresses_and_its_pool_reuses_memory() -> None:
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    x = torch.zeros(1 << 20, device="cuda")
    with torch.cuda.graph(first):
        a = x + 1
    address = a.data_ptr()
    del a
    with torch.cuda.graph(second, pool=first.pool()):
        b = x + 2
    assert b.data_ptr() == address
    second.replay()
    assert b[0].item() == 2
    first.replay()
    assert b[0].item() == 1


def recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("a value that the host needs", lambda x: x.sum().item()),
        ("a synchronization", lambda x: torch.cuda.synchronize()),
        ("an event that the host waits for", lambda x: recorded_event().synchronize()),
        ("a copy to the host", lambda x: x.cpu()),
        ("a copy from pageable memory", lambda x: x.copy_(torch.ones(1))),
        ("a mask whose size the host needs", lambda x: x[x > 0]),
    ],
)
def test_a_capture_refuses(name: str, forbidden) -> None:
    x = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        forbidden(x)
    graph = capture(lambda: x.add_(1))  # the next one is not disturbed
    graph.replay()
    assert x.item() == 1


def test_a_capture_refuses_a_stream_that_does_not_come_back(
    capfd: pytest.CaptureFixture[str],
) -> None:
    x, side = torch.zeros(1, device="cuda"), torch.cuda.Stream()
    with (
        pytest.raises(RuntimeError, match="unjoined"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2)
    assert "aten::mul_, enqueued at cuda_device/test_device.py" in capfd.readouterr().err


# ---------------------------------------------------------------- failures


def test_work_that_fails_later_says_where_it_was_enqueued() -> None:
    def fail() -> None:
        with cuda_device.lazy(1):
            x = torch.zeros(2, device="cuda")
            y = x[torch.tensor([5], device="cuda")]
            for _ in range(2):  # the device stays lost
                with pytest.raises(RuntimeError) as error:
                    y.tolist()
                assert "aten::index.Tensor failed" in str(error.value) or (
                    "aten::index failed" in str(error.value)
                )
                assert "test_device.py" in str(error.value)
                assert "out of bounds" in str(error.value)
            os._exit(0)

    in_child(fail)


def test_an_error_of_a_call_that_runs_at_once_is_raised_there() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.ones(2, 3, device="cuda") @ torch.ones(2, 3, device="cuda")
    assert torch.ones(1, device="cuda").item() == 1
