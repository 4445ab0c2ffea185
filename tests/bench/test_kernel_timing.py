"""Timing on a GPU, with as much of torch.cuda as it needs played by a clock."""

import contextlib

import device
import measure
import pytest
import torch
from measure import Arm, time_on_gpu

LAUNCH_US = 8.0


class PretendDevice:
    """Events, graphs and a spinning kernel on one stream, and a host that runs ahead of it.

    Both have a clock. Queueing work costs the host LAUNCH_US; the device starts it when it is
    queued and all before it is done.
    """

    def __init__(self):
        self.host = self.device = 0.0
        self.capturing = None
        self.ended = []  # pools that allocation was told to leave
        self.lost = self.capture_broken = False

    def launch(self, us):
        if self.capturing is not None:
            self.capturing.us += us
            return
        self.host += LAUNCH_US
        self.device = max(self.device, self.host) + us

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.host = max(self.host, self.device)

    def install(self, monkeypatch):
        pretend = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                pretend.launch(0.0)
                self.at = pretend.device

            def query(self):
                return self.at <= pretend.host

            def synchronize(self):
                pretend.synchronize()

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            us = 0.0

            def replay(self):
                pretend.launch(self.us)

            def reset(self):
                self.us = None

        @contextlib.contextmanager
        def graph(captured, pool):
            assert pool in pretend.pools
            pretend.capturing, pretend.stream = captured, "capture"
            try:
                yield
            finally:
                pretend.capturing = None
                if not pretend.capture_broken:
                    pretend.stream = "default"

        def new_pool():
            pretend.pools.append(len(pretend.pools))
            return pretend.pools[-1]

        def end_allocate(_, pool):
            if not pretend.capture_broken:
                raise RuntimeError("not currently recording to mempool_id")
            pretend.ended.append(pool)

        self.pools, self.stream, self.spun = [], "default", []
        cuda = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": new_pool,
            "synchronize": self.synchronize,
            "is_initialized": lambda: True,
            "empty_cache": lambda: None,
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "current_device": lambda: 0,
            "_sleep": lambda cycles: (self.spun.append(cycles), self.launch(cycles / 1e3)),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: None, raising=False)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host / 1e6)
        measure.cycles_per_us.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    pretend = PretendDevice()
    pretend.install(monkeypatch)
    yield pretend
    measure.cycles_per_us.cache_clear()


def test_launches_are_no_part_of_the_time_of_a_graph(gpu):
    arms = [Arm("a", lambda i: gpu.launch(3.0)), Arm("b", lambda i: gpu.launch(30.0))]
    time_on_gpu(arms, sets=4, rounds=5)
    assert [arm.us for arm in arms] == [pytest.approx([3.0] * 5), pytest.approx([30.0] * 5)]
    assert all(arm.graph for arm in arms)


def test_an_arm_that_cannot_be_captured_is_timed_with_its_launches(gpu):
    arm = Arm("a", lambda i: gpu.launch(3.0), capturable=False)
    time_on_gpu([arm], sets=4, rounds=3)
    assert not arm.graph
    assert min(arm.us) >= LAUNCH_US


def test_graphs_last_long_enough_unless_that_takes_too_many_passes():
    assert measure.passes_for(400.0) == 3
    assert measure.passes_for(5000.0) == 1
    assert measure.passes_for(0.5) == measure.MOST_PASSES


def test_spinning_gets_longer_until_the_host_is_in_time(gpu):
    replay = measure.Replay(lambda: gpu.launch(10.0), calls=1, spin_us=5.0)
    assert measure.time_replay(replay) == pytest.approx(10.0)
    assert replay.spin_us > 5.0


def failing_when(gpu, moment):
    """An arm that fails when it is first called, while it is captured, or when it is replayed."""

    def run(i):
        if moment == "warm-up" or (moment == "capture" and gpu.capturing is not None):
            raise torch.OutOfMemoryError("out of memory")
        gpu.launch(2.0)

    return Arm("bad", run)


@pytest.mark.parametrize("moment", ["warm-up", "capture"])
def test_an_arm_that_fails_is_dropped_and_the_others_go_on(gpu, moment, capsys):
    bad, good = failing_when(gpu, moment), Arm("good", lambda i: gpu.launch(3.0))
    time_on_gpu([bad, good], sets=2, rounds=3)
    assert bad.failure == "OutOfMemoryError: out of memory" and not bad.us
    assert good.us == pytest.approx([3.0] * 3) and good.graph
    assert "bad left out" in capsys.readouterr().err


def test_after_a_broken_capture_stream_and_pool_are_put_right(gpu):
    gpu.capture_broken = True
    bad = failing_when(gpu, "capture")
    with pytest.raises(torch.OutOfMemoryError):
        measure.prepare(bad, 2, torch.cuda.graph_pool_handle())
    assert gpu.stream == "default" and gpu.ended == [0]


def test_a_replay_that_fails_ends_its_arm_alone(gpu, monkeypatch):
    bad, good = Arm("bad", lambda i: gpu.launch(2.0)), Arm("good", lambda i: gpu.launch(3.0))
    replays = []
    event = torch.cuda.Event

    class FailsLater(event):
        def record(self):
            replays.append(self)
            if len(replays) == 12:
                raise RuntimeError("launch failed")
            super().record()

    monkeypatch.setattr(torch.cuda, "Event", FailsLater)
    time_on_gpu([bad, good], sets=2, rounds=6)
    assert sorted(bool(arm.failure) for arm in (bad, good)) == [False, True]
    assert sorted(len(arm.us) for arm in (bad, good)) == [1, 6]


def test_a_lost_device_stops_everything(gpu):
    def crash(i):
        gpu.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(measure.DeviceLostError, match="after bad"):
        time_on_gpu([Arm("bad", crash), Arm("good", lambda i: None)], sets=1, rounds=1)


def test_arms_that_cannot_be_made_say_why_and_are_not_timed(gpu):
    def missing():
        raise ModuleNotFoundError("No module named 'sgl_kernel'")

    makers = {"fa3": missing, "good": lambda: Arm("good", lambda i: gpu.launch(3.0))}
    arms = measure.build(makers, ["fa3", "good"])
    time_on_gpu(arms, sets=1, rounds=2)
    assert arms[0].failure == "ModuleNotFoundError: No module named 'sgl_kernel'"
    assert not arms[0].us and len(arms[1].us) == 2


def test_peaks_on_a_gpu_are_the_best_of_device_times(gpu):
    durations = iter([50.0, 9.0, *[7.0] * 20])
    seconds = device.least_seconds("cuda", lambda: gpu.launch(next(durations)), calls=3)
    assert seconds == pytest.approx(7e-6)
    assert device.Peaks(read_gb_s=3200, copy_gb_s=3000, tflop_s=800).gb_s == 3200


@pytest.mark.parametrize(
    "bytes_per_set, cache, free, expected",
    [
        (74 << 20, 50 << 20, 80 << 30, 3),  # weights of Qwen3-4B's drafter, H100
        (4 << 20, 50 << 20, 80 << 30, 38),
        (16 << 10, 50 << 20, 80 << 30, 128),
        (160 << 20, 50 << 20, 80 << 30, 2),
        (34 << 30, 50 << 20, 80 << 30, 1),
        (74 << 20, 50 << 20, 200 << 20, 1),
    ],
)
def test_buffer_sets_exceed_the_cache_and_fit_in_memory(bytes_per_set, cache, free, expected):
    assert device.sets_needed(bytes_per_set, cache, free) == expected


def test_lines_name_the_gpu_with_and_without_nvidia_smi(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    answers = {"git": "abc123", "nvidia-smi": "NVIDIA H100 80GB, 580.1, 1980 MHz, 2619 MHz, 700 W"}
    monkeypatch.setattr(device, "output_of", lambda program, *_: answers[program])
    found = device.environment("cuda")
    assert (found["gpu"], found["driver"], found["power_limit"]) == (
        "NVIDIA H100 80GB",
        "580.1",
        "700 W",
    )
    answers["nvidia-smi"] = ""
    assert device.environment("cuda")["gpu"] == "NVIDIA H100"


def test_a_program_that_is_not_there_says_nothing():
    assert device.output_of("no-such-program") == device.output_of("false") == ""
