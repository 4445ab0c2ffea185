#include "../kv_project_write.cuh"

namespace dflare {
template cudaError_t run_kv_project_write<Fp16, 64>(const KvProjectWriteParams&, cudaStream_t);
}  // namespace dflare
