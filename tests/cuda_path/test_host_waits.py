"""A decode step of DFLARE makes the host wait nowhere but where SGLang's scheduler does.

Counted by call site, in steps of all widths, with overlap scheduling and graphs.
"""

import pytest
from models import GREEDY, prompts

pytestmark = pytest.mark.slow

# SGLang's scheduler takes the results of the step before.
_RESULTS = "batch_result_processor.py"
_WORKER = "forward_batch_generation"
# SGLang's workers wait here for the tokens that its grammars must have seen; ours call the same.
_GRAMMAR = "build_grammar_vocab_mask"
SAMPLINGS = {
    "greedy": {},
    "sampling": {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.2, "min_new_tokens": 12},
    "grammar": {"regex": "[a-z ]{40,60}", "ignore_eos": False},
}


@pytest.mark.parametrize("name", list(SAMPLINGS))
def test_decode_steps_add_no_wait(dflare, name):
    requests = [
        {
            "rid": f"{name}-{i}",
            "ids": ids,
            "sampling": GREEDY | {"max_new_tokens": 14} | SAMPLINGS[name],
        }
        for i, ids in enumerate(prompts(3, 5, 30, seed=9))
    ]
    if name == "sampling":
        # SGLang makes buffers for it at the first batch of a size.
        dflare.generate(requests)
    result = dflare.generate(requests, count_waits=True)
    steps = len(result["widths"])
    assert steps >= 8 and set(result["widths"]) == {1, 2, 3, 4}
    ours = {
        site: n
        for site, n in result["waits"].items()
        if any(_WORKER in c for c in site) and not any(_GRAMMAR in c for c in site[:4])
    }
    assert sum(ours.values()) == 0, "\n".join(f"{n} {site[:5]}" for site, n in ours.items())
    results = sum(n for site, n in result["waits"].items() if _RESULTS in site[1])
    assert results >= steps, "the device reports no waits at all"
