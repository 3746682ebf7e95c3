// All kernels as one library: `kernel(name)` returns the address of a kernel, which compiled.py calls.
//
// A name ends with the dtypes of activations and parameters: fp32, bf16, or bf16_mixed, whose parameters are float.

#include <cstring>

#include "activations.h"
#include "attention.h"
#include "embedding.h"
#include "gradients.h"
#include "loss.h"
#include "normalization.h"
#include "optimizers.h"
#include "products.h"

namespace {

#define ATTENTION_SIZES                                                                                                  \
  int64_t B, int64_t T, int64_t S, int64_t H, int64_t G, int64_t K, int64_t angles, int64_t causal, int64_t dropout_key, \
      int64_t n_heads, int64_t positions, int64_t first_row, int64_t first_head, int64_t first_query, int64_t first_key, \
      double probability

#define VISIBLE Visible{causal != 0, key_lengths, query_segments, key_segments, T, S}
#define ROTATION Rotation{rotation, rotation ? rotation + angles * K / 2 : nullptr}
#define DROPOUT \
  Dropout{probability, dropout_key, n_heads, positions, first_row, first_head, first_query, first_key}

// Tensors (B, T or S, heads, K) with the strides of their first three dimensions; rotation (2, angles, K / 2).
template <class A, class P>
void attention_forward(
    A* context, float* sums, const A* query, const A* key, const A* value, const int64_t* key_lengths,
    const int64_t* query_segments, const int64_t* key_segments, const float* rotation, int64_t context_b, int64_t context_t, int64_t context_h,
    int64_t query_b, int64_t query_t, int64_t query_h, int64_t key_b, int64_t key_s, int64_t key_h, int64_t value_b,
    int64_t value_s, int64_t value_h, ATTENTION_SIZES) {
  attention_forward_of<A>(
      {context, context_b, context_t, context_h}, sums, {query, query_b, query_t, query_h}, {key, key_b, key_s, key_h},
      {value, value_b, value_s, value_h}, VISIBLE, DROPOUT, ROTATION, B, H, G, K);
}

template <class A, class P>
void attention_backward(
    A* dquery, A* dkey, A* dvalue, const A* dcontext, const float* sums, const A* query, const A* key, const A* value,
    const int64_t* key_lengths, const int64_t* query_segments, const int64_t* key_segments, const float* rotation, int64_t dquery_b,
    int64_t dquery_t, int64_t dquery_h, int64_t dkey_b, int64_t dkey_s, int64_t dkey_h, int64_t dvalue_b, int64_t dvalue_s,
    int64_t dvalue_h, int64_t dcontext_b, int64_t dcontext_t, int64_t dcontext_h, int64_t query_b, int64_t query_t,
    int64_t query_h, int64_t key_b, int64_t key_s, int64_t key_h, int64_t value_b, int64_t value_s, int64_t value_h,
    ATTENTION_SIZES) {
  attention_backward_of<A>(
      {dquery, dquery_b, dquery_t, dquery_h}, {dkey, dkey_b, dkey_s, dkey_h}, {dvalue, dvalue_b, dvalue_s, dvalue_h},
      {dcontext, dcontext_b, dcontext_t, dcontext_h}, sums, {query, query_b, query_t, query_h}, {key, key_b, key_s, key_h},
      {value, value_b, value_s, value_h}, VISIBLE, DROPOUT, ROTATION, B, H, G, K);
}

struct Kernel {
  const char* name;
  void* address;
};

#define IN_ALL_FORMATS(name, function, ...)                                       \
  {#name "_fp32", reinterpret_cast<void*>(&function<__VA_ARGS__ float, float>)},  \
      {#name "_bf16", reinterpret_cast<void*>(&function<__VA_ARGS__ BFloat16, BFloat16>)}, \
      {#name "_bf16_mixed", reinterpret_cast<void*>(&function<__VA_ARGS__ BFloat16, float>)}

const Kernel kernels[] = {
    IN_ALL_FORMATS(bias_gelu_tanh, bias_activation, GeluTanh, ),
    IN_ALL_FORMATS(bias_gelu_tanh_gradient, bias_activation_gradient, GeluTanh, ),
    IN_ALL_FORMATS(bias_gelu, bias_activation, Gelu, ),
    IN_ALL_FORMATS(bias_gelu_gradient, bias_activation_gradient, Gelu, ),
    IN_ALL_FORMATS(bias_relu, bias_activation, Relu, ),
    IN_ALL_FORMATS(bias_relu_gradient, bias_activation_gradient, Relu, ),
    IN_ALL_FORMATS(swiglu, swiglu, ),
    IN_ALL_FORMATS(swiglu_gradient, swiglu_gradient, ),
    IN_ALL_FORMATS(add_and_normalize, add_and_normalize, ),
    IN_ALL_FORMATS(normalize_rows, normalize_rows, ),
    IN_ALL_FORMATS(normalize, normalize, ),
    IN_ALL_FORMATS(add_normalization_gradient, add_normalization_gradient, ),
    IN_ALL_FORMATS(add_and_rms_normalize, add_and_rms_normalize, ),
    IN_ALL_FORMATS(rms_normalize_rows, rms_normalize_rows, ),
    IN_ALL_FORMATS(rms_normalize, rms_normalize, ),
    IN_ALL_FORMATS(add_rms_normalization_gradient, add_rms_normalization_gradient, ),
    IN_ALL_FORMATS(add_rounded, add_rounded, ),
    IN_ALL_FORMATS(add_sum_of_rows, add_sum_of_rows, ),
    IN_ALL_FORMATS(rows_of_tokens, rows_of_tokens, ),
    IN_ALL_FORMATS(add_rows_of_tokens, add_rows_of_tokens, ),
    IN_ALL_FORMATS(add_to_rows, add_to_rows, ),
    IN_ALL_FORMATS(cross_entropy_of_rows, cross_entropy_of_rows, ),
    IN_ALL_FORMATS(scale_rows, scale_rows, ),
    IN_ALL_FORMATS(sum_of_numbers, sum_of_numbers, ),
    IN_ALL_FORMATS(gradient_norm, gradient_norm, ),
    IN_ALL_FORMATS(check_step, check_step, ),
    IN_ALL_FORMATS(adamw_step, adamw_step, ),
    IN_ALL_FORMATS(sgd_step, sgd_step, ),
    IN_ALL_FORMATS(attention_forward, attention_forward, ),
    IN_ALL_FORMATS(attention_backward, attention_backward, ),
#ifdef HAS_PRODUCTS
    IN_ALL_FORMATS(product, product, ),
    IN_ALL_FORMATS(add_product, add_product, ),
#endif
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void* kernel(const char* name) {
  for (const Kernel& one : kernels) {
    if (std::strcmp(one.name, name) == 0) return one.address;
  }
  return nullptr;
}
