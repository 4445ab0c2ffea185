#include "../kv_project_wgmma.cuh"

namespace dflare {
template cudaError_t run_kv_project_wgmma<Bf16, 256>(const KvProjectWriteParams&, cudaStream_t);
}  // namespace dflare
