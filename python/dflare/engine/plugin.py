"""Entry point `sglang.srt.plugins`: makes `--speculative-algorithm DFLARE` known to SGLang.

SGLang calls `register` early in every process, before it parses arguments, so this module
imports nothing heavy until then, and nothing here needs a device.
"""

from dflare.engine.version import check_sglang_version
from dflare.errors import UnsupportedError

ALGORITHM = "DFLARE"
ATTENTION_BACKEND = "dflare"


def register() -> None:
    """Register the algorithm, the attention backend and the hooks."""
    try:
        check_sglang_version()
    except UnsupportedError as error:
        _register_refusal(error)
        return
    from dflare.engine import hooks
    from dflare.engine.algorithm import register_algorithm
    from dflare.engine.attention import register_backend

    register_algorithm()
    register_backend()
    hooks.register_hooks()


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

