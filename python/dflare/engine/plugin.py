"""Entry point `sglang.srt.plugins`: makes `--speculative-algorithm DFLARE` known to SGLang.

SGLang calls `register` early in every process, before it parses arguments, so this module
imports nothing heavy until then, and nothing here needs a device.
"""

from dflare.engine.names import ALGORITHM, ATTENTION_BACKEND
from dflare.engine.version import check_sglang_version
from dflare.errors import UnsupportedError


def register() -> None:
    """Register the algorithm, the attention backend and the hooks."""
    try:
        check_sglang_version()
    except UnsupportedError as error:
        _register_refusal(error)
        return
    from dflare.engine.algorithm import register_algorithm
    from dflare.engine.hooks import register_hooks

    register_algorithm()
    _register_attention_backend()
    register_hooks()


def _register_refusal(error: UnsupportedError) -> None:
    """Under an untested SGLang keep the name, so that asking for it gives our message.

    Without this the user would only read "unknown speculative algorithm", and everybody who
    does not use DFLARE must not be bothered at all.
    """
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    def refuse(_server_args) -> None:
        raise error

    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=True, validate_server_args=refuse)(
        refuse
    )


def _register_attention_backend() -> None:
    """Allow the backend `dflare` for the draft, and for the target on the CPU platform."""
    from sglang.srt.arg_groups.choices import (
        add_attention_backend_choices,
        add_draft_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    add_attention_backend_choices([ATTENTION_BACKEND])
    add_draft_attention_backend_choices([ATTENTION_BACKEND])

    @register_attention_backend(ATTENTION_BACKEND)
    def _create(model_runner):
        # Here and not above: this loads the operator library, which only its users need.
        if str(model_runner.device) == "cpu":
            from dflare.cpu.attention import CpuAttentionBackend

            return CpuAttentionBackend(model_runner)
        from dflare.engine.cuda_attention import CudaBlockAttentionBackend

        return CudaBlockAttentionBackend(model_runner)
