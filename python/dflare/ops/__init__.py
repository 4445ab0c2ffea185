"""Operators of DFlare: context K/V, block attention; on the CPU paged attention and linear too.

One module an operator: its public function, its fake (meta) implementation and a plain PyTorch
reference. The C++ and CUDA implementations live in `libdflare_ops.so` (csrc/).
"""

from dflare.ops.library import OperatorLibraryError, load_library

load_library()

from dflare.ops.append_context_kv import (  # noqa: E402
    append_context_kv,
    append_context_kv_reference,
)
from dflare.ops.block_attention import block_attention, block_attention_reference  # noqa: E402
from dflare.ops.linear import linear  # noqa: E402
from dflare.ops.paged_attention import paged_attention, paged_attention_reference  # noqa: E402

__all__ = [
    "OperatorLibraryError",
    "append_context_kv",
    "append_context_kv_reference",
    "block_attention",
    "block_attention_reference",
    "linear",
    "paged_attention",
    "paged_attention_reference",
]
