"""A sweep as data: which servers, which load, how often."""

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

HERE = Path(__file__).parent


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Data):
    """One server configuration.

    Attributes:
        kind: `none`, `fixed` and `adaptive` enter the comparison adaptive / best; `other` is shown.
        args: Flags of `sglang.launch_server`; `{draft}` stands for the drafter.
        env: Environment variables.
        optional: A server that does not start is reported and left out instead of ending the sweep.
    """

    name: str
    kind: Literal["none", "fixed", "adaptive", "other"]
    args: list[str] = []
    env: dict[str, str] = {}
    optional: bool = False


class Dataset(_Data):
    """What is asked.

    Attributes:
        prompts: Prompt files under `bench/serving/prompts` by stem, or paths of JSON Lines in
            `sglang.benchmark.serving`'s custom format; several are mixed. None for generated loads.
        shared_prefixes: Groups of requests with a common prefix, for a generated load.
        args: Further flags of `sglang.benchmark.serving`.
    """

    name: str
    prompts: list[str] = []
    shared_prefixes: int = 0
    args: list[str] = []

    def flags(self, requests: int, output_tokens: int, folder: Path) -> list[str]:
        """Flags of the load generator for so many requests; writes the prompt file it reads."""
        if self.shared_prefixes:
            per_group = -(-requests // self.shared_prefixes)
            groups = ["--gsp-num-groups", str(self.shared_prefixes)]
            load = [*groups, "--gsp-prompts-per-group", str(per_group)]
            return ["--dataset-name", "generated-shared-prefix", *load, *self.args]
        if not self.prompts:
            return [*self.args, "--num-prompts", str(requests)]
        lines = []
        for name in self.prompts:
            own = HERE / "prompts" / f"{name}.jsonl"
            lines += (own if own.exists() else Path(name)).read_text().split("\n")
        lines = [line for line in lines if line.strip()]
        # The generator takes a random part; where it needs more than there are, prompts repeat.
        lines *= -(-requests // len(lines))
        path = folder / f"{self.name}.jsonl"
        path.write_text("\n".join(lines) + "\n")
        answers = ["--apply-chat-template", "--disable-ignore-eos"]
        answers += ["--sharegpt-output-len", str(output_tokens), "--num-prompts", str(requests)]
        return ["--dataset-name", "custom", "--dataset-path", str(path), *answers, *self.args]


class Sweep(_Data):
    """A whole sweep.

    Attributes:
        model, draft: Folder or hub id; `demo` is the pair that needs no hub.
        server_args: Flags of every server.
        concurrency: Requests in flight, one cell each.
        requests_per_stream: Requests of a cell are this times the concurrency ...
        min_requests: ... but at least this many.
        output_tokens: Longest answer to a prompt; it may end before.
        keep_alive: Keep all servers running and measure one arm after the other in every cell. Else
            one server runs at a time, and arms alternate between repeats.
        simulate_acc_len: Accept length that SGLang fakes (SGLANG_SIMULATE_ACC_LEN); outputs are
            then meaningless and every report says so.
    """

    model: str
    draft: str
    server_args: list[str] = []
    arms: list[Arm] = Field(min_length=1)
    datasets: list[Dataset] = Field(min_length=1)
    concurrency: list[int] = Field(min_length=1)
    repeats: int = Field(default=3, ge=1)
    requests_per_stream: int = 3
    min_requests: int = 4
    output_tokens: int = 128
    seed: int = 1
    keep_alive: bool = False
    simulate_acc_len: float | None = None

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        return cls.model_validate(yaml.safe_load(path.read_text()))

    def pair(self) -> tuple[str, str]:
        """Paths or ids of target and drafter."""
        from dflare.demo import demo_draft, demo_target

        return (
            str(demo_target()) if self.model == "demo" else self.model,
            str(demo_draft()) if self.draft == "demo" else self.draft,
        )


class Cell(_Data):
    """One measurement: an arm under one load."""

    arm: str
    dataset: str
    concurrency: int
    repeat: int


def cells(sweep: Sweep) -> list[Cell]:
    """All cells in the order of measurement; the order of arms rotates with the repeat."""
    found = []
    for repeat in range(sweep.repeats):
        turn = repeat % len(sweep.arms)
        arms = [arm.name for arm in (*sweep.arms[turn:], *sweep.arms[:turn])]
        loads = [(d.name, c) for d in sweep.datasets for c in sweep.concurrency]
        if sweep.keep_alive:
            order = [(arm, *load) for load in loads for arm in arms]
        else:
            order = [(arm, *load) for arm in arms for load in loads]
        found += [
            Cell(arm=arm, dataset=dataset, concurrency=concurrency, repeat=repeat)
            for arm, dataset, concurrency in order
        ]
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of the cells measured so far; a line cut off by a crash is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def cell_of(record: dict[str, Any]) -> Cell:
    return Cell(**{name: record[name] for name in Cell.model_fields})
