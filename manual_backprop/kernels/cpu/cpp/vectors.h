// Loops over rows of numbers, a vector at a time: the building blocks of every kernel here.
//
// Numbers are float or bfloat16 in memory and float in registers, so that sums run in float (ops/numerics.py). Vectors
// and their functions are PyTorch's.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

using c10::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t WIDTH = Vec::size();           // numbers in a vector
constexpr int64_t GRAIN = 1 << 14;               // fewest numbers for one thread
constexpr int64_t GROUP = 64;                    // rows summed before their sums are added: it loses fewer digits
constexpr float INFINITE = std::numeric_limits<float>::infinity();

// As many bfloat16 numbers as a Vec has fill half a vector of their own. They are copied as such: PyTorch's store would
// mask the other half, and a masked store of 16-bit numbers takes ten times as long on some processors (AMD's Zen 5).

template <class T>
inline Vec load(const T* x, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(x, count);
  } else {
    if (count < WIDTH) return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(x, count));
    Vec whole;
    at::vec::load_fp32_from_bf16(x, whole);
    return whole;
  }
}

// x rounded to bfloat16, in the first half of a vector.
template <class T>
inline at::vec::Vectorized<T> narrowed(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)  // one instruction instead of ten
  return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(x));
#else
  return at::vec::convert<T>(x);
#endif
}

template <class T>
inline void store(T* y, const Vec& x, int64_t count = WIDTH) {
  if constexpr (std::is_same_v<T, float>) {
    x.store(y, count);
  } else {
    const at::vec::Vectorized<T> half = narrowed<T>(x);
    if (count == WIDTH) {
      std::memcpy(static_cast<void*>(y), &half, WIDTH * sizeof(T));
    } else {
      half.store(y, count);
    }
  }
}

// x rounded to dtype T.
template <class T>
inline Vec rounded(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return at::vec::convert<float>(narrowed<T>(x));
  }
}

// x (x (... (x + c_1) ...) + c_n), the polynomial whose first coefficient is `first`.
inline Vec polynomial(const Vec& x, float first, std::initializer_list<float> rest) {
  Vec sum(first);
  for (const float c : rest) sum = at::vec::fmadd(sum, x, Vec(c));
  return sum;
}

// exp: accurate to about 1 ulp if the result stays float, to 1e-5 if it is rounded to bfloat16.
template <class T>
inline Vec exponential(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)  // half the instructions of PyTorch's: `scalef` multiplies by 2^floor(t), whatever t is
  if constexpr (std::is_same_v<T, float>) {
    // e^x = 2^n e^r with the whole number n nearest to x / ln(2), and r = x - n ln(2), with ln(2) in two parts
    const Vec least(_mm512_max_ps(Vec(-1e4f), x)), n = (least * Vec(float(M_LOG2E))).round();  // NaN stays NaN
    const Vec r = at::vec::fmadd(n, Vec(-1.42860677e-6f), at::vec::fmadd(n, Vec(-0.693145752f), least));
    // minimax up to ln(2) / 2: 3e-9
    return _mm512_scalef_ps(polynomial(r, 0.001381454f, {0.008368745f, 0.04166839f, 0.16666521f, 0.49999994f, 1.f, 1.f}), n);
  } else {
    // e^x = 2^floor(t) 2^f; the polynomial is exact at f = 0 and 1, and minimax between: 1e-7
    const Vec t = x * Vec(float(M_LOG2E)), f(_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    return _mm512_scalef_ps(
        polynomial(f, 0.001879318617f, {0.008990994655f, 0.05581867695f, 0.2401592731f, 0.6931517124f, 1.f}), t);
  }
#else
  if constexpr (std::is_same_v<T, float>) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
#endif
}

inline Vec where(const Vec& condition, const Vec& x, const Vec& otherwise) {
  return Vec::blendv(otherwise, x, condition);
}

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, x);
}

inline float largest_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, x);
}

// f(first, count) for all of n numbers: whole vectors, then the rest.
template <class F>
inline void for_vectors(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) f(i, WIDTH);
  if (i < n) f(i, n - i);
}

// The sum of f(first, count) over a row of n numbers; f returns a vector whose first `count` lanes are summed.
template <class F>
inline float sum_over(int64_t n, const F& f) {
  Vec even(0.f), odd(0.f);              // two sums do not wait for each other, and lose fewer digits
  int64_t i = 0;
  for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
    even = even + f(i, WIDTH);
    odd = odd + f(i + WIDTH, WIDTH);
  }
  for (; i < n; i += WIDTH) {
    const int64_t count = std::min(WIDTH, n - i);
    even = even + Vec::set(Vec(0.f), f(i, count), count);
  }
  return sum_of(even + odd);
}

// f(row) for all rows, of `numbers` numbers each, distributed over the threads.
template <class F>
inline void for_rows(int64_t n_rows, int64_t numbers, const F& f) {
  at::parallel_for(0, n_rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, numbers)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

// sum (count) += x.
template <class T>
inline void add(T* sum, const Vec& x, int64_t count) {
  store(sum, load(sum, count) + x, count);
}

// f(row, sums) for all rows of C numbers, distributed over the threads. f adds to sums, which has C numbers for each of
// totals; in the end they are added to totals (C each). Every group of rows has its own sums, and these are added in
// order: the bits do not depend on the number of threads.
template <class P, class F>
inline void for_rows_with_sums(int64_t n_rows, int64_t C, std::initializer_list<P*> totals, const F& f) {
  const int64_t groups = (n_rows + GROUP - 1) / GROUP, width = C * int64_t(totals.size());
  std::vector<float> sums(groups * width);
  for_rows(groups, GROUP * C, [&](int64_t group) {
    for (int64_t row = group * GROUP; row < std::min(n_rows, (group + 1) * GROUP); ++row) f(row, sums.data() + group * width);
  });
  const float* first = sums.data();
  for (P* total : totals) {
    for_vectors(C, [&](int64_t c, int64_t count) {
      Vec sum(0.f);
      for (int64_t group = 0; group < groups; ++group) sum = sum + load(first + group * width + c, count);
      add(total + c, sum, count);
    });
    first += C;
  }
}

// f(first, count) for all of n contiguous numbers, distributed over the threads. `reads`: numbers that f reads for each.
template <class F>
inline void for_numbers(int64_t n, const F& f, int64_t reads = 1) {
  const int64_t vectors = (n + WIDTH - 1) / WIDTH;
  at::parallel_for(0, vectors, std::max<int64_t>(1, GRAIN / WIDTH / reads), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * WIDTH;
    for_vectors(std::min(n, end * WIDTH) - first, [&](int64_t i, int64_t count) { f(first + i, count); });
  });
}

}  // namespace
