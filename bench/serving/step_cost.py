"""What a speculative step costs beside the verification forward in it.

The drafter is random: about one token is accepted a step, nothing hides the overhead. Prints the
table of `DFLARE_STEP_TRACE` (docs/serving.md), with rows also for the batches on the way to those
that were asked for.

    python bench/serving/step_cost.py [--tokens 200] [--batches 1 4 8]

Every step has the full width; with `DFLARE_ADAPTIVE=on` the widths that the policy takes, which
soon is 1 with such a drafter.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from random_drafter import write_random_drafter

from dflare.adaptive.config import VARIABLE
from dflare.checkpoint import read_config
from dflare.demo import demo_draft, demo_target
from dflare.engine.step_timing import TRACE_ENV


def generate(target: Path, draft: Path, tokens: int, batches: list[int]) -> None:
    """Run each batch size for `tokens` tokens; the worker writes its trace when it ends."""
    import sglang

    engine = sglang.Engine(
        model_path=str(target),
        log_level="warning",
        speculative_algorithm="DFLARE",
        speculative_draft_model_path=str(draft),
        disable_radix_cache=True,
    )
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    for batch in batches:
        prompts = [[100 + 7 * i + j for j in range(32)] for i in range(batch)]
        engine.generate(input_ids=prompts, sampling_params=sampling)
    engine.shutdown()


def print_report(folder: Path) -> None:
    """Print the table that the worker wrote."""
    print(next(folder.glob("steps-*.md")).read_text(), end="")


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200, help="tokens a request")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="in flight")
    options = parser.parse_args()
    os.environ.setdefault(VARIABLE, "off")
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TRACE_ENV] = folder
        draft = write_random_drafter(Path(folder) / "draft", read_config(demo_draft()))
        generate(demo_target(), draft, options.tokens, options.batches)
        print_report(Path(folder))


if __name__ == "__main__":
    main()
