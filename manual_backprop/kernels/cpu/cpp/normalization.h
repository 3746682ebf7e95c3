// Layer norm over rows: normalization.py and ops/normalization.py, whose lines are quoted.
#pragma once

#include "vectors.h"

namespace {

// y = (x - mean) rstd weight + bias, and its statistics.
template <class T, class P>
inline void normalize_row(T* y, float* mean, float* rstd, const T* x, const P* weight, const P* bias, float epsilon, int64_t D) {
  const float average = sum_over(D, [&](int64_t d, int64_t count) { return load(x + d, count); }) / D;
  const float variance = sum_over(D, [&](int64_t d, int64_t count) {
    const Vec centered = load(x + d, count) - Vec(average);
    return centered * centered;
  }) / D;
  const float scale = 1 / std::sqrt(variance + epsilon);
  *mean = average;
  *rstd = scale;
  for_vectors(D, [&](int64_t d, int64_t count) {
    const Vec normalized = (load(x + d, count) - Vec(average)) * Vec(scale);
    store(y + d, normalized * load(weight + d, count) + load(bias + d, count), count);
  });
}

// total (N, D), which holds the branch, becomes x + branch, and y = layer_norm(total); mean, rstd (N).
template <class T, class P>
void add_and_normalize(
    T* y, T* total, float* mean, float* rstd, const T* x, const P* weight, const P* bias, const float* epsilon, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    T* row = total + n * D;
    for_vectors(D, [&](int64_t d, int64_t count) { store(row + d, load(x + n * D + d, count) + load(row + d, count), count); });
    normalize_row(y + n * D, mean + n, rstd + n, row, weight, bias, *epsilon, D);
  });
}

// y = layer_norm(x), where nothing is added.
template <class T, class P>
void normalize_rows(
    T* y, float* mean, float* rstd, const T* x, const P* weight, const P* bias, const float* epsilon, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) { normalize_row(y + n * D, mean + n, rstd + n, x + n * D, weight, bias, *epsilon, D); });
}

// y = layer_norm(total) once more, from its statistics.
template <class T, class P>
void normalize(T* y, const T* total, const float* mean, const float* rstd, const P* weight, const P* bias, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    for_vectors(D, [&](int64_t d, int64_t count) {
      const Vec normalized = (load(total + n * D + d, count) - Vec(mean[n])) * Vec(rstd[n]);
      store(y + n * D + d, normalized * load(weight + d, count) + load(bias + d, count), count);
    });
  });
}

// dtotal (N, D) += the gradient of `total` through y = layer_norm(total), from dy (N, D).
template <class T, class P>
void add_normalization_gradient(
    T* dtotal, const T* dy, const T* total, const float* mean, const float* rstd, const P* weight, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    const T *dy_row = dy + n * D, *row = total + n * D;
    const auto normalized = [&](int64_t d, int64_t count) { return (load(row + d, count) - Vec(mean[n])) * Vec(rstd[n]); };
    const auto dnormalized = [&](int64_t d, int64_t count) { return load(dy_row + d, count) * load(weight + d, count); };
    const float along_ones = sum_over(D, dnormalized) / D;
    const float along_normalized =
        sum_over(D, [&](int64_t d, int64_t count) { return dnormalized(d, count) * normalized(d, count); }) / D;
    for_vectors(D, [&](int64_t d, int64_t count) {
      // dtotal = (dnormalized - mean(dnormalized) - normalized mean(dnormalized normalized)) rstd
      const Vec through = dnormalized(d, count) - Vec(along_ones) - normalized(d, count) * Vec(along_normalized);
      store(dtotal + n * D + d, load(dtotal + n * D + d, count) + through * Vec(rstd[n]), count);
    });
  });
}

// dweight, dbias (D) += their gradients from dy (N, D), where y = layer_norm(total). A thread has columns of its own, so
// that a sum is the same for every number of threads.
template <class T, class P>
void add_normalization_weights_gradient(
    float* dweight, float* dbias, const T* dy, const T* total, const float* mean, const float* rstd, int64_t D, int64_t N) {
  const int64_t vectors = (D + WIDTH - 1) / WIDTH;
  at::parallel_for(0, vectors, std::max<int64_t>(1, GRAIN / (WIDTH * std::max<int64_t>(1, N))), [&](int64_t begin, int64_t end) {
    constexpr int64_t AT_ONCE = 4;   // vectors side by side: a cache line of bfloat16 and more is read at once
    constexpr int64_t ROWS = 128;    // whose sum is made before it is added to that of the others: fewer digits are lost
    for (int64_t vector = begin; vector < end; vector += AT_ONCE) {
      const int64_t first = vector * WIDTH, n_vectors = std::min(AT_ONCE, end - vector);
      Vec gains[AT_ONCE], shifts[AT_ONCE];
      for (int64_t v = 0; v < AT_ONCE; ++v) gains[v] = shifts[v] = Vec(0.f);
      for (int64_t rows = 0; rows < N; rows += ROWS) {
        Vec gain[AT_ONCE], shift[AT_ONCE];
        for (int64_t v = 0; v < AT_ONCE; ++v) gain[v] = shift[v] = Vec(0.f);
        for (int64_t n = rows; n < std::min(N, rows + ROWS); ++n) {
          for (int64_t v = 0; v < n_vectors; ++v) {
            const int64_t d = first + v * WIDTH, count = std::min(WIDTH, D - d), i = n * D + d;
            const Vec upstream = load(dy + i, count);
            // y = normalized weight + bias
            gain[v] = gain[v] + upstream * (load(total + i, count) - Vec(mean[n])) * Vec(rstd[n]);
            shift[v] = shift[v] + upstream;
          }
        }
        for (int64_t v = 0; v < n_vectors; ++v) gains[v] = gains[v] + gain[v], shifts[v] = shifts[v] + shift[v];
      }
      for (int64_t v = 0; v < n_vectors; ++v) {
        const int64_t d = first + v * WIDTH, count = std::min(WIDTH, D - d);
        store(dweight + d, load(dweight + d, count) + gains[v], count);
        store(dbias + d, load(dbias + d, count) + shifts[v], count);
      }
    }
  });
}

}  // namespace
