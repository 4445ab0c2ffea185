// head_argmax, once for every device: schema, arguments, and what must hold for them. What it
// computes stands in python/dflare/ops/head_argmax.py.
#pragma once

#include <cstring>
#include <optional>

#include "arguments.h"

namespace dflare {

inline constexpr char kHeadArgmax[] =
    "head_argmax(Tensor hidden, Tensor weight, int block_size, Tensor? ids, int first_id,"
    " Tensor(a!) tokens) -> Tensor";

// A logit and its token as one number: larger for a higher logit, of equal ones for the lower
// token, which is the complement of the lower half. Zeros of both signs are equal.
DFLARE_HOST_DEVICE inline int64_t argmax_key(float logit, int64_t token) {
  const float positive_zero = logit + 0.0f;
  int32_t bits;
  memcpy(&bits, &positive_zero, sizeof(bits));
  bits ^= bits >> 31 & 0x7fffffff;  // negative numbers in the order of their values
  const uint64_t high = static_cast<uint32_t>(bits);
  return static_cast<int64_t>(high << 32 | static_cast<uint32_t>(~token));
}

DFLARE_HOST_DEVICE inline int64_t argmax_token(int64_t key) { return static_cast<uint32_t>(~key); }

// The token of each row of the head.
struct HeadTokens {
  const int64_t* ids;  // or null: first_id, first_id + 1, ..
  int64_t first_id;

  DFLARE_HOST_DEVICE int64_t operator[](int64_t row) const {
    return ids != nullptr ? ids[row] : first_id + row;
  }
};

template <class Tensor>
struct HeadArgmax {
  const Tensor& hidden;
  const Tensor& weight;
  int64_t block_size;
  const std::optional<Tensor>& ids;
  int64_t first_id;
  const Tensor& tokens;
  // What `check` reads from them; `drafted` counts the rows that are no anchor.
  int64_t rows = 0, vocabulary = 0, inputs = 0, drafted = 0;

  template <class Checker>
  void check(Checker&& check) {
    check.element("hidden", hidden);
    check.rows("hidden", hidden, {kAny, kAny}, "[bs * block_size, hidden]");
    rows = hidden.size(0), inputs = hidden.size(1);
    check.require(rows <= 1 << 30, "hidden has ", rows, " rows, expected at most 2^30");
    check.weight("weight", weight, {kAny, inputs}, "[vocabulary, hidden]");
    vocabulary = weight.size(0);
    check.count("weight", vocabulary, "rows", int64_t{1} << 31);
    check.block(block_size);
    check.require(rows % block_size == 0, "hidden has ", rows,
                  " rows, expected a multiple of block_size = ", block_size);
    drafted = block_size == 1 ? rows : rows / block_size * (block_size - 1);
    if (ids) check.int64s("ids", *ids, {vocabulary}, "[vocabulary]");
    check.int64s("tokens", tokens, {drafted}, "[bs * (block_size - 1)], of blocks of 1 [bs]");
  }

  HeadTokens head_tokens() const {
    return {ids ? ids->template const_data_ptr<int64_t>() : nullptr, first_id};
  }
};

// The row of `hidden` that drafts a token: the first of each block is its anchor's.
DFLARE_HOST_DEVICE inline int drafting_row(int drafted, int block_size) {
  if (block_size == 1) return drafted;
  return drafted / (block_size - 1) * block_size + drafted % (block_size - 1) + 1;
}

// The operator as Torch calls it, for the implementation `run` of a device.
template <class Tensor, Tensor (*run)(HeadArgmax<Tensor>)>
Tensor head_argmax(const Tensor& hidden, const Tensor& weight, int64_t block_size,
                   const std::optional<Tensor>& ids, int64_t first_id, const Tensor& tokens) {
  return run({hidden, weight, block_size, ids, first_id, tokens});
}

}  // namespace dflare
