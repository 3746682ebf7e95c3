// Adding into gradients of parameters: products.py.
#pragma once

#include "vectors.h"

namespace {

// total (R, C) += product (R, C), which has a narrower dtype in bf16_mixed.
template <class T, class P>
void add_rounded(P* total, const T* product, int64_t R, int64_t C) {
  for_numbers(R * C, [&](int64_t i, int64_t count) { add(total + i, load(product + i, count), count); });
}

// total (C) += the sum over the rows of x (R, C): the gradient of a bias.
template <class T, class P>
void add_sum_of_rows(P* total, const T* x, int64_t C, int64_t R) {
  for_rows_with_sums(R, C, {total}, [&](int64_t r, float* sum) {
    for_vectors(C, [&](int64_t c, int64_t count) { add(sum + c, load(x + r * C + c, count), count); });
  });
}

}  // namespace
