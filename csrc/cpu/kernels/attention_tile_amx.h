// The arithmetic of one key tile for bfloat16 pools by the tile unit: 16 query rows at a time,
// whose scores and softmax lie across the lanes of vectors, a row a lane.
//
// Queries and probabilities are rounded to bfloat16, products are summed in float. A lane's sums do
// not depend on the others.
#pragma once

#include "cpu/kernels/attention_tile.h"
#include "cpu/kernels/tile_unit.h"

#if defined(__AMX_BF16__)

namespace dflare::cpu::DFLARE_ISA {

template <>
class TileMath<BFloat16> {
 public:
  static int64_t scratch_floats(int64_t rows, int64_t head_dim) {
    const int64_t depth = round_up(head_dim, kTileInputs);
    return (round_up(rows, kTileRows) + kMostRows) * depth / 2 + kKeyTile * depth / 2 +
           kKeyTile / 2 * head_dim + kKeyTile * kTileRows + kTileRows * kKeyTile / 2 +
           kTileRows * head_dim + kAlignment;
  }

  TileMath(float* scratch, int64_t rows, int64_t head_dim)
      : head_dim_(head_dim), depth_(round_up(head_dim, kTileInputs)) {
    scratch += -(reinterpret_cast<uintptr_t>(scratch) / sizeof(float)) % kAlignment;
    const auto take = [&](int64_t words) {
      float* taken = scratch;
      scratch += words;
      return taken;
    };
    queries_ = reinterpret_cast<uint32_t*>(take(round_up(rows, kTileRows) * depth_ / 2));
    alone_ = reinterpret_cast<uint32_t*>(take(kMostRows * depth_ / 2));
    k_ = reinterpret_cast<BFloat16*>(take(kKeyTile * depth_ / 2));
    v_ = reinterpret_cast<uint32_t*>(take(kKeyTile / 2 * head_dim));
    scores_ = take(kKeyTile * kTileRows);
    probs_ = reinterpret_cast<uint32_t*>(take(kTileRows * kKeyTile / 2));
    values_ = take(kTileRows * head_dim);
  }

  void prepare(const QueryRows& rows, float scale) {
    scale_ = scale;
    pack_queries(rows, queries_);
  }

  void attend(const QueryRows& rows, const KeyRows<BFloat16>& keys, float logit_cap) {
    attend(rows, queries_, keys, logit_cap);
  }

  void attend_alone(const QueryRows& some, const KeyRows<BFloat16>& keys, float logit_cap) {
    for (int64_t r = 0; r < some.count; r += kMostRows) {
      const QueryRows rows = some.from(r, min(some.count - r, kMostRows));
      pack_queries(rows, alone_);
      attend(rows, alone_, keys, logit_cap);
    }
  }

 private:
  static constexpr int64_t kMostRows = 32;   // packed anew for keys of their own
  static constexpr int64_t kAlignment = 16;  // words

  int64_t steps() const { return depth_ / kTileInputs; }

  // As tiles [groups of rows][steps][pairs][rows].
  void pack_queries(const QueryRows& rows, uint32_t* packed) const {
    for (int64_t first = 0; first < rows.count; first += kTileRows) {
      const int64_t count = min(rows.count - first, kTileRows);
      for (int64_t c = 0; c < depth_; c += kTileInputs, packed += kTileWords) {
        IntVec words[kTileRows] = {};
        for (int64_t r = 0; r < count; ++r) {
          const float* q = rows.q + (first + r) * head_dim_ + c;
          words[r] = two_bf16(load(q), c + kLanes < head_dim_ ? load(q + kLanes) : Vec{});
        }
        transpose(words);
        for (int64_t pair = 0; pair < kTileRows; ++pair)
          store_words(packed + pair * kTileRows, words[pair]);
      }
    }
  }

  static void store_words(uint32_t* p, IntVec x) { *reinterpret_cast<IntVecMem*>(p) = x; }

  // [a, b] as 32 bfloat16.
  static IntVec two_bf16(Vec a, Vec b) {
    return reinterpret_cast<IntVec>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
  }
  // [a0, b0, a1, b1, ...]
  static IntVec pairs_bf16(Vec a, Vec b) {
    const IntVec halves = two_bf16(a, b);
    const IntVec low = __builtin_convertvector(halves_of(halves, 0), IntVec);
    const IntVec high = __builtin_convertvector(halves_of(halves, 1), IntVec);
    return low | (high << 16);
  }
  static HalfVec halves_of(IntVec x, int which) {
    HalfVec halves[2];
    memcpy(halves, &x, sizeof(x));
    return halves[which];
  }

  void attend(const QueryRows& rows, const uint32_t* queries, const KeyRows<BFloat16>& keys,
              float logit_cap) {
    pack_keys(keys);
    for (int64_t r = 0; r < rows.count; r += kTileRows, queries += steps() * kTileWords) {
      const QueryRows group = rows.from(r, min(rows.count - r, kTileRows));
      score(queries, keys.count);
      const Vec alpha = softmax(group, keys, logit_cap);
      add_values(group, keys.count, alpha);
    }
  }

  // Keys one after the other, values as pairs of keys.
  void pack_keys(const KeyRows<BFloat16>& keys) const {
    for (int64_t i = 0; i < round_up(keys.count, kTileRows); ++i) {
      BFloat16* out = k_ + i * depth_;
      memcpy(out, keys.k[i], sizeof(BFloat16) * head_dim_);
      if (depth_ > head_dim_) memset(out + head_dim_, 0, sizeof(BFloat16) * (depth_ - head_dim_));
    }
    for (int64_t i = 0; i < round_up(keys.count, 2 * kTileRows); i += 2) {
      for (int64_t c = 0; c < head_dim_; c += kLanes) {
        const auto wide = [c](const BFloat16* x) {
          return __builtin_convertvector(*reinterpret_cast<const HalfVecMem*>(x + c), IntVec);
        };
        store_words(v_ + i / 2 * head_dim_ + c, wide(keys.v[i]) | (wide(keys.v[i + 1]) << 16));
      }
    }
  }

  // scores[key][row] of one group of rows.
  void score(const uint32_t* queries, int64_t count) const {
    const int64_t stride = depth_ * sizeof(BFloat16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps(); ++step) {
      const BFloat16* k = k_ + step * kTileInputs;
      _tile_loadd(5, queries + step * kTileWords, 64);
      _tile_loadd(4, k, stride);
      _tile_dpbf16ps(0, 4, 5);
      if (count > 16) {
        _tile_loadd(4, k + 16 * depth_, stride);
        _tile_dpbf16ps(1, 4, 5);
      }
      if (count > 32) {
        _tile_loadd(4, k + 32 * depth_, stride);
        _tile_dpbf16ps(2, 4, 5);
      }
      if (count > 48) {
        _tile_loadd(4, k + 48 * depth_, stride);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, scores_, 64);
    _tile_stored(1, scores_ + kTileWords, 64);
    _tile_stored(2, scores_ + 2 * kTileWords, 64);
    _tile_stored(3, scores_ + 3 * kTileWords, 64);
  }

  // Turns scores into probabilities [row][key], bfloat16; returns by what o shrinks.
  Vec softmax(const QueryRows& rows, const KeyRows<BFloat16>& keys, float logit_cap) {
    const int count = static_cast<int>(rows.count);
    const Vec before = load_lanes(rows.part.m, count);
    Vec m = before;
    IntVec first = {}, last = {};
    memcpy(&first, rows.first, sizeof(int32_t) * count);
    memcpy(&last, rows.last, sizeof(int32_t) * count);
    for (int64_t i = 0; i < keys.count; ++i) {
      Vec x = load(scores_ + i * kTileRows) * scale_;
      if (logit_cap > 0) x = logit_cap * tanh(x / logit_cap);
      if (keys.masked) {
        const int32_t key = static_cast<int32_t>(keys.begin + i);
        x = (first <= key) & (last >= key) ? x : broadcast(-__builtin_inff());
      }
      store(scores_ + i * kTileRows, x);
      m = max(x, m);
    }
    const int64_t padded = round_up(keys.count, 2 * kTileRows);
    Vec l = {};
    for (int64_t half = 0; half < padded; half += 2 * kTileRows) {
      IntVec pairs[kTileRows];
      for (int64_t pair = 0; pair < kTileRows; ++pair) {
        Vec y[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t key = half + 2 * pair + i;
          y[i] = key < keys.count ? exp(load(scores_ + key * kTileRows) - m) : Vec{};
          l += y[i];
        }
        pairs[pair] = pairs_bf16(y[0], y[1]);
      }
      transpose(pairs);
      for (int64_t r = 0; r < kTileRows; ++r)
        store_words(probs_ + r * (kKeyTile / 2) + half / 2, pairs[r]);
    }
    const Vec alpha = exp(before - m);
    store_lanes(rows.part.l, load_lanes(rows.part.l, count) * alpha + l, count);
    store_lanes(rows.part.m, m, count);
    return alpha;
  }

  static Vec load_lanes(const float* p, int count) {
    return count == kLanes ? load(p) : load_partial(p, count);
  }
  static void store_lanes(float* p, Vec x, int count) {
    count == kLanes ? store(p, x) : store_partial(p, x, count);
  }

  // o[row] = o[row] * alpha[row] + sum over keys of probability[row][key] * v[key].
  void add_values(const QueryRows& rows, int64_t count, Vec alpha) const {
    const int64_t v_stride = head_dim_ * sizeof(uint32_t), o_stride = head_dim_ * sizeof(float);
    int64_t c = 0;
    for (; c + 64 <= head_dim_; c += 64) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t pair = 0; 2 * pair < count; pair += kTileRows) {
        const uint32_t* v = v_ + pair * head_dim_ + c;
        _tile_loadd(4, probs_ + pair, sizeof(uint32_t) * kKeyTile / 2);
        _tile_loadd(5, v, v_stride);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, v + 16, v_stride);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(5, v + 32, v_stride);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, v + 48, v_stride);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(0, values_ + c, o_stride);
      _tile_stored(1, values_ + c + 16, o_stride);
      _tile_stored(2, values_ + c + 32, o_stride);
      _tile_stored(3, values_ + c + 48, o_stride);
    }
    for (; c < head_dim_; c += kTileRows) {
      _tile_zero(0);
      for (int64_t pair = 0; 2 * pair < count; pair += kTileRows) {
        _tile_loadd(4, probs_ + pair, sizeof(uint32_t) * kKeyTile / 2);
        _tile_loadd(5, v_ + pair * head_dim_ + c, v_stride);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, values_ + c, o_stride);
    }
    float shrink[kLanes];
    store(shrink, alpha);
    for (int64_t r = 0; r < rows.count; ++r) {
      float* o = rows.part.o + r * head_dim_;
      for (int64_t d = 0; d < head_dim_; d += kLanes)
        store(o + d, load(o + d) * shrink[r] + load(values_ + r * head_dim_ + d));
    }
  }

  int64_t head_dim_, depth_;  // depth: head_dim, padded with zeros to whole tiles
  float scale_ = 1.0f;
  uint32_t *queries_, *alone_;  // packed
  BFloat16* k_;                 // [kKeyTile][depth]
  uint32_t* v_;                 // [kKeyTile / 2][head_dim] pairs
  float* scores_;               // [kKeyTile][16]
  uint32_t* probs_;             // [16][kKeyTile / 2] pairs
  float* values_;               // [16][head_dim]
  TileUnit unit_;
};

}  // namespace dflare::cpu::DFLARE_ISA

#endif
