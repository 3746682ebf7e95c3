// Layer norm and RMS norm over rows, after a residual sum (normalization.py). The quoted lines are those of
// ops/normalization.py and ops/rms_normalization.py.
//
// The residual stream has the dtype of the parameters, P; inputs and outputs of products have that of the activations,
// T: in bf16_mixed float and bfloat16. An RMS norm is a layer norm without mean and bias.
#pragma once

#include "vectors.h"

namespace {

// The statistics of a row; for an RMS norm the mean is 0.
struct Statistics {
  float mean, rstd;
};

// `sum`: that of the row.
template <bool centered, class P>
inline Statistics statistics_of(const P* x, float sum, float epsilon, int64_t D) {
  const float average = centered ? sum / D : 0;
  const float variance = sum_over(D, [&](int64_t d, int64_t count) {
    const Vec difference = load(x + d, count) - Vec(average);
    return difference * difference;
  }) / D;
  return {average, 1 / std::sqrt(variance + epsilon)};
}

// The statistics of row n, read from mean and rstd (N).
template <bool centered>
inline Statistics kept(const float* mean, const float* rstd, int64_t n) {
  return {centered ? mean[n] : 0, rstd[n]};
}

template <bool centered>
inline void keep(float* mean, float* rstd, int64_t n, const Statistics& of_row) {
  if (centered) mean[n] = of_row.mean;
  rstd[n] = of_row.rstd;
}

// y = (x - mean) rstd weight + bias; an RMS norm has no bias.
template <class T, class P>
inline void normalize_row(T* y, const Statistics& of_row, const P* x, const P* weight, const P* bias, int64_t D) {
  for_vectors(D, [&](int64_t d, int64_t count) {
    const Vec gained = (load(x + d, count) - Vec(of_row.mean)) * Vec(of_row.rstd) * load(weight + d, count);
    store(y + d, bias ? gained + load(bias + d, count) : gained, count);
  });
}

// total = x + branch, and y = norm(total); y, total, x, branch (N, D), mean, rstd (N). total may overwrite branch.
template <bool centered, class T, class P>
inline void add_and_normalize_of(
    T* y, P* total, float* mean, float* rstd, const P* x, const T* branch, const P* weight, const P* bias, float epsilon,
    int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    P* row = total + n * D;
    const float sum = sum_over(D, [&](int64_t d, int64_t count) {
      const Vec added = rounded<P>(load(x + n * D + d, count) + load(branch + n * D + d, count));
      store(row + d, added, count);
      return added;
    });
    const Statistics of_row = statistics_of<centered>(row, sum, epsilon, D);
    keep<centered>(mean, rstd, n, of_row);
    normalize_row(y + n * D, of_row, row, weight, bias, D);
  });
}

// y = norm(x), without a branch.
template <bool centered, class T, class P>
inline void normalize_rows_of(
    T* y, float* mean, float* rstd, const P* x, const P* weight, const P* bias, float epsilon, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    const P* row = x + n * D;
    const float sum = centered ? sum_over(D, [&](int64_t d, int64_t count) { return load(row + d, count); }) : 0;
    const Statistics of_row = statistics_of<centered>(row, sum, epsilon, D);
    keep<centered>(mean, rstd, n, of_row);
    normalize_row(y + n * D, of_row, row, weight, bias, D);
  });
}

// Recomputes y = norm(total) from its statistics.
template <bool centered, class T, class P>
inline void normalize_of(T* y, const P* total, const float* mean, const float* rstd, const P* weight, const P* bias, int64_t N, int64_t D) {
  for_rows(N, D, [&](int64_t n) {
    normalize_row(y + n * D, kept<centered>(mean, rstd, n), total + n * D, weight, bias, D);
  });
}

// dtotal (N, D) += the gradient of `total` through y = norm(total), from dy (N, D). If adds is 0, dtotal = that
// gradient, and dtotal may overwrite total. dweight, dbias (D) += their gradients.
template <bool centered, class T, class P>
inline void normalization_gradient_of(
    P* dtotal, P* dweight, P* dbias, const T* dy, const P* total, const float* mean, const float* rstd, const P* weight,
    bool adds, int64_t N, int64_t D) {
  const auto of_row = [&](int64_t n, float* dweight_sum, float* dbias_sum) {
    const T* dy_row = dy + n * D;
    const P* row = total + n * D;
    P* drow = dtotal + n * D;
    const Statistics by = kept<centered>(mean, rstd, n);
    const auto normalized = [&](int64_t d, int64_t count) { return (load(row + d, count) - Vec(by.mean)) * Vec(by.rstd); };
    const auto dnormalized = [&](int64_t d, int64_t count) { return load(dy_row + d, count) * load(weight + d, count); };
    const float along_ones = centered ? sum_over(D, dnormalized) / D : 0;
    const float along_normalized =
        sum_over(D, [&](int64_t d, int64_t count) { return dnormalized(d, count) * normalized(d, count); }) / D;
    for_vectors(D, [&](int64_t d, int64_t count) {
      const Vec upstream = load(dy_row + d, count), normal = normalized(d, count);
      // y = normalized weight + bias
      add(dweight_sum + d, upstream * normal, count);
      if (centered) add(dbias_sum + d, upstream, count);
      // dtotal = (dnormalized - mean(dnormalized) - normalized mean(dnormalized normalized)) rstd
      const Vec through = (dnormalized(d, count) - Vec(along_ones) - normal * Vec(along_normalized)) * Vec(by.rstd);
      store(drow + d, adds ? load(drow + d, count) + through : through, count);
    });
  };
  if constexpr (centered) {
    for_rows_with_sums(N, D, {dweight, dbias}, [&](int64_t n, float* sums) { of_row(n, sums, sums + D); });
  } else {
    for_rows_with_sums(N, D, {dweight}, [&](int64_t n, float* sums) { of_row(n, sums, nullptr); });
  }
}

// Layer norm

template <class T, class P>
void add_and_normalize(
    T* y, P* total, float* mean, float* rstd, const P* x, const T* branch, const P* weight, const P* bias,
    const float* epsilon, int64_t N, int64_t D) {
  add_and_normalize_of<true>(y, total, mean, rstd, x, branch, weight, bias, *epsilon, N, D);
}

template <class T, class P>
void normalize_rows(
    T* y, float* mean, float* rstd, const P* x, const P* weight, const P* bias, const float* epsilon, int64_t N, int64_t D) {
  normalize_rows_of<true>(y, mean, rstd, x, weight, bias, *epsilon, N, D);
}

template <class T, class P>
void normalize(T* y, const P* total, const float* mean, const float* rstd, const P* weight, const P* bias, int64_t N, int64_t D) {
  normalize_of<true>(y, total, mean, rstd, weight, bias, N, D);
}

template <class T, class P>
void add_normalization_gradient(
    P* dtotal, P* dweight, P* dbias, const T* dy, const P* total, const float* mean, const float* rstd, const P* weight,
    const float* adds, int64_t N, int64_t D) {
  normalization_gradient_of<true>(dtotal, dweight, dbias, dy, total, mean, rstd, weight, *adds > 0, N, D);
}

// RMS norm

template <class T, class P>
void add_and_rms_normalize(
    T* y, P* total, float* rrms, const P* x, const T* branch, const P* weight, const float* epsilon, int64_t N, int64_t D) {
  add_and_normalize_of<false>(y, total, nullptr, rrms, x, branch, weight, static_cast<const P*>(nullptr), *epsilon, N, D);
}

template <class T, class P>
void rms_normalize_rows(T* y, float* rrms, const P* x, const P* weight, const float* epsilon, int64_t N, int64_t D) {
  normalize_rows_of<false>(y, nullptr, rrms, x, weight, static_cast<const P*>(nullptr), *epsilon, N, D);
}

template <class T, class P>
void rms_normalize(T* y, const P* total, const float* rrms, const P* weight, int64_t N, int64_t D) {
  normalize_of<false>(y, total, nullptr, rrms, weight, static_cast<const P*>(nullptr), N, D);
}

template <class T, class P>
void add_rms_normalization_gradient(
    P* dtotal, P* dweight, const T* dy, const P* total, const float* rrms, const P* weight, const float* adds, int64_t N,
    int64_t D) {
  normalization_gradient_of<false>(dtotal, dweight, static_cast<P*>(nullptr), dy, total, nullptr, rrms, weight, *adds > 0, N, D);
}

}  // namespace
