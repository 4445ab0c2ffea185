"""Chat prompts for the demo target; none is in any training data of the demo drafter."""

_TOPICS = (
    "rivers", "glaciers", "bicycles", "bread", "chess", "volcanoes", "bees", "clocks", "bridges",
    "kites", "whales", "comets", "libraries", "tea", "maps", "violins", "deserts", "trains",
    "lighthouses", "paper",
)  # fmt: skip
_TASKS = (
    "Explain {} to a child in three sentences.",
    "Write a short poem about {}.",
    "List five facts about {}.",
    "What would the world be without {}?",
    "Give me one question and its answer about {}.",
)


def chat_prompts(tokenizer, count: int) -> list[list[int]]:
    """Token ids of the first `count` of 100 chat prompts."""
    questions = [task.format(topic) for topic in _TOPICS for task in _TASKS][:count]
    return [chat(tokenizer, question) for question in questions]


def chat(tokenizer, question: str) -> list[int]:
    """Token ids of one question under the target's chat template."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
