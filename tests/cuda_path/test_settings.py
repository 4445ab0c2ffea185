"""DFLARE on the CUDA device at other settings: page sizes, windows, measured widths, a backend."""

import pytest
from models import assert_greedy, greedy, prompts, write_pair
from reference_drafter import ReferencePair
from same_drafts import assert_same_drafts
from scheduler_process import running_scheduler
from test_same_tokens import check

pytestmark = pytest.mark.slow

FP8_TIE = 1.0  # of logits with a spread of about 4


@pytest.mark.parametrize("page", [16, pytest.param(64, marks=pytest.mark.long)])
def test_pages(pair, reference, page):
    with running_scheduler(*pair, widths=[3, 1, 1, 4], page_size=page) as scheduler:
        requests = greedy("page", prompts(5, 30, 90, seed=50), 20)
        check(scheduler.generate(requests), requests, reference)
        again = greedy("again", [requests[0]["ids"] + [7, 8]], 12)
        result = scheduler.generate(again)
        check(result, again, reference)
        assert result["answers"]["again-0"]["cached"] >= len(requests[0]["ids"]) // page * page


def test_retraction(pair, reference):
    """Five answers of 36 tokens do not fit into 160 slots; those taken back begin again.

    SGLang takes none back that ignore their end: it knows how long they get.
    """
    small = {"max_total_tokens": 160, "schedule_conservativeness": 0.01}
    with running_scheduler(*pair, widths=[3, 1, 4, 2], **small) as scheduler:
        requests = greedy("retract", prompts(5, 20, 30, seed=90), 36)
        for request in requests:
            request["sampling"] = request["sampling"] | {"ignore_eos": False}
        result = scheduler.generate(requests)
        # A token that comes with the prefill after a retraction was never drafted.
        check(result, requests, reference, mixed=True)
        assert sum(answer["retracted"] for answer in result["answers"].values())


@pytest.mark.long
def test_draft_window(pair, reference):
    with running_scheduler(*pair, widths=[4], speculative_draft_window_size=32) as scheduler:
        requests = greedy("window", prompts(3, 10, 90, seed=60), 24)
        check(scheduler.generate(requests), requests, reference, window=32)


def test_a_draft_vocabulary(tmp_path):
    """The draft graphs of every width end with the rows of 200 tokens."""
    pair = write_pair(tmp_path, draft_vocab_size=200)
    with running_scheduler(*pair, widths=[4, 2, 1, 3]) as scheduler:
        requests = greedy("vocabulary", prompts(3, 10, 60, seed=90), 16)
        check(scheduler.generate(requests), requests, ReferencePair(*pair))
        assert scheduler.call("report")["graph_launches"] > 0


def test_a_drafter_in_fp8(pair, reference):
    """Of a checkpoint in bfloat16, by SGLang's own layers; the target and its answers stay."""
    settings = {"widths": [4, 2], "speculative_draft_model_quantization": "fp8"}
    with running_scheduler(*pair, **settings) as scheduler:
        requests = greedy("fp8", prompts(2, 10, 60, seed=95), 16)
        result = scheduler.generate(requests)
        for request in requests:
            answer = result["answers"][request["rid"]]
            assert_greedy(reference, request["ids"], answer["ids"])
            # Drafts are the reference's up to the rounding of eight bits.
            assert_same_drafts(
                reference, request["ids"], answer["ids"], answer["proposals"], None, FP8_TIE
            )
        launches = scheduler.call("launches")
        assert launches["sgl_kernel::fp8_scaled_mm"]
        assert launches["jit::per_token_quant_fp8.per_token_quant_fp8"]


def test_a_batch_that_is_sampled_in_parts(dflare, reference):
    """Two requests at once, and one: beside free ones, greedy requests get the target's tokens."""
    before = dflare.call("sample_in_parts", part_bytes=2 * 4 * 4 * 512)  # two blocks, float32
    requests = greedy("part", prompts(5, 10, 60, seed=97), 16)
    free = {"temperature": 1.0, "top_p": 0.9, "top_k": -1}
    for name, more in (("free", {}), ("seeded", {"sampling_seed": 3})):
        (other,) = greedy(name, [[5, 6, 7]], 16)
        other["sampling"] |= free | more
        check(dflare.generate([other, *requests]), requests, reference, mixed=True)
        dflare.call("flush_cache")
    dflare.call("sample_in_parts", part_bytes=before)


@pytest.mark.long
def test_measured_widths(pair, reference):
    """The policy chooses: step times are measured at start, on the device."""
    with running_scheduler(*pair, widths='{"proposers": ["chain"]}') as scheduler:
        requests = greedy("policy", prompts(3, 10, 60, seed=70), 40)
        check(scheduler.generate(requests), requests, reference)


@pytest.mark.parametrize("page", [1, pytest.param(16, marks=pytest.mark.long)])
def test_flashinfer_drafts_the_same(pair, reference, page):
    """Captured, with SGLang's plan for graphs, at every width; and eagerly in a larger batch."""
    settings = {"speculative_draft_attention_backend": "flashinfer", "page_size": page}
    with running_scheduler(*pair, widths=[3, 1, 4, 2], **settings) as scheduler:
        requests = greedy("flashinfer", prompts(5, 10, 60, seed=85), 12)
        check(scheduler.generate(requests), requests, reference)
        assert scheduler.call("launches")["flashinfer::batch_prefill_paged"]


@pytest.mark.long
def test_triton_backend(pair, reference):
    with running_scheduler(*pair, widths=[3, 1, 4], attention_backend="triton") as scheduler:
        requests = greedy("triton", prompts(3, 10, 60, seed=80), 20)
        check(scheduler.generate(requests), requests, reference)
