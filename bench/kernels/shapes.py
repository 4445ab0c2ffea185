"""Sizes that the benchmarks run at: published targets, each with a drafter as large as the
published DFlare drafters (7 layers, 9 taps, blocks of 16) unless it has its own."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 7
    taps: int = 9
    block: int = 16


PAIRS = {
    "qwen3-4b": Pair(hidden=2560, heads=32, kv_heads=8, head_dim=128),
    "qwen3-8b": Pair(hidden=4096, heads=32, kv_heads=8, head_dim=128),
    "qwen3-32b": Pair(hidden=5120, heads=64, kv_heads=8, head_dim=128),
    "llama-3-70b": Pair(hidden=8192, heads=64, kv_heads=8, head_dim=128),
    "gpt-oss-20b": Pair(hidden=2880, heads=64, kv_heads=8, head_dim=64),
    "gemma-3-12b": Pair(hidden=3840, heads=16, kv_heads=8, head_dim=256),
    "smollm2-135m": Pair(hidden=576, heads=9, kv_heads=3, head_dim=64, layers=3, taps=7, block=6),
}
