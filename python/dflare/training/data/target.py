"""The frozen target: its tapped hidden states, its embedding and its head."""

from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dflare.errors import UnsupportedError
from dflare.training.data.slot_cache import ATTENTION
from dflare.training.errors import ConfigError

DEMO_TARGET = "demo"
# Norms that are weight times the normed input, rounded in between or not.
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


@dataclass(frozen=True)
class TargetOutput:
    """What a forward pass of the target gives to training.

    Args:
        taps: ``[N, S, T*H]``, outputs of the tapped layers side by side (Hugging Face's
            ``hidden_states[id + 1]``).
        final: ``[N, S, H]``, the normed final hidden states that the head reads.
    """

    taps: Tensor
    final: Tensor


class Target:
    """A Hugging Face causal LM, frozen.

    Args:
        model: The model, on its device and in its dtype.
        taps: Ids of the tapped layers, none where only text is wanted.

    Raises:
        ConfigError: A tap that the target has no layer for, or layers that cannot be found.
        UnsupportedError: Logits that are more than a product with the head.
    """

    def __init__(self, model: PreTrainedModel, taps: tuple[int, ...] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.taps = taps
        layers = getattr(self.decoder, "layers", ())
        if taps and not len(layers):
            raise ConfigError(
                f"the target's {type(self.decoder).__name__} does not keep its layers in `layers` "
                f"but in one of {', '.join(name for name, _ in self.decoder.named_children())}, so "
                "they cannot be tapped; choose a target of the Llama or Qwen kind"
            )
        if taps and not 0 <= min(taps) <= max(taps) < len(layers):
            raise ConfigError(
                f"drafter.taps is {list(taps)}, but the target has layers 0 to {len(layers) - 1}; "
                "choose taps within them, or give their number and let them be spread"
            )
        for key in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
            if getattr(self.config, key, None) not in (None, 0, 1):
                raise UnsupportedError(
                    f"the target's config has {key} = {getattr(self.config, key)}; the drafter "
                    "reads the head's logits as they are, so such a target is not supported"
                )
        self._seen: dict[int, Tensor] = {}
        for tap in taps:
            layers[tap].register_forward_hook(self._remember(tap))

    def _remember(self, tap: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.dtype

    @property
    def head(self) -> Tensor:
        """Weight of the language-model head, ``[V, H]``."""
        return self.model.get_output_embeddings().weight

    def embed(self, ids: Tensor) -> Tensor:
        """Embed tokens as the target does, scaling included: ``[...]`` to ``[..., H]``."""
        return self.model.get_input_embeddings()(ids)

    @torch.no_grad()
    def read(self, ids: Tensor, **kwargs: Any) -> TargetOutput:
        """Run the layers, not the head, over whole sequences or cached ones.

        Args:
            ids: ``[N, S]`` int64. Without a mask attention is causal, so padding belongs at the
                end, where no real token sees it.
            kwargs: Cache, positions and mask, handed to the model.

        Returns:
            Tapped and final states.
        """
        # In the target's own dtype, as it is served, also while a drafter trains under autocast.
        with torch.autocast(ids.device.type, enabled=False):
            final = self.decoder(input_ids=ids, **kwargs).last_hidden_state
        taps = (
            torch.cat([self._seen[tap] for tap in self.taps], -1) if self.taps else final[..., :0]
        )
        self._seen.clear()
        return TargetOutput(taps, final)


def compute_dtype(device: torch.device, wanted: str | None = None) -> torch.dtype:
    """What products are computed in, of a drafter that is trained as of a target that writes.

    Args:
        device: Where.
        wanted: ``bfloat16`` or ``float32``; none for bfloat16 wherever the hardware multiplies it.
    """
    if wanted is not None:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]
    native = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native or torch.cpu._is_amx_tile_supported() else torch.float32


def choose_device(device: str) -> str:
    """Settle what computes.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.

    Returns:
        ``cpu`` or ``cuda``.

    Raises:
        ConfigError: Another name, or CUDA is asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"the device is {device!r}, expected cpu, cuda or auto")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device is cuda, but PyTorch sees no GPU; choose cpu (--device cpu, or "
            "run.device=cpu in a training configuration)"
        )
    return device


def target_path(name: str) -> str:
    """Resolve ``demo`` to the demo target's folder; other names stay as they are."""
    if name != DEMO_TARGET:
        return name
    from dflare.demo import demo_target

    return str(demo_target())


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a target's tokenizer.

    Args:
        path: Folder or hub id, from :func:`target_path`.

    Raises:
        ConfigError: There is none, or none that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer of target {path!r} cannot be loaded ({error}); save it beside the "
            "weights"
        ) from error


def load_target(
    name: str,
    taps: tuple[int, ...] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attention: str = ATTENTION,
) -> Target:
    """Load a target from a folder, from the Hugging Face hub, or the demo's.

    Args:
        name: Folder, hub id or ``demo``.
        taps: Ids of the layers to tap.
        device: Where it runs.
        dtype: What it computes in.
        attention: Attention function; transformers' ``sdpa`` for models that ours refuses.

    Returns:
        The frozen target.

    Raises:
        ConfigError: No such model.
    """
    path = target_path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, device_map=None
        )
    except (OSError, ValueError) as error:
        hint = "" if Path(path).exists() else "; no such folder or hub repository, check the name"
        raise ConfigError(f"target {name!r} cannot be loaded: {error}{hint}") from error
    torch.nn.Module.to(model, device)
    if model.device.type == "cpu":
        _use_cpu_kernels(model)
    return Target(model, taps)


def _use_cpu_kernels(model: nn.Module) -> None:
    """Run the linear layers and norms of a frozen model on our kernels.

    Products are twice as fast as MKL's on some CPUs; but not in bfloat16 where there is AMX, which
    Torch's products of the many rows of a batch use better. Norms are one pass in place of six.
    """
    from dflare.ops import add_rms_norm, linear

    multiplied = {torch.float32}
    if not torch.cpu._is_amx_tile_supported():
        multiplied.add(torch.bfloat16)

    def project(layer: nn.Linear, x: Tensor) -> Tensor:
        return linear(x, layer.weight, layer.bias)

    def norm(layer: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return add_rms_norm(rows, None, layer.weight, layer.variance_epsilon).view(x.shape)

    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if type(module) is nn.Linear and weight.dtype in multiplied:
            module.forward = MethodType(project, module)  # type: ignore[method-assign]
        elif type(module).__name__ in _NORMS and weight.dtype in (torch.float32, torch.bfloat16):
            module.forward = MethodType(norm, module)  # type: ignore[method-assign]
