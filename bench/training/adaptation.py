"""Adapt the demo drafter to one domain from a server's own traffic, and measure what that gives.

    python -m bench.training.adaptation OUT

1. A server with `DFLARE_TRAFFIC` answers a stream of prompts that the drafter does not know.
2. `dflare train` goes on from the shipped drafter with that traffic and some of its old data.
3. The server runs again; `dflare swap` puts the new drafter in while requests run. The same prompts
   are asked before and after.
4. `dflare evaluate` compares both drafters on prompts of the domain that were never served before
   3., on the same questions about other tables and columns, and on the old prompts.

The same command goes on after an interruption, with the stage that is not done. In 3. the accept
length as served is that of the whole block as a chain (`DFLARE_ADAPTIVE=off`).
"""

import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import requests
import typer
from bench.serving.provenance import provenance

from dflare.apps.server_process import ServerProcess
from dflare.demo import demo_draft, demo_target
from dflare.training.data.files import read_records
from dflare.training.data.prompts import encode, read_prompts
from dflare.training.data.target import load_tokenizer
from dflare.training.data.templates import Templates, read_templates

ROOT = Path(__file__).parents[2]
DOMAIN = ROOT / "configs/adaptation/sql.yaml"
CORPUS = ROOT / "assets/demo-corpus"
REPLAYED = ("templates-1.xz", "templates-2.xz", "varied-2.xz")  # so that the old is not forgotten
OLD = {
    "questions": ROOT / "configs/demo/questions.txt",
    "easy": ROOT / "bench/serving/prompts/easy.jsonl",
    "hard": ROOT / "bench/serving/prompts/hard.jsonl",
}
STREAMED, MEASURED = 400, 40  # prompts
ASKED = 16  # of each set, of the server
STEPS, LEARNING_RATE = 240, 8e-4
DRAFTED = 8192  # tokens, as many as the shipped drafter drafts
TOKENS = 96  # of an answer
CONCURRENCY = 16


def draw_prompts(folder: Path) -> dict[str, Path]:
    """Write the domain's prompts, none of them twice: `stream`, `domain` and `new-names`."""
    templates = read_templates(DOMAIN)
    lists = templates.lists
    new = {"table": lists["new_table"], "column": lists["new_column"]}
    others = templates.model_copy(update={"lists": lists | new})
    drawn = distinct(templates, 1, STREAMED + MEASURED)
    sets = {
        "stream": drawn[:STREAMED],
        "domain": drawn[STREAMED:],
        "new-names": distinct(others, 2, MEASURED),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.txt" for name in sets}
    for name, prompts in sets.items():
        files[name].write_text("\n".join(prompts) + "\n")
    return files


def distinct(templates: Templates, seed: int, count: int) -> list[str]:
    """Draw so many different prompts."""
    prompts: dict[str, None] = {}
    for (message,) in templates.conversations(seed):
        prompts[message["content"]] = None
        if len(prompts) == count:
            break
    return list(prompts)


class Client:
    """Asks a server of the demo pair for greedy answers, several at once."""

    def __init__(self, url: str) -> None:
        self._url, self._tokenizer = url, load_tokenizer(str(demo_target()))

    def ask(self, messages: list[dict[str, str]]) -> tuple[int, int, str]:
        """An answer's tokens but for the first, which prefill gives, its verify steps, its text."""
        params = {"temperature": 0, "max_new_tokens": TOKENS}
        body = {"input_ids": encode(self._tokenizer, messages), "sampling_params": params}
        reply = requests.post(f"{self._url}/generate", json=body, timeout=600)
        reply.raise_for_status()
        answer = reply.json()
        info = answer["meta_info"]
        return info["completion_tokens"] - 1, info["spec_verify_ct"], answer["text"]

    def ask_all(self, file: Path, limit: int | None = None) -> list[tuple[int, int, str]]:
        """Answers to the prompts of a file, in their order."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self.ask, read_prompts(file)[:limit]))


@contextmanager
def server(out: Path, adaptive: str):
    """The demo pair with the shipped drafter, keeping its traffic; gives its client and address."""
    arguments = ["--model-path", str(demo_target()), "--draft", str(demo_draft())]
    arguments += ["--max-running-requests", str(CONCURRENCY), "--context-length", "1024"]
    environment = {"DFLARE_TRAFFIC": str(out / "traffic"), "DFLARE_ADAPTIVE": adaptive}
    with Serve(arguments, out / "server.log", environment) as process:
        process.wait_until_healthy()
        yield Client(process.url), process.url


class Serve(ServerProcess):
    """`dflare serve`."""

    COMMAND = (sys.executable, "-m", "dflare.cli", "serve")


def accept_length(answers: list[tuple[int, int, str]]) -> float:
    """Tokens a verify step."""
    return sum(tokens for tokens, _, _ in answers) / sum(steps for _, steps, _ in answers)


def dflare(*arguments: str | Path) -> str:
    """Run a command of the package; it is shown, and what it prints is given back."""
    command = [str(part) for part in arguments]
    print("$ dflare", *command, flush=True)
    run = subprocess.run(
        [sys.executable, "-m", "dflare.cli", *command],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(run.stdout, flush=True)
    if run.returncode:
        raise SystemExit(f"`dflare {command[0]}` ended with status {run.returncode}")
    return run.stdout


def stream(out: Path, prompts: dict[str, Path]) -> dict[str, Any]:
    """Serve the stream, and wait until it is on disk."""
    traffic = out / "traffic"
    with server(out, "on") as (client, _):
        started = time.monotonic()
        answers = client.ask_all(prompts["stream"])
        seconds = time.monotonic() - started
        while sum(len(list(read_records(file))) for file in traffic.glob("*.xz")) < STREAMED:
            time.sleep(1)
    return {
        "conversations": len(answers),
        "tokens": sum(tokens + 1 for tokens, _, _ in answers),
        "minutes": round(seconds / 60, 1),
    }


def train(out: Path) -> dict[str, Any]:
    """Train on the traffic and some of the old data, and choose the drafted tokens anew."""
    traffic = sorted((out / "traffic").glob("traffic-*.xz"))
    files = ", ".join(map(str, [*traffic, *(CORPUS / name for name in REPLAYED)]))
    trained = out / "train"
    with counting(out / "train-seconds.json") as seconds:
        dflare(
            "train",
            ROOT / "configs/demo/cpu-train.yaml",
            f"drafter.init={demo_draft()}",
            f"data.files=[{files}]",
            f"data.tap_cache={out / 'taps'}",
            f"optimizer.learning_rate={LEARNING_RATE}",
            f"run.steps={STEPS}",
            f"run.output={trained}",
            *(["--resume"] if (trained / "snapshot.pt").exists() else []),
        )
    every = [*traffic, *sorted(CORPUS.glob("*.xz"))]
    data = [part for file in every for part in ("--data", file)]
    dflare("draft-vocab", trained / "drafter", out / "drafter", *data, "--size", str(DRAFTED))
    minutes = {f"{clock}_minutes": round(spent / 60, 1) for clock, spent in seconds.items()}
    return {"steps": STEPS, "learning_rate": LEARNING_RATE, **minutes}


@contextmanager
def counting(file: Path):
    """Add to a file the seconds of child processes of a block: by the clock, and of all cores."""
    seconds = read(file) or {"wall": 0.0, "cpu": 0.0}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    try:
        yield seconds
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds["wall"] += time.monotonic() - started
        seconds["cpu"] += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        file.write_text(json.dumps(seconds))


def swap(out: Path, prompts: dict[str, Path]) -> dict[str, Any]:
    """Ask, swap while prompts of the stream are answered, and ask again."""
    asked = OLD | {name: file for name, file in prompts.items() if name != "stream"}
    with server(out, "off") as (client, url):
        before = {name: client.ask_all(file, ASKED) for name, file in asked.items()}
        with Background(client, prompts["stream"]) as background:
            background.wait_for(40)  # more than `dflare swap` looks back upon
            told = dflare(
                "swap", url, out / "drafter", "--traffic", out / "traffic", "--watch-minutes", "5"
            )
        after = {name: client.ask_all(file, ASKED) for name, file in asked.items()}
    result: dict[str, Any] = {"swap": re.sub(rf"{out}/|{ROOT}/", "", told).splitlines()}
    result["requests_during_the_swap"] = background.answered
    result["failed"] = background.failed
    result["answers_that_differ"] = sum(
        one[2] != other[2]
        for name in asked
        for one, other in zip(before[name], after[name], strict=True)
    )
    result["answers"] = sum(map(len, before.values()))
    for name in asked:
        result[name] = [round(accept_length(rows[name]), 3) for rows in (before, after)]
    return result


class Background:
    """Asks the prompts of a file over and over, as long as the context is open."""

    def __init__(self, client: Client, file: Path) -> None:
        self._client, self._prompts = client, read_prompts(file)
        self._end = threading.Event()
        self.answered, self.failed = 0, 0

    def _ask(self, first: int) -> None:
        for number in range(first, 10**9, CONCURRENCY):
            if self._end.is_set():
                return
            try:
                self._client.ask(self._prompts[number % len(self._prompts)])
                self.answered += 1
            except requests.RequestException:
                self.failed += 1

    def wait_for(self, count: int) -> None:
        """Return once so many are answered."""
        while self.answered < count:
            time.sleep(0.5)

    def __enter__(self) -> "Background":
        self._pool = ThreadPoolExecutor(CONCURRENCY)
        for first in range(CONCURRENCY):
            self._pool.submit(self._ask, first)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._pool.shutdown()


def evaluate(out: Path, prompts: dict[str, Path]) -> dict[str, Any]:
    """Both drafters on the same answers."""
    sets = OLD | {name: file for name, file in prompts.items() if name != "stream"}
    files = [part for file in sets.values() for part in ("--prompts", file)]
    how = ["--max-new-tokens", str(TOKENS), "--limit", str(MEASURED), "--rows", "32"]
    where = ["--against", demo_draft(), "--output", out / "evaluation"]
    dflare("evaluate", out / "drafter", "--target", "demo", *files, *how, *where)
    report = json.loads((out / "evaluation/evaluation.json").read_text())
    return {
        name: {
            "before": round(own["drafter"]["accept_length"] / (1 + own["against"]["gain"]), 3),
            "after": own["drafter"]["accept_length"],
            "gain": own["against"]["gain"],
            "interval": own["against"]["interval"],
            "prompts": own["prompts"],
        }
        for name, own in report.items()
    }


def read(file: Path) -> dict[str, Any]:
    """What is in a result file; nothing where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def main(
    out: Annotated[Path, typer.Argument(help="Folder of data, drafters and results.")],
    stages: Annotated[
        str, typer.Option(help="Which to do, of those that are not done.")
    ] = "stream,train,swap,evaluate",
) -> None:
    """Do what is not done yet, and write `OUT/result.json`."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    out = out.resolve()
    prompts = draw_prompts(out / "prompts")
    work = {
        "stream": lambda: stream(out, prompts),
        "train": lambda: train(out),
        "swap": lambda: swap(out, prompts),
        "evaluate": lambda: evaluate(out, prompts),
    }
    file = out / "result.json"
    for name in stages.split(","):
        if name not in read(file):
            done = work[name]()
            file.write_text(
                json.dumps(read(file) | {name: done, "conditions": provenance()}, indent=2) + "\n"
            )
        print(name, json.dumps(read(file)[name]), flush=True)


if __name__ == "__main__":
    typer.run(main)
