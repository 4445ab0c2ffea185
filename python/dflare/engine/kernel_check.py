"""Whether there are kernels for a drafter on this device, told before a model is loaded."""

import torch

from dflare import ops
from dflare.checkpoint import DraftConfig


def check_kernels(server_args, draft: DraftConfig) -> None:
    """Refuse a device, dtype or drafter that the operators would refuse at the first request.

    Args:
        server_args: SGLang's arguments, with the device settled.
        draft: the drafter's configuration.

    Raises:
        DFlareError: there are no kernels for the device, the dtype or the sizes.
    """
    from sglang.srt.configs.model_config import _get_and_verify_dtype

    device = torch.device(server_args.device)
    dtype = _get_and_verify_dtype({"dtype": draft.dtype}, server_args.dtype)
    ops.check_support(device, dtype, draft.head_dim)
    block = server_args.speculative_num_draft_tokens or server_args.speculative_dflash_block_size
    sizes = ops.DrafterSizes(
        layers=draft.num_hidden_layers,
        taps=draft.num_taps,
        hidden=draft.hidden_size,
        rotary=draft.rotary_dim,
        block=int(block or draft.block_size),
        group=draft.num_attention_heads // draft.num_key_value_heads,
    )
    ops.check_sizes(device, sizes)
