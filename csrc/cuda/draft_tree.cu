// Draft trees: one warp a request. Each node knows its best child that is not in the tree yet, so
// that to grow by one is to find the best of as many candidates as there are nodes.
#include "launch.cuh"
#include "params.h"
#include "seq_len.cuh"

namespace dflare {
namespace {

// Of two candidates the better one; of equals that of the lower node.
__device__ __forceinline__ void warp_best(float& score, int& node) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, score, lanes);
    const int other_node = __shfl_xor_sync(0xffffffffu, node, lanes);
    if (other > score || (other == score && other_node < node)) {
      score = other;
      node = other_node;
    }
  }
}

__device__ __forceinline__ int warp_least(int x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = min(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

__device__ __forceinline__ int64_t warp_sum(int64_t x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Any candidate comes before none, NaN and -inf included.
constexpr float kWorst = -3.4e38f;

__global__ void __launch_bounds__(kTreeThreads)
    build_draft_tree_kernel(const __grid_constant__ BuildTreeParams p) {
  DFLARE_DYNAMIC_SHARED_MEMORY(shared);
  TreeNode* nodes = reinterpret_cast<TreeNode*>(shared);
  const int lane = threadIdx.x, width = p.nodes + 1;
  const int64_t request = blockIdx.x, table = request * p.depths * p.ranks;
  const int64_t* drafted = p.tokens + table;
  const float* log_probs = p.log_probs + table;
  // Without a branch it is empty, and nothing of it is read.
  const int64_t* branch = p.branch + request * p.longest;
  const float* branch_log_probs = p.branch_log_probs + request * p.longest;
  const int branch_len = p.longest ? min(max(p.branch_lens[request], 0), p.longest) : 0;
  const auto child = [&](float score, int depth, int rank) {
    if (depth >= p.depths || rank >= p.ranks) return -INFINITY;
    return fmaxf(score + log_probs[depth * p.ranks + rank], kWorst);
  };
  const auto put = [&](int row, int64_t token, int parent, const TreeNode& node) {
    const int64_t at = request * width + row;
    p.out_tokens[at] = token;
    p.parents[at] = parent;
    p.out_depths[at] = node.depth;
    nodes[row] = node;
  };

  // The longest prefix of the branch that is in the tree: its node, and its tokens.
  int tip = 0, tip_depth = 0;
  if (lane == 0) put(0, p.anchors[request], -1, {0, child(0, 0, 0), 0, 0, true});
  __syncthreads();
  for (int count = 1; count < width;) {
    float score = -INFINITY;
    int parent = 0;
    for (int i = lane; i < count; i += kTreeThreads) {
      if (nodes[i].best_child > score) {
        score = nodes[i].best_child;
        parent = i;
      }
    }
    warp_best(score, parent);
    const bool open = tip_depth < branch_len;
    const float proposed =
        open ? fmaxf(nodes[tip].score + branch_log_probs[tip_depth], kWorst) : -INFINITY;
    const bool of_drafter = proposed <= score;
    if (!of_drafter) {
      score = proposed;
      parent = tip;
    }
    const TreeNode above = nodes[parent];
    const int64_t token =
        of_drafter ? drafted[above.depth * p.ranks + above.rank] : branch[tip_depth];
    // A prefix that both propose is one node: that of the higher score, which came first.
    const bool is_there =
        of_drafter && above.in_branch && above.depth < tip_depth && token == branch[above.depth];
    const bool in_branch = parent == tip && open && token == branch[tip_depth];
    __syncthreads();
    if (lane == 0) {
      if (of_drafter) {
        nodes[parent].rank = above.rank + 1;
        nodes[parent].best_child = child(above.score, above.depth, above.rank + 1);
      }
      const int depth = above.depth + 1;
      if (!is_there) {
        put(count, token, parent, {score, child(score, depth, 0), depth, 0, in_branch});
      }
    }
    __syncthreads();
    if (in_branch) {
      tip = count;
      ++tip_depth;
    }
    count += !is_there;
  }
}

__global__ void __launch_bounds__(kTreeThreads)
    walk_draft_tree_kernel(const __grid_constant__ WalkTreeParams p) {
  const int lane = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.width;
  const int64_t out = static_cast<int64_t>(blockIdx.x) * p.stride;
  int length = 0, node = 0;
  while (true) {
    const int64_t target = p.target_tokens[row + node];
    if (lane == 0) {
      p.path[out + length] = node;
      p.committed[out + length] = target;
    }
    if (++length == p.stride) break;
    int next = p.width;
    for (int i = node + 1 + lane; i < p.width && next == p.width; i += kTreeThreads) {
      if (p.parents[row + i] == node && p.tokens[row + i] == target) next = i;
    }
    next = warp_least(next);
    if (next == p.width) break;
    node = next;
  }
  if (lane == 0) p.commit_lens[blockIdx.x] = length;
  for (int i = length + lane; i < p.stride; i += kTreeThreads) {
    p.path[out + i] = node;
    p.committed[out + i] = 0;
  }
}

__global__ void __launch_bounds__(kTreeThreads)
    write_tree_mask_kernel(const __grid_constant__ TreeMaskParams p) {
  const int lane = threadIdx.x, request = blockIdx.x;
  const auto row_size = [&](int i) {
    return int64_t{load_seq_len(p.seq_lens, p.seq_lens_64bit, i)} + p.width;
  };
  int64_t before = 0;
  for (int i = lane; i < request; i += kTreeThreads) before += row_size(i) * p.width;
  before = warp_sum(before);
  const int32_t* parents = p.parents + static_cast<int64_t>(request) * p.width;
  for (int row = lane; row < p.width; row += kTreeThreads) {
    uint8_t* seen = p.mask + before + (row + 1) * row_size(request) - p.width;
    for (int i = 0; i < p.width; ++i) seen[i] = 0;
    // Parents have lower rows, whatever they are: this ends.
    for (int node = row, last = p.width; node >= 0 && node < last; node = parents[node]) {
      seen[node] = 1;
      last = node;
    }
  }
}

}  // namespace

cudaError_t run_build_draft_tree(const BuildTreeParams& params, cudaStream_t stream) {
  return launch(build_draft_tree_kernel, dim3(params.batch_size), kTreeThreads,
                build_tree_shared_bytes(params.nodes), false, params, stream);
}

cudaError_t run_walk_draft_tree(const WalkTreeParams& params, cudaStream_t stream) {
  return launch(walk_draft_tree_kernel, dim3(params.batch_size), kTreeThreads, 0, false, params,
                stream);
}

cudaError_t run_write_tree_mask(const TreeMaskParams& params, cudaStream_t stream) {
  return launch(write_tree_mask_kernel, dim3(params.batch_size), kTreeThreads, 0, false, params,
                stream);
}

}  // namespace dflare
