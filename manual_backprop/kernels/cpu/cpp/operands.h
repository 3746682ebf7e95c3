// Operands of matrix products as their kernels read them, and memory for them.
#pragma once

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t whole_vectors(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// The right operand (R, C) of a bfloat16 product has pairs of rows interleaved, (R / 2, C, 2): R is rounded up to pairs.

constexpr int64_t even(int64_t n) { return (n + 1) / 2 * 2; }

template <class T>
constexpr int64_t padded(int64_t rows) {
  return std::is_same_v<T, float> ? rows : even(rows);
}

#if defined(CPU_CAPABILITY_AVX512)
// The indices of a permutation of two vectors of N numbers: from N on, those of the second.
template <class I, int N>
struct Places {
  alignas(64) I of[N];

  template <class F>
  constexpr explicit Places(const F& place) : of() {
    for (int i = 0; i < N; ++i) of[i] = I(place(i));
  }
};

const Places<int16_t, 32> FIRST_PAIRS([](int k) { return k / 2 + k % 2 * 32; });
const Places<int16_t, 32> LAST_PAIRS([](int k) { return 16 + k / 2 + k % 2 * 32; });
const Places<int16_t, 32> HALVES_IN_TURNS([](int k) { return k / 2 + k % 2 * 16; });
#endif

// y (2 count) = one and other, rounded to bfloat16, in turns: one_0, other_0, one_1, other_1, ...
inline void store_pairs(BFloat16* y, const Vec& one, const Vec& other, int64_t count = WIDTH) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  if (count == WIDTH) {
    const __m512i in_turns = _mm512_load_si512(HALVES_IN_TURNS.of);
    _mm512_storeu_si512(y, _mm512_permutexvar_epi16(in_turns, (__m512i)_mm512_cvtne2ps_pbh(other, one)));
    return;
  }
#endif
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits low = at::vec::cast<int32_t>(rounded<BFloat16>(one)) >> Bits(16) & Bits(0xFFFF);
  const Bits high = at::vec::cast<int32_t>(rounded<BFloat16>(other));
  (low | high).store(y, count);
}

// y (2 n) = the numbers of two rows in turns: one_0, other_0, one_1, other_1, ... Without `other`, zeros are in its place.
inline void join_pairs(BFloat16* y, const BFloat16* one, const BFloat16* other, int64_t n) {
  int64_t i = 0;
#if defined(CPU_CAPABILITY_AVX512)      // without a conversion to float
  const __m512i first = _mm512_load_si512(FIRST_PAIRS.of), second = _mm512_load_si512(LAST_PAIRS.of);
  for (; i + 32 <= n; i += 32) {
    const __m512i a = _mm512_loadu_si512(one + i), b = other ? _mm512_loadu_si512(other + i) : _mm512_setzero_si512();
    _mm512_storeu_si512(y + 2 * i, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(y + 2 * i + 32, _mm512_permutex2var_epi16(a, second, b));
  }
#endif
  for (; i < n; i += WIDTH) {
    const int64_t count = std::min(WIDTH, n - i);
    store_pairs(y + 2 * i, load(one + i, count), other ? load(other + i, count) : Vec(0.f), count);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
template <int S>
const Places<int32_t, 16> UPPER([](int c) { return c & S ? 16 + c - S : c; });
template <int S>
const Places<int32_t, 16> LOWER([](int c) { return c & S ? 16 + c : c + S; });

// In each square of 2 S rows and columns, exchanges the upper right quarter and the lower left one: UPPER and LOWER are what
// the rows of its upper and its lower half take from both.
template <int S>
inline void exchange(__m512 (&rows)[16]) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r & S) continue;
    const __m512 one = rows[r], other = rows[r + S];
    rows[r] = _mm512_permutex2var_ps(one, _mm512_load_si512(UPPER<S>.of), other);
    rows[r + S] = _mm512_permutex2var_ps(one, _mm512_load_si512(LOWER<S>.of), other);
  }
}

// y = x transposed, for 16 rows and 16 columns in registers: PyTorch's takes three times as long. row(r) loads a row of x.
template <class Row>
inline void transpose_square(float* y, int64_t ld_y, const Row& row) {
  __m512 rows[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) rows[r] = row(r);
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) _mm512_storeu_ps(y + r * ld_y, rows[r]);
}
#endif

// y (C, R) = x (R, C) transposed; rows have a stride of ld numbers.
template <class T>
inline void transpose(T* y, int64_t ld_y, const T* x, int64_t ld_x, int64_t R, int64_t C) {
  constexpr int64_t SIDE = std::is_same_v<T, float> ? 16 : 32;  // of a square in registers: ours, and PyTorch's
  for (int64_t r = 0; r < R; r += SIDE) {
    for (int64_t c = 0; c < C; c += SIDE) {
      const int64_t height = std::min(SIDE, R - r), width = std::min(SIDE, C - c);
#if defined(CPU_CAPABILITY_AVX512)
      if constexpr (std::is_same_v<T, float>) {
        if (height == SIDE && width == SIDE) {
          transpose_square(y + c * ld_y + r, ld_y, [&](int64_t i) { return _mm512_loadu_ps(x + (r + i) * ld_x + c); });
          continue;
        }
      }
#endif
      at::vec::transpose_mxn<T>(x + r * ld_x + c, ld_x, y + c * ld_y + r, ld_y, int(height), int(width));
    }
  }
}

// x (n, K), with row stride `stride`, as the right operand of a product that sums over its rows.
template <class T>
inline const T* right_operand(const T* x, int64_t n, int64_t K, int64_t stride, T* memory, int64_t& ld) {
  if constexpr (std::is_same_v<T, float>) {
    ld = stride;
    return x;
  } else {
    ld = K;
    for (int64_t r = 0; r < n; r += 2) {
      const T *one = x + r * stride, *other = r + 1 < n ? one + stride : nullptr;
      join_pairs(memory + r * K, one, other, K);
    }
    return memory;
  }
}

// x (n, K) transposed, (K, columns), as a right operand; columns from n on are 0.
template <class T>
inline void transposed_right(T* right, const T* x, int64_t n, int64_t K, int64_t stride, int64_t columns) {
  if (n < columns) std::fill(right, right + padded<T>(K) * columns, T(0.f));
  if constexpr (std::is_same_v<T, float>) {
    transpose(right, columns, x, stride, n, K);
  } else if (stride % 2 == 0) {         // pairs lie side by side (K is even): each is one number of 32 bits
    transpose(reinterpret_cast<float*>(right), columns, reinterpret_cast<const float*>(x), stride / 2, n, K / 2);
  } else {
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t k = 0; k < K; ++k) right[(k / 2 * columns + c) * 2 + k % 2] = x[c * stride + k];
    }
  }
}

// x (n, K) transposed, (K, ld), as a left operand; columns from n on are 0.
template <class T>
inline void transposed_left(T* left, const T* x, int64_t n, int64_t K, int64_t stride, int64_t ld) {
  for (int64_t k = 0; k < K; ++k) std::fill(left + k * ld + n, left + (k + 1) * ld, T(0.f));
  transpose(left, ld, x, stride, n, K);
}

// Reusable memory of a thread.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (size_t(count) * sizeof(T) + 63) & ~size_t(63);
    if (next_ == blocks_.size()) blocks_.emplace_back();
    auto& block = blocks_[next_++];
    if (block.size() < bytes + 64) block.resize(bytes + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(block.data()) + 63) / 64 * 64);
  }
  void restart() { next_ = 0; }

 private:
  std::vector<std::vector<char>> blocks_;
  size_t next_ = 0;
};

inline Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  scratch.restart();
  return scratch;
}

}  // namespace
