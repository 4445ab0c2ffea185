"""How training data is generated: declared once, for the command line, pipelines and data files."""

from pydantic import Field

from dflare.training.section import Section


class GenerationSettings(Section):
    """What decides which answers and prompts a target writes; kept in the data file."""

    temperature: float = Field(0.0, ge=0, description="Of the answers; 0 for greedy.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Tokens below this share of the most probable are not drawn."
    )
    max_new_tokens: int = Field(512, gt=0, description="Tokens of an answer.")
    max_length: int = Field(2048, gt=0, description="Tokens of prompt and answer.")
    prompt_temperature: float = Field(1.0, ge=0, description="Of self-written prompts.")
    prompt_min_p: float = Field(0.02, ge=0, lt=1, description="Of self-written prompts.")
    prompt_max_tokens: int = Field(
        128, gt=0, description="Longer self-written prompts are thrown away."
    )
    seed: int = Field(0, description="Of everything drawn.")
    template_arguments: str = Field(
        "{}",
        description='JSON for the target\'s chat template, such as {"enable_thinking": false}.',
    )


class SynthSettings(GenerationSettings):
    """How data is generated, with the beginnings of prompts that were read from a file.

    Args:
        openers: Beginnings of user turns that the target continues, in turn; more kinds of
            questions than it would think of itself.
    """

    openers: tuple[str, ...] = ("",)
