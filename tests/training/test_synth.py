"""Data generation: what is written, resumed, left out, and who is asked."""

import json
import lzma
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch
from checkpoints import EOS, TURN, byte_tokenizer, write_random_target
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dflare.cli.app import app
from dflare.errors import DFlareError
from dflare.training.data.corpus import load_corpus
from dflare.training.data.files import read_header, read_records
from dflare.training.data.generate import Sampling
from dflare.training.data.prompts import encode, key, read_prompts
from dflare.training.data.server_generator import ServerGenerator, own_server
from dflare.training.data.target import compute_dtype
from dflare.training.errors import ConfigError, DataError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_random_target(tmp_path_factory.mktemp("target"), num_layers=2)


def synth(target, output, *arguments):
    common = ["synth", str(output), "--target", str(target), "--max-new-tokens", "8"]
    common += ["--max-length", "64", "--rows", "4", "--device", "cpu"]
    result = CliRunner().invoke(app, [*common, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return read_header(output), *read_records(output)


def test_answers_follow_their_prompts_and_alone_are_supervised(target, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello there\nwhat is up\n\nhello  THERE\n")
    header, *records = synth(target, tmp_path / "data.xz", "--prompts", str(prompts))
    assert header["vocab_size"] == 512 and header["generation"]["temperature"] == 0.0
    made_by = header["generation"]["generator"], header["generation"]["dtype"]
    assert made_by == ("transformers", str(compute_dtype(CPU)).removeprefix("torch."))
    assert len(records) == 2  # the third differs from the first in case and spacing alone
    tokenizer = AutoTokenizer.from_pretrained(target)
    expected = {tuple(encode(tokenizer, messages)) for messages in read_prompts(prompts)[:2]}
    for record in records:
        ((start, end),) = record.answers
        assert tuple(record.ids[:start]) in expected
        assert end == len(record.ids) and 1 <= end - start <= 8
        assert record.cut == (record.ids[-1] != EOS)


@pytest.mark.parametrize("bf16, amx", [(False, False), (True, False), (False, True)])
def test_answers_are_computed_in_bfloat16_where_the_processor_multiplies_it(
    target, tmp_path, monkeypatch, bf16, amx
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    header = synth(target, tmp_path / "data.xz", "--prompts", str(prompts))[0]
    assert header["generation"]["dtype"] == ("bfloat16" if bf16 or amx else "float32")


def test_an_interrupted_file_is_continued_without_repeating(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"question number {n}"}) for n in range(6)]
    prompts.write_text("\n".join(lines[:3]) + "\n")
    output = tmp_path / "data.xz"
    synth(target, output, "--prompts", str(prompts))
    before = [list(record.ids) for record in read_records(output)]
    output.write_bytes(output.read_bytes() + lzma.compress(b"cut in the middle")[:20])
    prompts.write_text("\n".join(lines) + "\n")
    records = synth(target, output, "--prompts", str(prompts))[1:]
    assert [list(record.ids) for record in records[:3]] == before
    assert len({record.key for record in records}) == len(records) == 6


def test_other_settings_do_not_mix_into_a_file(target, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    synth(target, tmp_path / "data.xz", "--prompts", str(prompts))
    with pytest.raises(ConfigError, match="other settings"):
        synth(target, tmp_path / "data.xz", "--prompts", str(prompts), "--temperature", "1")


def test_the_target_writes_its_own_prompts_after_openers(target, tmp_path):
    openers = tmp_path / "openers.txt"
    openers.write_text("\nwhat is\n")
    arguments = ["--self-written", "3", "--openers", str(openers), "--prompt-min-p", "0"]
    arguments += ["--rows", "16", "--max-length", "256", "--prompt-temperature", "4"]
    header, *records = synth(target, tmp_path / "data.xz", *arguments)
    lines = (tmp_path / "data.prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[1:]]
    assert len(set(prompts)) == len(prompts) == len(records) == 3
    assert any(prompt.startswith("what is") for prompt in prompts)
    assert header["generation"]["openers"] == ["", "what is"]
    assert all(record.ids[0] == TURN for record in records)
    # The same command again has nothing left to do; asked for more, it draws other prompts.
    assert len(synth(target, tmp_path / "data.xz", *arguments)) == 4
    arguments[1] = "4"
    assert len(synth(target, tmp_path / "data.xz", *arguments)) == 5


def test_a_target_that_repeats_itself_is_given_up(target, tmp_path, monkeypatch):
    monkeypatch.setattr("dflare.training.data.synth._USELESS", 30)
    arguments = ["--self-written", "5", "--prompt-temperature", "0", "--rows", "16"]
    with pytest.raises(DataError, match="--prompt-temperature"):
        synth(target, tmp_path / "data.xz", *arguments)


def test_a_conversation_ends_where_no_room_is_left(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"turns": ["hello there", "x" * 60, "bye"]}) + "\n")
    _, record = synth(target, tmp_path / "data.xz", "--prompts", str(prompts))
    assert len(record.answers) == 1 and len(record.ids) <= 64


def test_excluded_prompts_stay_out(target, tmp_path):
    (tmp_path / "all.txt").write_text("one fish\ntwo fish\n")
    (tmp_path / "bench.txt").write_text("Two  Fish\n")
    arguments = ["--prompts", str(tmp_path / "all.txt"), "--exclude", str(tmp_path / "bench.txt")]
    assert len(synth(target, tmp_path / "data.xz", *arguments)) == 2


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"--device": "gpu"}, ConfigError, "device is 'gpu', expected cpu, cuda or auto"),
        ({"--device": "cuda"}, ConfigError, "PyTorch sees no GPU"),
        ({"--target": "./no-such-target"}, DFlareError, "no-such-target: no such folder"),
        ({"--generator": "vllm"}, ConfigError, "expected sglang, transformers or auto"),
        ({"--server": "http://127.0.0.1:9"}, DFlareError, "no SGLang server answers"),
    ],
)
def test_what_cannot_generate_is_refused(target, tmp_path, monkeypatch, changes, error, hint):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "p.txt").write_text("one fish\n")
    output = tmp_path / changes.pop("output", "data.xz")
    options = {"--target": str(target), "--prompts": str(tmp_path / "p.txt"), **changes}
    arguments = [part for option in options.items() for part in option]
    with pytest.raises(error, match=hint):
        CliRunner().invoke(app, ["synth", str(output), *arguments], catch_exceptions=False)
    assert not output.exists()


def test_a_target_without_a_tokenizer_is_named(target, tmp_path):
    shutil.copytree(target, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(ConfigError, match=r"the tokenizer of target .*bare"):
        synth(tmp_path / "bare", tmp_path / "data.xz", "--self-written", "1")


def test_what_is_written_can_be_trained_on(target, tmp_path):
    (tmp_path / "p.txt").write_text("one fish\ntwo fish\n")
    synth(target, tmp_path / "data.xz", "--prompts", str(tmp_path / "p.txt"))
    corpus = load_corpus([tmp_path / "data.xz"], 512, 64)
    assert 1 <= len(corpus) <= 2


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "hi"},
        {"problem": "hi", "solution": "x"},  # MATH-500's
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]},
    ],
)
def test_prompts_come_in_the_usual_forms(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    assert read_prompts(tmp_path / "p.jsonl") == [[{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("line", "hint"), [({"foo": 1}, "messages"), ({"messages": []}, "no user turn")]
)
def test_a_prompt_that_is_none_is_named_with_its_line(tmp_path, line, hint):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=f"p.jsonl:2.*{hint}"):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_are_the_same_whatever_their_case_and_spacing():
    a, b = ([{"role": "user", "content": text}] for text in ("Hello  World", "hello world\n"))
    assert key(a) == key(b) != key([{"role": "system", "content": "hello world"}])


def test_a_base_model_gets_plain_text():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    ids = encode(tokenizer, [{"role": "user", "content": "abc"}])
    assert tokenizer.decode(ids) == "abc"


TOOL_TEMPLATE = (
    "{{ tools[0]['name'] }}|{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{% for c in m['tool_calls'] %}call {{ c['function']['name'] }}{% endfor %}|{% endfor %}"
    "assistant:{% if not enable_thinking %}<think></think>{% endif %}"
)
TOOL_ARGUMENTS = {"enable_thinking": False, "tools": [{"name": "weather"}]}
TOOL_TURNS = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "look",
        "tool_calls": [{"function": {"name": "weather"}}],
    },
    {"role": "tool", "content": "dry"},
    {"role": "tool", "content": "warm"},
]


def test_thinking_tools_and_reasoning_are_as_the_template_renders_them(target, tmp_path, url):
    """In what the target answers: a tool's result, not the turn that called it."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    shutil.copytree(target, tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": TOOL_TURNS}) + "\n")
    arguments = ["--prompts", str(prompts), "--max-length", "256", "--server", url]
    arguments += ["--template-arguments", json.dumps(TOOL_ARGUMENTS)]
    header, record = synth(tmp_path / "target", tmp_path / "data.xz", *arguments)
    ((start, _),) = record.answers
    assert tokenizer.decode(record.ids[:start]) == (
        "weather|user:rain?|assistant:<think>look</think>call weather|tool:dry|tool:warm|"
        "assistant:<think></think>"
    )
    assert json.loads(header["generation"]["template_arguments"]) == TOOL_ARGUMENTS


def test_prompts_that_differ_in_what_tools_were_called_are_two(tmp_path):
    call = TOOL_TURNS[1] | {"tool_calls": [{"function": {"name": "clock"}}]}
    other = [TOOL_TURNS[0], call, *TOOL_TURNS[2:]]
    lines = [json.dumps({"messages": messages}) for messages in (TOOL_TURNS, other)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    first, second = read_prompts(tmp_path / "p.jsonl")
    assert key(first) != key(second)


@pytest.mark.parametrize("given", ["[]", "{enable_thinking: false}"])
def test_template_arguments_that_are_no_json_object_are_refused(target, tmp_path, given):
    (tmp_path / "p.txt").write_text("hi\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--template-arguments", given]
    with pytest.raises(ConfigError, match=r"template arguments are .*expected a JSON object"):
        synth(target, tmp_path / "data.xz", *arguments)


def test_messages_that_a_template_refuses_are_shown():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(DataError, match=r'refuses .*"role": "user".*no tools here'):
        encode(tokenizer, TOOL_TURNS[:1])


class EchoServer(BaseHTTPRequestHandler):
    """Speaks the part of SGLang's native HTTP interface that is used; answers in reverse."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"dtype": "bfloat16"}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids, stop = body["input_ids"], body["sampling_params"]["stop_token_ids"][0]
        assert self.path == "/generate"
        end = {"type": "stop", "matched": stop} if ids[0] != 99 else {"type": "length"}
        answer = ids[::-1][: body["sampling_params"]["max_new_tokens"]]
        content = json.dumps({"output_ids": answer, "meta_info": {"finish_reason": end}}).encode()
        self.send_response(500 if ids[0] == 13 else 200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), EchoServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_answers_by_http(url):
    generator = ServerGenerator(url, 2, 10, Sampling(max_new_tokens=4, stop_ids=(7,)))
    answers = {a.prompt: a for a in generator.run([[1, 2, 3], [99, 5], [1] * 10])}
    assert sorted(answers) == [0, 1]  # the third leaves no room
    assert answers[0].ids == [3, 2, 1, 7] and answers[0].finish == "stop"
    assert answers[1].ids == [5, 99] and answers[1].finish == "length"
    assert generator.generated == 6


def test_a_server_that_fails_is_named(url):
    generator = ServerGenerator(url, 1, 10, Sampling(stop_ids=(7,)))
    with pytest.raises(DFlareError, match=r"127\.0\.0\.1.*500"):
        list(generator.run([[13, 1]]))


def test_data_from_a_server_says_so(target, tmp_path, url):
    (tmp_path / "p.txt").write_text("one fish\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--server", url]
    header, _ = synth(target, tmp_path / "data.xz", *arguments)
    made_by = header["generation"]["generator"], header["generation"]["dtype"]
    assert made_by == ("sglang", "bfloat16")


def test_several_user_turns_become_a_conversation(target, tmp_path, url):
    """Each answer follows what a server would be sent: all turns so far in the chat template."""
    lines = [{"turns": ["hello there", "and now?", "bye"]}, {"prompt": "only one"}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--prompts", str(prompts), "--max-length", "256", "--server", url]
    _, *records = synth(target, tmp_path / "data.xz", *arguments)
    tokenizer = AutoTokenizer.from_pretrained(target)
    by_turns = {len(record.answers): record for record in records}
    assert sorted(by_turns) == [1, 3]
    turns = []
    for text, (start, end) in zip(lines[0]["turns"], by_turns[3].answers, strict=True):
        turns.append({"role": "user", "content": text})
        assert list(by_turns[3].ids[:start]) == encode(tokenizer, turns)
        said = [int(token) for token in by_turns[3].ids[start:end] if token != EOS]
        turns.append({"role": "assistant", "content": tokenizer.decode(said)})
    _, *again = synth(target, tmp_path / "data.xz", *arguments)
    assert len(again) == 2


FAKE_SERVER = """
import http.server, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({pid!r}, "w").write(str(worker.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *arguments):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_of_our_own_ends_with_its_workers(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    code = FAKE_SERVER.format(pid=str(pid))
    command = (sys.executable, "-c", code)
    monkeypatch.setattr("dflare.apps.server_process.ServerProcess.COMMAND", command)
    with own_server("target", [], tmp_path / "log") as address:
        assert address.startswith("http://127.0.0.1:")
        worker = psutil.Process(int(pid.read_text()))
        assert worker.is_running()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone == [worker]


def test_a_server_that_does_not_start_is_described(tmp_path, monkeypatch):
    command = (sys.executable, "-c", "raise SystemExit('no such model')")
    monkeypatch.setattr("dflare.apps.server_process.ServerProcess.COMMAND", command)
    hint = r"(?s)no such model.*--generator transformers"
    with pytest.raises(DFlareError, match=hint), own_server("target", [], tmp_path / "log"):
        pass
