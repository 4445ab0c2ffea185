"""The prompts that adaptation is measured on: none that the drafter was trained on."""

import re

from bench.training.adaptation import DOMAIN, MEASURED, STREAMED, draw_prompts

from dflare.training.data.prompts import read_prompts
from dflare.training.data.templates import read_templates


def words(text):
    return set(re.findall(r"[a-z]+", text))


def test_no_measured_prompt_is_in_the_stream_and_new_names_are_in_none_of_it(tmp_path):
    sets = {
        name: [messages[0]["content"] for messages in read_prompts(file)]
        for name, file in draw_prompts(tmp_path).items()
    }
    assert {name: len(set(prompts)) for name, prompts in sets.items()} == {
        "stream": STREAMED,
        "domain": MEASURED,
        "new-names": MEASURED,
    }
    assert not set(sets["stream"]) & {*sets["domain"], *sets["new-names"]}
    templates = read_templates(DOMAIN)
    lists = templates.lists
    known, new = ({*lists[f"{old}table"], *lists[f"{old}column"]} for old in ("", "new_"))
    assert not known & new
    known -= words(" ".join(templates.templates))  # a table is named "returns"
    for prompt in sets["new-names"]:
        assert words(prompt) & new and not words(prompt) & known
