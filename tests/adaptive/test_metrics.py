import os
import subprocess
import sys
import textwrap
import time

import prometheus_client
import pytest

from dflare.adaptive import SpecMetrics, chain

LABELS = {"model_name": "target", "tp_rank": "0"}


@pytest.fixture
def value(monkeypatch):
    """Reads one metric of a fresh registry."""
    registry = prometheus_client.CollectorRegistry()
    for kind in ("Counter", "Gauge"):
        original = getattr(prometheus_client, kind)
        monkeypatch.setattr(
            prometheus_client,
            kind,
            lambda *args, original=original, **kwargs: original(*args, registry=registry, **kwargs),
        )
    return lambda name, **labels: registry.get_sample_value(f"dflare_{name}", LABELS | labels)


def publish_after_a_second(metrics, accept_rates, monkeypatch):
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + 1.5)
    return metrics.publish(lambda: accept_rates)


def test_steps_are_counted_and_averaged(value, monkeypatch):
    metrics = SpecMetrics(LABELS)
    metrics.record(chain(1), [1, 1], predicted=0.01, actual=0.012)
    metrics.record(chain(4), [3, 2], exploring=True, predicted=0.02, actual=0.022)
    metrics.record(chain(4), [4])
    line = publish_after_a_second(metrics, [0.8, 0.6, 0.5], monkeypatch)
    assert line == (
        "verify width 2.80, accept length 2.20, step 17.00 ms (predicted 15.00), "
        "acceptance by position 1.00 0.67 0.50"
    )
    assert value("verify_width") == pytest.approx(14 / 5)
    assert value("accept_length") == pytest.approx(11 / 5)
    assert value("verify_steps_total", width="4") == 2
    assert value("exploring_steps_total") == 1
    assert value("request_steps_total") == 5
    assert value("verified_tokens_total") == 14
    assert value("committed_tokens_total") == 11
    assert value("step_seconds_actual") == pytest.approx(0.017)
    assert value("accept_rate_position", position="3") == 0.5


def test_positions_are_counted_without_a_policy(value, monkeypatch):
    """Of a block of w, w - 1 tokens are drafted; behind a rejected one none is reached."""
    metrics = SpecMetrics(LABELS)
    for commits in ([4, 1], [2], [3, 3, 1]):
        metrics.record(chain(4), commits)
    metrics.record(chain(2), [2])
    metrics.record(chain(1), [1, 1])
    line = publish_after_a_second(metrics, (), monkeypatch)
    assert line.endswith(", acceptance by position 0.71 0.75 0.33")
    counts = {
        name: [value(f"drafts_{name}_total", position=str(i)) for i in (1, 2, 3)]
        for name in ("reached", "accepted")
    }
    assert counts == {"reached": [7, 4, 3], "accepted": [5, 3, 1]}
    assert value("drafts_reached_total", position="4") is None
    assert value("accept_rate_position", position="1") is None, "that is the policy's estimate"


def test_plain_steps_say_nothing_about_positions(value, monkeypatch):
    metrics = SpecMetrics(LABELS)
    metrics.record(chain(1), [1, 1])
    line = publish_after_a_second(metrics, (), monkeypatch)
    assert line == "verify width 1.00, accept length 1.00"
    assert value("drafts_reached_total", position="1") is None


def test_counters_go_on_and_gauges_start_over(value, monkeypatch):
    metrics = SpecMetrics(LABELS)
    metrics.record(chain(2), [2])
    publish_after_a_second(metrics, [0.9], monkeypatch)
    metrics.record(chain(1), [1])
    publish_after_a_second(metrics, [0.9], monkeypatch)
    assert value("verify_width") == 1
    assert value("committed_tokens_total") == 3


def test_without_labels_there_is_a_line_for_the_log_and_nothing_else(value, monkeypatch):
    metrics = SpecMetrics(None)
    metrics.record(chain(2), [2, 1])
    line = publish_after_a_second(metrics, [0.9], monkeypatch)
    assert line == "verify width 2.00, accept length 1.50, acceptance by position 0.50"
    assert value("committed_tokens_total") is None


def test_nothing_is_written_before_the_interval_is_over(value):
    metrics = SpecMetrics(LABELS)
    metrics.record(chain(2), [2])
    assert metrics.publish(lambda: [0.9]) is None
    assert value("committed_tokens_total") == 0


def test_an_idle_server_has_counted_everything_and_writes_no_more_lines_for_it(value, monkeypatch):
    metrics = SpecMetrics(LABELS)
    for tokens in (2, 1):
        metrics.record(chain(2), [tokens])
        assert metrics.publish(lambda: [0.9], idle=True) is None
    assert value("committed_tokens_total") == 3
    metrics.record(chain(4), [4])
    line = publish_after_a_second(metrics, [0.9], monkeypatch)
    assert line == "verify width 4.00, accept length 4.00, acceptance by position 1.00 1.00 1.00"
    assert value("committed_tokens_total") == 7
    metrics.record(chain(1), [1])
    assert metrics.publish(lambda: [0.9], idle=True) is None


def test_another_process_collects_what_the_scheduler_wrote(tmp_path):
    """As under SGLang: one process counts, the HTTP server's collects from the shared folder."""
    script = textwrap.dedent(
        """
        import time
        from dflare.adaptive import SpecMetrics, chain
        metrics = SpecMetrics({"model_name": "target"})
        metrics.record(chain(2), [2, 1])
        time.sleep(1.1)
        assert metrics.publish(lambda: [0.5])
        """
    )
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    from prometheus_client import CollectorRegistry, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=str(tmp_path))
    labels = {"model_name": "target"}
    assert registry.get_sample_value("dflare_committed_tokens_total", labels) == 3
    assert registry.get_sample_value("dflare_accept_length", labels) == 1.5
