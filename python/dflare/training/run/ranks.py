"""One process or many: started plainly, or by torchrun."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dflare.training.data.target import choose_device
from dflare.training.drafter.model import Drafter


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Args:
        rank: From 0.
        world: How many there are.
        device: Of this rank.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, values: list[float]) -> list[float]:
        """Return the largest of each value over all ranks, without waiting for a GPU."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def wrap(self, drafter: Drafter, shard: bool) -> nn.Module:
        """Make a drafter train on all ranks.

        Both ways average gradients over ranks, so losses are scaled by ``world`` to add them up.

        Args:
            drafter: On this rank's device.
            shard: Shard weights, gradients and optimizer state (FSDP2) instead of copying them.

        Returns:
            The module to call.
        """
        if self.world == 1:
            return drafter
        if shard:
            from torch.distributed.fsdp import fully_shard

            # One unit: a drafter is small beside its optimizer state, which is what gets sharded.
            fully_shard(drafter)
            return drafter
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(drafter, device_ids=ids, gradient_as_bucket_view=True)


def start_ranks(device: str) -> Ranks:
    """Join the process group that torchrun describes in the environment, if it does.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        ConfigError: A device that is not there.
    """
    device = choose_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    if world > 1 and not dist.is_initialized():
        # Tensors on the CPU go over gloo, so that agreeing on a number does not wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    return Ranks(dist.get_rank() if world > 1 else 0, world, where)
