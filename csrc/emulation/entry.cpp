// C interface of the emulator for tests/emulation: kernels of one element type and head size
// (DFLARE_EMULATED_ELEMENT, DFLARE_EMULATED_HEAD_DIM) and the pure functions of heuristics.h.
#include "../cuda/launch.cuh"
#include "../cuda/params.h"
#include "emulator.h"
#include "guarded_memory.h"

namespace dflare {
template <class T, int kHeadDim>
cudaError_t run_kv_project_write(const KvProjectWriteParams& params, cudaStream_t stream);
template <class T, int kHeadDim>
cudaError_t run_block_attention(const BlockAttentionParams& params, cudaStream_t stream);
}  // namespace dflare

using dflare::DFLARE_EMULATED_ELEMENT;
constexpr int kHeadDim = DFLARE_EMULATED_HEAD_DIM;

// Stands for the kernel before an operator's: it writes what that one must wait for, and late.
struct ProduceParams {
  void* to;
  const void* from;
  size_t bytes;
};
void produce_kernel(ProduceParams p) {
  for (int i = 0; i < 64; ++i) __syncthreads();  // where the kernels after it may overtake it
  if (threadIdx.x == 0) std::memcpy(p.to, p.from, p.bytes);
}

#pragma GCC visibility push(default)
extern "C" {

void* emu_allocate(size_t bytes, const char* name) {
  return dflare::emulation::allocate_guarded(bytes, 16, name);
}
void emu_release(void* data) { dflare::emulation::release_guarded(data); }

// Runs what was queued; null or a description of the first error, valid until the next call.
const char* emu_synchronize(uint64_t seed) {
  static std::string error;
  error = dflare::emulation::synchronize(seed);
  return error.empty() ? nullptr : error.c_str();
}

int emu_produce(void* to, const void* from, size_t bytes) {
  return dflare::launch(produce_kernel, dim3(1), 32, 0, false, ProduceParams{to, from, bytes},
                        nullptr);
}
// Of the index-th launch of the last emu_synchronize: the fields of emulation::Counters in order.
void emu_counters(size_t index, int64_t (&out)[8]) {
  const dflare::emulation::Counters c = dflare::emulation::counters(index);
  static_assert(sizeof(c) == sizeof(out));
  std::memcpy(out, &c, sizeof(out));
}
int emu_fuse_norm(const dflare::FuseNormParams* p) { return dflare::run_fuse_norm(*p, nullptr); }
int emu_kv_project_write(const dflare::KvProjectWriteParams* p) {
  return dflare::run_kv_project_write<DFLARE_EMULATED_ELEMENT, kHeadDim>(*p, nullptr);
}
int emu_norm_rope_write(const dflare::NormRopeWriteParams* p) {
  return dflare::run_norm_rope_write(*p, nullptr);
}
int emu_block_attention_schedule(const dflare::AttentionScheduleParams* p) {
  return dflare::run_block_attention_schedule(*p, nullptr);
}
int emu_block_attention(const dflare::BlockAttentionParams* p) {
  return dflare::run_block_attention<DFLARE_EMULATED_ELEMENT, kHeadDim>(*p, nullptr);
}
int emu_lookup_continuations(const dflare::LookupParams* p) {
  return dflare::run_lookup_continuations(*p, nullptr);
}

dflare::AttentionPlan emu_plan_attention(int batch_size, int block_size, int num_heads,
                                         int kv_heads, int sm_count, int shared_memory_per_sm) {
  return dflare::plan_attention(batch_size, block_size, num_heads, kv_heads, kHeadDim,
                                {sm_count, shared_memory_per_sm});
}
int emu_attention_first_tile(int tiles, int part, int parts) {
  return dflare::attention_first_tile(tiles, part, parts);
}
int64_t emu_attention_schedule_size(const dflare::AttentionPlan* plan) {
  return dflare::attention_schedule_size(*plan);
}
int64_t emu_attention_partials_size(const dflare::AttentionPlan* plan) {
  return dflare::attention_partials_size(*plan, kHeadDim);
}

// Sizes of the parameter structs, which the tests mirror.
size_t emu_size_of(int which) {
  const size_t sizes[] = {
      sizeof(dflare::FuseNormParams),       sizeof(dflare::KvProjectWriteParams),
      sizeof(dflare::NormRopeWriteParams),  sizeof(dflare::AttentionScheduleParams),
      sizeof(dflare::BlockAttentionParams), sizeof(dflare::LookupParams)};
  return sizes[which];
}
}
#pragma GCC visibility pop
