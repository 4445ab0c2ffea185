"""Accept length of a drafter on prompts, beside prompt lookup on the same prompts."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dflare.adaptive.lookup import SpliceRule
from dflare.branch import BranchOdds
from dflare.checkpoint import check_pair
from dflare.errors import DFlareError
from dflare.training.data.conversation import Conversation, converse
from dflare.training.data.corpus import Corpus, load_corpus, split
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.prompts import Message, encode, read_prompts, stop_tokens
from dflare.training.data.target import Target, load_target, load_tokenizer, target_path
from dflare.training.drafter.export import load_drafter
from dflare.training.drafter.model import Drafter
from dflare.training.errors import ConfigError
from dflare.training.run.config import load_config
from dflare.training.run.draft_table import DraftTable, draft_table
from dflare.training.run.look_ups import look_ups
from dflare.training.run.prompt_lookup import simulate
from dflare.training.run.ranks import start_ranks
from dflare.training.run.speculate import decode

_SPLICE_MEMORY = 3000  # steps, as the engine's policy has it
TREE_TOKENS = (6, 8, 12, 16, 32)  # verified tokens: the anchor and drafted nodes


@dataclass(frozen=True)
class Score:
    """Acceptance over all verify steps of a set of prompts.

    Args:
        steps: Verify steps.
        tokens: Tokens that they added.
        histogram: For 1 .. B tokens, how many steps added that many.
    """

    steps: int
    tokens: int
    histogram: list[int]

    @classmethod
    def of(cls, emitted: Sequence[Sequence[int]], block_size: int) -> "Score":
        """Count steps; ``emitted`` has the tokens of each step of each prompt."""
        histogram = [0] * block_size
        for prompt in emitted:
            for tokens in prompt:
                histogram[tokens - 1] += 1
        tokens = sum(count * size for size, count in enumerate(histogram, 1))
        return cls(sum(histogram), tokens, histogram)

    @property
    def accept_length(self) -> float:
        """Tokens a verify step, the target's own included."""
        return self.tokens / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; ``reached[j-1]``: share of steps that kept j drafts or more."""
        reached = [sum(self.histogram[j:]) / max(self.steps, 1) for j in range(1, self.block_size)]
        return {
            "accept_length": round(self.accept_length, 4),
            "steps": self.steps,
            "tokens": self.tokens,
            "reached": [round(share, 4) for share in reached],
            "histogram": self.histogram,
        }

    @property
    def block_size(self) -> int:
        """B."""
        return len(self.histogram)


def held_out_prompts(corpus: Corpus) -> list[list[int]]:
    """Return the prompts of sequences that were set aside: what is before their first answer."""
    return [
        corpus.tokens(i)[: int(corpus.mask(i).argmax())].tolist()
        for i in range(len(corpus))
        if corpus.mask(i).argmax() > 0
    ]


def answered(
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[Message]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    rows: int = 16,
) -> list[tuple[list[int], list[int]]]:
    """Let the target answer conversations turn by turn; the last answers, as :func:`known_answers`.

    Turns without an answer that are not the last are answered first, by the target too.
    """
    turns = max(sum(m["role"] == "user" for m in messages) for messages in prompts)
    longest = max(len(encode(tokenizer, messages)) for messages in prompts)
    room = longest + turns * (max_new_tokens + 8)  # 8: what a template puts around an answer
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    generator = Generator(target, min(rows, len(prompts)), room, sampling)
    order = {id(messages): number for number, messages in enumerate(prompts)}
    ended = sorted(
        converse(map(Conversation, prompts), generator, tokenizer, room),
        key=lambda conversation: order[id(conversation.prompt)],
    )
    pairs = [(c.ids[: c.answers[-1][0]], c.ids[c.answers[-1][0] :]) for c in ended]
    return [(prompt, answer) for prompt, answer in pairs if len(answer) > 1]


def known_answers(
    target: Target,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
    temperature: float = 0.0,
    rows: int = 16,
) -> list[tuple[list[int], list[int]]]:
    """Let the target answer; pairs of prompt and answer, without answers of a single token."""
    room = max(map(len, prompts)) + max_new_tokens
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    generated = Generator(target, min(rows, len(prompts)), room, sampling).run(prompts)
    answers = sorted(generated, key=lambda answer: answer.prompt)
    return [(prompts[answer.prompt], answer.ids) for answer in answers if len(answer.ids) > 1]


def evaluate(
    target: Target, drafter: Drafter, answers: Sequence[tuple[list[int], list[int]]]
) -> dict[str, Any]:
    """Draft at every position of answers, and walk over them in every way.

    Args:
        target: Tapped as the drafter wants.
        drafter: On the same device.
        answers: From :func:`known_answers`.

    Returns:
        Scores of the whole block as a chain (``drafter``) and of prompt lookup; accept lengths of
        chains and trees by verified tokens, without and with the engine's look-ups; tokens and
        steps of each prompt.
    """
    started = time.monotonic()
    size = drafter.config.block_size
    walks = _Walks(size)
    for prompt, answer in answers:
        walks.add(prompt, answer, draft_table(target, drafter, prompt, answer))
    whole = walks.chain[size]
    return {
        "prompts": len(answers),
        "block_size": size,
        "drafter": Score.of(whole, size).to_dict(),
        "prompt_lookup": Score.of(walks.looked_up, size).to_dict(),
        **walks.accept_lengths(),
        "by_prompt": [[sum(emitted), len(emitted)] for emitted in whole],
        "seconds": round(time.monotonic() - started, 1),
        "device": str(target.device.type),
        "dtype": str(target.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


class _Walks:
    """Tokens of each step of each answer, by way of drafting and verified tokens.

    What look-ups are worth is learned from answer to answer, as a server does.
    """

    def __init__(self, block_size: int) -> None:
        self._slots = block_size - 1
        self.chain: dict[int, list[list[int]]] = {n: [] for n in range(2, block_size + 1)}
        self._spliced: dict[int, list[list[int]]] = {n: [] for n in self.chain}
        self._tree: dict[int, list[list[int]]] = {n: [] for n in TREE_TOKENS}
        self._branched: dict[int, list[list[int]]] = {n: [] for n in TREE_TOKENS}
        self.looked_up: list[list[int]] = []
        self._odds, self._rule = BranchOdds(), SpliceRule(_SPLICE_MEMORY)

    def add(self, prompt: list[int], answer: list[int], table: DraftTable) -> None:
        """Walk over one answer in every way."""
        found = look_ups(prompt, answer, max(TREE_TOKENS) - 1)
        seen = table.compare(found)
        for width in self.chain:
            self.chain[width].append(table.chain(width))
            spliced = table.spliced(width, seen, self._rule.least_strength())
            self._spliced[width].append(spliced)
        for walks, branches in ((self._tree, None), (self._branched, found.branches(self._odds))):
            for tokens, steps in table.tree(TREE_TOKENS, branches).items():
                walks[tokens].append(steps)
        found.teach(self._odds)
        self._rule.observe(seen, self._slots)
        self.looked_up.append(simulate(prompt, answer, self._slots))

    def accept_lengths(self) -> dict[str, dict[str, float]]:
        """Tokens a step by way of drafting, then by verified tokens."""
        walks = {
            "chain": self.chain,
            "tree": self._tree,
            "chain_and_lookup": self._spliced,
            "tree_and_lookup": self._branched,
        }
        return {
            name: {
                str(tokens): round(sum(map(sum, emitted)) / max(sum(map(len, emitted)), 1), 4)
                for tokens, emitted in of_name.items()
            }
            for name, of_name in walks.items()
        }


def compare(own: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compare two drafters on the same prompts.

    Args:
        own: ``by_prompt`` of :func:`evaluate`: tokens and steps of each prompt.
        other: The same of the one that it is compared with.

    Returns:
        ``gain``, by how much the accept length is higher (0.05: 5 %), and the 95 % interval of a
        bootstrap over prompts, each with both its results.
    """
    from scipy.stats import bootstrap

    a, b = np.asarray(own, float), np.asarray(other, float)

    def gain(tokens, steps, other_tokens, other_steps, axis=-1):
        length = tokens.sum(axis) / steps.sum(axis)
        return length / (other_tokens.sum(axis) / other_steps.sum(axis)) - 1.0

    columns = (*a.T, *b.T)
    interval = bootstrap(
        columns, gain, paired=True, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return {
        "gain": round(float(gain(*columns)), 4),
        "interval": [round(float(interval.low), 4), round(float(interval.high), 4)],
    }


def check_by_decoding(
    target: Target,
    drafter: Drafter,
    answers: Sequence[tuple[list[int], list[int]]],
    max_new_tokens: int,
    stop_ids: tuple[int, ...],
) -> None:
    """Decode greedily with draft, verify and commit, and hold the walks against it.

    Raises:
        DFlareError: Text or steps differ.
    """
    size = drafter.config.block_size
    decoded = decode(target, drafter, [p for p, _ in answers], max_new_tokens, stop_ids)
    for number, ((prompt, answer), real) in enumerate(zip(answers, decoded, strict=True)):
        walked = draft_table(target, drafter, prompt, answer).chain(size)
        if real.ids != answer or real.emitted != walked:
            raise DFlareError(
                f"prompt {number}: decoding adds {real.emitted} tokens a step, the walk {walked}"
                f"{'' if real.ids == answer else ', and another text'}; in float32 they are equal"
            )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write ``evaluation.json`` and ``evaluation.png`` (the plot needs matplotlib).

    Args:
        report: Results of :func:`evaluate` by the name of their set of prompts.
        folder: Destination.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(10, 3.6 * len(report)), layout="constrained")
    axes = figure.subplots(len(report), 2, squeeze=False)
    for (name, result), (left, right) in zip(report.items(), axes, strict=True):
        slots = range(1, result["block_size"])
        for label in ("drafter", "prompt_lookup"):
            score = result[label]
            legend = f"{label.replace('_', ' ')}, accept length {score['accept_length']:.2f}"
            left.plot(slots, score["reached"], marker="o", label=legend)
            shift = -0.2 if label == "drafter" else 0.2
            right.bar(
                [size + shift for size in range(1, result["block_size"] + 1)],
                [count / max(score["steps"], 1) for count in score["histogram"]],
                width=0.4,
                label=label.replace("_", " "),
            )
        left.set(
            title=f"{name}: {result['prompts']} prompts, temperature {result['temperature']}",
            xlabel="slot",
            ylabel="share of steps accepted that far",
            ylim=(0, 1),
        )
        right.set(title="tokens a verify step", xlabel="tokens", ylabel="share of steps")
        left.legend()
        right.legend()
    figure.savefig(folder / "evaluation.png", dpi=110)


def run_evaluation(
    draft: str,
    target_name: str,
    prompt_files: list[Path],
    held_out: Path | None,
    output: Path,
    *,
    against: str | None = None,
    check: int = 0,
    max_new_tokens: int,
    temperature: float,
    limit: int | None,
    rows: int,
    device: str,
) -> dict[str, Any]:
    """Evaluate a drafter on disk and write the report; the arguments are those of the command.

    Returns:
        Results of :func:`evaluate` and :func:`compare` by the name of their set of prompts.

    Raises:
        ConfigError: No prompts are named.
        DFlareError: Drafter, target or prompts cannot be used.
    """
    if not prompt_files and held_out is None:
        raise ConfigError("nothing to draft: give --prompts FILE, --held-out CONFIG.yaml, or both")
    path = target_path(target_name)
    drafters = [_load_drafter(name, path) for name in (draft, against) if name is not None]
    where = start_ranks(device).device
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = load_target(path, (), where, dtype)
    pairs = [(Target(model.model, d.config.target_layer_ids), d.to(where)) for d in drafters]
    tokenizer = load_tokenizer(path)
    stop_ids = stop_tokens(tokenizer, model.model.generation_config)
    how = (max_new_tokens, stop_ids, temperature, rows)
    sets = {
        file.stem: answered(model, tokenizer, read_prompts(file)[:limit], *how)
        for file in prompt_files
    }
    if held_out is not None:
        prompts = _held_out_of(held_out, model.config.vocab_size)
        sets["held_out"] = known_answers(model, prompts[:limit], *how)
    report = {}
    for name, answers in sets.items():
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=where.type == "cuda"):
            result, *others = (evaluate(*pair, answers) for pair in pairs)
        if check:
            check_by_decoding(*pairs[0], answers[:check], max_new_tokens, stop_ids)
        conditions = {"draft": draft, "target": target_name, "max_new_tokens": max_new_tokens}
        report[name] = {**conditions, "temperature": temperature, **result}
        for other in others:
            compared = compare(result["by_prompt"], other["by_prompt"])
            report[name]["against"] = {"draft": against, **compared}
        print(_summary(name, report[name]))
    write_report(report, output)
    return report


def _summary(name: str, result: dict[str, Any]) -> str:
    """Results of a set of prompts in a line, or in two if there is something to compare with."""
    own, lookup, shown = result["drafter"], result["prompt_lookup"], str(TREE_TOKENS[2])
    text = (
        f"{name}: accept length {own['accept_length']:.3f} ({own['steps']} steps, "
        f"{result['prompts']} prompts), trees of {shown} tokens {result['tree'][shown]:.3f}, "
        f"with look-ups {result['tree_and_lookup'][shown]:.3f}, prompt lookup alone "
        f"{lookup['accept_length']:.3f}"
    )
    if compared := result.get("against"):
        low, high = compared["interval"]
        text += f"\n{name}: {compared['gain']:+.1%} ({low:+.1%} .. {high:+.1%}) against "
        text += compared["draft"]
    return text


def _held_out_of(config_file: Path, vocab_size: int) -> list[list[int]]:
    """The prompts that a run sets aside."""
    data = load_config(config_file).data
    corpus = load_corpus([Path(name) for name in data.files], vocab_size, data.max_length)
    return held_out_prompts(split(corpus, data.held_out)[1])


def _load_drafter(draft: str, path: str) -> Drafter:
    drafter = load_drafter(draft)
    check_pair(drafter.config, path, draft)
    return drafter
