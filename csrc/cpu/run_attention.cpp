#include "cpu/run_attention.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "cpu/isa.h"
#include "cpu/team.h"
#include "stable_torch.h"

namespace dflare::cpu {

namespace {

// Rows of one item (tokens x heads of a KV head): enough that K and V are read rarely, few enough
// that queries, scores and outputs stay in the second-level cache.
constexpr int64_t kItemRows = 64;
// Work of a key tile that does not depend on rows (gathering it), in rows.
constexpr int64_t kTileOverheadRows = 8;
// Least work (rows x tiles x head_dim) that is worth waking a thread: a few microseconds.
constexpr int64_t kThreadCost = 4096;

int64_t tiles_of(const AttentionItem& item) {
  return (item.key_end + kKeyTile - 1) / kKeyTile - item.key_begin / kKeyTile;
}
int64_t first_split(const AttentionItem& item) { return item.key_begin / kSplitKeys; }
int64_t num_splits(const AttentionItem& item) {
  return (item.key_end + kSplitKeys - 1) / kSplitKeys - first_split(item);
}

// The items of all requests in the order in which they are worked off, with the running sum of
// their costs. Items that share keys are neighbours.
struct Plan {
  std::vector<AttentionItem> items;
  std::vector<int64_t> cost_before;  // items.size() + 1 of them
};

template <typename T>
int64_t tile_cost(const AttentionParams<T>& p, const AttentionItem& item) {
  return item.num_tokens * p.group + kTileOverheadRows;
}

// The lowest and the highest index of `count` queries from `begin` on.
std::pair<int64_t, int64_t> index_range(const Request& r, int64_t begin, int64_t count) {
  if (!r.depths) return {r.first_index + begin, r.first_index + begin + count - 1};
  const auto [low, high] = std::minmax_element(r.depths + begin, r.depths + begin + count);
  return {r.first_index + *low, r.first_index + *high};
}

template <typename T>
Plan make_plan(const AttentionParams<T>& p, const std::vector<Request>& requests) {
  Plan plan;
  plan.items.reserve(requests.size() * p.kv_heads);
  plan.cost_before.reserve(requests.size() * p.kv_heads + 1);
  plan.cost_before.push_back(0);
  const int64_t item_tokens = std::max<int64_t>(1, kItemRows / p.group);
  for (size_t b = 0; b < requests.size(); ++b) {
    const Request& r = requests[b];
    const int64_t keys = r.pooled + (p.block_k ? r.num_queries : 0);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t token = 0; token < r.num_queries; token += item_tokens) {
        AttentionItem item{static_cast<int64_t>(b),
                           head,
                           token,
                           std::min(item_tokens, r.num_queries - token),
                           0,
                           keys};
        const auto [first, last] = index_range(r, token, item.num_tokens);
        if (p.window >= 0) item.key_begin = std::max<int64_t>(0, first - p.window);
        if (p.causal) item.key_end = last + 1;
        plan.items.push_back(item);
        plan.cost_before.push_back(plan.cost_before.back() + tiles_of(item) * tile_cost(p, item));
      }
    }
  }
  return plan;
}

// A position in the plan: a split of an item's context.
struct Cut {
  int64_t item, split;
};

// Where every thread begins, an equal share of the cost after the one before it, but for splits.
template <typename T>
std::vector<Cut> cut_plan(const AttentionParams<T>& p, const Plan& plan) {
  const int64_t total = plan.cost_before.back();
  const int64_t shares =
      std::clamp<int64_t>(total * p.head_dim / kThreadCost, 1, at::get_num_threads());
  std::vector<Cut> cuts;
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t cost = total * share / shares;
    const auto after = std::upper_bound(plan.cost_before.begin(), plan.cost_before.end(), cost);
    const int64_t i = after - plan.cost_before.begin() - 1;
    const AttentionItem& item = plan.items[i];
    const int64_t tiles = (cost - plan.cost_before[i]) / tile_cost(p, item);
    cuts.push_back({i, (item.key_begin / kKeyTile + tiles) * kKeyTile / kSplitKeys});
  }
  cuts.push_back({static_cast<int64_t>(plan.items.size()), 0});
  return cuts;
}

}  // namespace

template <typename T>
void run_attention(const char* op, AttentionParams<T>& p, const std::vector<Request>& requests) {
  const Plan plan = make_plan(p, requests);
  const int64_t items = plan.items.size();
  if (items == 0) return;
  const KernelsFor<T>& kernel = kernels().get<T>();
  BadSlot bad_slot{};
  p.requests = requests.data();
  p.bad_slot = &bad_slot;

  const std::vector<Cut> cuts = cut_plan(p, plan);
  // Of the items that several threads share, the parts of all splits.
  std::vector<std::unique_ptr<float[]>> parts(items);
  const auto size = [&](const AttentionItem& x) {
    return part_size(x.num_tokens * p.group, p.head_dim);
  };
  for (auto cut = cuts.begin(); cut + 1 != cuts.end(); ++cut) {
    const AttentionItem& item = plan.items[cut->item];
    if (cut->split == first_split(item) || parts[cut->item]) continue;
    parts[cut->item].reset(new float[num_splits(item) * size(item)]);
  }
  const auto work = [&](const Cut& begin, const Cut& end) {
    for (int64_t i = begin.item; i < std::min(items, end.item + 1); ++i) {
      const AttentionItem& item = plan.items[i];
      const int64_t first = first_split(item);
      const int64_t from = i == begin.item ? begin.split : first;
      const int64_t to = i == end.item ? end.split : first + num_splits(item);
      if (from == to) continue;
      kernel.attend(p, item, from, to,
                    parts[i] ? parts[i].get() + (from - first) * size(item) : nullptr);
    }
  };
  const int64_t shares = cuts.size() - 1;
  parallel_for(shares, shares, 1, [&](int64_t first_share, int64_t last_share) {
    for (int64_t share = first_share; share < last_share; ++share) {
      work(cuts[share], cuts[share + 1]);
    }
  });
  TORCH_CHECK(!bad_slot.found, op, ": req_to_token gives slot ",
              requests[bad_slot.request].slots[bad_slot.index], " for index ", bad_slot.index,
              " of request ", bad_slot.request, ", but the pool has ", p.num_slots, " slots");
  for (int64_t i = 0; i < items; ++i) {
    if (parts[i]) kernel.merge(p, plan.items[i], parts[i].get(), num_splits(plan.items[i]));
  }
}

template <typename T>
void set_pools(const PagedContext<at::Tensor>& context, int64_t q_heads, AttentionParams<T>& p) {
  p.k_pool = static_cast<const T*>(context.k_pool.const_data_ptr());
  p.v_pool = static_cast<const T*>(context.v_pool.const_data_ptr());
  p.num_slots = context.slots;
  p.kv_heads = context.kv_heads;
  p.group = q_heads / context.kv_heads;
  p.head_dim = context.head_dim;
  p.k_slot_stride = context.k_pool.stride(0);
  p.v_slot_stride = context.v_pool.stride(0);
}

const int32_t* request_slots(const char* op, const at::Tensor& req_to_token,
                             const at::Tensor& req_pool_indices, int64_t b, int64_t length) {
  const int64_t row = Indices(req_pool_indices)[b];
  TORCH_CHECK(row >= 0 && row < req_to_token.size(0), op, ": req_pool_indices[", b, "] is ", row,
              ", but req_to_token has ", req_to_token.size(0), " rows");
  TORCH_CHECK(length >= 0 && length <= req_to_token.size(1), op, ": seq_lens[", b, "] is ", length,
              ", expected 0 to ", req_to_token.size(1), ", the columns of req_to_token");
  return static_cast<const int32_t*>(req_to_token.const_data_ptr()) + row * req_to_token.stride(0);
}

template void run_attention(const char*, AttentionParams<float>&, const std::vector<Request>&);
template void run_attention(const char*, AttentionParams<BFloat16>&, const std::vector<Request>&);
template void set_pools(const PagedContext<at::Tensor>&, int64_t, AttentionParams<float>&);
template void set_pools(const PagedContext<at::Tensor>&, int64_t, AttentionParams<BFloat16>&);

}  // namespace dflare::cpu
