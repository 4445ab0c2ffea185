"""A small sweep and the records of its cells, for the tests of the benchmark."""

from bench.serving import plan


def make_sweep(**changes):
    settings = {
        "model": "target",
        "draft": "draft",
        "arms": [
            {"name": "none", "kind": "none"},
            {"name": "width 4", "kind": "fixed"},
            {"name": "adaptive", "kind": "adaptive"},
            {"name": "ngram", "kind": "other"},
        ],
        "datasets": [{"name": "easy"}, {"name": "hard"}],
        "concurrency": [1, 8],
        "repeats": 2,
    }
    return plan.Sweep.model_validate(settings | changes)


def record(arm, concurrency=1, dataset="easy", repeat=0, rate=10.0, outputs=("a", "b"), errors=0):
    figures = {
        f"{name}_{p}_ms": 5.0
        for name in ("ttft", "tpot", "e2e_latency")
        for p in ("p50", "p90", "p99")
    }
    return figures | {
        "arm": arm,
        "dataset": dataset,
        "concurrency": concurrency,
        "repeat": repeat,
        "output_tok_s": rate,
        "accept_length": 1.5,
        "mean_width": None,
        "outputs": list(outputs),
        "errors": errors,
        "simulated": None,
        "made_with": {"device": "a machine", "revision": "abc"},
    }
