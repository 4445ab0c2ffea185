"""The kernels of an op as its launcher runs them, on the emulator."""

import torch
from emulated import (
    AttentionScheduleParams,
    BlockAttentionParams,
    ContextKvOutput,
    Emulator,
    FuseNormParams,
    KvProjectWriteParams,
    Memory,
    NormRopeWriteParams,
    emulator,
)
from kernel_cases import AppendCase, AttentionCase
from torch import Tensor


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def attention_output(
    case: AttentionCase,
    seed: int = 0,
    on: Emulator | None = None,
    sm_count: int = 4,
    scheduled_lens: tuple[int, ...] | None = None,
) -> Tensor:
    """[layers, rows, heads * head_dim], with one schedule made for `scheduled_lens` if given.

    As in a drafter, the kernel before each layer's attention writes its qkv.
    """
    emu = on or emulator(case.dtype, case.head_dim)
    with emu.memory() as memory:
        return _attend(case, seed, emu, memory, sm_count, scheduled_lens).clone()


def _attend(
    case: AttentionCase,
    seed: int,
    emu: Emulator,
    memory: Memory,
    sm_count: int,
    scheduled_lens: tuple[int, ...] | None,
) -> Tensor:
    batch = len(case.lens)
    x = {name: memory.copy(name, tensor) for name, tensor in case.inputs().items()}
    plan = emu.plan_attention(
        batch, case.block, case.heads, case.kv_heads, sm_count, shared=228 << 10
    )
    schedule = memory.empty("schedule", (emu.schedule_size(plan),), torch.int32)
    partials = memory.empty("partials", (emu.partials_size(plan),), torch.float32)
    scheduled_lens = scheduled_lens or case.lens
    scheduled_plan = emu.plan_attention(
        len(scheduled_lens), case.block, case.heads, case.kv_heads, sm_count, shared=228 << 10
    )
    assert emu.schedule_size(scheduled_plan) == emu.schedule_size(plan)
    lens = memory.copy("lens", torch.tensor(scheduled_lens).to(x["seq_lens"]))
    emu.launch(
        "block_attention_schedule",
        AttentionScheduleParams(
            seq_lens=lens.data_ptr(),
            seq_lens_64bit=case.lens_64bit,
            batch_size=len(scheduled_lens),
            head_dim=case.head_dim,
            window=case.window,
            plan=scheduled_plan,
            schedule=schedule.data_ptr(),
        ),
    )
    shape = (case.layers, batch * case.block, case.heads * case.head_dim)
    out = memory.empty("out", shape, case.dtype)
    for layer in range(case.layers):
        qkv = memory.empty("qkv", tuple(x["qkv"][layer].shape), case.dtype)
        emu.produce(qkv, x["qkv"][layer])
        params = BlockAttentionParams(
            element=emu.element,
            qkv=qkv.data_ptr(),
            qkv_stride=qkv.stride(0),
            q_norm_weight=x["q_norm_weight"].data_ptr(),
            k_norm_weight=x["k_norm_weight"].data_ptr(),
            eps=1e-6,
            cos_sin=x["cos_sin_cache"].data_ptr(),
            rotary=case.rotary,
            positions=x["positions"].data_ptr(),
            k_pool=x["k_pool"].data_ptr(),
            v_pool=x["v_pool"].data_ptr(),
            k_stride=x["k_pool"].stride(0),
            v_stride=x["v_pool"].stride(0),
            req_to_token=x["req_to_token"].data_ptr(),
            req_to_token_stride=x["req_to_token"].stride(0),
            req_pool_indices=x["req_pool_indices"].data_ptr(),
            seq_lens=x["seq_lens"].data_ptr(),
            seq_lens_64bit=case.lens_64bit,
            batch_size=batch,
            block_size=case.block,
            num_heads=case.heads,
            kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            window=case.window,
            causal=case.causal,
            scale=case.scale,
            plan=plan,
            schedule=schedule.data_ptr(),
            partials=partials.data_ptr(),
            out=out[layer].data_ptr(),
            overlap_launch=True,
        )
        emu.launch("block_attention", params)
    emu.synchronize(seed)
    return out


def attention_error(
    case: AttentionCase,
    seed: int = 0,
    on: Emulator | None = None,
    sm_count: int = 4,
    scheduled_lens: tuple[int, ...] | None = None,
) -> float:
    return case.error(attention_output(case, seed, on, sm_count, scheduled_lens))


def append_error(
    case: AppendCase, seed: int = 0, on: Emulator | None = None, fused: bool = True
) -> float:
    """Error of the path with the fused projection, or of the one with a GEMM (PyTorch's)."""
    emu = on or emulator(case.dtype, case.head_dim)
    with emu.memory() as memory:
        return case.error(*_append(case, seed, emu, memory, fused))


def _append(
    case: AppendCase, seed: int, emu: Emulator, memory: Memory, fused: bool
) -> tuple[Tensor, Tensor]:
    x = {name: memory.copy(name, tensor) for name, tensor in case.inputs().items()}
    # The kernel before, a verification, writes the states.
    target_hidden = memory.empty("target_hidden", tuple(x["target_hidden"].shape), case.dtype)
    emu.produce(target_hidden, x["target_hidden"])
    states = memory.empty("fused", (case.layers, case.num_rows, case.hidden), case.dtype)
    compact_rows = None
    if case.commit_lens is not None:
        compact_rows = memory.empty("compact_rows", (1 + case.num_rows,), torch.int32)
    emu.launch(
        "fuse_norm",
        FuseNormParams(
            element=emu.element,
            target_hidden=target_hidden.data_ptr(),
            target_hidden_stride=target_hidden.stride(0),
            probs=x["fusion_probs"].data_ptr(),
            norm_weight=x["norm_weight"].data_ptr(),
            eps=1e-6,
            commit_lens=address(x.get("commit_lens")),
            num_rows=case.num_rows,
            block_size=case.block,
            num_taps=case.taps,
            num_layers=case.layers,
            hidden=case.hidden,
            fused=states.data_ptr(),
            compact_rows=address(compact_rows),
            tokens_ahead=2,
            overlap_launch=True,
        ),
    )
    out = ContextKvOutput(
        kv_bias=address(x.get("kv_bias")),
        k_norm_weight=x["k_norm_weight"].data_ptr(),
        k_norm_eps=1e-5,
        cos_sin=x["cos_sin_cache"].data_ptr(),
        rotary=case.rotary,
        positions=x["positions"].data_ptr(),
        cache_loc=x["cache_loc"].data_ptr(),
        compact_rows=address(compact_rows),
        num_rows=case.num_rows,
        num_layers=case.layers,
        kv_heads=case.kv_heads,
    )
    for layer in range(case.layers):
        out.k_pools[layer] = x["k_pools"][layer].data_ptr()
        out.v_pools[layer] = x["v_pools"][layer].data_ptr()
        out.k_strides[layer] = x["k_pools"].stride(1)
        out.v_strides[layer] = x["v_pools"].stride(1)
    if fused:
        project = KvProjectWriteParams(
            element=emu.element,
            head_dim=case.head_dim,
            hidden=case.hidden,
            fused=states.data_ptr(),
            kv_weight=x["kv_weight"].data_ptr(),
            overlap_launch=True,
            out=out,
        )
        emu.launch("kv_project_write", project)
    else:
        emu.synchronize(seed)
        kv = memory.copy("kv", torch.bmm(states, x["kv_weight"].transpose(1, 2)))
        write = NormRopeWriteParams(
            element=emu.element, head_dim=case.head_dim, kv=kv.data_ptr(), out=out
        )
        emu.launch("norm_rope_write", write)
    emu.synchronize(seed)
    return x["k_pools"].clone(), x["v_pools"].clone()
