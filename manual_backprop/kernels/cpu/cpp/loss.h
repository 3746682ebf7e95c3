// Cross-entropy over a chunk of logits, which are overwritten by their gradient: loss.py and rowwise.py.
#pragma once

#include <numeric>

#include "vectors.h"

namespace {

constexpr int64_t IGNORED = -100;  // of common/batch.py

// The logits z (R, V) become total (softmax(z) - q), where total = sum(exp(z - max(z))) and q = 1 - s + s / V at the
// target, s / V elsewhere, s being the label smoothing; loss (R) = (logsumexp(z) - sum_v q_v z_v) / denominator, and scale
// (R) = dloss / total / denominator, which is at least 1. All of them are 0 where the target (R) is IGNORED, whatever the
// row contains; loss and scale are NaN where it is no column.
template <class T, class P>
void cross_entropy_of_rows(
    T* logits, float* loss, float* scale, const int64_t* target, const float* denominator, const float* dloss,
    const float* label_smoothing, int64_t R, int64_t V) {
  const float smoothing = *label_smoothing, share = 1 / std::max(*denominator, 1.f);
  for_rows(R, V, [&](int64_t r) {
    T* z = logits + r * V;
    const int64_t t = target[r];
    if (t < 0 || t >= V) {
      for_vectors(V, [&](int64_t v, int64_t count) { store(z + v, Vec(0.f), count); });
      loss[r] = scale[r] = t == IGNORED ? 0 : NAN;
      return;
    }
    Vec most(-INFINITE), all(0.f);
    for_vectors(V, [&](int64_t v, int64_t count) {
      const Vec x = load(z + v, count);
      most = at::vec::maximum(most, Vec::set(Vec(-INFINITE), x, count));
      if (smoothing > 0) all = all + Vec::set(Vec(0.f), x, count);
    });
    const float largest = largest_of(most), z_target = float(z[t]) - largest;
    // total = sum(exp(z - largest)), before the exponentials are rounded
    const float total = sum_over(V, [&](int64_t v, int64_t count) {
      const Vec e = exponential<T>(load(z + v, count) - Vec(largest));
      store(z + v, e, count);
      return e;
    });
    const float everywhere = smoothing / V;
    if (smoothing > 0) for_vectors(V, [&](int64_t v, int64_t count) { add(z + v, Vec(-everywhere * total), count); });
    z[t] = T(std::exp(z_target) - (1 - smoothing + everywhere) * total);
    scale[r] = *dloss * share / total;
    // 0 times an average of -inf would be NaN
    const float smoothed = smoothing > 0 ? smoothing * (sum_of(all) / V - largest) : 0;
    loss[r] = (std::log(total) - (1 - smoothing) * z_target - smoothed) * share;
  });
}

// total, one number, = the sum of x (N).
template <class T, class P>
void sum_of_numbers(float* total, const float* x, int64_t N) {
  *total = std::accumulate(x, x + N, 0.);
}

// y (R, D) = each row of x times its number in scale (R).
template <class T, class P>
void scale_rows(T* y, const T* x, const float* scale, int64_t R, int64_t D) {
  for_rows(R, D, [&](int64_t r) {
    for_vectors(D, [&](int64_t d, int64_t count) { store(y + r * D + d, Vec(scale[r]) * load(x + r * D + d, count), count); });
  });
}

}  // namespace
