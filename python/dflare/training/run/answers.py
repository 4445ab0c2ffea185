"""What a target answers: the text that drafters are measured on."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from dflare.training.data.conversation import Conversation, converse
from dflare.training.data.corpus import Corpus
from dflare.training.data.generate import Generator, Sampling
from dflare.training.data.prompts import ASKING, Message, encode
from dflare.training.data.target import Target


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
    template: dict[str, Any] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Let the target answer conversations turn by turn; the last answers, as :func:`known_answers`.

    Turns without an answer that are not the last are answered first, by the target too;
    ``template`` are arguments of its chat template.
    """
    template = template or {}
    turns = max(sum(m["role"] in ASKING for m in messages) for messages in prompts)
    longest = max(len(encode(tokenizer, messages, template)) for messages in prompts)
    room = longest + turns * (max_new_tokens + 8)  # 8: what a template puts around an answer
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    generator = Generator(target, min(rows, len(prompts)), room, sampling)
    order = {id(messages): number for number, messages in enumerate(prompts)}
    ended = sorted(
        converse((Conversation(p, template) for p in prompts), generator, tokenizer, room),
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
