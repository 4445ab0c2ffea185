"""llama.cpp's own server as an arm of a sweep: the same model without SGLang.

It is a program of its own: `llama-server` (github.com/ggml-org/llama.cpp) on the PATH, and the
target as a GGUF file, which llama.cpp's `convert_hf_to_gguf.py` writes. An arm that lacks either is
left out, and the report says why.
"""

import shutil
from pathlib import Path

from bench.serving.server import BenchServer
from dflare.errors import DFlareError

PROGRAM = "llama-server"


class LlamaServer(BenchServer):
    """`llama-server`, ready when it is made; it has no counters that we read."""

    COMMAND = (PROGRAM, "--no-webui", "--no-cache-prompt")
    COUNTS_TOKENS = False

    def __init__(self, args: list[str], target: str, log: Path):
        """
        Args:
            args: Flags of `llama-server`, `--model FILE.gguf` among them.
            target: The folder that the GGUF file was made from, for its tokenizer.
            log: File for stdout and stderr.

        Raises:
            DFlareError: The program or the file is missing, or the server ended.
        """
        if shutil.which(PROGRAM) is None:
            raise DFlareError(
                f"{PROGRAM} is not on the PATH; build llama.cpp, or leave the arm out"
            )
        model = Path(args[args.index("--model") + 1])
        if not model.exists():
            raise DFlareError(
                f"{model} does not exist; write it with llama.cpp's convert_hf_to_gguf.py "
                f"{target} --outfile {model}"
            )
        self._target = target
        super().__init__(args, log)

    def generator_flags(self) -> list[str]:
        flags = ["--backend", "vllm", "--model", self._target, "--tokenizer", self._target]
        return [*flags, "--extra-request-body", '{"cache_prompt": false}']

    def counters(self) -> dict[str, float]:
        return {}
