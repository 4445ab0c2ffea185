"""Two tensor-parallel ranks on the device: the same widths, graphs and tokens on both."""

import pytest
from models import assert_greedy, greedy, prompts
from scheduler_process import running_scheduler
from test_same_tokens import check

pytestmark = pytest.mark.slow


@pytest.mark.long  # but for the backend, what the test below shows as well
def test_two_ranks_agree(pair, reference):
    with running_scheduler(*pair, ranks=2, widths=[3, 1, 4, 2]) as scheduler:
        requests = greedy("rank", prompts(3, 10, 60, seed=120), 20)
        first, second = scheduler.all("generate", requests=requests)
        check(first, requests, reference)
        assert set(first["widths"]) == {1, 2, 3, 4}  # rank 0 chooses
        for rid, answer in first["answers"].items():
            assert second["answers"][rid]["ids"] == answer["ids"]
            assert second["answers"][rid]["proposals"] == answer["proposals"]
        reports = scheduler.all("report")
        for name in ("captures", "graph_launches"):
            assert reports[0][name] == reports[1][name], name


def test_two_ranks_grow_the_same_trees(pair, reference):
    """Each takes the best tokens of its part of the head, and of what the other says of its own."""
    script = [["tree", 4], 3, 1, ["tree", 3], ["lookup", 2]]
    with running_scheduler(*pair, ranks=2, widths=script, attention_backend="triton") as scheduler:
        requests = greedy("trees", [ids * 2 for ids in prompts(3, 10, 40, seed=121)], 24)
        first, second = scheduler.all("generate", requests=requests)
        for request in requests:
            assert_greedy(reference, request["ids"], first["answers"][request["rid"]]["ids"])
            for result in (first, second):
                assert len(result["answers"][request["rid"]]["ids"]) == 24
        assert first["answers"] == second["answers"]
        reports = scheduler.all("report")
        for name in ("captures", "graph_launches"):
            assert reports[0][name] == reports[1][name], name
