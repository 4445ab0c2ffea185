"""Attention backend `dflare` on CUDA: a drafter's blocks, eagerly and in captured graphs."""

from typing import NoReturn

import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from dflare import ops
from dflare.engine.attention import BlockAttentionBackend
from dflare.engine.names import ATTENTION_BACKEND
from dflare.errors import UnsupportedError


class CudaBlockAttentionBackend(BlockAttentionBackend):
    """The drafter's block attention on CUDA; the target keeps a backend of SGLang's.

    All that a step needs beside its inputs is one schedule for each sliding window that occurs in
    the drafter. It is made on the device from the lengths that the layers read. In a captured graph
    it is the first node, so a replay follows whatever SGLang has put into the graph's input
    buffers: there is nothing to prepare on the host and nothing to wait for.
    """

    # SGLang then skips the copy of the lengths to the host, which would wait for the step before.
    needs_cpu_seq_lens = False

    def __init__(self, model_runner) -> None:
        super().__init__(model_runner)
        if not model_runner.is_draft_worker:
            raise UnsupportedError(
                f"the attention backend {ATTENTION_BACKEND!r} serves a drafter on CUDA, not the "
                "target; leave out --attention-backend (the drafter's own is "
                "--speculative-draft-attention-backend)"
            )
        layers: list[RadixAttention] = [layer.self_attn.attn for layer in model_runner.model.layers]
        self._shape = {
            "num_heads": layers[0].tp_q_head_num,
            "kv_heads": layers[0].tp_k_head_num,
            "head_dim": layers[0].qk_head_dim,
        }
        self._schedules: dict[int, torch.Tensor | None] = {
            layer.sliding_window_size: None for layer in layers
        }

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Make the schedules of this step; recorded at capture, and part of every replay."""
        block_size = forward_batch.positions.shape[0] // forward_batch.batch_size
        for window in self._schedules:
            self._schedules[window] = ops.block_attention_schedule(
                forward_batch.seq_lens, block_size, window=window, **self._shape
            )

    def block_schedule(self, layer: RadixAttention) -> torch.Tensor | None:
        return self._schedules[layer.sliding_window_size]

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Every layer reads `req_to_token`, so the scheduler may change it after the last one."""
        return SharedReadEnds.POST_REPLAY

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing: schedules and scratch memory come from the pool of the graph that uses them."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Context length of the requests that pad a batch to a captured size: slot 0 is theirs."""
        return 1

    def forward_decode(self, *args, **kwargs) -> NoReturn:
        _refuse_stock_attention()

    def forward_extend(self, *args, **kwargs) -> NoReturn:
        _refuse_stock_attention()


def _refuse_stock_attention() -> NoReturn:
    raise UnsupportedError(
        f"the attention backend {ATTENTION_BACKEND!r} runs the blocks of DFlare drafters only, and "
        "this drafter has SGLang's own attention layers; choose another one, for instance "
        "--speculative-draft-attention-backend flashinfer"
    )
