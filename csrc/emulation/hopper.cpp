// Barriers that count bytes, the copy engine and warpgroup products: see hopper.h.
#include "hopper.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace dflare {

namespace {

constexpr uint64_t kMap = 0x70616d726f736e65;  // marks an encoded map

struct Boxes {
  uint64_t mark;
  const uint16_t* tensor;
  int64_t outer, rows, columns, box_rows;
};
static_assert(sizeof(Boxes) <= sizeof(TensorMap));

Boxes decode(const TensorMap& map) {
  Boxes boxes;
  std::memcpy(&boxes, &map, sizeof(boxes));
  if (boxes.mark != kMap || reinterpret_cast<uintptr_t>(&map) % 64 != 0) {
    emulation::fail("a tensor map that was not encoded or is not aligned to 64 bytes");
  }
  return boxes;
}

}  // namespace

cudaError_t encode_tensor_map(TensorMap& map, const void* tensor, int outer, int rows, int columns,
                              int box_rows) {
  const bool sizes = outer >= 1 && rows >= 1 && columns >= 1 && box_rows >= 1 && box_rows <= 256;
  if (!sizes || columns % 8 != 0 || reinterpret_cast<uintptr_t>(tensor) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  const Boxes boxes{kMap, static_cast<const uint16_t*>(tensor), outer, rows, columns, box_rows};
  std::memcpy(&map, &boxes, sizeof(boxes));
  return cudaSuccess;
}

namespace emulation {

namespace {

constexpr uint64_t kBarrier = 0x726569727261626d;  // what a barrier's 8 bytes hold

Block& own_block() { return *machine().running->warp->block; }

// The 128-byte swizzle: bits 4-6 of an address, exclusive or bits 7-9.
uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 3 & 0x70); }

Mbarrier& barrier_at(Block& block, uintptr_t at) {
  auto& barriers = block.mbarriers;
  const auto found = barriers.find(at);
  if (found == barriers.end() || *reinterpret_cast<const uint64_t*>(at) != kBarrier) {
    fail("use of something that is no barrier, or was overwritten");
  }
  return found->second;
}

// Ends the phase if all have arrived and all bytes are there.
void advance(Block& block, uintptr_t at, Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  for_each_thread(block, [at](Thread& t) {
    if (t.state == State::kAtMbarrier && t.awaited == at) make_ready(t);
  });
}

void arrive(Block& block, uintptr_t at, int64_t expected_bytes) {
  Mbarrier& barrier = barrier_at(block, at);
  if (barrier.pending == 0) fail("more arrivals at a barrier than its phase has");
  barrier.bytes += expected_bytes;
  --barrier.pending;
  advance(block, at, barrier);
}

void land(Block& block, const BoxCopy& copy) {
  const TensorMap map = copy.map;
  const Boxes boxes = decode(map);
  for (int row = 0; row < boxes.box_rows; ++row) {
    for (int piece = 0; piece < kBoxColumns / 8; ++piece) {
      const int64_t r = copy.row + row, c = copy.column + piece * 8;
      auto* to = reinterpret_cast<void*>(swizzled(copy.to + row * 128 + piece * 16));
      if (r < boxes.rows && c < boxes.columns) {
        std::memcpy(to, boxes.tensor + (copy.outer * boxes.rows + r) * boxes.columns + c, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  }
  Mbarrier& barrier = block.mbarriers.at(copy.barrier);
  barrier.bytes -= boxes.box_rows * 128;
  advance(block, copy.barrier, barrier);
}

// Checks what a copy reads, and counts its bytes.
int64_t count_box(const TensorMap& map, int column, int row, int outer) {
  Machine& m = machine();
  const Boxes boxes = decode(map);
  if (m.running->launched_dependents) {
    fail("copy after launch_dependents: the next kernel's blocks would take the SM from it");
  }
  if (column < 0 || row < 0 || outer < 0 || outer >= boxes.outer) fail("a box outside its tensor");
  const int64_t rows = std::clamp<int64_t>(boxes.rows - row, 0, boxes.box_rows);
  const int64_t columns = std::clamp<int64_t>(boxes.columns - column, 0, kBoxColumns);
  Counters& c = own_block().grid->counters;
  ++c.copies;
  c.copied_bytes += rows * columns * 2;
  c.sectors += rows * ((columns * 2 + 31) / 32);
  return rows * columns * 2;
}

void copy_box_to(Block& block, const BoxCopy& copy, int64_t bytes) {
  Machine& m = machine();
  if (copy.to % 1024 != 0) fail("a box to a place that is no multiple of 1024 bytes");
  Mbarrier& barrier = barrier_at(block, copy.barrier);
  if (!barrier.known_to_copies) fail("a copy for a barrier without a fence after init");
  barrier.in_flight += bytes;
  block.in_flight += bytes;
  block.most_in_flight = std::max(block.most_in_flight, block.in_flight);
  if (m.chance(0.3)) {
    land(block, copy);
  } else {
    block.box_copies.push_back(copy);
    ++m.under_way;
  }
}

// Rows of 16 elements that a descriptor names in the block's shared memory.
class Operand {
 public:
  Operand(const Block& block, uint64_t descriptor)
      : block_(block),
        start_((descriptor & 0x3fff) << 4),
        panel_((descriptor >> 16 & 0x3fff) << 4),
        eight_rows_((descriptor >> 32 & 0x3fff) << 4) {}

  static bool readable(uint64_t descriptor) {
    constexpr uint64_t kFields = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    return descriptor >> 62 == 1 && (descriptor & ~kFields) == 0;
  }

  void read(int row, float (*widen)(uint16_t), float (&out)[16]) const {
    for (int piece = 0; piece < 2; ++piece) {
      const uint16_t* elements = at(start_ + row / 8 * eight_rows_ + row % 8 * 128 + piece * 16);
      if (elements == nullptr) return;
      for (int i = 0; i < 8; ++i) out[piece * 8 + i] = widen(elements[i]);
    }
  }

  // Of rows and panels of 64 columns, 16 rows of a column.
  void read_down(int column, float (*widen)(uint16_t), float (&out)[16]) const {
    const uintptr_t top = start_ + column / 64 * panel_ + column % 64 / 8 * 16;
    for (int row = 0; row < 16; ++row) {
      const uint16_t* elements = at(top + row / 8 * eight_rows_ + row % 8 * 128);
      if (elements == nullptr) return;
      out[row] = widen(elements[column % 8]);
    }
  }

 private:
  // The 16-byte piece that is at this address before the swizzle; null: an error.
  const uint16_t* at(uintptr_t address) const {
    const auto base = reinterpret_cast<uintptr_t>(block_.shared);
    const uintptr_t offset = (swizzled(address) - base) & 0x3ffff;  // addresses have 18 bits
    if (offset + 16 > block_.shared_bytes) {
      machine().error = "a descriptor names memory beyond the block's";
      return nullptr;
    }
    if (offset / 16 < block_.unpublished.size() && block_.unpublished[offset / 16]) {
      machine().error = "a product reads what cp.async has written and no thread has published";
      return nullptr;
    }
    return reinterpret_cast<const uint16_t*>(base + offset);
  }

  const Block& block_;
  const uintptr_t start_, panel_, eight_rows_;
};

void land(const Warp& warp, const Product& product) {
  const Block& block = *warp.block;
  const Operand a(block, product.a), b(block, product.b);
  const int first_row = static_cast<int>(&warp - block.warps.data()) % 4 * 16;
  float left[16][16] = {};
  if (product.left[0] == nullptr) {
    for (int row = 0; row < 16; ++row) a.read(first_row + row, product.widen, left[row]);
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {  // as emulated_ptx.h's mma_m16n8k16
        const uint32_t pair = product.left[lane][i / 2];
        left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] =
            product.widen(static_cast<uint16_t>(pair >> i % 2 * 16));
      }
    }
  }
  for (int token = 0; token < product.tokens; ++token) {
    float right[16] = {};
    product.transposed ? b.read_down(token, product.widen, right)
                       : b.read(token, product.widen, right);
    for (int row = 0; row < 16; ++row) {
      float& sum = product.d[row % 8 * 4 + token % 8 / 2][token / 8 * 4 + row / 8 * 2 + token % 2];
      for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k];
    }
  }
}

bool land_product(Warp& warp) {
  auto& groups = warp.product_groups;
  while (!groups.empty() && groups.front().empty()) groups.erase(groups.begin());
  auto& first = groups.empty() ? warp.products : groups.front();
  if (first.empty()) return false;
  land(warp, first.front());
  first.erase(first.begin());
  return true;
}

}  // namespace

void mbarrier_init(uintptr_t at, int arrivals) {
  if (at % 8 != 0) fail("a misaligned barrier");
  std::memcpy(reinterpret_cast<void*>(at), &kBarrier, 8);
  own_block().mbarriers[at] = {
      .arrivals = arrivals, .pending = arrivals, .initialiser = machine().running};
}

void fence_mbarrier_init() {
  for (auto& [at, barrier] : own_block().mbarriers) {
    barrier.known_to_copies |= barrier.initialiser == machine().running;
  }
}

void mbarrier_arrive(uintptr_t at, int64_t expected_bytes) {
  arrive(own_block(), at, expected_bytes);
}

void mbarrier_arrive_in_cluster(uintptr_t at) {
  const auto& blocks = own_block().cluster->blocks;
  for (size_t rank = 0; rank < blocks.size(); ++rank) {
    if (blocks[rank] == nullptr) continue;
    if (at - reinterpret_cast<uintptr_t>(blocks[rank]->shared) < blocks[rank]->shared_bytes) {
      arrive(block_of(static_cast<int>(rank)), at, 0);
      return;
    }
  }
  fail("a barrier in no block of the cluster, or in one that has ended");
}

void mbarrier_wait(uintptr_t at, uint32_t parity) {
  Thread& self = *machine().running;
  Block& block = own_block();
  while ((barrier_at(block, at).phase & 1) == parity) {
    self.awaited = at;
    suspend(State::kAtMbarrier);
  }
  block.in_flight -= std::exchange(barrier_at(block, at).in_flight, 0);
}

void copy_box(uintptr_t to, const TensorMap& map, int column, int row, int outer,
              uintptr_t barrier) {
  copy_box_to(own_block(), {map, to, column, row, outer, barrier},
              count_box(map, column, row, outer));
}

void copy_box_to_cluster(uintptr_t to, const TensorMap& map, int column, int row, int outer,
                         uintptr_t barrier, int mask) {
  const int64_t bytes = count_box(map, column, row, outer);
  for (int rank = 0; mask >> rank != 0; ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    Block& block = block_of(rank);
    copy_box_to(
        block, {map, cluster_address(to, rank), column, row, outer, cluster_address(barrier, rank)},
        bytes);
  }
}

void prefetch_box(const TensorMap& map, int column, int row, int outer) {
  const Boxes boxes = decode(map);
  if (outer < 0 || outer >= boxes.outer) fail("a box outside its tensor");
  const int64_t rows = std::clamp<int64_t>(boxes.rows - row, 0, boxes.box_rows);
  const int64_t columns = std::clamp<int64_t>(boxes.columns - column, 0, kBoxColumns);
  own_block().grid->counters.prefetched_bytes += rows * columns * 2;
}

void warpgroup_fence() {
  static const WarpOperation operate = [](void* const*) { machine().running->warp->fenced = true; };
  warp_operation("wgmma.fence", nullptr, operate);
}

void warpgroup_commit() {
  static const WarpOperation operate = [](void* const*) {
    Warp& warp = *machine().running->warp;
    warp.product_groups.push_back(std::move(warp.products));
    warp.products.clear();
    warp.fenced = false;  // what happens to the registers until the next product is not seen
  };
  warp_operation("wgmma.commit_group", nullptr, operate);
}

void warpgroup_wait(int pending_groups) {
  static const WarpOperation operate = [](void* const* operands) {
    Warp& warp = *machine().running->warp;
    const size_t pending = *static_cast<const int*>(operands[0]);
    while (warp.product_groups.size() > pending) {
      auto& group = warp.product_groups.front();
      for (const Product& product : group) land(warp, product);
      machine().under_way -= static_cast<int>(group.size());
      warp.product_groups.erase(warp.product_groups.begin());
    }
  };
  warp_operation("wgmma.wait_group", &pending_groups, operate);
}

void warpgroup_product(uint64_t a, uint64_t b, int tokens, float* d, float (*widen)(uint16_t),
                       const uint32_t* left, bool transposed) {
  struct Issued {
    Product product;  // of the warp but for d and left
    float* d;
    const uint32_t* left;
  } mine{{.a = a, .b = b, .tokens = tokens, .transposed = transposed, .widen = widen}, d, left};
  warp_operation("wgmma", &mine, [](void* const* operands) {
    Warp& warp = *machine().running->warp;
    Block& block = *warp.block;
    Product product = static_cast<const Issued*>(operands[0])->product;
    for (int lane = 0; lane < 32; ++lane) {
      const auto& issued = *static_cast<const Issued*>(operands[lane]);
      if (issued.product.a != product.a || issued.product.b != product.b) {
        fail("lanes of a warp with different descriptors");
      }
      product.d[lane] = issued.d;
      product.left[lane] = issued.left;
    }
    if (!warp.fenced) fail("wgmma without wgmma.fence since the last group");
    const bool in_registers = product.left[0] != nullptr;
    if (!(in_registers || Operand::readable(product.a)) || !Operand::readable(product.b)) {
      fail("a descriptor of another kind than rows with the 128-byte swizzle");
    }
    const size_t index = &warp - block.warps.data(), first = index / 4 * 4;
    if (first + 4 > block.warps.size()) fail("wgmma in a warpgroup of fewer than four warps");
    // The first of the four warps to get here says what the others must do as well.
    auto& agreed = block.warps[first].agreed_products;
    if (warp.issued_products == agreed.size()) agreed.push_back({product.a, product.b});
    if (agreed[warp.issued_products++] != std::pair{product.a, product.b}) {
      fail("warps of a warpgroup with different products");
    }
    warp.products.push_back(product);
    ++machine().under_way;
  });
}

bool land_one_of(Block& block) {
  Machine& m = machine();
  auto& copies = block.box_copies;
  if (!copies.empty() && m.chance(0.5)) {
    std::swap(copies[m.below(copies.size())], copies.back());
    const BoxCopy copy = copies.back();
    copies.pop_back();
    --m.under_way;
    land(block, copy);
    return true;
  }
  Warp& warp = block.warps[m.below(block.warps.size())];
  if (!land_product(warp)) return false;
  --m.under_way;
  return true;
}

std::string unfinished(const Block& block) {
  if (!block.box_copies.empty()) return "a block ends while copies to it are under way";
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const Warp &warp = block.warps[w], &first = block.warps[w / 4 * 4];
    const auto& groups = warp.product_groups;
    const bool under_way =
        std::any_of(groups.begin(), groups.end(), [](auto& g) { return !g.empty(); });
    if (under_way || !warp.products.empty()) return "a block ends while products are under way";
    if (warp.issued_products != first.agreed_products.size()) {
      return "warps of a warpgroup with different numbers of products";
    }
  }
  return "";
}

}  // namespace emulation
}  // namespace dflare
