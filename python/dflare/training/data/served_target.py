"""A target whose layers run in a server: here are only its embedding, final norm and head."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dflare.training.data.server_generator import ask_server, server_info
from dflare.training.data.state_files import new_name, read_states
from dflare.training.data.target import Target, TargetOutput, target_path
from dflare.training.errors import ConfigError


class ServedTarget(Target):
    """Reads through an SGLang server with ``DFLARE_STATES``, which may be on many GPUs.

    Args:
        name: Folder, hub id or ``demo``; of which only what is outside the layers is loaded.
        taps: Ids of the tapped layers.
        url: Of the server.
        folder: What its ``DFLARE_STATES`` names, as seen from here.
        device: Where the embedding and the head are.
        dtype: Theirs, and of the states that are read.

    Raises:
        ConfigError: The server taps other layers, or reuses prefixes of other requests.
        DFlareError: No server answers there.
    """

    def __init__(
        self,
        name: str,
        taps: tuple[int, ...],
        url: str,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        path = target_path(name)
        try:
            whole = AutoConfig.from_pretrained(path)
            config = copy.deepcopy(whole)
            config.get_text_config().num_hidden_layers = 0
            if getattr(config.get_text_config(), "layer_types", None):
                config.get_text_config().layer_types = []
            model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
        except (OSError, ValueError) as error:
            raise ConfigError(f"target {name!r} cannot be loaded: {error}") from error
        super().__init__(torch.nn.Module.to(model, device))
        self.config = whole.get_text_config()
        self.taps, self._url, self._folder = taps, url.rstrip("/"), folder
        self._check_server()

    def _check_server(self) -> None:
        info = server_info(self._url)
        found = info.get("return_aux_hidden_state_layer_ids")
        if found != list(self.taps) or not info.get("disable_radix_cache"):
            layers = " ".join(map(str, self.taps))
            raise ConfigError(
                f"the server at {self._url} taps layers {found}; to train on its states start it "
                "with DFLARE_STATES=FOLDER and --enable-return-aux-hidden-states "
                "--speculative-algorithm DFLASH "
                f"--return-aux-hidden-state-layer-ids {layers} --disable-radix-cache "
                "--chunked-prefill-size -1 --disable-cuda-graph"
            )

    def _read_one(self, ids: list[int]) -> Tensor:
        name = new_name()
        sampling = {"temperature": 0, "max_new_tokens": 1}
        body = {"rid": name, "input_ids": ids, "sampling_params": sampling}
        ask_server(self._url, body, "go on with --resume once it does")
        width = (len(self.taps) + 1) * self.config.hidden_size
        return read_states(self._folder, name, len(ids), width)

    def read(self, ids: Tensor, **kwargs: Any) -> TargetOutput:
        """As :meth:`Target.read` of whole sequences, by one request each, all at once.

        Raises:
            TrainingError: The server left no states.
            DFlareError: It did not answer.
        """
        with ThreadPoolExecutor(max(1, len(ids))) as pool:
            rows = list(pool.map(self._read_one, ids.tolist()))
        states = torch.stack(rows).to(self.device, self.dtype)
        width = len(self.taps) * self.config.hidden_size
        return TargetOutput(states[..., :width], states[..., width:])
