"""What `make demo` runs: the demo pair over HTTP, with and without speculation."""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.table import Table

from dflare.apps.launch import QUESTIONS_FILE, pair_args
from dflare.apps.server_process import ServerProcess
from dflare.demo import demo_draft, demo_target


@dataclass(frozen=True)
class Answer:
    """One chat answer: its text, tokens, seconds, and SGLang's speculation figures, if any."""

    text: str
    tokens: int
    seconds: float
    verify_steps: int


def run_demo(prompts: int, max_tokens: int) -> bool:
    """Ask the questions of both servers and print answers and a table.

    Returns:
        Whether all answers were identical.
    """
    console = Console()
    with console.status("making the demo target (once)"):
        target = str(demo_target())
    lines = Path(__file__).with_name(QUESTIONS_FILE).read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines[:prompts]]
    arms = {"without": [], "with DFLARE": pair_args(str(demo_draft()))}
    answers = {
        name: _ask_server(
            console, name, ["--model-path", target, *arguments], questions, max_tokens
        )
        for name, arguments in arms.items()
    }
    _print_answers(console, questions, answers["with DFLARE"])
    return _print_table(console, answers)


def _ask_server(
    console: Console, name: str, arguments: list[str], questions: list[str], max_tokens: int
) -> list[Answer]:
    log = Path(tempfile.gettempdir()) / f"dflare-demo-{name.split()[-1].lower()}.log"
    start = time.monotonic()
    with ServerProcess(arguments, log) as server:
        with console.status("") as status:

            def tick() -> None:
                seconds = time.monotonic() - start
                status.update(f"starting the server {name}: {seconds:.0f} s (log: {log})")

            server.wait_until_healthy(tick)
        console.print(f"server {name} ready after {time.monotonic() - start:.0f} s")
        _chat(server.url, "Hello!", 8)
        answers = []
        for number, question in enumerate(questions, start=1):
            with console.status(f"question {number} of {len(questions)}"):
                answers.append(_chat(server.url, question, max_tokens))
    return answers


def _chat(url: str, question: str, max_tokens: int) -> Answer:
    body: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "return_meta_info": True,
    }
    start = time.perf_counter()
    response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
    seconds = time.perf_counter() - start
    response.raise_for_status()
    content = response.json()
    choice = content["choices"][0]
    steps = (choice.get("meta_info") or {}).get("spec_verify_ct", 0)
    return Answer(
        choice["message"]["content"], content["usage"]["completion_tokens"], seconds, steps
    )


def _print_answers(console: Console, questions: list[str], answers: list[Answer]) -> None:
    for question, answer in zip(questions, answers, strict=True):
        console.print(f"\n[bold]{question}[/bold]")
        console.print(answer.text, markup=False)


def _print_table(console: Console, answers: dict[str, list[Answer]]) -> bool:
    alone, dflare = answers["without"], answers["with DFLARE"]
    same = sum(a.text == b.text for a, b in zip(alone, dflare, strict=True))
    steps = sum(answer.verify_steps for answer in dflare)
    # The first token of an answer comes from prefill, the others from verify steps.
    verified = sum(answer.tokens - 1 for answer in dflare)
    speed = {
        name: sum(a.tokens for a in arm) / sum(a.seconds for a in arm)
        for name, arm in answers.items()
    }
    table = Table(title="SmolLM2-135M-Instruct on this machine, one request at a time")
    table.add_column("")
    table.add_column("without", justify="right")
    table.add_column("with DFLARE", justify="right")
    table.add_row("tokens per second", *(f"{speed[name]:.1f}" for name in answers))
    table.add_row("tokens a step (accept length)", "1.00", f"{verified / max(1, steps):.2f}")
    table.add_row("speed-up", "1.00x", f"{speed['with DFLARE'] / speed['without']:.2f}x")
    table.add_row("identical outputs", "", f"{same} of {len(alone)}")
    console.print(table)
    return same == len(alone)
