// A kernel for the tests of launches: what it asks for and what it does are arguments.
#include "launch.cuh"
#include "ptx.cuh"

namespace {

struct ProbeParams {
  int* out;  // [blocks]
  bool waits;
};

__global__ void probe_kernel(ProbeParams p) {
  if (p.waits) dflare::ptx::wait_for_prior_kernels();
  if (threadIdx.x == 0) p.out[blockIdx.x] = 1;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int probe(int* out, unsigned blocks, int threads,
                                                            int shared_bytes, bool overlap,
                                                            bool waits, unsigned cluster) {
  return dflare::launch(probe_kernel, dim3(blocks), threads, shared_bytes, overlap,
                        ProbeParams{out, waits}, nullptr, dim3(cluster));
}
