// AdamW and SGD over flat parameters; each number is read and written once. The quoted lines are those of
// optimizers.py.
#pragma once

#include <numeric>

#include "vectors.h"

namespace {

constexpr int64_t ROW = 1 << 12;  // numbers whose squares are summed in float; the sums of rows are added in double

// norm, one number, = the root of the sum of the squares of gradient (n).
template <class T, class P>
void gradient_norm(float* norm, const P* gradient, int64_t n) {
  std::vector<float> squares((n + ROW - 1) / ROW);
  for_rows(squares.size(), ROW, [&](int64_t r) {
    const P* row = gradient + r * ROW;
    squares[r] = sum_over(std::min(ROW, n - r * ROW), [&](int64_t i, int64_t count) {
      const Vec g = load(row + i, count);
      return g * g;
    });
  });
  *norm = std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.));
}

// The factor that clips a gradient of this norm, the learning rate and whether norm and loss are finite, and the counts of
// steps. All are one number.
template <class T, class P>
void check_step(
    float* clip, float* rate, float* finite, const float* norm, const float* loss, int64_t* updates, int64_t* nonfinite_steps,
    int64_t* nonfinite_in_a_row, int64_t* nonfinite_longest, const float* learning_rate, const float* max_grad_norm) {
  const bool counts = std::isfinite(*norm) && std::isfinite(*loss);
  *updates += counts;
  *nonfinite_steps += !counts;
  *nonfinite_in_a_row = counts ? 0 : *nonfinite_in_a_row + 1;
  *nonfinite_longest = std::max(*nonfinite_longest, *nonfinite_in_a_row);
  *clip = std::min(1.f, *max_grad_norm / (*norm + 1e-6f));
  *rate = counts ? *learning_rate : 0;
  *finite = counts;
}

// 1 - beta^updates for share = 1 - beta, without the digits that beta would lose in float.
inline float bias_correction(const float* share, const float* updates) {
  return -std::expm1(*updates * std::log1p(-double(*share)));
}

// Writes a parameter and its rounded copy, if a network keeps one (bf16_mixed); otherwise `rounded` is the parameter.
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
    const float* rate, const float* updates, int64_t n) {
  if (!(*finite > 0)) return;
  const float root = std::sqrt(bias_correction(share2, updates));
  const Vec factor(*rate / bias_correction(share1, updates) * root), least(*epsilon * root), fading(*rate * *decay);
  for_numbers(n, [&](int64_t i, int64_t count) {
    const Vec p = load(parameter + i, count), g = Vec(*clip) * load(gradient + i, count);
    const Vec first = Vec(*beta1) * load(first_moment + i, count) + Vec(*share1) * g;
    const Vec second = Vec(*beta2) * load(second_moment + i, count) + Vec(*share2) * g * g;
    store(first_moment + i, first, count);
    store(second_moment + i, second, count);
    // parameter -= rate * decay * parameter + rate / correction1 * first / (sqrt(second) / root + epsilon), times root / root
    const Vec change = factor * first / (second.sqrt() + least);
    store_parameter(parameter + i, rounded + i, p - (fading * p + change), count);
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
    // parameter -= rate * (decay * parameter + moment)
    store_parameter(parameter + i, rounded + i, p - Vec(*rate) * (Vec(*decay) * p + total), count);
  });
}

}  // namespace
