// Matrix products of linear layers, for processors that multiply bfloat16 numbers in vectors and have no matrix
// registers: y = x W^T + b, dx = dy W and dW += dy^T x, as in products.py. On other processors the library has none of
// these kernels, and PyTorch's products are used.
//
// A tile of 6 rows and 64 columns of the result stays in 24 registers while its sums run over K. One step reads 4 vectors
// of the right operand and 6 numbers of the left one: 24 multiplications of vectors for 10 loads, so it is the arithmetic
// that takes the time. In bfloat16 a step is two k: the instruction adds the products of pairs.
//
// What the tiles read is copied to lie side by side in the cache, DEPTH k at a time: the right operand always, once for many
// rows of the result; the left one only if it is stored by columns.
#pragma once

// Compilers that do not know matrix registers cannot tell.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__) && !defined(__AMX_BF16__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_PRODUCTS

#include "operands.h"

namespace {

constexpr int64_t TILE_ROWS = 6, TILE_COLUMNS = 64, TILE_VECTORS = TILE_COLUMNS / WIDTH;
constexpr int64_t BLOCK_ROWS = 96, BLOCK_COLUMNS = 384;  // of the operands that are copied at a time
constexpr int64_t PASS_ROWS = 8 * BLOCK_ROWS;            // of the result whose unfinished sums are kept, if K is done in parts
constexpr int64_t PIECE = 1 << 18;                       // fewest multiplications for one thread
constexpr int64_t COPY_COST = 8;                         // copying a number takes as long as so many multiplications

template <class T>
constexpr int64_t K_PER_STEP = std::is_same_v<T, float> ? 1 : 2;  // k of a step
template <class T>
constexpr int64_t DEPTH = 1536 / sizeof(T);              // most k at a time

// A matrix with the strides of its rows and columns [numbers], one of which is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;

  const T* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
};

// Asks memory for a row of `columns` numbers that will be read, or written: soon (3, the first cache), or later (2, the second).
template <int is_written, int how_soon = 3, class T>
inline void prefetch(T* row, int64_t columns) {
  for (int64_t c = 0; c < columns; c += 64 / sizeof(T)) __builtin_prefetch(row + c, is_written, how_soon);
}

// sum + left right, in each lane. In bfloat16 two products are added, those of a pair of left and a pair of right.
inline Vec multiply_add(const Vec& sum, const float* left, const Vec& right) { return at::vec::fmadd(Vec(*left), right, sum); }

inline Vec multiply_add(const Vec& sum, const BFloat16* left, const Vec& right) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof(pair));
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)__m512(right));
}

// A tile (TILE_ROWS, V vectors) of left right, plus `earlier` sums, which may be null, whose rows are ld numbers apart. left: its
// row 0 at k 0; the k of one step are adjacent, rows and steps have strides. right: a panel (steps, V vectors). put(r, v, sum) is
// called for every vector of the tile; `rows` rows of left are read, and the sums of other rows mean nothing.
template <int V, class T, class Put>
void tile(
    const float* earlier, int64_t ld, int64_t rows, const T* left, int64_t row_stride, int64_t step_stride, const T* right, int64_t K,
    const Put& put) {
  constexpr int R = TILE_ROWS;
  const T* numbers[R];
  Vec kept[R][V];                       // of zeros
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) numbers[r] = left + std::min<int64_t>(r, rows - 1) * row_stride;
  const float* vectors = reinterpret_cast<const float*>(right);
  for (int64_t k = 0; k + K_PER_STEP<T> <= K; k += K_PER_STEP<T>, vectors += V * WIDTH) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) kept[r][v] = multiply_add(kept[r][v], numbers[r], Vec::loadu(vectors + v * WIDTH));
      numbers[r] += step_stride;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const T pair[2] = {K % K_PER_STEP<T> != 0 ? *numbers[r] : T(0.f), T(0.f)};  // the last number has no partner
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if (K % K_PER_STEP<T> != 0) kept[r][v] = multiply_add(kept[r][v], pair, Vec::loadu(vectors + v * WIDTH));
      put(r, v, earlier ? kept[r][v] + Vec::loadu(earlier + r * ld + v * WIDTH) : kept[r][v]);
    }
  }
}

// x (K, columns) as panels of W columns: for each step, W columns, and of each its K_PER_STEP numbers. The last panel is
// narrower, in whole vectors. A k that is missing is 0; columns that are missing mean nothing. In bf16_mixed the numbers of
// a parameter are rounded here, so that no rounded copy of it is kept.
template <int64_t W, class T, class S>
inline void copy_panels(T* panels, const S* x, int64_t stride, int64_t K, int64_t columns) {
  constexpr int64_t AHEAD = 8;          // rows: by then they have come into the cache
  for (int64_t k = 0; k < K; k += K_PER_STEP<T>) {
    const S *one = x + k * stride, *other = k + 1 < K ? one + stride : nullptr;
    for (int64_t r = k + AHEAD; r < std::min(k + AHEAD + K_PER_STEP<T>, K); ++r) prefetch<0>(x + r * stride, columns);
    for (int64_t first = 0; first < columns; first += W) {
      const int64_t count = std::min(W, columns - first);
      T* to = panels + first * padded<T>(K) + k * whole_vectors(count);
      if constexpr (std::is_same_v<T, float>) {
        for_vectors(count, [&](int64_t c, int64_t some) { load(one + first + c, some).store(to + c); });
      } else if constexpr (std::is_same_v<S, float>) {
        for_vectors(count, [&](int64_t c, int64_t some) {
          const Vec second = other ? load(other + first + c, some) : Vec(0.f);
          store_pairs(to + 2 * c, load(one + first + c, some), second, some);
        });
      } else {
        join_pairs(to, one + first, other ? other + first : nullptr, count);
      }
    }
  }
}

// x (n, K) transposed and rounded, (K, columns), as a right operand. A k that is missing is 0; columns from n on mean nothing.
inline void rounded_transposed_right(BFloat16* right, const float* x, int64_t n, int64_t K, int64_t stride, int64_t columns) {
  constexpr int64_t ROWS = 16, NUMBERS = 2 * ROWS;  // of a square of pairs
  for (int64_t r = 0; r < n; r += ROWS) {
    for (int64_t k = 0; k < K; k += NUMBERS) {
      if (n - r >= ROWS && K - k >= NUMBERS) {
        for (int64_t i = r + ROWS; i < r + 2 * ROWS; ++i) prefetch<0>(x + i * stride + k, NUMBERS);
        transpose_square(reinterpret_cast<float*>(right) + k / 2 * columns + r, columns, [&](int64_t i) {
          const float* row = x + (r + i) * stride + k;
          return (__m512)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(row + ROWS), _mm512_loadu_ps(row));
        });
        continue;
      }
      for (int64_t c = r; c < std::min(n, r + ROWS); ++c) {
        for (int64_t i = k; i < std::min(even(K), k + NUMBERS); ++i) {
          right[(i / 2 * columns + c) * 2 + i % 2] = i < K ? x[c * stride + i] : 0.f;
        }
      }
    }
  }
}

// right (K, N) from row k on: `depth` rows and `columns` columns, as panels of the columns of a tile.
template <class T, class S>
inline void copy_right(T* panels, const Matrix<S>& right, int64_t k, int64_t n, int64_t depth, int64_t columns) {
  if (right.column == 1) return copy_panels<TILE_COLUMNS>(panels, right.at(k, n), right.row, depth, columns);
  for (int64_t first = 0; first < columns; first += TILE_COLUMNS) {
    const int64_t count = std::min(TILE_COLUMNS, columns - first);
    T* panel = panels + first * padded<T>(depth);
    const S* x = right.at(k, n + first);
    if constexpr (std::is_same_v<T, S>) {
      transposed_right(panel, x, count, depth, right.column, whole_vectors(count));
    } else {
      rounded_transposed_right(panel, x, count, depth, right.column, whole_vectors(count));
    }
  }
}

// The tiles of M rows.
constexpr int64_t tiles_in(int64_t M) { return (M + TILE_ROWS - 1) / TILE_ROWS; }

// What the tiles ask memory for before it is read, some of the rows at each turn. Numbers of a row are adjacent.
template <class S>
struct Prefetch {
  const S* row;
  int64_t stride, numbers, rows, rows_of_a_turn;

  void take_turn() {
    const int64_t end = std::max<int64_t>(0, rows - rows_of_a_turn);
    for (; rows > end; --rows, row += stride) prefetch<0, 2>(row, numbers);
  }
};

// Of what is copied of right (K, N) after its block at row k and column n: the block below, or the first one of the next columns.
// A turn is a tile of the M rows that are multiplied by the block.
template <class T, class S>
inline Prefetch<S> prefetch_after(const Matrix<S>& right, int64_t k, int64_t n, int64_t M, int64_t N, int64_t K) {
  const int64_t turns = tiles_in(M) * ((std::min(BLOCK_COLUMNS, N - n) + TILE_COLUMNS - 1) / TILE_COLUMNS);
  const bool is_last = k + DEPTH<T> >= K, by_rows = right.column == 1;
  k = is_last ? 0 : k + DEPTH<T>;
  n = is_last ? n + BLOCK_COLUMNS : n;
  const int64_t depth = std::min(DEPTH<T>, K - k), columns = std::min(BLOCK_COLUMNS, N - n);  // none after the last
  const int64_t rows = by_rows ? depth : columns;
  return {right.at(k, n), by_rows ? right.row : right.column, by_rows ? columns : depth, rows, (rows + turns - 1) / turns};
}

// sums, whose rows are ld numbers apart, = a tile with as many vectors as the columns need, or += if `adds`.
template <class T>
inline void tile_of(
    int64_t columns, float* sums, int64_t ld, bool adds, int64_t rows, const T* left, int64_t row_stride, int64_t step_stride,
    const T* right, int64_t K) {
  const float* earlier = adds ? sums : nullptr;
  const auto put = [&](int r, int v, const Vec& sum) { sum.store(sums + r * ld + v * WIDTH); };
  switch (whole_vectors(columns) / WIDTH) {
    case 1: return tile<1>(earlier, ld, rows, left, row_stride, step_stride, right, K, put);
    case 2: return tile<2>(earlier, ld, rows, left, row_stride, step_stride, right, K, put);
    case 3: return tile<3>(earlier, ld, rows, left, row_stride, step_stride, right, K, put);
    default: return tile<4>(earlier, ld, rows, left, row_stride, step_stride, right, K, put);
  }
}

// out (M, N) = left (M, K) right (K, N), by one thread. finish(place, n, sum, count) writes `count` complete sums, a vector, to
// `place`; n is the column of out. A whole tile is written from its registers, a narrower one by way of the cache.
template <class O, class T, class S, class F>
void multiply_alone(
    O* out, int64_t ld, const Matrix<T>& left, const Matrix<S>& right, int64_t M, int64_t N, int64_t K, const F& finish) {
  const bool in_parts = K > DEPTH<T>, copies_left = left.column != 1;
  const int64_t most = padded<T>(std::min(K, DEPTH<T>)), pass = in_parts ? std::min(PASS_ROWS, tiles_in(M) * TILE_ROWS) : M;
  Scratch& memory = scratch_of_thread();
  T *right_panels = memory.take<T>(BLOCK_COLUMNS * most), *left_panel = memory.take<T>(copies_left ? BLOCK_ROWS * most : 0);
  float* sums_of_pass = memory.take<float>((in_parts ? pass : TILE_ROWS) * BLOCK_COLUMNS);
  for (int64_t top = 0; top < M; top += pass) {
    const int64_t bottom = std::min(M, top + pass);
    for (int64_t n0 = 0; n0 < N; n0 += BLOCK_COLUMNS) {
      const int64_t columns = std::min(BLOCK_COLUMNS, N - n0);
      for (int64_t k0 = 0; k0 < K; k0 += DEPTH<T>) {
        const int64_t depth = std::min(DEPTH<T>, K - k0);
        copy_right(right_panels, right, k0, n0, depth, columns);
        Prefetch<S> prefetch_next = prefetch_after<T>(right, k0, n0, bottom - top, N, K);
        for (int64_t m0 = top; m0 < bottom; m0 += BLOCK_ROWS) {
          const int64_t rows = std::min(BLOCK_ROWS, bottom - m0);
          if (copies_left) copy_panels<BLOCK_ROWS>(left_panel, left.at(m0, k0), left.column, depth, rows);
          const T* first = copies_left ? left_panel : left.at(m0, k0);
          const int64_t row_stride = copies_left ? K_PER_STEP<T> : left.row;
          const int64_t step_stride = copies_left ? whole_vectors(rows) * K_PER_STEP<T> : K_PER_STEP<T>;
          const int64_t k_there = copies_left ? padded<T>(depth) : depth;
          for (int64_t n = 0; n < columns; n += TILE_COLUMNS) {
            for (int64_t m = 0; m < rows; m += TILE_ROWS) {
              const int64_t tile_rows = std::min(TILE_ROWS, rows - m), tile_columns = std::min(TILE_COLUMNS, columns - n);
              O* place = out + (m0 + m) * ld + n0 + n;
              float* sums = sums_of_pass + (in_parts ? (m0 - top + m) * BLOCK_COLUMNS : 0) + n;
              for (int64_t r = 0; r < tile_rows && k0 + depth == K; ++r) prefetch<1>(place + r * ld, tile_columns);
              prefetch_next.take_turn();
              const T *rows_of_left = first + m * row_stride, *panel = right_panels + n * padded<T>(depth);
              if (k0 + depth == K && tile_columns == TILE_COLUMNS) {
                const float* earlier = k0 > 0 ? sums : nullptr;
                tile<TILE_VECTORS>(
                    earlier, BLOCK_COLUMNS, tile_rows, rows_of_left, row_stride, step_stride, panel, k_there,
                    [&](int r, int v, const Vec& sum) {
                      if (r < tile_rows) finish(place + r * ld + v * WIDTH, n0 + n + v * WIDTH, sum, WIDTH);
                    });
                continue;
              }
              tile_of(tile_columns, sums, BLOCK_COLUMNS, k0 > 0, tile_rows, rows_of_left, row_stride, step_stride, panel, k_there);
              for (int64_t r = 0; r < tile_rows && k0 + depth == K; ++r) {
                for_vectors(tile_columns, [&](int64_t c, int64_t count) {
                  finish(place + r * ld + c, n0 + n + c, load(sums + r * BLOCK_COLUMNS + c, count), count);
                });
              }
            }
          }
        }
      }
    }
  }
}

// `multiply_alone` by all threads, each for a part of the rows and columns of out. The bits do not depend on the number of threads.
template <class O, class T, class S, class F>
void multiply(O* out, int64_t ld, const Matrix<T>& left, const Matrix<S>& right, int64_t M, int64_t N, int64_t K, const F& finish) {
  const int64_t tiles_down = tiles_in(M), tiles_across = (N + TILE_COLUMNS - 1) / TILE_COLUMNS;
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + M * N * K / PIECE);
  int64_t down = 1, least = std::numeric_limits<int64_t>::max();  // parts of the rows: those that cost least
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const int64_t rows = (tiles_down + parts - 1) / parts * TILE_ROWS, others = threads / parts;
    const int64_t columns = (tiles_across + others - 1) / others * TILE_COLUMNS, cost = rows * columns + COPY_COST * (rows + columns);
    if (cost < least) least = cost, down = parts;
  }
  const int64_t across = threads / down;
  at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part % down, j = part / down;
      const int64_t m = tiles_down * i / down * TILE_ROWS, rows = std::min(M, tiles_down * (i + 1) / down * TILE_ROWS) - m;
      const int64_t n = tiles_across * j / across * TILE_COLUMNS;
      const int64_t columns = std::min(N, tiles_across * (j + 1) / across * TILE_COLUMNS) - n;
      multiply_alone(
          out + m * ld + n, ld, Matrix<T>{left.at(m, 0), left.row, left.column}, Matrix<S>{right.at(0, n), right.row, right.column},
          rows, columns, K, [&](O* place, int64_t c, const Vec& sum, int64_t count) { finish(place, n + c, sum, count); });
    }
  });
}

// out (M, N) = left (M, K) right (K, N) + bias (N), which may be null: a linear layer, or its dx. right is the weight.
template <class T, class P>
void product(
    T* out, const T* left, const P* right, const P* bias, int64_t out_row, int64_t left_row, int64_t left_column, int64_t right_row,
    int64_t right_column, int64_t M, int64_t N, int64_t K) {
  const auto finish = [&](T* place, int64_t n, const Vec& sum, int64_t count) {
    store(place, bias ? sum + load(bias + n, count) : sum, count);
  };
  multiply(out, out_row, Matrix<T>{left, left_row, left_column}, Matrix<P>{right, right_row, right_column}, M, N, K, finish);
}

// total (M, N) += left (M, K) right (K, N): dW += dy^T x. The sum is rounded once.
template <class T, class P>
void add_product(
    P* total, const T* left, const T* right, int64_t total_row, int64_t left_row, int64_t left_column, int64_t right_row,
    int64_t right_column, int64_t M, int64_t N, int64_t K) {
  const auto finish = [&](P* place, int64_t, const Vec& sum, int64_t count) { add(place, sum, count); };
  multiply(total, total_row, Matrix<T>{left, left_row, left_column}, Matrix<T>{right, right_row, right_column}, M, N, K, finish);
}

}  // namespace

#endif
