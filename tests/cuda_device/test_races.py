"""Two accesses that nothing orders are reported, in whatever order they happened to run."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

import cuda_device


def orders() -> list[AbstractContextManager[None]]:
    return [nullcontext(), cuda_device.lazy(1), cuda_device.lazy(2)]


def expect_race(work: Callable[[], None], first: str, second: str) -> None:
    """The report names both accesses with the lines of this file that enqueued them."""
    here = r"at cuda_device/test_races\.py:\d+ [^ ]*"
    for order in orders():
        with (
            order,
            pytest.raises(AssertionError, match=f"{first} {here}.* and {second} {here}"),
            cuda_device.no_races(),
        ):
            work()
            torch.cuda.synchronize()


def expect_none(work: Callable[[], None]) -> None:
    for order in orders():
        with order, cuda_device.no_races():
            work()
            torch.cuda.synchronize()


def on_two_streams(first: Callable, second: Callable, wait: bool) -> Callable[[], None]:
    def work() -> None:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
        x = torch.zeros(64, device="cuda")
        side.wait_stream(main)
        with torch.cuda.stream(side):
            first(x)
        if wait:
            main.wait_stream(side)
        second(x)
        main.wait_stream(side)

    return work


ADD, READ = (lambda x: x.add_(1)), (lambda x: x + 1)
CONFLICTS = [
    (ADD, READ, "write by aten::add_", "read by aten::add"),
    (READ, ADD, "read by aten::add", "write by aten::add_"),
    (ADD, ADD, "write by aten::add_", "write by aten::add_"),
    (ADD, lambda x: x[3:5].clone(), "write by aten::add_", "read by copy"),
    (ADD, lambda x: x.copy_(torch.ones(64)), "write by aten::add_", "write by copy to device"),
]


@pytest.mark.parametrize(("first", "second", "says", "then"), CONFLICTS)
def test_a_missing_wait_between_streams(first, second, says: str, then: str) -> None:
    expect_race(on_two_streams(first, second, wait=False), says, then)
    expect_none(on_two_streams(first, second, wait=True))


def test_reads_and_disjoint_writes_need_no_order() -> None:
    expect_none(on_two_streams(READ, READ, wait=False))
    halves = on_two_streams(lambda x: x[:32].add_(1), lambda x: x[32:].add_(1), wait=False)
    expect_none(halves)
    columns = on_two_streams(
        lambda x: x.view(8, 8)[:, :3].add_(1), lambda x: x.view(8, 8)[:, 3:].add_(1), wait=False
    )
    expect_none(columns)


def test_an_event_orders_what_came_before_its_record_alone() -> None:
    def work(late: bool) -> None:
        side, event = torch.cuda.Stream(), torch.cuda.Event()
        x, y = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
            event.record()
            y.add_(1)
        event.wait()
        (y if late else x).mul_(2)
        torch.cuda.current_stream().wait_stream(side)

    expect_none(lambda: work(late=False))
    expect_race(lambda: work(late=True), "write by aten::add_", "write by aten::mul_")


def test_what_the_host_waited_for_is_ordered_before_what_it_enqueues_next() -> None:
    def work() -> None:
        side, x = torch.cuda.Stream(), torch.zeros(4, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.add_(1)
        side.synchronize()
        x.mul_(2)

    expect_none(work)


def test_memory_that_is_freed_while_another_stream_uses_it() -> None:
    def work(record: bool) -> None:
        side, x = torch.cuda.Stream(), torch.zeros(1024, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.sin_()
        if record:
            x.record_stream(side)
        del x
        torch.ones(1024, device="cuda")
        torch.cuda.current_stream().wait_stream(side)

    expect_none(lambda: work(record=True))
    expect_race(lambda: work(record=False), "write by aten::sin_", "write by aten::fill_")


# ---------------------------------------------------------------- graphs


def graph_of(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def branches(x: torch.Tensor, join: bool) -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        x.add_(1)
    if join:
        main.wait_stream(side)
    x.mul_(2)
    main.wait_stream(side)


def test_branches_of_a_graph() -> None:
    x = torch.zeros(4, device="cuda")
    expect_none(graph_of(lambda: branches(x, join=True)).replay)
    replay = graph_of(lambda: branches(x, join=False)).replay
    expect_race(replay, "write by aten::add_", "write by aten::mul_")


def test_a_graph_and_what_stands_beside_it() -> None:
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    graph = graph_of(lambda: x.add_(1))
    torch.cuda.synchronize()

    def work(wait: bool) -> None:
        graph.replay()
        if wait:
            side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2)
        torch.cuda.current_stream().wait_stream(side)

    expect_none(lambda: work(wait=True))
    expect_race(lambda: work(wait=False), "write by aten::add_", "write by aten::mul_")


def test_a_graph_that_outlives_memory_which_it_borrows() -> None:
    class Owner:
        x = torch.zeros(256, device="cuda")

    graph = graph_of(lambda: Owner.x.add_(1))
    expect_none(graph.replay)
    inside = graph_of(lambda: (Owner.x + 1).mul_(2))  # its own pool's, freed in the capture
    expect_none(inside.replay)
    Owner.x = Owner.x.clone()
    for again in (graph, inside):
        with pytest.raises(AssertionError, match="freed since its capture"), cuda_device.no_races():
            again.replay()


def test_replays_on_one_stream_are_ordered() -> None:
    x = torch.zeros(4, device="cuda")
    graph = graph_of(lambda: x.add_(1))

    def work() -> None:
        for _ in range(3):
            graph.replay()
            x.mul_(2)

    expect_none(work)


# ---------------------------------------------------------------- the host and pinned memory


def staging(then: Callable[[torch.Tensor], object], to_host: bool, wait: bool) -> None:
    host = torch.zeros(1000, pin_memory=True)
    x = torch.ones(1000, device="cuda")
    if to_host:
        host.copy_(x, non_blocking=True)
    else:
        x.copy_(host, non_blocking=True)
    if wait:
        torch.cuda.current_stream().synchronize()
    then(host)


@pytest.mark.parametrize(
    ("access", "to_host", "says", "then"),
    [
        (lambda host: host.tolist(), True, "write by copy to host", "read by the host"),
        (lambda host: host.numpy().sum(), True, "write by copy to host", "read by the host"),
        (lambda host: host.fill_(2), False, "read by copy to device", "write by the host"),
    ],
)
def test_the_host_must_wait_for_copies(access, to_host: bool, says: str, then: str) -> None:
    expect_race(lambda: staging(access, to_host, wait=False), says, then)
    expect_none(lambda: staging(access, to_host, wait=True))


def test_the_host_may_read_what_a_copy_reads() -> None:
    expect_none(lambda: staging(lambda host: host.tolist(), to_host=False, wait=False))


def test_reports_name_the_line_of_each_access() -> None:
    def work() -> None:
        staging(lambda host: host.tolist(), to_host=True, wait=False)

    with pytest.raises(AssertionError) as error, cuda_device.no_races():
        work()
    lines = re.findall(r"test_races\.py:(\d+)", str(error.value))
    source = open(__file__).read().splitlines()  # noqa: SIM115
    quoted = " ".join(source[int(line) - 1] for line in lines)
    assert "host.copy_(x, non_blocking=True)" in quoted
    assert "host.tolist()" in quoted
