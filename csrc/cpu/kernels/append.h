// append_context_kv in two parts: fuse_norm writes the D normalised fused states of each valid row,
// project turns them into keys and values, one task a layer, head and chunk of rows.
#pragma once

#include "cpu/kernels/dot_tile.h"
#include "cpu/kernels/head.h"
#include "cpu/scratch.h"

namespace dflare::cpu::DFLARE_ISA {

// What the projection reads: bfloat16 only where the processor multiplies it.
template <typename T>
struct FusedElement {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct FusedElement<BFloat16> {
  using type = BFloat16;
};
#endif
template <typename T>
using Fused = typename FusedElement<T>::type;

template <typename T>
inline Fused<T>* fused_row(const AppendParams<T>& p, int64_t layer, int64_t m) {
  return reinterpret_cast<Fused<T>*>(p.fused) + (layer * p.num_rows + m) * p.fused_stride;
}

// The fused states of LAYERS layers from `layer` on: the T states of a row are read once for all.
template <int LAYERS, typename T>
inline void fuse_layers(const AppendParams<T>& p, int64_t m, int64_t layer) {
  const T* states = p.target_hidden + p.rows[m] * p.target_hidden_stride;
  const float* probs = p.fusion_probs + layer * p.taps;
  float* wide = thread_scratch(LAYERS * p.fused_stride);
  const int64_t whole = p.hidden / kLanes * kLanes;
  const int rest = static_cast<int>(p.hidden - whole);
  Vec squares[LAYERS] = {};
  auto add_states = [&](int64_t c, auto load_state) __attribute__((always_inline)) {
    Vec sums[LAYERS] = {};
    for (int64_t t = 0; t < p.taps; ++t) {
      const Vec state = load_state(states + t * p.hidden + c);
#pragma GCC unroll 8
      for (int i = 0; i < LAYERS; ++i) sums[i] += probs[i * p.taps + t] * state;
    }
#pragma GCC unroll 8
    for (int i = 0; i < LAYERS; ++i) {
      squares[i] += sums[i] * sums[i];
      store(wide + i * p.fused_stride + c, sums[i]);
    }
  };
  for (int64_t c = 0; c < whole; c += kLanes) {
    add_states(c, [](const T* x) { return load(x); });
  }
  if (rest) add_states(whole, [rest](const T* x) { return load_partial(x, rest); });

#pragma GCC unroll 8
  for (int i = 0; i < LAYERS; ++i) {
    const float inverse = 1.0f / sqrt(sum(squares[i]) / static_cast<float>(p.hidden) + p.eps);
    const float* x = wide + i * p.fused_stride;
    Fused<T>* out = fused_row(p, layer + i, m);
    int64_t c = 0;
    for (; c < whole; c += kLanes) store(out + c, load(x + c) * inverse * load(p.norm_weight + c));
    if (rest) {
      store(out + c, load(x + c) * inverse * load_partial(p.norm_weight + c, rest));
      c += kLanes;
    }
    for (; c < p.fused_stride; c += kLanes) store(out + c, Vec{});
  }
}

template <typename T>
void fuse_norm(const AppendParams<T>& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    int64_t layer = 0;
    for (; layer + 4 <= p.layers; layer += 4) fuse_layers<4>(p, m, layer);
    switch (p.layers - layer) {
      case 3: fuse_layers<3>(p, m, layer); break;
      case 2: fuse_layers<2>(p, m, layer); break;
      case 1: fuse_layers<1>(p, m, layer); break;
    }
  }
}

// Weight rows that stay in the second-level cache while all rows of a chunk pass by.
inline int64_t weight_block_rows(int64_t hidden, int64_t weight_bytes, int64_t head_dim) {
  const int64_t rows = (256 << 10) / (hidden * weight_bytes) / 4 * 4;
  return rows < 4 ? 4 : rows > head_dim ? head_dim : rows;
}

// tile[r][o] = fused[r] . weight[o] for a chunk of rows and one head, blocked so that weights come
// from memory once and the current rows of `fused` stay in the first-level cache.
template <typename T>
void project_head(const AppendParams<T>& p, const Fused<T>* fused, int64_t rows, const T* weight,
                  float* tile) {
  const int64_t block = weight_block_rows(p.hidden, sizeof(T), p.head_dim);
  for (int64_t o0 = 0; o0 < p.head_dim; o0 += block) {
    const int64_t o1 = o0 + block < p.head_dim ? o0 + block : p.head_dim;
    for (int64_t r = 0; r < rows; r += kDotRows) {
      const int64_t count = rows - r < kDotRows ? rows - r : kDotRows;
      for (int64_t o = o0; o < o1; o += 4) {
        const T* w = weight + o * p.hidden;
        const T* const four[4] = {w, w + p.hidden, w + 2 * p.hidden, w + 3 * p.hidden};
        dot_rows(fused + r * p.fused_stride, p.fused_stride, count, four, p.hidden,
                 tile + r * p.head_dim + o, p.head_dim);
      }
    }
  }
}

// Tasks are numbered layer, chunk, head (keys, then values): neighbours share rows of `fused`.
template <typename T>
void project(const AppendParams<T>& p, int64_t begin, int64_t end) {
  const int64_t heads = 2 * p.kv_heads;
  const int64_t chunks = (p.num_rows + p.chunk_rows - 1) / p.chunk_rows;
  float* tile = thread_scratch(p.chunk_rows * p.head_dim);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task % heads;
    const int64_t layer = task / heads / chunks;
    const int64_t first = task / heads % chunks * p.chunk_rows;
    const int64_t rows = p.num_rows - first < p.chunk_rows ? p.num_rows - first : p.chunk_rows;
    const int64_t out_row = (layer * heads + head) * p.head_dim;
    project_head(p, fused_row(p, layer, first), rows, p.kv_weight + out_row * p.hidden, tile);

    const bool is_key = head < p.kv_heads;
    const int64_t pool = is_key ? layer : p.layers + layer;
    const int64_t kv_head = is_key ? head : head - p.kv_heads;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = p.rows[first + r];
      float* x = tile + r * p.head_dim;
      if (p.kv_bias) {
        for (int64_t c = 0; c < p.head_dim; c += kLanes) {
          store(x + c, load(x + c) + load(p.kv_bias + out_row + c));
        }
      }
      if (is_key) {
        head_norm(x, p.k_norm_weight + layer * p.head_dim, p.k_norm_eps, p.head_dim);
        head_rope(x, p.rope, row);
      }
      T* slot = p.pools[pool] + p.cache_loc[row] * p.slot_strides[pool] + kv_head * p.head_dim;
      store_row(slot, x, 1.0f, p.head_dim);
    }
  }
}

}  // namespace dflare::cpu::DFLARE_ISA
