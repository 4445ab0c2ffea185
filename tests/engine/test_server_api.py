"""No request that the server's own OpenAPI description allows, or nearly allows, harms the server.

schemathesis draws requests to every path that a client's key opens: valid ones, and such that break
the description somewhere. `DFLARE_GENERATED` sets about how many the long run sends.
"""

import os
from collections import Counter

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from served import KEY, generate

pytestmark = pytest.mark.slow

_ANSWER_SECONDS = 60
_TEXT = [{"role": "user", "content": "word " * 300}]
# Status 500 in SGLang, and for streams 200 and no more; found by these tests.
_FOUND = (
    ("/parse_function_call", {"text": ""}),
    ("/parse_function_call", {"text": "", "tool_call_parser": "no such"}),
    ("/separate_reasoning", {"text": "", "reasoning_parser": ""}),
    ("/v1/detokenize", {"tokens": [-1]}),
    ("/encode", {"input_ids": []}),
    ("/encode", {"input_ids": [[]], "multi_item_delimiter_indices": []}),
    ("/vertex_generate", {"instances": [{}], "parameters": {"no such": 1}}),
    ("/separate_reasoning", {"text": "", "reasoning_parser": "no such"}),
    ("/api/chat", {"model": "", "messages": []}),
    ("/api/chat", {"model": "", "messages": _TEXT}),
    ("/api/chat", {"model": "", "messages": _TEXT, "stream": False}),
    ("/api/generate", {"model": "", "prompt": "word"}),
    ("/api/generate", {"model": "", "prompt": "word", "stream": False}),
)


@pytest.fixture(scope="module")
def server(random_server):
    random_server.expected = generate(random_server, 8).json()["output_ids"]
    return random_server


@pytest.fixture(scope="module")
def operations(server) -> list[schemathesis.APIOperation]:
    described = requests.get(f"{server.url}/openapi.json", headers=KEY, timeout=60).json()
    # Tags nest without end, which takes minutes to draw from; test_generated_requests.py has them.
    described["components"]["schemas"]["StructuralTag"] = {"type": "object"}
    schema = schemathesis.openapi.from_dict(described)
    return [operation.ok() for operation in schema.get_all_operations()]


def check(server, case, statuses: Counter) -> None:
    response = case.call(base_url=server.url, headers=KEY, timeout=_ANSWER_SECONDS)
    statuses[response.status_code] += 1
    sent = case.as_curl_command()
    assert response.status_code < 500, f"{sent}: {response.status_code}, {response.text}"
    answer = generate(server, 8)
    assert answer.json().get("output_ids") == server.expected, f"after {sent}: {answer.text}"


def send_to(server, operation, examples: int) -> Counter:
    """Statuses of so many requests; an administrator's operation is asked once."""
    statuses: Counter = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(*(operation.as_strategy(mode) for mode in GenerationMode)))
    def sent(case):
        if not statuses[401]:
            check(server, case, statuses)

    sent()
    print(operation.label, dict(statuses), flush=True)
    return statuses


def run(server, operations, examples: int) -> Counter:
    each = (send_to(server, operation, examples) for operation in operations)
    statuses = sum(each, Counter())
    print(f"generated requests: {statuses.total()}, {dict(statuses)}")
    return statuses


def test_a_few_of_every_kind(server, operations):
    statuses = run(server, operations, 3)
    assert statuses[200] > 10 and statuses[400] > 50 and statuses[401] > 30, statuses


@pytest.mark.parametrize(("path", "body"), _FOUND)
def test_a_wrong_request_is_the_clients_fault(server, path, body):
    refused = requests.post(f"{server.url}{path}", json=body, headers=KEY, timeout=60)
    assert refused.status_code == 400, refused.text


def test_a_wrong_section_of_loads_is_the_clients_fault(server):
    refused = requests.get(f"{server.url}/v1/loads?include=no", headers=KEY, timeout=60)
    assert refused.status_code == 400, refused.text


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thousands(server, operations):
    examples = int(os.environ.get("DFLARE_GENERATED", "5000")) // 40
    statuses = run(server, operations, examples)
    assert statuses[200] > examples and statuses[400] > 10 * examples, statuses
