"""What the CPU platform chooses for a user, and what it leaves alone."""

import os
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow  # imports SGLang


@pytest.mark.parametrize(
    ("given", "served"), [("auto", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
def test_dtype(monkeypatch, given, served):
    from dflare.cpu.platform import CpuPlatform

    monkeypatch.setattr("os.environ", dict(os.environ))  # the platform sets variables there
    arguments = SimpleNamespace(
        dtype=given,
        speculative_algorithm=None,
        attention_backend=None,
        mem_fraction_static=None,
        max_total_tokens=None,
        tp_size=1,
    )
    CpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.dtype == served
