"""A sweep as data: which servers, which load, how often."""

import json
import random
import zlib
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

HERE = Path(__file__).parent
_PREFIX_SHARERS = 4  # requests at least that share a prefix, or nothing is shared


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(_Data):
    """One server configuration.

    Attributes:
        kind: `none`, `fixed` and `adaptive` enter the comparison adaptive / best; `other` is shown.
            A second arm of kind `none` is not a rival: it shows how far the same server, measured
            twice, differs from itself. `llama.cpp` is shown too, with a server of its own.
        args: Flags of `sglang.launch_server`, or of `llama-server` with `--model FILE.gguf`;
            `{draft}` stands for the drafter.
        env: Environment variables on top of DFLARE_ADAPTIVE=on.
    """

    name: str
    kind: Literal["none", "fixed", "adaptive", "other", "llama.cpp"]
    args: list[str] = []
    env: dict[str, str] = {}


class Dataset(_Data):
    """What is asked.

    Attributes:
        prompts: Prompt files under `bench/serving/prompts` by stem, or paths of JSON Lines in
            `sglang.benchmark.serving`'s custom format; several are mixed. None for generated loads.
        shared_prefixes: Groups of requests with a common prefix, for a generated load; fewer where
            a group would have less than four.
        args: Further flags of `sglang.benchmark.serving`.
    """

    name: str
    prompts: list[str] = []
    shared_prefixes: int = 0
    args: list[str] = []

    def flags(
        self,
        requests: int,
        output_tokens: int,
        folder: Path,
        *,
        range_ratio: float = 1.0,
        ignore_eos: bool = False,
    ) -> list[str]:
        """Flags of the load generator for so many requests; writes the prompt file it reads.

        Args:
            requests: How many, at least; shared prefixes round up to whole groups.
            output_tokens: Longest answer to a prompt of a file.
            folder: Where the prompt file goes.
            range_ratio: Share of `output_tokens` that the shortest limit of an answer has.
            ignore_eos: Answers of full length, where their text means nothing.
        """
        if self.shared_prefixes:
            groups = max(1, min(self.shared_prefixes, requests // _PREFIX_SHARERS))
            per_group = max(_PREFIX_SHARERS, -(-requests // groups))
            load = ["--gsp-num-groups", str(groups), "--gsp-prompts-per-group", str(per_group)]
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
        answers = ["--apply-chat-template", *([] if ignore_eos else ["--disable-ignore-eos"])]
        answers += ["--num-prompts", str(requests)]
        if range_ratio < 1:
            lines = _with_lengths(lines, output_tokens, range_ratio)
        else:
            answers += ["--sharegpt-output-len", str(output_tokens)]
        path.write_text("\n".join(lines) + "\n")
        return ["--dataset-name", "custom", "--dataset-path", str(path), *answers, *self.args]


def _with_lengths(lines: list[str], longest: int, range_ratio: float) -> list[str]:
    """Give each conversation an answer as long as its own may be, as the generator expects it.

    A word that every common tokenizer has stands for a token.
    """
    rng = random.Random(longest)
    varied = []
    for line in lines:
        record = json.loads(line)
        question, *_ = record.get("conversations") or record["conversation"]
        length = rng.randint(max(2, round(range_ratio * longest)), longest)
        answer = {"role": "assistant", "content": " the" * length}
        varied.append(json.dumps(record | {"conversations": [question, answer]}))
    return varied


class Sweep(_Data):
    """A whole sweep.

    Attributes:
        model, draft: Folder or hub id; `demo` is the pair that needs no hub. Without a drafter,
            which only simulated acceptance allows, one of the published shape is written with
            random weights.
        server_args: Flags of every SGLang server.
        concurrency: Requests in flight, one cell each.
        requests_per_stream: Requests of a cell are this times the concurrency ...
        min_requests: ... but at least this many.
        output_tokens: Longest answer to a prompt; it may end before.
        range_ratio: Each prompt's limit is drawn between this share of `output_tokens` and all of
            it, as `--random-range-ratio` does for generated loads. At 1 the requests of a server
            without speculation run in step and are prefilled together, which real ones are not.
        keep_alive: Keep all servers running and measure one arm after the other in every cell. Else
            one server runs at a time, and arms alternate between repeats.
        simulate_acc_len: Accept length that SGLang fakes (SGLANG_SIMULATE_ACC_LEN); outputs are
            then meaningless, of full length, and every report says so.
        minutes: Repeats behind the first that would not end within this time are left out, and the
            report says so. The same command goes on with them.
    """

    model: str
    draft: str | None = None
    server_args: list[str] = []
    arms: list[Arm] = Field(min_length=1)
    datasets: list[Dataset] = Field(min_length=1)
    concurrency: list[int] = Field(min_length=1)
    repeats: int = Field(default=3, ge=1)
    requests_per_stream: int = 3
    min_requests: int = 4
    output_tokens: int = 128
    range_ratio: float = Field(default=1.0, gt=0, le=1)
    seed: int = 1
    keep_alive: bool = False
    simulate_acc_len: float | None = None
    minutes: float | None = Field(default=None, gt=0)

    @classmethod
    def load(cls, path: Path) -> "Sweep":
        return cls.model_validate(yaml.safe_load(path.read_text()))

    @model_validator(mode="after")
    def _check_draft(self) -> Self:
        if self.draft is None and self.simulate_acc_len is None:
            raise ValueError(
                f"no drafter for {self.model}; name one (--draft), or simulate its acceptance "
                "(--simulate-acc-len)"
            )
        return self

    @property
    def baseline(self) -> str | None:
        """The arm without speculation."""
        return next((arm.name for arm in self.arms if arm.kind == "none"), None)

    @property
    def adaptive(self) -> str | None:
        """The arm that must not lose; a second one of its kind is shown and not judged."""
        return next((arm.name for arm in self.arms if arm.kind == "adaptive"), None)

    @property
    def rivals(self) -> list[str]:
        """The arms that it must not lose to."""
        return [a.name for a in self.arms if a.kind == "fixed" or a.name == self.baseline]

    def pair(self, folder: Path) -> tuple[str, str]:
        """Paths or ids of target and drafter; a random drafter is written into the folder."""
        from bench.serving.random_drafter import config_for, write_random_drafter
        from dflare.demo import demo_draft, demo_target

        target = str(demo_target()) if self.model == "demo" else self.model
        if self.draft is not None:
            return target, str(demo_draft()) if self.draft == "demo" else self.draft
        drafter = folder / "random-drafter"
        if not drafter.exists():
            write_random_drafter(drafter, config_for(target))
        return target, str(drafter)

    def seed_of(self, repeat: int) -> int:
        """Seed of a repeat's prompts.

        The generator keeps prompts with shared prefixes in the user's cache folder by seed and
        sizes; the model is part of the seed so that no other model's are taken.
        """
        return zlib.crc32(self.model.encode()) % 1_000_000 * 1000 + self.seed + repeat


class Cell(_Data):
    """One measurement: an arm under one load."""

    arm: str
    dataset: str
    concurrency: int
    repeat: int


def cells(sweep: Sweep) -> list[Cell]:
    """All cells in the order of measurement.

    The order of arms rotates with every second repeat and is reversed in the others: what drifts
    steadily, as a machine that warms up, then favours no arm over two repeats.
    """
    found = []
    for repeat in range(sweep.repeats):
        turn = repeat // 2 % len(sweep.arms)
        arms = [arm.name for arm in (*sweep.arms[turn:], *sweep.arms[:turn])]
        arms = arms[::-1] if repeat % 2 else arms
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
