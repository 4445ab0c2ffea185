"""DFlare by its paper's equations (arXiv 2606.02091), in plain PyTorch and transformers.

Independent of the package: it reads config.json and the weights itself. Slow and obvious.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class ReferencePair:
    """A target and its drafter in one dtype on the CPU."""

    def __init__(self, target: Path | str, draft: Path | str, dtype=torch.float32) -> None:
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).eval()
        self.config = json.loads((Path(draft) / "config.json").read_text())
        weights: dict[str, torch.Tensor] = {}
        for file in sorted(Path(draft).glob("*.safetensors")):
            weights |= load_file(file)
        # Token id less row of the draft head, of a drafter that drafts some tokens alone.
        d2t = weights.pop("d2t", None)
        self.drafted = None if d2t is None else d2t + torch.arange(len(d2t))
        self.w = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.taps = self.config["dflash_config"]["target_layer_ids"]
        self.mask = self.config["dflash_config"]["mask_token_id"]
        self.block_size = self.config["block_size"]
        self.layers = self.config["num_hidden_layers"]
        self.heads = self.config["num_attention_heads"]
        self.kv_heads = self.config["num_key_value_heads"]
        self.head_dim = self.config["head_dim"]

    @torch.no_grad()
    def tapped_states(self, tokens: list[int]) -> torch.Tensor:
        """Target hidden states [N, T, H] of the tokens at the taps: `hidden_states[id + 1]`."""
        states = self.target.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.stack([states[tap + 1][0] for tap in self.taps], dim=1)

    @torch.no_grad()
    def propose(
        self,
        states: torch.Tensor,
        anchor: int,
        length: int,
        first: int = 0,
        width: int | None = None,
    ) -> torch.Tensor:
        """Logits [B - 1, V] of slots 1 .. B-1 for the block that begins at position `length`.

        Args:
            states: [>= length, T, H]; only rows first .. length - 1, the context, are used.
            anchor: token at position `length`.
            first: first context position that the drafter may see (a draft window).
            width: B, if it is not the drafter's block size.
        """
        context = states[first:length]
        block = torch.tensor([anchor] + [self.mask] * ((width or self.block_size) - 1))
        x = self.target.get_input_embeddings()(block)
        for d in range(self.layers):
            name = f"layers.{d}."
            h = self._norm(x, self.w[name + "input_layernorm.weight"])
            x = x + self._attention(d, h, context, length)
            h = self._norm(x, self.w[name + "post_attention_layernorm.weight"])
            gate = torch.nn.functional.silu(h @ self.w[name + "mlp.gate_proj.weight"].T)
            up = h @ self.w[name + "mlp.up_proj.weight"].T
            x = x + (gate * up) @ self.w[name + "mlp.down_proj.weight"].T
        x = self._norm(x, self.w["norm.weight"])
        logits = self.target.lm_head(x[1:])
        if self.drafted is not None:
            others = torch.ones(logits.shape[-1], dtype=torch.bool)
            others[self.drafted] = False
            logits = logits.masked_fill(others, float("-inf"))
        return logits

    def _attention(self, d: int, h: torch.Tensor, context: torch.Tensor, n: int) -> torch.Tensor:
        def project(name: str, value: torch.Tensor) -> torch.Tensor:
            key = f"layers.{d}.self_attn.{name}."
            out = value @ self.w[key + "weight"].T
            return (out + self.w.get(key + "bias", 0)).unflatten(-1, (-1, self.head_dim))

        fused = self._fuse(d, context)
        q_norm = self.w[f"layers.{d}.self_attn.q_norm.weight"]
        k_norm = self.w[f"layers.{d}.self_attn.k_norm.weight"]
        block = torch.arange(n, n + len(h))
        q = self._rope(self._norm(project("q_proj", h), q_norm), block)
        k = torch.cat([project("k_proj_target", fused), project("k_proj", h)])
        keys = torch.arange(n - len(context), n + len(h))
        k = self._rope(self._norm(k, k_norm), keys)
        v = torch.cat([project("v_proj_target", fused), project("v_proj", h)])
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.head_dim**-0.5
        scores = scores.masked_fill(~self._visible(d, block, keys), float("-inf"))
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        key = f"layers.{d}.self_attn.o_proj."
        return out @ self.w[key + "weight"].T + self.w.get(key + "bias", 0)

    def _visible(self, d: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Full layers see everything; sliding ones are causal, `sliding_window` tokens wide."""
        distance = queries[:, None] - keys[None, :]
        if self.config["layer_types"][d] == "full_attention":
            return torch.ones_like(distance, dtype=torch.bool)
        return (distance >= 0) & (distance < self.config["sliding_window"])

    def _fuse(self, d: int, states: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(self.w["layer_fusion_weights"][d].float(), dim=-1).to(states.dtype)
        return self._norm(torch.einsum("t,nth->nh", p, states), self.w["hidden_norm.weight"])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        variance = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + self.config["rms_norm_eps"])).to(x.dtype) * weight

    def _rope(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = self.head_dim // 2
        inverse = self.config["rope_theta"] ** (-torch.arange(half).double() / half)
        angle = (positions.double()[:, None] * inverse).float()[:, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
