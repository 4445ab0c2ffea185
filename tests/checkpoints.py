"""Small random drafters and targets on disk, for every test that needs one.

    target = write_random_target(tmp_path / "target", num_layers=4)
    draft = write_random_draft(tmp_path / "draft", num_target_layers=4)

The defaults of both fit together: hidden size 64, the same vocabulary, the mask token `<|mask|>`.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from dflare.checkpoint import DraftConfig, expected_tensors, make_config, spread_taps

VOCAB_SIZE = 512
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|mask|>", "<|turn|>")
PAD, BOS, EOS, MASK, TURN = range(len(SPECIAL_TOKENS))
CHAT_TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|eos|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
_ANGELSPEC_NAMES = {"hidden_norm.weight": "context_norm.weight", "norm.weight": "final_norm.weight"}


def random_draft_config(
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 96,
    num_target_layers: int = 8,
    taps: tuple[int, ...] | None = None,
    block_size: int = 4,
    mask_token_id: int = MASK,
    vocab_size: int = VOCAB_SIZE,
    dtype: str = "float32",
    **more: Any,
) -> DraftConfig:
    """Return a small configuration; `more` are other fields of DraftConfig.

    Three taps are spread over the target; a shallow one is tapped wherever it can be.
    """
    if taps is None:
        roomy = num_target_layers > 5
        taps = spread_taps(num_target_layers, 3) if roomy else tuple(range(num_target_layers - 1))
    values = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope": {"theta": 10000.0},
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size,
        "block_size": block_size,
        "mask_token_id": mask_token_id,
        "target_layer_ids": tuple(taps),
        "num_target_layers": num_target_layers,
        "layer_types": ("full_attention",) * num_layers,
        "dtype": dtype,
    }
    return make_config({**values, **more}, "random_draft_config")


def random_tensors(config: DraftConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights by AngelSlim name: norms near 1, matrices that keep the scale."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        if name == "d2t":
            ids = torch.randperm(config.vocab_size, generator=generator)[: shape[0]].sort().values
            tensors[name] = ids - torch.arange(shape[0])
            continue
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 2 and name != "layer_fusion_weights":
            values = values * shape[1] ** -0.5
        tensors[name] = values.to(getattr(torch, config.dtype))
    return tensors


def write_random_draft(
    folder: Path,
    *,
    seed: int = 0,
    dialect: Literal["angelslim", "angelspec", "vllm"] = "angelslim",
    shards: int = 1,
    config: DraftConfig | None = None,
    **settings: Any,
) -> Path:
    """Write a random drafter.

    Args:
        folder: Made if it is not there.
        seed: Of the weights.
        dialect: The way in which it is written.
        shards: Number of safetensors files; with an index if there are several.
        config: What to write; default `random_draft_config(**settings)`.
        settings: Arguments of `random_draft_config`.

    Returns:
        The folder.
    """
    config = config or random_draft_config(**settings)
    tensors = random_tensors(config, seed)
    if dialect == "angelspec":
        tensors = {_ANGELSPEC_NAMES.get(name, name): value for name, value in tensors.items()}
        embedding = torch.zeros(config.vocab_size, config.hidden_size)
        tensors["embed_tokens.weight"] = embedding.to(getattr(torch, config.dtype))
    elif dialect == "vllm":
        tensors = {f"model.{name}": value for name, value in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(config_content(config, dialect), indent=1)
    (folder / "config.json").write_text(content, encoding="utf-8")
    write_tensors(folder, tensors, shards)
    return folder


def config_content(config: DraftConfig, dialect: str) -> dict[str, Any]:
    """Return config.json of a drafter as the programs of a dialect write it."""
    content = config.to_dict()
    if dialect == "angelslim":
        return content
    settings = content.pop("dflash_config")
    if dialect == "angelspec":
        content |= {
            **settings,
            "architectures": ["DFlashDraftModel"],
            "model_type": "dflash",
            "model_arch": "dflare",
            "num_target_layers": config.num_taps,
            "target_num_hidden_layers": config.num_target_layers,
            "target_hidden_size": config.hidden_size,
            "draft_vocab_size": config.vocab_size,
        }
    else:
        content |= {"architectures": ["DFlareQwen3Model"], "dflare_config": settings}
    return content


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write weights as one file, or as several with an index as transformers does."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_random_target(
    folder: Path,
    *,
    architecture: Literal["llama", "qwen3"] = "llama",
    hidden_size: int = 64,
    num_layers: int = 8,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    intermediate_size: int = 96,
    vocab_size: int = VOCAB_SIZE,
    max_position_embeddings: int = 4096,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a small random target with a tokenizer, as `save_pretrained` does.

    Its greedy answers vary: the head is its own and scaled up, so that logits are well apart and
    the most likely token depends on the whole context.

    Returns:
        The folder.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[architecture]
    config = config_class(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                values = 1 + 0.1 * values
            elif name == "lm_head.weight":
                values *= 4 * hidden_size**-0.5
            elif "embed" not in name:
                values *= weight.shape[1] ** -0.5
            weight.copy_(values)
    model.save_pretrained(folder)
    byte_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def byte_tokenizer(vocab_size: int = VOCAB_SIZE) -> Any:
    """Return a byte-level tokenizer with a chat template that encodes and decodes any text.

    Args:
        vocab_size: At least 261: the special tokens, one token a byte, then pairs of letters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    lower = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pairs = [(first, second) for first in ["Ġ", *lower] for second in lower]
    pairs = pairs[: vocab_size - len(SPECIAL_TOKENS) - len(letters)]
    tokens = [*SPECIAL_TOKENS, *letters, *(first + second for first, second in pairs)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
