// In place of csrc/emulation/cuda_types.h: the real runtime's types and functions, which the test
// device provides.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
