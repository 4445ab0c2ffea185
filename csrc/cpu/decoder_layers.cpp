// torch.ops.dflare.decoder_layers: all layers of a Llama- or Qwen-like target on the CPU.
//
// A layer of a small model takes some hundred microseconds, and a dozen operators with what Python
// does between them take as long again. Here the layers are one operator, made of the same kernels.

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/checks.h"
#include "cpu/paged_queries.h"
#include "cpu/run_attention.h"
#include "cpu/run_layer.h"
#include "stable_torch.h"

namespace dflare::cpu {
namespace {

constexpr const char* kOp = "decoder_layers";

struct Layers {
  const at::Tensor& residual;
  at::TensorList norms, matrices, biases, head_norms;
  double eps;
  const at::Tensor& cos_sin_cache;
  const at::Tensor& positions;
  at::TensorList pools;
  const at::Tensor& cache_loc;
  PagedContext<at::Tensor> context;
  const at::Tensor& query_start;
  int64_t window;
  double scale, logit_cap;
  const std::optional<at::Tensor>& parents;
  const std::vector<int64_t>& taps;
  // What `check` reads from them.
  int64_t layers = 0, rows = 0, hidden = 0, q_size = 0, kv_size = 0, wide = 0;
  Rope rope{};

  int64_t qkv_size() const { return q_size + 2 * kv_size; }

  void check(Checker check) {
    check.element("residual", residual);
    check.rows("residual", residual, {kAny, kAny}, "[rows, hidden]");
    check.require(residual.is_contiguous(), "residual is not contiguous: call .contiguous()");
    rows = residual.size(0), hidden = residual.size(1);
    layers = static_cast<int64_t>(matrices.size()) / 4;
    check.require(layers > 0, "matrices has ", matrices.size(), " tensors, expected 4 a layer");
    length(check, "matrices", matrices, 4 * layers);
    length(check, "norms", norms, 2 * layers + 1);
    length(check, "pools", pools, 2 * layers);
    if (!biases.empty()) length(check, "biases", biases, layers);
    if (!head_norms.empty()) length(check, "head_norms", head_norms, 2 * layers);
    context.check(check);
    kv_size = context.kv_heads * context.head_dim;
    for (const at::Tensor& pool : pools) {
      check.rows("pools", pool, {context.slots, context.kv_heads, context.head_dim},
                 "the same shape for all");
    }
    q_size = matrices[0].size(0) - 2 * kv_size;
    check.require(q_size > 0 && q_size % kv_size == 0, "matrices[0] has ", matrices[0].size(0),
                  " rows, expected those of query heads, a multiple of the ", context.kv_heads,
                  " key heads, of keys and of values");
    wide = matrices[3].size(1);
    for (const int64_t inputs : {hidden, q_size, wide}) {
      check.require(inputs % kVector == 0, "a matrix has ", inputs,
                    " columns, expected a multiple of ", kVector);
    }
    for (int64_t layer = 0; layer < layers; ++layer) check_weights(check, layer);
    check.weight("norms", norms[2 * layers], {hidden}, "[hidden]");
    rope = check.rope(cos_sin_cache, positions, rows, context.head_dim);
    check.int64s("cache_loc", cache_loc, {rows}, "[rows]");
    const int64_t* slots = cache_loc.const_data_ptr<int64_t>();
    for (int64_t row = 0; row < rows; ++row) {
      check_position(kOp, rope, row, cos_sin_cache.size(0));
      check.require(slots[row] >= 0 && slots[row] < context.slots, "cache_loc[", row, "] is ",
                    slots[row], ", but the pools have ", context.slots, " slots");
    }
    check.integers("query_start", query_start, {context.batch + 1}, "[bs + 1]");
    if (parents) check.int32s("parents", *parents, {rows}, "[rows]");
    for (const int64_t tap : taps) {
      check.require(tap >= 0 && tap < layers, "a tap is ", tap, ", expected 0 to ", layers - 1);
    }
  }

  static void length(const Checker& check, const char* name, at::TensorList list, int64_t wanted) {
    check.require(static_cast<int64_t>(list.size()) == wanted, name, " has ", list.size(),
                  " tensors, expected ", wanted);
  }

  void check_weights(const Checker& check, int64_t layer) const {
    const at::Tensor* of = &matrices[4 * layer];
    check.weight("matrices", of[0], {qkv_size(), hidden}, "[queries, keys and values, hidden]");
    check.weight("matrices", of[1], {hidden, q_size}, "[hidden, queries]");
    check.weight("matrices", of[2], {2 * wide, hidden}, "[gates and values, hidden]");
    check.weight("matrices", of[3], {hidden, wide}, "[hidden, values]");
    for (int i : {0, 1}) check.weight("norms", norms[2 * layer + i], {hidden}, "[hidden]");
    if (!biases.empty()) check.weight("biases", biases[layer], {qkv_size()}, "[outputs]");
    if (head_norms.empty()) return;
    for (int i : {0, 1}) {
      check.weight("head_norms", head_norms[2 * layer + i], {context.head_dim}, "[head_dim]");
    }
  }
};

// One step through the layers; rows are those of the batch.
template <typename T>
class Pass {
 public:
  Pass(const Layers& x, const PagedQueries& queries) : x_(x), queries_(queries) {
    residual_ = static_cast<T*>(x.residual.mutable_data_ptr());
    normed_ = make(x.hidden);
    qkv_ = make(x.qkv_size());
    attended_ = make(x.q_size);
    gates_ = make(2 * x.wide);
    gated_ = make(x.wide);
    out_ = make(x.hidden);
    tapped_ = make(x.hidden * x.taps.size());
  }

  std::tuple<at::Tensor, at::Tensor> run() {
    const T* added = nullptr;  // what the layer before left to be added to the residual
    for (int64_t layer = 0; layer < x_.layers; ++layer) {
      norm(x_.norms[2 * layer], added);
      keep_taps(layer);
      multiply(normed_, x_.hidden, x_.matrices[4 * layer], qkv_,
               x_.biases.empty() ? nullptr : &x_.biases[layer]);
      attend(layer);
      multiply(attended_, x_.q_size, x_.matrices[4 * layer + 1], out_);
      norm(x_.norms[2 * layer + 1], data(out_));
      multiply(normed_, x_.hidden, x_.matrices[4 * layer + 2], gates_);
      run_gate(GateParams<T>{data(gates_), 2 * x_.wide, data(gated_), x_.wide}, x_.rows);
      multiply(gated_, x_.wide, x_.matrices[4 * layer + 3], out_);
      added = data(out_);
    }
    norm(x_.norms[2 * x_.layers], added);
    return {normed_, tapped_};
  }

 private:
  at::Tensor make(int64_t columns) const { return at::empty({x_.rows, columns}, x_.residual); }
  static T* data(const at::Tensor& x) { return static_cast<T*>(x.mutable_data_ptr()); }
  static const T* weight(const at::Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); }

  // The norm of the residual, to which `added` is added first.
  void norm(const at::Tensor& scale, const T* added) {
    NormParams<T> p{};
    p.x = added ? added : residual_;
    p.x_stride = p.residual_stride = p.hidden = x_.hidden;
    p.residual = added ? residual_ : nullptr;
    p.weight = weight(scale);
    p.eps = static_cast<float>(x_.eps);
    p.out = data(normed_);
    run_norm(p, x_.rows);
  }

  void keep_taps(int64_t layer) {
    const int64_t taps = x_.taps.size();
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (x_.taps[tap] != layer) continue;
      for (int64_t row = 0; row < x_.rows; ++row) {
        std::memcpy(data(tapped_) + (row * taps + tap) * x_.hidden, residual_ + row * x_.hidden,
                    sizeof(T) * x_.hidden);
      }
    }
  }

  void multiply(const at::Tensor& in, int64_t inputs, const at::Tensor& matrix,
                const at::Tensor& out, const at::Tensor* bias = nullptr) {
    LinearParams<T> p{};
    p.x = data(in);
    p.x_stride = p.inputs = inputs;
    p.weight = weight(matrix);
    p.bias = bias ? weight(*bias) : nullptr;
    p.out = data(out);
    p.rows = x_.rows;
    p.outputs = matrix.size(0);
    run_linear(p);
  }

  // Norms of the heads from `first` on, in place: the rows of all of them one after the other.
  void norm_heads(int64_t first, int64_t size, const at::Tensor& scale) {
    NormParams<T> p{};
    p.x_stride = p.hidden = x_.context.head_dim;
    p.weight = weight(scale);
    p.eps = static_cast<float>(x_.eps);
    for (int64_t row = 0; row < x_.rows; ++row) {
      p.out = data(qkv_) + row * x_.qkv_size() + first;
      p.x = p.out;
      run_norm(p, size / x_.context.head_dim);
    }
  }

  void attend(int64_t layer) {
    const int64_t qkv_size = x_.qkv_size(), head_dim = x_.context.head_dim;
    if (!x_.head_norms.empty()) {
      norm_heads(0, x_.q_size, x_.head_norms[2 * layer]);
      norm_heads(x_.q_size, x_.kv_size, x_.head_norms[2 * layer + 1]);
    }
    const int64_t turned = (x_.q_size + x_.kv_size) / head_dim;
    run_rotary(RotaryParams<T>{data(qkv_), qkv_size, turned, head_dim, x_.rope}, x_.rows);
    const at::Tensor& k_pool = x_.pools[layer];
    const at::Tensor& v_pool = x_.pools[x_.layers + layer];
    const int64_t* slots = x_.cache_loc.template const_data_ptr<int64_t>();
    for (int64_t row = 0; row < x_.rows; ++row) {
      const T* keys = data(qkv_) + row * qkv_size + x_.q_size;
      std::memcpy(data(k_pool) + slots[row] * k_pool.stride(0), keys, sizeof(T) * x_.kv_size);
      std::memcpy(data(v_pool) + slots[row] * v_pool.stride(0), keys + x_.kv_size,
                  sizeof(T) * x_.kv_size);
    }
    AttentionParams<T> p{};
    set_pools(
        {k_pool, v_pool, x_.context.req_to_token, x_.context.req_pool_indices, x_.context.seq_lens,
         x_.context.batch, x_.context.slots, x_.context.kv_heads, head_dim},
        x_.q_size / head_dim, p);
    p.q = data(qkv_);
    p.q_stride = qkv_size;
    p.window = clamp_window(x_.window);
    p.causal = true;
    p.scale = static_cast<float>(x_.scale);
    p.logit_cap = static_cast<float>(x_.logit_cap);
    p.out = data(attended_);
    run_attention(kOp, p, queries_.requests);
  }

  const Layers& x_;
  const PagedQueries& queries_;
  T* residual_;
  at::Tensor normed_, qkv_, attended_, gates_, gated_, out_, tapped_;
};

std::tuple<at::Tensor, at::Tensor> decoder_layers(
    const at::Tensor& residual, at::TensorList norms, at::TensorList matrices,
    at::TensorList biases, at::TensorList head_norms, double eps, const at::Tensor& cos_sin_cache,
    const at::Tensor& positions, at::TensorList pools, const at::Tensor& cache_loc,
    const at::Tensor& req_to_token, const at::Tensor& req_pool_indices, const at::Tensor& seq_lens,
    const at::Tensor& query_start, int64_t window, double scale, double logit_cap,
    const std::optional<at::Tensor>& parents, const std::vector<int64_t>& taps) {
  TORCH_CHECK(pools.size() >= 2, kOp, ": pools has ", pools.size(),
              " tensors, expected keys and values of each layer");
  Layers x{residual,
           norms,
           matrices,
           biases,
           head_norms,
           eps,
           cos_sin_cache,
           positions,
           pools,
           cache_loc,
           {pools[0], pools[pools.size() / 2], req_to_token, req_pool_indices, seq_lens},
           query_start,
           window,
           scale,
           logit_cap,
           parents,
           taps};
  x.check(Checker(kOp, kLimits, residual));
  const PagedQueries queries = paged_queries(kOp, x.context, query_start, parents, x.rows);
  TORCH_CHECK(queries.used == x.rows, kOp, ": query_start ends with ", queries.used,
              ", expected the ", x.rows, " rows of residual");
  return with_element_type(residual,
                           [&](auto element) { return Pass<decltype(element)>(x, queries).run(); });
}

}  // namespace
}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CPU, m) {
  m.impl("decoder_layers", TORCH_BOX(&dflare::cpu::decoder_layers));
}
