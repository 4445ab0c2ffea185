"""FlashInfer's sampling and renormalisation, SGLang's default on CUDA."""

import torch

from .table import launch, stand_in


def install() -> None:
    """Replace the functions that SGLang looks up in `flashinfer.sampling` when it first samples."""
    import flashinfer.sampling as sampling

    sampling.top_k_renorm_probs = _renorm("flashinfer::top_k_renorm_probs")
    sampling.top_p_renorm_probs = _renorm("flashinfer::top_p_renorm_probs")
    sampling.min_p_sampling_from_probs = _min_p_sampling
    sampling.top_k_top_p_sampling_from_probs = _top_k_top_p_sampling


def _per_row(limit, probs: torch.Tensor) -> torch.Tensor:
    if isinstance(limit, torch.Tensor):
        return limit
    return torch.full((len(probs),), limit, device=probs.device)


def _renorm(name: str):
    def call(probs: torch.Tensor, limit) -> torch.Tensor:
        out = torch.empty_like(probs)
        launch(name, out, probs, _per_row(limit, probs))
        return out

    return call


def _min_p_sampling(probs: torch.Tensor, min_p, **unused) -> torch.Tensor:
    return _sampling("flashinfer::min_p_sampling_from_probs", probs, _per_row(min_p, probs))


def _top_k_top_p_sampling(probs: torch.Tensor, top_k, top_p, filter_apply_order) -> torch.Tensor:
    assert filter_apply_order == "joint", filter_apply_order
    name = "flashinfer::top_k_top_p_sampling_from_probs"
    return _sampling(name, probs, _per_row(top_k, probs), _per_row(top_p, probs))


def _sampling(name: str, probs: torch.Tensor, *limits: torch.Tensor) -> torch.Tensor:
    tokens = torch.empty(len(probs), dtype=torch.int32, device=probs.device)
    # The kernel draws from its own generator; torch's for the device keeps runs repeatable.
    coins = torch.rand(len(probs), device=probs.device)
    launch(name, tokens, probs, coins, *limits)
    return tokens


def _within_top_k(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    order = probs.argsort(-1, descending=True).argsort(-1)
    return order < top_k[:, None]


def _within_top_p(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    values, order = probs.sort(-1, descending=True)
    kept = values.cumsum(-1) - values < top_p[:, None]
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _draw(probs: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    sums = probs.cumsum(-1)
    return (sums > coins[:, None] * sums[:, -1:]).int().argmax(-1)


@stand_in("flashinfer::top_k_renorm_probs", writes="out")
def _top_k_renorm(out, probs, top_k) -> None:
    kept = probs * _within_top_k(probs, top_k)
    out.copy_(kept / kept.sum(-1, keepdim=True))


@stand_in("flashinfer::top_p_renorm_probs", writes="out")
def _top_p_renorm(out, probs, top_p) -> None:
    kept = probs * _within_top_p(probs, top_p)
    out.copy_(kept / kept.sum(-1, keepdim=True))


@stand_in("flashinfer::min_p_sampling_from_probs", writes="tokens")
def _draw_min_p(tokens, probs, coins, min_p) -> None:
    least = min_p[:, None] * probs.amax(-1, keepdim=True)
    tokens.copy_(_draw(probs * (probs >= least), coins))


@stand_in("flashinfer::top_k_top_p_sampling_from_probs", writes="tokens")
def _draw_top_k_top_p(tokens, probs, coins, top_k, top_p) -> None:
    tokens.copy_(_draw(probs * _within_top_k(probs, top_k) * _within_top_p(probs, top_p), coins))
