// block_attention_schedule: cuts a batch's contexts into parts of about equal length, on the
// device, once a step. One warp; a batch is a few hundred requests at most.
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"
#include "seq_len.cuh"

namespace dflare {
namespace {

template <class Int>
__device__ __forceinline__ Int warp_sum(Int x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ int warp_max(int x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// Sum of the lanes before this one.
__device__ __forceinline__ int warp_exclusive_scan(int x) {
  const int lane = threadIdx.x;
  int sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_sync(0xffffffffu, sum, max(lane - lanes, 0));
    if (lane >= lanes) sum += other;
  }
  return sum - x;
}

// Where each lane's parts go: behind those of the lanes before it, but at the next cluster of items
// if they fit one and not what is left of this one, as long as there are items to spare.
struct Places {
  int next, spare;  // of the next lanes

  // {first idle item, first item} of this lane.
  __device__ __forceinline__ int2 take(int parts, int cluster) {
    int2 mine = make_int2(next, next);
    for (int lane = 0; lane < 32; ++lane) {
      const int wanted = __shfl_sync(0xffffffffu, parts, lane);
      const int left = cluster - next % cluster;
      const int idle = left < wanted && wanted <= cluster && left <= spare ? left : 0;
      if (lane == static_cast<int>(threadIdx.x)) mine = make_int2(next, next + idle);
      next += idle + wanted;
      spare -= idle;
    }
    return mine;
  }
};

__global__ void __launch_bounds__(32)
    block_attention_schedule_kernel(const __grid_constant__ AttentionScheduleParams p) {
  const int lane = threadIdx.x;
  const auto tiles_of = [&](int request) {
    const int seq_len = load_seq_len(p.seq_lens, p.seq_lens_64bit, request);
    return attention_tiles(seq_len, p.window, p.head_dim);
  };
  const auto items_at = [&](int chunk) {
    int items = 0;
    for (int b = lane; b < p.batch_size; b += 32) items += attention_parts(tiles_of(b), chunk);
    return warp_sum(items);
  };

  int64_t total = 0;
  int longest = 1;
  for (int b = lane; b < p.batch_size; b += 32) {
    const int work = attention_work(tiles_of(b));
    total += work;
    longest = max(longest, work);
  }
  total = warp_sum(total);
  longest = warp_max(longest);

  // Two waves for a batch that is larger than one; else the shortest chunk that makes one wave.
  const bool fits_one_wave = p.batch_size <= p.plan.wave_items;
  const int waves = fits_one_wave ? 1 : 2;
  int chunk = max(static_cast<int>(ceil_div<int64_t>(total, waves * p.plan.wave_items)), 1);
  if (fits_one_wave) {
    int too_many = chunk - 1, enough = max(longest, chunk);
    while (enough - too_many > 1) {
      const int middle = (too_many + enough) / 2;
      if (items_at(middle) <= p.plan.wave_items) {
        enough = middle;
      } else {
        too_many = middle;
      }
    }
    chunk = enough;
  }

  int4* records = reinterpret_cast<int4*>(p.schedule);
  if (lane == 0) {
    records[0] = make_int4(p.batch_size, p.plan.units, p.plan.max_items, p.plan.max_partials);
  }
  int4* items = records + 1;
  const int4 idle = make_int4(-1, 0, 0, 0);
  Places places{0, p.plan.cluster > 1 ? p.plan.wave_items - items_at(chunk) : 0};
  int next_partial = 0;
  for (int base = 0; base < p.batch_size; base += 32) {
    const int request = base + lane;
    const int parts = request < p.batch_size ? attention_parts(tiles_of(request), chunk) : 0;
    const int partials = parts > 1 ? parts : 0;
    const int partial = next_partial + warp_exclusive_scan(partials);
    int2 mine = make_int2(0, 0);
    if (p.plan.cluster > 1) {
      mine = places.take(parts, p.plan.cluster);
    } else {
      mine.x = mine.y = places.next + warp_exclusive_scan(parts);
      places.next += warp_sum(parts);
    }
    for (int item = mine.x; item < mine.y; ++item) items[item] = idle;
    for (int part = 0; part < parts; ++part) {
      items[mine.y + part] = make_int4(request, part, parts, partial);
    }
    next_partial += warp_sum(partials);
  }
  for (int item = places.next + lane; item < p.plan.max_items; item += 32) {
    items[item] = idle;
  }
  int32_t* tickets = p.schedule + 4 * (1 + p.plan.max_items);
  for (int i = lane; i < p.plan.max_partials * p.plan.units; i += 32) tickets[i] = 0;
}

}  // namespace

cudaError_t run_block_attention_schedule(const AttentionScheduleParams& params,
                                         cudaStream_t stream) {
  return launch(block_attention_schedule_kernel, dim3(1), 32, 0, false, params, stream);
}

}  // namespace dflare
