// Embeddings of tokens and positions: embedding.py.
#pragma once

#include "vectors.h"

namespace {

constexpr int64_t COLUMNS = 64;  // that one thread sums at a time

// y (N, D) = scale times the rows of weight (V, D), each of a token (N). The row of a token that is none is NaN.
template <class T, class P>
void rows_of_tokens(P* y, const P* weight, const int64_t* token, const float* scale, int64_t N, int64_t D, int64_t V) {
  for_rows(N, D, [&](int64_t n) {
    const bool is_row = token[n] >= 0 && token[n] < V;
    const P* row = weight + (is_row ? token[n] * D : 0);
    const Vec factor(is_row ? *scale : NAN);
    for_vectors(D, [&](int64_t d, int64_t count) { store(y + n * D + d, factor * load(row + d, count), count); });
  });
}

// dweight (V, D) += scale times the rows of dy (N, D), each to the row of its token (N). A token's rows are summed in
// float, in their order, before they are rounded. If a token is none, nothing is added.
template <class T, class P>
void add_rows_of_tokens(P* dweight, const T* dy, const int64_t* token, const float* scale, int64_t V, int64_t D, int64_t N) {
  // places: those of all tokens, sorted by token; starts: the first one of each token in the batch, then N
  std::vector<int64_t> end(V), places(N), starts;
  for (int64_t n = 0; n < N; ++n) {
    if (token[n] < 0 || token[n] >= V) return;
    end[token[n]] += 1;
  }
  int64_t total = 0;
  for (int64_t v = 0; v < V; ++v) {
    if (end[v] > 0) starts.push_back(total);
    end[v] = total += end[v];
  }
  starts.push_back(N);
  for (int64_t n = N - 1; n >= 0; --n) places[--end[token[n]]] = n;

  const int64_t blocks = (D + COLUMNS - 1) / COLUMNS, groups = starts.size() - 1;
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / COLUMNS / N), [&](int64_t begin, int64_t stop) {
    const int64_t first = begin * COLUMNS, width = std::min(D, stop * COLUMNS) - first;
    std::vector<float> sums(width);
    for (int64_t group = 0; group < groups; ++group) {
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i) {
        const T* row = dy + places[i] * D + first;
        for_vectors(width, [&](int64_t d, int64_t count) { add(sums.data() + d, load(row + d, count), count); });
      }
      P* drow = dweight + token[places[starts[group]]] * D + first;
      for_vectors(width, [&](int64_t d, int64_t count) { add(drow + d, Vec(*scale) * load(sums.data() + d, count), count); });
    }
  });
}

// y (R, C) = x + row (C).
template <class T, class P>
void add_to_rows(P* y, const P* x, const P* row, int64_t R, int64_t C) {
  for_rows(R, C, [&](int64_t r) {
    for_vectors(C, [&](int64_t c, int64_t count) {
      store(y + r * C + c, load(x + r * C + c, count) + load(row + c, count), count);
    });
  });
}

}  // namespace
