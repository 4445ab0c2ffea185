"""Stand-ins in PyTorch for every compiled kernel that SGLang's CUDA path launches.

`install` puts them in place; `table.TABLE` lists them. A kernel without one fails with its name.
"""

from . import (
    collectives,
    flashinfer_attention,
    flashinfer_sampling,
    jit,
    sgl_kernel_ops,
    triton_attention,
    triton_interpreter,
)


def install() -> None:
    """Replace kernels in this process; after the device is there and before SGLang is used."""
    for module in (
        sgl_kernel_ops,
        jit,
        triton_interpreter,
        triton_attention,
        flashinfer_attention,
        flashinfer_sampling,
        collectives,
    ):
        module.install()
