"""Which targets run as one operator on the CPU, and that nobody can tell from what they answer."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import write_random_draft, write_random_target
from engines import ALL_ARMS, forked_engines, proposals, running_engine
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.lora.layers import BaseLayerWithLoRA
from torch import nn

from dflare.cpu import decoder as cpu_decoder
from dflare.cpu.decoder import DecoderForward, look_at, use_decoder_layers
from dflare.cpu.layers import CpuLinearMethod

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
RANKS = SimpleNamespace(tp_size=1, pp_size=1)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.quant_method = CpuLinearMethod()


def module(**members: Any) -> nn.Module:
    made = nn.Module()
    for name, member in members.items():
        setattr(made, name, member)
    return made


@pytest.fixture
def body(monkeypatch) -> Any:
    """Two layers as SGLang builds them for a Llama."""
    monkeypatch.setattr(cpu_decoder, "get_parallel", lambda: RANKS)
    rotary = RotaryEmbedding(HEAD_DIM, HEAD_DIM, 64, 10000, True, torch.float32)
    rotary.cos_sin_cache = rotary.cos_sin_cache.float()

    def layer(i: int) -> nn.Module:
        attention = module(
            qkv_proj=Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            o_proj=Linear(HEADS * HEAD_DIM, HIDDEN),
            attn=RadixAttention(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, layer_id=i),
            rotary_emb=rotary,
        )
        return module(
            self_attn=attention,
            mlp=module(gate_up_proj=Linear(HIDDEN, 2 * WIDE), down_proj=Linear(WIDE, HIDDEN)),
            input_layernorm=RMSNorm(HIDDEN),
            post_attention_layernorm=RMSNorm(HIDDEN),
        )

    layers = nn.ModuleList(layer(i) for i in range(2))
    return module(layers=layers, norm=RMSNorm(HIDDEN), config=SimpleNamespace())


def _adapters(body):
    attention = body.layers[1].self_attn
    attention.qkv_proj = BaseLayerWithLoRA(attention.qkv_proj, None)


def _quantised(body):
    linear = body.layers[0].mlp.down_proj
    linear.quant_method = object()
    del linear.weight


def _head_norms_of_their_own_kind(body):
    for layer in body.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.LayerNorm(HEAD_DIM)


OTHERS = {
    "adapters": _adapters,
    "quantised": _quantised,
    "head norms": _head_norms_of_their_own_kind,
    "a hook": lambda body: body.layers[1].mlp.register_forward_hook(print),
    "a dtype without kernels": lambda body: body.half(),
    "a window in one layer": lambda body: setattr(
        body.layers[1].self_attn.attn, "sliding_window_size", 8
    ),
    "attention to what follows": lambda body: [
        setattr(layer.self_attn.attn, "attn_type", AttentionType.ENCODER_ONLY)
        for layer in body.layers
    ],
    "a bias behind attention": lambda body: setattr(
        body.layers[0].self_attn.o_proj, "bias", nn.Parameter(torch.ones(HIDDEN))
    ),
    "other rotations": lambda body: setattr(
        body.layers[0].self_attn.rotary_emb, "is_neox_style", False
    ),
    "odd columns": lambda body: setattr(body.layers[0].mlp, "down_proj", Linear(WIDE + 1, HIDDEN)),
}


def test_weights_of_plain_layers_are_the_models_own(body):
    weights, attention, rotary = look_at(body)
    assert weights.matrices[7] is body.layers[1].mlp.down_proj.weight
    assert weights.norms[-1] is body.norm.weight and not weights.biases
    assert attention is body.layers[0].self_attn.attn
    assert rotary is body.layers[0].self_attn.rotary_emb


@pytest.mark.parametrize("other", OTHERS)
def test_layers_that_do_something_else_are_left_to_sglang(body, other):
    OTHERS[other](body)
    assert look_at(body) is None


@pytest.mark.parametrize("ranks", [{"tp_size": 2}, {"pp_size": 2}], ids=str)
def test_several_ranks_are_left_to_sglang(body, ranks, monkeypatch):
    monkeypatch.setattr(cpu_decoder, "get_parallel", lambda: SimpleNamespace(**vars(RANKS) | ranks))
    assert look_at(body) is None


@pytest.mark.parametrize(
    ("where", "known"), [("llama", True), ("llama_eagle", False), ("torch_native_llama", False)]
)
def test_a_model_of_the_same_name_elsewhere_is_not_taken_for_one(body, where, known):
    def become(made: nn.Module, name: str) -> None:
        members = {"__module__": f"sglang.srt.models.{where}", "forward": None}
        made.__class__ = type(name, (nn.Module,), members)

    become(body, "LlamaModel")
    for layer in body.layers:
        become(layer, "LlamaDecoderLayer")
    use_decoder_layers(module(model=body))
    assert isinstance(body.forward, DecoderForward) == known


def test_embeddings_that_are_given_go_to_sglang(body, monkeypatch):
    monkeypatch.setattr(cpu_decoder, "get_attn_backend", SimpleNamespace)
    forward = DecoderForward(body, lambda *arguments: arguments)
    arguments = (torch.ones(3), torch.arange(3), None, torch.ones(3, HIDDEN), None)
    assert forward(*arguments) == arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "bfloat16"),  # norms of the heads, and float32: tests/ops/test_decoder_layers.py
        pytest.param("qwen3", "float32", marks=pytest.mark.long),
        pytest.param("llama", "float32", marks=pytest.mark.long),
        pytest.param("qwen3", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_the_same_bits_as_layer_by_layer(tmp_path, architecture, dtype):
    """Log-probs, and proposals, which the drafter makes of the layers' states."""
    target = write_random_target(tmp_path / "target", architecture=architecture, dtype=dtype)
    draft = write_random_draft(tmp_path / "draft", dtype=dtype)
    prompts = [[7 + i, *range(20, 30 + 9 * i)] for i in range(5)]
    greedy = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    hooks = [{"target_modules": ["model.norm"], "hook_factory": "engine_preload:look_on"}]
    results = []
    for way, more in {"as one operator": {}, "layer by layer": {"forward_hooks": hooks}}.items():
        with (
            forked_engines("off") as log,
            running_engine(
                target, draft, ALL_ARMS, dtype=dtype, log_level="info", **more
            ) as engine,
        ):
            answers = engine.generate(
                input_ids=prompts,
                sampling_params=greedy,
                rid=[f"{way} {i}" for i in range(len(prompts))],
                return_logprob=True,
                logprob_start_len=0,
            )
        assert f"the target's layers run {way}" in log.read_text()
        results.append(
            [
                (
                    answer["output_ids"],
                    answer["meta_info"]["input_token_logprobs"],
                    answer["meta_info"]["output_token_logprobs"],
                    [step["block"] for step in proposals(f"{way} {i}")],
                )
                for i, answer in enumerate(answers)
            ]
        )
    assert results[0] == results[1]
    assert all(blocks for *_, blocks in results[0])
