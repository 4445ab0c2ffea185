"""SGLang's side of the CUDA attention backend: runner, batch, and capture and replay of a step."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from op_cases import AttentionCase
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.cuda_graph_buffer_registry import (
    CudaGraphBufferRegistry,
    build_decode_registry,
)
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dflare.engine.cuda_attention import CudaBlockAttentionBackend

WINDOWS = (-1, 40, -1)  # of three layers; the sliding one is causal, as in DFlareAttention


class RecordedGraph(TorchDispatchMode):
    """Records the operators that run inside it; `replay` runs them on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            out.copy_(func(*args, **kwargs))

    @property
    def names(self) -> list[str]:
        return [func.name().split("::")[1] for func, *_ in self.calls]


def attention_layer(case: AttentionCase, x: dict[str, Tensor], layer_id: int) -> SimpleNamespace:
    """What the backend reads of a `DFlareAttention`; on this rank the case's heads are local."""
    window = WINDOWS[layer_id]
    return SimpleNamespace(
        attn=RadixAttention(
            num_heads=case.heads,
            head_dim=case.head_dim,
            scaling=case.scale,
            num_kv_heads=case.kv_heads,
            layer_id=layer_id,
            sliding_window_size=window,
            attn_type=AttentionType.ENCODER_ONLY if window < 0 else AttentionType.DECODER,
        ),
        q_norm=SimpleNamespace(weight=x["q_norm_weight"], variance_epsilon=1e-6),
        k_norm=SimpleNamespace(weight=x["k_norm_weight"], variance_epsilon=1e-6),
        rotary_emb=SimpleNamespace(cos_sin_cache=x["cos_sin_cache"]),
    )


def model_runner(case: AttentionCase, x: dict[str, Tensor], **changed: Any) -> SimpleNamespace:
    layers = [
        SimpleNamespace(self_attn=attention_layer(case, x, layer_id))
        for layer_id in range(len(WINDOWS))
    ]
    pools = SimpleNamespace(get_kv_buffer=lambda _layer_id: (x["k_pool"], x["v_pool"]))
    runner = {
        "is_draft_worker": True,
        "model": SimpleNamespace(layers=layers),
        "req_to_token_pool": SimpleNamespace(req_to_token=x["req_to_token"]),
        "token_to_kv_pool": pools,
    }
    return SimpleNamespace(**(runner | changed))


def forward_batch(x: dict[str, Tensor]) -> ForwardBatch:
    """As `DFlashWorkerV2` makes it for a draft block."""
    rows = x["positions"].shape[0]
    return ForwardBatch(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=x["seq_lens"].shape[0],
        input_ids=torch.zeros(rows, dtype=torch.long),
        req_pool_indices=x["req_pool_indices"],
        seq_lens=x["seq_lens"],
        out_cache_loc=torch.zeros(rows, dtype=torch.long),
        seq_lens_sum=0,
        positions=x["positions"],
    )


def run_layers(
    backend: CudaBlockAttentionBackend,
    layers: list[SimpleNamespace],
    qkv: Tensor,
    batch: ForwardBatch,
) -> list[Tensor]:
    return [
        backend.block_attention(layer.self_attn, qkv, batch.positions, batch) for layer in layers
    ]


class CapturedStep:
    """A step for `case`, padded to four requests, captured as SGLang's decode graph runner does.

    Attributes:
        backend, graph: what was captured.
        outs: the layers' outputs, where every replay leaves them.
    """

    SIZE = 4

    def __init__(self, case: AttentionCase) -> None:
        most = replace(case, lens=(200,) * self.SIZE)
        x = {name: torch.zeros_like(tensor) for name, tensor in most.inputs().items()}
        x["req_to_token"] = torch.cat([x["req_to_token"][:1], x["req_to_token"]])
        runner = model_runner(case, x)
        self.backend = backend = CudaBlockAttentionBackend(runner)
        self._block, self._rows = case.block, self.SIZE * case.block
        backend.init_cuda_graph_state(self.SIZE, self._rows)
        self._registry: CudaGraphBufferRegistry = build_decode_registry(
            device=torch.device("cpu"),
            max_bs=self.SIZE,
            max_num_token=self._rows,
            seq_len_fill_value=backend.get_cuda_graph_seq_len_fill_value(),
            cache_loc_dtype=torch.int64,
            share_pool=False,
        )
        names = ("positions", "req_pool_indices", "seq_lens")
        self._static = x | {name: self._registry.get_slot(name).buffer for name in names}
        self._static["seq_lens"].fill_(backend.get_cuda_graph_seq_len_fill_value())
        batch, qkv = forward_batch(self._static), x["qkv"][0]
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        with RecordedGraph() as graph:
            backend.init_forward_metadata_in_graph(batch)
            self.outs = run_layers(backend, runner.model.layers, qkv, batch)
        self.graph = graph

    def addresses(self) -> list[int]:
        """Of everything that the graph allocated."""
        return [out.data_ptr() for *_, out in self.graph.calls]

    def replay(self, case: AttentionCase) -> list[Tensor]:
        """Outputs of the case's own rows, from a replay after SGLang's copy into the buffers."""
        x, static = case.inputs(), self._static
        static["qkv"].zero_()
        static["qkv"][:, : x["qkv"].shape[1]] = x["qkv"]
        for name in ("q_norm_weight", "k_norm_weight", "cos_sin_cache", "k_pool", "v_pool"):
            static[name][: x[name].shape[0]] = x[name]
        table = x["req_to_token"]  # row 0 is the padding's
        static["req_to_token"].zero_()
        static["req_to_token"][1 : 1 + table.shape[0], : table.shape[1]] = table
        batch = forward_batch(x | {"req_pool_indices": x["req_pool_indices"] + 1})
        self._registry.fill_from(
            batch,
            raw_bs=batch.batch_size,
            padded_bs=self.SIZE,
            raw_num_tokens=batch.batch_size * self._block,
            padded_num_tokens=self._rows,
        )
        self.backend.init_forward_metadata_out_graph(batch)
        for out in self.outs:
            out.fill_(torch.nan)
        self.graph.replay()
        return [out[: batch.batch_size * self._block] for out in self.outs]
