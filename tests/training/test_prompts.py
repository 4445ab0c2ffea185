"""Prompts from templates, and what is kept out of the data."""

import itertools
from pathlib import Path

import pytest

from dflare.training.data.prompt_filter import PromptFilter
from dflare.training.data.prompts import read_prompts
from dflare.training.data.templates import Templates, read_templates
from dflare.training.errors import ConfigError

DEMO = Path(__file__).parents[2] / "configs/demo"


def user(*texts: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text} for text in texts]


def drawn(count: int, seed: int = 0, **content) -> list[list[str]]:
    conversations = Templates.model_validate(content).conversations(seed)
    return [[turn["content"] for turn in c] for c in itertools.islice(conversations, count)]


def test_gaps_are_filled_with_articles_and_the_same_word_where_it_is_tagged():
    lists = {"noun": ["owl"], "name": ["Ann", "Bob"], "thing": ["{a noun} of {name.x}"]}
    texts = drawn(40, lists=lists, templates=["see {thing}, {name.x}: {a noun}, {name}"])
    owners = set()
    for (text,) in texts:
        assert text.startswith("See an owl of ") and ": an owl, " in text
        first, second = text.split(" of ")[1].split(":")[0].split(", ")
        assert first == second
        owners.add((first, text.split(", ")[-1]))
    assert len(owners) == 4  # without a tag a word is drawn anew


def test_conversations_have_the_shares_of_turns_that_are_asked_for():
    texts = drawn(2000, templates=["a"], follow_ups=["b", "c", "d"], turns=[0.5, 0.3, 0.2])
    shares = [sum(len(c) == n for c in texts) / len(texts) for n in (1, 2, 3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    assert all(len(set(c)) == len(c) for c in texts)  # no follow-up comes twice


def test_a_seed_gives_the_same_prompts_again():
    templates = read_templates(DEMO / "templates.yaml")
    first, same, other = (
        list(itertools.islice(templates.conversations(seed), 20)) for seed in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("templates: [a]\nturns: [0.5, 0.6]", "turns"),
        ("lists: {a: [b]}", "templates"),
        (
            "templates: ['{noun}']\nlists: {noun: {package: no_such_package, file: x}}",
            "pip install",
        ),
        ("templates: ['{noun}']", "no list noun"),
        ("a: [", "t.yaml"),
        (b"templates:\n- \xff", "line 2: byte 0xff"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(tmp_path, content, hint):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=hint):
        next(read_templates(tmp_path / "t.yaml").conversations(0))


def test_prompts_of_an_excluded_template_stay_out():
    filter_ = PromptFilter([user("List five facts about rivers."), user("Why do cats purr?")])
    assert not filter_.allows(user("Please list FIVE facts about old trains"))
    assert not filter_.allows(user("hello", "why do cats purr"))  # in a later turn
    assert not filter_.allows(user("List five facts about"))
    assert filter_.allows(user("List five uses of a river."))
    assert filter_.allows(user("Why do dogs bark?"))


def test_near_duplicates_are_admitted_once():
    filter_ = PromptFilter()
    text = "the brown fox wanted to learn how to swim and so it went to the river every single day"
    assert filter_.admit(user(text))
    assert not filter_.admit(user(text.upper() + "!"))
    assert not filter_.admit(user(text.replace("single", "other")))
    assert filter_.admit(
        user(text.replace("fox", "wolf").replace("river", "sea").replace("how", ""))
    )
    assert filter_.admit(user(text, "and then?"))  # another conversation


def test_no_demo_prompt_shares_four_words_in_a_row_with_one_that_is_measured():
    """Checked without the filter: no template of the evaluation is left in the corpus."""

    def runs(text: str) -> set[str]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}

    measured = [
        prompt for name in ("questions.txt", "excluded.txt") for prompt in read_prompts(DEMO / name)
    ]
    forbidden = set().union(*(runs(turn["content"]) for prompt in measured for turn in prompt))
    filter_ = PromptFilter(measured)
    source = read_templates(DEMO / "templates.yaml").conversations(3)
    admitted = [prompt for prompt in itertools.islice(source, 1500) if filter_.admit(prompt)]
    assert len(admitted) > 1200
    assert not any(runs(turn["content"]) & forbidden for p in admitted for turn in p)
