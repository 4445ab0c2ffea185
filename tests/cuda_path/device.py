"""The CUDA device for tests, loaded; to be imported before torch."""

import cuda_device

DEVICE = cuda_device.load()
