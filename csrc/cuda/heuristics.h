// Every tuning choice of the CUDA kernels, as pure functions of shapes and device limits. Reasons
// are byte and operation counts; docs/kernels.md says which of them have been measured.
#pragma once

#include "../contract/arguments.h"

namespace dflare {

// What the operators take; no server starts with a drafter beyond it (dflare/ops/library.py).
constexpr int kMaxLayers = 16;    // drafter layers: pool addresses travel in the launch parameters
constexpr int kMaxTaps = 32;      // target layers read
constexpr int kMaxHidden = 8192;  // fuse_norm: 1024 threads of 8 elements
constexpr int kMaxBlock = 32;     // tokens of a drafter's block
constexpr int kMaxQueryRows = 1024;   // query heads of a KV head times tokens of a block
constexpr int kMaxContext = 1 << 24;  // tokens; keeps the products of tiles and parts in 31 bits

struct DeviceLimits {
  int sm_count;
  int shared_memory_per_sm;  // bytes
  bool clusters;             // blocks may reach each other's shared memory, and shall
  bool wgmma;                // warpgroup products exist, and shall be used
};

template <class Int>
DFLARE_HOST_DEVICE constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

// ------------------------------------------------------------ append_context_kv

// fuse_norm keeps one fp32 sum per layer for each of a thread's 8 elements. 64 sums fit the 128
// registers of 512 threads, and the 96 of 320 twice on an SM (hidden sizes up to 2560); a
// 1024-thread block has 64 registers, room for 32 sums. More layers take another block, which finds
// the taps in L2.
constexpr int fuse_norm_layers_per_block(int num_layers, int hidden) {
  return hidden <= 4096 && num_layers > 4 ? 8 : 4;
}

// Taps that a thread has requested and not yet summed: at 320 threads 40 KiB a block, two blocks an
// SM; at 1024 threads 64 KiB.
DFLARE_HOST_DEVICE constexpr int fuse_norm_taps_in_flight(int layers) {
  return layers == 8 ? 8 : 4;
}

// Probabilities of every tap, one partial sum a warp, one row index; the taps in flight.
constexpr int fuse_norm_shared_bytes(int layers, int threads) {
  return (kMaxTaps * layers + 32 * layers + 4) * 4 +
         fuse_norm_taps_in_flight(layers) * threads * 16;
}

// Rows that count, as far as the host knows: with commit_lens the committed lengths are on the
// device, and of a verified block about two fifths are committed (docs/kernels.md).
constexpr int expected_valid_rows(int num_rows, bool has_commit_lens) {
  return has_commit_lens ? ceil_div(2 * num_rows, 5) : num_rows;
}

// Fused projection or GEMM + write kernel. The fused kernel reads the weights once per token tile,
// needs no round trip of K/V through memory and skips rows that do not count; but mma.sync reaches
// about 60 % of the GEMM's rate, so it wins while the projection is bound by weight bytes. The GEMM
// reads them at the same speed from one row on and is bound by operations from the ridge of the
// machine (206 to 263 FLOP a byte; a row is one FLOP a byte) on; the fused kernel from 60 % of it.
//
// kv_project_wgmma is meant for all N, and skips rows that do not count for any; it is taken only
// where it is asked for, until a GPU has measured it.
enum class Projection { kFused, kWgmma, kGemm };
constexpr Projection choose_projection(int num_rows, bool has_commit_lens, bool wgmma) {
  if (wgmma) return Projection::kWgmma;
  return expected_valid_rows(num_rows, has_commit_lens) <= 176 ? Projection::kFused
                                                               : Projection::kGemm;
}

// Rows that go through fusion, GEMM and write together, whole blocks. What lies between the three
// takes 64 KiB a row at 7 layers, hidden size 2560 and 8 KV heads of 128: 2048 rows keep that at
// 132 MB however long the prompt, and give the GEMM more than six waves of 128 x 256 tiles.
constexpr int64_t projection_panel_rows(int64_t num_rows, int64_t block_size) {
  constexpr int64_t kPanelRows = 2048;
  return num_rows <= kPanelRows ? num_rows : kPanelRows / block_size * block_size;
}

// Tokens a block of kv_project_write multiplies with its head's weights. 16 covers one request's
// block; 64 a small batch; 128 halves the weight reads of a large one (head_dim 256 has no
// accumulator registers for it). Rows that turn out to count beyond a tile take further ones.
constexpr int kv_project_tokens(int expected_rows, int head_dim) {
  if (expected_rows <= 16) return 16;
  return expected_rows <= 64 || head_dim > 128 ? 64 : 128;
}

// The other sizes of a kv_project_write block. Every shape stays under 99 KiB of shared memory,
// which a block may have on every supported part. Two blocks then fit an SM of sm_90 and sm_100
// (228 KiB). On sm_80 (164 KiB) it is one, two only where a block takes 80 KiB; on the consumer
// parts (100 KiB) it is one. A block alone has at least 60 KiB in flight, three times what 3 TB/s
// times 0.8 us of latency asks of each of 132 SMs.
template <int kHeadDim, int kTokens>
struct KvProjectShape {
  // Elements of the hidden size per stage: a 128-byte line of each row; half a line at head_dim
  // 256, where a full one would leave room for two stages only.
  static constexpr int kDepth = kHeadDim == 256 ? 32 : 64;
  static constexpr int kStageBytes = (kHeadDim + kTokens) * kDepth * 2;
  static constexpr int kStages = 96 * 1024 / kStageBytes < 8 ? 96 * 1024 / kStageBytes : 8;
  // Warps tile [tokens, head_dim] and, where accumulators are few, the depth of a stage: a warp
  // with more columns loads the states less often, and shared memory bounds the loop.
  static constexpr int kWarps = kHeadDim * kTokens <= 64 * 64 && kHeadDim == 64 ? 4 : 8;
  static constexpr int kDepthWarps = kTokens == 16                      ? kDepth / 16
                                     : kTokens == 64 && kHeadDim < 256  ? 2
                                     : kTokens == 128 && kHeadDim == 64 ? 2
                                                                        : 1;
  static constexpr int kTokenWarps = kTokens == 16 ? 1 : kHeadDim == 64 && kTokens == 128 ? 4 : 2;
  static constexpr int kHeadWarps = kWarps / kTokenWarps / kDepthWarps;
  static constexpr int kThreads = 32 * kWarps;
  // fp32 tile a depth warp, padded against bank conflicts.
  static constexpr int kOutputStride = kHeadDim + 8;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kOutputBytes = kDepthWarps * kTokens * kOutputStride * 4;
  // Behind both: where each token goes, {slot, position}.
  static constexpr int kRowsAt = kPipelineBytes > kOutputBytes ? kPipelineBytes : kOutputBytes;
  static constexpr int kSharedBytes = kRowsAt + kTokens * 16;
};

// Tokens a block of kv_project_wgmma multiplies: a product of tensor cores may have as few columns
// as that, and 256 of them read the weights least often. At head_dim 256 there are four consumer
// warpgroups, with registers for 128 each.
constexpr int kv_project_wgmma_tokens(int expected_rows, int head_dim) {
  if (expected_rows <= 16) return 16;
  return expected_rows <= 64 ? 64 : head_dim > 128 ? 128 : 256;
}

// The other sizes of a kv_project_wgmma block, which has an SM of sm_90 (227 KiB a block) to
// itself.
template <int kHeadDim, int kTokens>
struct KvProjectWgmmaShape {
  static constexpr int kDepth = 64;  // a 128-byte line of each row, the span of the swizzle
  // One product's tokens. 64 would read shared memory as fast as it gives: the weights, 2 KiB, and
  // as much of tokens in 32 cycles.
  static constexpr int kPartTokens = kTokens < 128 ? kTokens : 128;
  static constexpr int kParts = kTokens / kPartTokens;
  // Blocks of neighbouring heads that form a cluster: each requests its share of a part's tokens
  // for all. 16 tokens are a ninth of a stage, not worth that blocks wait for one another.
  static constexpr int kCluster = kTokens > 16 ? 2 : 1;
  static constexpr int kShareTokens = kPartTokens / kCluster;
  static constexpr int kWeightBytes = kHeadDim * kDepth * 2;
  static constexpr int kPartBytes = kPartTokens * kDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + kParts * kPartBytes;
  static constexpr int kStages = 200 * 1024 / kStageBytes < 8 ? 200 * 1024 / kStageBytes : 8;
  static constexpr int kConsumers = 2 * kHeadDim;  // threads: a warpgroup for 64 rows of the head
  static constexpr int kThreads = kConsumers + 32;
  static constexpr int kOutputStride = kHeadDim + 4;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  static constexpr int kOutputBytes = kTokens * kOutputStride * 4;
  // Behind both: two barriers of 8 bytes a stage; where each token goes, {slot, position}.
  static constexpr int kBarriersAt = kPipelineBytes > kOutputBytes ? kPipelineBytes : kOutputBytes;
  static constexpr int kRowsAt = kBarriersAt + 16 * kStages;
  static constexpr int kSharedBytes = ceil_div(kRowsAt + kTokens * 16, 1024) * 1024;
  static_assert(kSharedBytes <= 227 * 1024, "fits an SM of sm_90");
};

// ------------------------------------------------------------ block_attention

// Keys a pipeline stage holds: K and V of 64 keys are 32 KiB at head_dim 128; at 256 half as many.
DFLARE_HOST_DEVICE constexpr int attention_keys(int head_dim) { return head_dim == 256 ? 32 : 64; }

// 99 KiB at most, as above; on sm_80 that is one block an SM at head_dim 128 and 256. At head_dim
// 256 the query tile stays in shared memory beside the stages.
DFLARE_HOST_DEVICE constexpr int attention_stages(int head_dim) {
  return head_dim == 64 ? 4 : head_dim == 128 ? 3 : 2;
}

// Query rows of a block: the group's heads times the block's tokens, 16 a warp. 128 rows read the
// context once where two 64-row blocks read it twice; head_dim 256 has no registers or shared
// memory for 128.
constexpr int attention_warps(int rows, int head_dim) {
  return rows > 64 && head_dim <= 128 ? 8 : 4;
}

// Whether block_attention's products are a warpgroup's: for wide groups, where mma.sync and not the
// memory would be the limit, and where it is asked for, until a GPU has measured it.
constexpr bool attention_takes_wgmma(int warps, int head_dim, bool wgmma) {
  return wgmma && warps == 8 && head_dim == 128;
}

// It has an SM to itself, as the portable kernel of 128 rows, and room for a stage more: 96 KiB in
// flight.
constexpr int kAttentionWgmmaStages = 4;
constexpr int kAttentionWgmmaSharedBytes = kAttentionWgmmaStages * 2 * 64 * 128 * 2;

constexpr int attention_shared_bytes(int head_dim, int warps) {
  const int stages = attention_stages(head_dim) * 2 * attention_keys(head_dim) * head_dim * 2;
  return head_dim == 256 ? stages + 16 * warps * head_dim * 2 : stages;
}

// Resident blocks on an SM that registers allow (the launch bound of the kernel).
constexpr int attention_blocks_per_sm(int head_dim, int warps) {
  return warps == 8 ? 1 : head_dim == 64 ? 3 : 2;
}

// Shapes that are known before the lengths are, so that the grid can be captured in a CUDA graph.
struct AttentionPlan {
  int group;          // query heads of a KV head
  int inverse_group;  // 2^20 / group, rounded up: row / group == row * inverse_group >> 20
  int warps;          // per block
  int row_tiles;      // blocks that share a KV head's query rows
  int units;          // kv_heads * row_tiles: blocks per item
  int wave_items;     // items that the device runs at once
  int max_items;      // grid size: an item is one request's part of the context, or idle
  int max_partials;   // items of requests that are cut, whose partial results need scratch
  bool wgmma;         // products of warpgroups (block_attention_wgmma.cuh)
  int cluster;        // items in a row whose blocks form clusters; 1: none do
};

// Lets items in a row form clusters, whose blocks merge a request's parts through each other's
// shared memory (attention_cluster.cuh). A GPU has clusters of eight blocks at most, all on one
// group of its SMs, of which the smallest is taken to have 16. A cluster has room for one or more
// requests with their share of a wave each, and a batch gets clusters where that holds all of it:
// so no request is cut into fewer parts than it would be without. On an H100 and for 8 units these
// are batches of up to 16, but for 11.
constexpr void plan_clusters(AttentionPlan& plan, int batch_size, int resident, int sm_count) {
  constexpr int kMost = 8, kGroup = 16;
  const int share = batch_size > 0 ? plan.wave_items / batch_size : 0;
  if (share < 2) return;
  const int size = share < kMost ? kMost / share * share : kMost;
  const int held = sm_count / kGroup * (kGroup * resident / size) / plan.units;
  const int clusters = held < plan.wave_items / size ? held : plan.wave_items / size;
  if (clusters * size < batch_size * (share < kMost ? share : kMost)) return;
  plan.cluster = size;
  plan.wave_items = plan.max_items = plan.max_partials = clusters * size;
}

// A batch smaller than a wave is cut into one wave of equal parts. A larger one is cut as if into
// two waves, so that the last wave's stragglers are short; chunks have at least a (2 * wave)th of
// all tiles, which bounds the items at batch + 2 waves and the items of cut requests at 4 waves.
constexpr AttentionPlan plan_attention(int batch_size, int block_size, int num_heads, int kv_heads,
                                       int head_dim, DeviceLimits device) {
  AttentionPlan plan{};
  plan.group = num_heads / kv_heads;
  plan.inverse_group = ceil_div(1 << 20, plan.group);
  const int rows = plan.group * block_size;
  plan.warps = attention_warps(rows, head_dim);
  plan.row_tiles = ceil_div(rows, 16 * plan.warps);
  plan.units = kv_heads * plan.row_tiles;
  plan.wgmma = attention_takes_wgmma(plan.warps, head_dim, device.wgmma);
  // A block also costs 1 KiB of shared memory that the driver keeps.
  const int by_shared_memory =
      device.shared_memory_per_sm / (attention_shared_bytes(head_dim, plan.warps) + 1024);
  const int by_registers = attention_blocks_per_sm(head_dim, plan.warps);
  const int resident = by_shared_memory < by_registers ? by_shared_memory : by_registers;
  const int slots = device.sm_count * (resident > 0 ? resident : 1);
  plan.wave_items = slots > plan.units ? slots / plan.units : 1;
  const bool fits_one_wave = batch_size <= plan.wave_items;
  plan.max_items = fits_one_wave ? plan.wave_items : batch_size + 2 * plan.wave_items;
  plan.max_partials = fits_one_wave ? plan.wave_items : 4 * plan.wave_items;
  plan.cluster = 1;
  if (device.clusters) plan_clusters(plan, batch_size, resident, device.sm_count);
  return plan;
}

// First context index that any query of the block sees, and the tiles from there to the block.
DFLARE_HOST_DEVICE constexpr int attention_first_key(int seq_len, int window) {
  return window >= 0 && seq_len > window ? seq_len - window : 0;
}

DFLARE_HOST_DEVICE constexpr int attention_tiles(int seq_len, int window, int head_dim) {
  return ceil_div(seq_len - attention_first_key(seq_len, window), attention_keys(head_dim));
}

// What a request costs, in half tiles. The block's own keys are one tile more, and normalising and
// rotating them about one and a half (docs/kernels.md, issue cycles).
DFLARE_HOST_DEVICE constexpr int attention_work(int tiles) { return 2 * tiles + 5; }

// Parts that a request of `tiles` tiles is cut into when a part should cost `chunk` half tiles.
// One block reads its part and, if it is the last, every part's partial result; 64 rows of fp32 are
// as many bytes as one tile of K and V. It moves length + tiles / length tiles, least at
// length = sqrt(tiles), so a part is never shorter than that. Nor is a request cut for less than a
// quarter above the chunk: the merge would cost more than the straggler.
DFLARE_HOST_DEVICE constexpr int attention_parts(int tiles, int chunk) {
  const int work = attention_work(tiles);
  if (4 * int64_t{work} <= 5 * int64_t{chunk}) return 1;
  int below = 0;  // the largest integer whose square is under tiles, bit by bit
  for (int bit = 1 << 14; bit > 0; bit >>= 1) {
    if ((below + bit) * (below + bit) < tiles) below += bit;
  }
  const int most = ceil_div(tiles, below + 1), wanted = ceil_div(work, chunk);
  const int parts = wanted < most ? wanted : most;
  return parts > 1 ? parts : 1;
}

// First tile of a part; of part == parts, the end. Parts cost the same: the last one has fewer
// tiles, because it has the block too.
DFLARE_HOST_DEVICE constexpr int attention_first_tile(int tiles, int part, int parts) {
  if (part == parts) return tiles;
  const int first = attention_work(tiles) * part / (2 * parts);
  return first < tiles ? first : tiles;
}

// Schedule layout: {batch size, units, max_items, max_partials} that it was made for, max_items
// records of {request, part, parts, first partial}, then one ticket per (partial, unit), all zero
// between launches.
constexpr int64_t attention_schedule_size(const AttentionPlan& plan) {
  return 4 * (1 + int64_t{plan.max_items}) + int64_t{plan.max_partials} * plan.units;
}

// Scratch layout: [max_partials, units, rows] x (head_dim sums, then maximum and normaliser).
constexpr int64_t attention_partials_size(const AttentionPlan& plan, int head_dim) {
  return int64_t{plan.max_partials} * plan.units * 16 * plan.warps * (head_dim + 2);
}

// ------------------------------------------------------------ head_argmax

// Rows of the head whose logits exist at a time, whole GEMM tiles: 32 MiB of logits stay in the
// second-level cache (40 MiB on an A100, 50 on an H100) until they are reduced. One part holds all
// of a vocabulary of 152K for up to 110 rows, six requests in blocks of 16.
constexpr int64_t head_argmax_columns(int64_t rows, int64_t vocabulary) {
  constexpr int64_t kMostLogits = 16 << 20, kTile = 256;
  const int64_t parts = ceil_div(rows * vocabulary, kMostLogits);
  const int64_t columns = ceil_div(ceil_div(vocabulary, parts), kTile) * kTile;
  return columns < vocabulary ? columns : vocabulary;
}

// A block reduces a row with eight 16-byte loads a thread in flight, 64 KiB a block.
constexpr int kHeadThreads = 512;
constexpr int kHeadLoads = 8;
constexpr int kHeadSharedBytes = kHeadThreads / 32 * int{sizeof(int64_t)};  // the best of each warp

// ------------------------------------------------------------ lookup_continuations

// A request's text is a few thousand tokens, scanned once a step by one block.
constexpr int kLookupThreads = 256;
constexpr int kLookupMatch = 1024;  // of a text's last tokens, kept in shared memory

// The best match of each warp, then the end of the text.
constexpr int lookup_shared_bytes(int longest_match) {
  return kLookupThreads / 32 * int{sizeof(int64_t)} + longest_match * int{sizeof(int32_t)};
}

// ------------------------------------------------------------ draft trees

constexpr int kTreeThreads = 32;              // a request
constexpr int kMaxTreeWidth = 8 * kMaxBlock;  // nodes of a tree, the anchor included

// A node of a tree that grows, and the best of its children that are not in the tree yet.
struct TreeNode {
  float score, best_child;  // log-probabilities from the anchor on
  int depth, rank;          // rank: of that child, among the drafter's tokens of the next depth
  bool in_branch;           // it ends a prefix of the branch
};

constexpr int build_tree_shared_bytes(int nodes) { return (nodes + 1) * int{sizeof(TreeNode)}; }

}  // namespace dflare
