// Adding into gradients of parameters: products.py.
#pragma once

#include "vectors.h"

namespace {

// total (R, C) += product (R, C), which has a narrower dtype in bf16_mixed.
template <class T, class P>
void add_rounded(P* total, const T* product, int64_t R, int64_t C) {
  for_numbers(R * C, [&](int64_t i, int64_t count) { add(total + i, load(product + i, count), count); });
}

// total (C) += the sum over the rows of x (R, C): the gradient of a bias, or of the positions. The threads share the rows,
// or, if these are one group, the columns.
template <class T, class P>
void add_sum_of_rows(P* total, const T* x, int64_t C, int64_t R) {
  if (R <= GROUP) {
    const auto add_columns = [&](int64_t c, int64_t count) {
      Vec sum(0.f);
      for (int64_t r = 0; r < R; ++r) sum = sum + load(x + r * C + c, count);
      add(total + c, sum, count);
    };
    return for_numbers(C, add_columns, R);
  }
  for_rows_with_sums(R, C, {total}, [&](int64_t r, float* sum) {
    for_vectors(C, [&](int64_t c, int64_t count) { add(sum + c, load(x + r * C + c, count), count); });
  });
}

}  // namespace
