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
import tempfile
from pathlib import Path

import torch

from dflare.adaptive.config import VARIABLE
from dflare.checkpoint import expected_tensors, read_config, save_checkpoint
from dflare.demo import demo_draft, demo_target
from dflare.engine.step_timing import TRACE_ENV


def write_random_drafter(folder: Path) -> Path:
    """Write a drafter of the demo drafter's shape with random weights."""
    config = read_config(demo_draft())
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=draw).mul_(0.02).to(torch.bfloat16)
        for name, shape in expected_tensors(config).items()
    }
    save_checkpoint(folder, config, weights)
    return folder


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
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        draft = write_random_drafter(Path(folder) / "draft")
        generate(demo_target(), draft, options.tokens, options.batches)
        print_report(Path(folder))


if __name__ == "__main__":
    main()
