"""What FP8 costs a drafter in accept length: each product of its layers in FP8, against its own.

    python -m bench.training.fp8 assets/smollm2-135m-dflare --target demo \\
        --prompts bench/serving/prompts/easy.jsonl --limit 16 --max-new-tokens 64 --out runs/fp8

Weights are rounded to e4m3 with a scale an output channel and inputs with a scale a token, as
SGLang does with `--speculative-draft-model-quantization fp8`; context projections too, which it
leaves as they are. Products stay in float32, so what is measured is the rounding alone.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from dflare.training.run import evaluate

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rounded(rows: Tensor) -> Tensor:
    """[..., columns] to the nearest values of e4m3 with one scale a row."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale


class Fp8Linear(nn.Module):
    """A linear layer whose weights and inputs are values of FP8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(rounded(linear.weight.data), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(rounded(x), self.weight, self.bias)


def quantise(drafter: nn.Module) -> int:
    """Put `Fp8Linear` in the place of every linear layer; returns how many there are."""
    found = [
        (parent, name, child)
        for parent in drafter.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name, child in found:
        setattr(parent, name, Fp8Linear(child))
    return len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("draft")
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"))
    arguments = parser.parse_args()
    load, loaded = evaluate._load_drafter, []

    def load_first_in_fp8(draft, path):
        drafter = load(draft, path)
        if not loaded:
            print(f"{quantise(drafter)} linear layers in FP8")
        loaded.append(drafter)
        return drafter

    evaluate._load_drafter = load_first_in_fp8
    evaluate.run_evaluation(
        arguments.draft,
        arguments.target,
        arguments.prompts,
        None,
        arguments.out,
        against=arguments.draft,
        max_new_tokens=arguments.max_new_tokens,
        temperature=0.0,
        limit=arguments.limit,
        rows=16,
        device="cpu",
    )


if __name__ == "__main__":
    main()
