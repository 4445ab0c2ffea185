"""Operators of DFlare: context K/V, block attention, trees; on the CPU a model's other layers too.

One module an operator: its public function, its fake (meta) implementation and a plain PyTorch
reference. The C++ and CUDA implementations live in `libdflare_ops.so` (csrc/).
"""

from dflare.ops.library import (
    DrafterSizes,
    OperatorLibraryError,
    build_info,
    check_kernels_for,
    check_sizes,
    check_support,
    load_library,
)

load_library()

from dflare.ops.append_context_kv import (  # noqa: E402
    ContextWeights,
    Pools,
    append_context_kv,
    append_context_kv_reference,
)
from dflare.ops.block_attention import (  # noqa: E402
    BlockNorms,
    block_attention,
    block_attention_reference,
    block_attention_schedule,
)
from dflare.ops.decoder_layers import DecoderWeights, decoder_layers  # noqa: E402
from dflare.ops.draft_tree import (  # noqa: E402
    build_draft_tree,
    cut_draft_tree,
    move_tree_path,
    tree_ancestors,
    walk_draft_tree,
    write_tree_mask,
)
from dflare.ops.head_argmax import head_argmax, head_argmax_reference, token_of  # noqa: E402
from dflare.ops.linear import any_linear, linear  # noqa: E402
from dflare.ops.lookup_continuations import (  # noqa: E402
    lookup_continuations,
    lookup_continuations_reference,
)
from dflare.ops.paged_attention import paged_attention, paged_attention_reference  # noqa: E402
from dflare.ops.paged_context import PagedContext  # noqa: E402
from dflare.ops.pointwise import add_rms_norm, rotate_heads, silu_and_mul  # noqa: E402

__all__ = [
    "BlockNorms",
    "ContextWeights",
    "DecoderWeights",
    "DrafterSizes",
    "OperatorLibraryError",
    "PagedContext",
    "Pools",
    "add_rms_norm",
    "any_linear",
    "append_context_kv",
    "append_context_kv_reference",
    "block_attention",
    "block_attention_reference",
    "block_attention_schedule",
    "build_draft_tree",
    "build_info",
    "check_kernels_for",
    "check_sizes",
    "check_support",
    "cut_draft_tree",
    "decoder_layers",
    "head_argmax",
    "head_argmax_reference",
    "linear",
    "lookup_continuations",
    "lookup_continuations_reference",
    "move_tree_path",
    "paged_attention",
    "paged_attention_reference",
    "rotate_heads",
    "silu_and_mul",
    "token_of",
    "tree_ancestors",
    "walk_draft_tree",
    "write_tree_mask",
]
