"""Entry point `sglang.srt.platforms`: SGLang on a plain CPU, with this package's CPU kernels.

SGLang's own CPU engine (`SGLANG_USE_CPU_ENGINE=1`) needs kernels that the PyPI wheel does not
carry. As an out-of-tree platform we make it take its torch-native paths instead, and provide
what has no such path (sglang/srt/platforms/interface.py).
"""

import gc
import os
import platform as host

import psutil
import torch
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import KVPoolKind, PlatformCapabilities

from dflare.engine.names import ALGORITHM, ATTENTION_BACKEND
from dflare.engine.own_platform import OwnPlatform

# Share of the memory that is free at start which weights and the KV pools may take, and a cap on
# the pools: SGLang's defaults suit a device that nothing else uses, and a CPU pool is zeroed at
# start, which takes about 3 s a GiB.
_MEM_FRACTION_STATIC = 0.5
_MAX_TOTAL_TOKENS = 32768
_BUILT_IN = "DFLASH"  # the one algorithm of SGLang's whose kernels this platform has


def activate() -> str | None:
    """Name the platform class where there is no accelerator and no other CPU engine asked for.

    Returns:
        The dotted name of the platform class, or None to stay out of the way.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or torch.cuda.is_available():
        return None
    others = ("xpu", "mps", "npu", "musa", "hpu")
    if any(getattr(getattr(torch, name, None), "is_available", bool)() for name in others):
        return None
    return "dflare.cpu.platform.CpuPlatform"


class CpuPlatform(OwnPlatform):
    """The host CPU: no Triton, no graphs, bfloat16 by default, attention by `dflare`'s own ops."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    # --- device ---------------------------------------------------------------------------

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device=None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def set_device(self, device) -> None:
        pass

    def get_device_name(self, device_id: int = 0) -> str:
        return host.processor() or host.machine()

    def get_device_uuid(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_capability(self, device_id: int = 0):
        return None

    def empty_cache(self) -> None:
        gc.collect()

    def synchronize(self) -> None:
        pass

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    # --- configuration --------------------------------------------------------------------

    def apply_server_args_defaults(self, server_args) -> None:
        """Choose for the user what a CPU needs, where the user chose nothing.

        Raises:
            ValueError: speculation that does not run here; SGLang itself asks the platform for some
                algorithms only, and NGRAM would fail later, without sgl_kernel's library.
        """
        algorithm = server_args.speculative_algorithm
        if algorithm and algorithm.upper() not in (ALGORITHM, _BUILT_IN, "NONE"):
            raise ValueError(
                f"--speculative-algorithm is {algorithm}; on a CPU without SGLang's own kernels "
                f"{ALGORITHM} and {_BUILT_IN} run: choose one of them, or serve without speculation"
            )
        # What SGLang itself has chosen for a CPU by now needs kernels that its wheel lacks.
        sglang_default = "torch_native" if host.machine() in ("aarch64", "arm64") else "intel_amx"
        if server_args.attention_backend in (None, sglang_default):
            server_args.attention_backend = ATTENTION_BACKEND
        # "auto" may choose float16, which our operators do not take. bfloat16 halves what a step
        # reads, and was the faster one on every processor measured, with AMX and without.
        if server_args.dtype == "auto":
            server_args.dtype = "bfloat16"
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = _MEM_FRACTION_STATIC
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = _MAX_TOTAL_TOKENS
        # An idle scheduler would keep a core busy that the user's other programs want.
        server_args.sleep_on_idle = True
        # There is no second stream to overlap with.
        server_args.disable_overlap_schedule = True
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", _cores_by_rank(server_args.tp_size))
        # For PyTorch's own operators in the scheduler, which are small: threads that spin at their
        # barriers slow a server beside other work by an order of magnitude (ours: csrc/cpu/team.h).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # When a process of the server has ended, SGLang waits 60 s for core dumps of the GPU and
        # 5 s for it to settle before it looks at the stacks.
        os.environ.setdefault("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "0")
        os.environ.setdefault("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "0")

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == _BUILT_IN  # DFLARE is settled as one, see dflare.engine.algorithm

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION_BACKEND

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION_BACKEND

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    # --- what has no torch-native path in SGLang ------------------------------------------

    def hooks(self):
        from dflare.cpu.hooks import CPU_HOOKS

        return CPU_HOOKS

    def get_kv_pool_cls(self, *, kind: KVPoolKind) -> type | None:
        from dflare.cpu.memory import CpuKVPool

        return CpuKVPool if kind == "mha" else None

    def get_speculative_cache_locs_fn(self):
        from dflare.cpu.memory import speculative_cache_locs

        return speculative_cache_locs

    def post_load_model(self, model: torch.nn.Module) -> None:
        from dflare.cpu.decoder import use_decoder_layers
        from dflare.cpu.layers import use_cpu_linear
        from dflare.cpu.memory import move_to_huge_pages

        use_cpu_linear(model)
        move_to_huge_pages(model)
        use_decoder_layers(model)

    def init_backend(self) -> None:
        """Called once in every worker process."""
        from dflare import ops
        from dflare.cpu.layers import register_cpu_forwards
        from dflare.cpu.memory import allow_record_stream_on_cpu

        ops.check_kernels_for(torch.device("cpu"))
        # Our operators read the rotary table in float32, whatever the model's dtype.
        os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")
        allow_record_stream_on_cpu()
        register_cpu_forwards(self.get_dispatch_key_name())


def _cores_by_rank(ranks: int) -> str:
    """Split the cores evenly over tensor-parallel ranks, as SGLANG_CPU_OMP_THREADS_BIND writes it.

    SGLang by itself refuses more ranks than there are NUMA nodes, and a laptop has one.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    if ranks == 1 or len(cores) < ranks:
        return "all"
    share = len(cores) // ranks
    groups = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
    return "|".join(",".join(map(str, group)) for group in groups)
