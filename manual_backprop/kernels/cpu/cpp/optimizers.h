// AdamW and SGD over flat parameters; each number is read and written once. The quoted lines are those of
// optimizers.py.
#pragma once

#include "vectors.h"

namespace {

// squares (R) = the sum of the squares of each row of gradient (R, C).
template <class T, class P>
void squares_of_rows(float* squares, const P* gradient, int64_t R, int64_t C) {
  for_rows(R, C, [&](int64_t r) {
    squares[r] = sum_over(C, [&](int64_t c, int64_t count) {
      const Vec g = load(gradient + r * C + c, count);
      return g * g;
    });
  });
}

// Writes a parameter and its rounded copy, which products read in bf16_mixed; otherwise `rounded` is the parameter.
template <class T, class P>
inline void store_parameter(P* parameter, T* rounded, const Vec& x, int64_t count) {
  store(parameter, x, count);
  if (static_cast<void*>(rounded) != parameter) store(rounded, x, count);
}

// All numbers are pointers, since their values may change from step to step. If `finite` is 0 nothing changes.
template <class T, class P>
void adamw_step(
    P* parameter, T* rounded, const P* gradient, float* first_moment, float* second_moment, const float* finite, const float* clip,
    const float* beta1, const float* share1, const float* beta2, const float* share2, const float* epsilon, const float* decay,
    const float* rate, const float* root_of_correction, int64_t n) {
  if (!(*finite > 0)) return;
  for_numbers(n, [&](int64_t i, int64_t count) {
    const Vec p = load(parameter + i, count), g = Vec(*clip) * load(gradient + i, count);
    const Vec first = Vec(*beta1) * load(first_moment + i, count) + Vec(*share1) * g;
    const Vec second = Vec(*beta2) * load(second_moment + i, count) + Vec(*share2) * g * g;
    store(first_moment + i, first, count);
    store(second_moment + i, second, count);
    // parameter -= decay * parameter + rate * first / (sqrt(second) / root_of_correction + epsilon)
    const Vec change = Vec(*rate) * first / (second.sqrt() / Vec(*root_of_correction) + Vec(*epsilon));
    store_parameter(parameter + i, rounded + i, p - (Vec(*decay) * p + change), count);
  });
}

template <class T, class P>
void sgd_step(
    P* parameter, T* rounded, const P* gradient, float* moment, const float* finite, const float* clip, const float* momentum,
    const float* decay, const float* rate, int64_t n) {
  if (!(*finite > 0)) return;
  for_numbers(n, [&](int64_t i, int64_t count) {
    const Vec p = load(parameter + i, count);
    const Vec total = Vec(*momentum) * load(moment + i, count) + Vec(*clip) * load(gradient + i, count);
    store(moment + i, total, count);
    // parameter -= decay * parameter + rate * moment
    store_parameter(parameter + i, rounded + i, p - (Vec(*decay) * p + Vec(*rate) * total), count);
  });
}

}  // namespace
