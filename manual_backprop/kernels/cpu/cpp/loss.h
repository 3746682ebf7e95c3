// Cross-entropy over a chunk of logits, which are overwritten by their gradient: loss.py and rowwise.py.
#pragma once

#include "vectors.h"

namespace {

// logits z (R, V) become e = exp(z - max(z)), and total (R) their sums: softmax(z) = e / total. at_target (R), the
// logit of each row's target, becomes total times the gradient there. loss (R) = logsumexp(z) - sum_v q_v z_v. All of
// them are 0 where counts (R) is 0, whatever the row contains.
template <class T, class P>
void cross_entropy_of_rows(
    T* logits, T* at_target, float* loss, float* total, const T* counts, const float* label_smoothing, int64_t R, int64_t V) {
  const float smoothing = *label_smoothing;
  for_rows(R, V, [&](int64_t r) {
    T* z = logits + r * V;
    if (!(float(counts[r]) > 0)) {
      for_vectors(V, [&](int64_t v, int64_t count) { store(z + v, Vec(0.f), count); });
      at_target[r] = T(0.f);
      loss[r] = total[r] = 0;
      return;
    }
    Vec most(-INFINITE), all(0.f);
    for_vectors(V, [&](int64_t v, int64_t count) {
      const Vec x = load(z + v, count);
      most = at::vec::maximum(most, Vec::set(Vec(-INFINITE), x, count));
      if (smoothing > 0) all = all + Vec::set(Vec(0.f), x, count);
    });
    const float largest = largest_of(most);
    // total = sum(exp(z - largest)), before the exponentials are rounded
    Vec sums(0.f);
    for_vectors(V, [&](int64_t v, int64_t count) {
      const Vec e = exponential<T>(load(z + v, count) - Vec(largest));
      store(z + v, e, count);
      sums = sums + Vec::set(Vec(0.f), e, count);
    });
    const float sum = sum_of(sums), z_target = float(at_target[r]) - largest;
    // 0 times an average of -inf would be NaN
    const float smoothed = smoothing > 0 ? smoothing * (sum_of(all) / V - largest) : 0;
    total[r] = sum;
    loss[r] = std::log(sum) - (1 - smoothing) * z_target - smoothed;
    at_target[r] = T(std::exp(z_target) - (1 - smoothing + smoothing / V) * sum);
  });
}

}  // namespace
