"""A platform that this package brings to SGLang, as the engine knows it; `dflare.cpu` has one."""

from typing import TYPE_CHECKING

from sglang.srt.platforms.interface import SRTPlatform

if TYPE_CHECKING:
    from dflare.engine.hooks import Hook


class OwnPlatform(SRTPlatform):
    """What such a platform adds to SGLang's interface."""

    def hooks(self) -> tuple["Hook", ...]:
        """What is to be replaced inside SGLang where the platform is active."""
        raise NotImplementedError


def own_platform() -> OwnPlatform | None:
    """The platform of this process if it is one of this package's."""
    from sglang.srt.platforms import current_platform

    return current_platform if isinstance(current_platform, OwnPlatform) else None
