// Switches for mutate_kernels.py: an expression of the kernels and its mutant, of which the environment's MUTANT chooses.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdlib>

static const int mutant = std::getenv("MUTANT") ? std::atoi(std::getenv("MUTANT")) : 0;  // 0: none

// An operator keeps its place among the others: a + b * c becomes a + At<7>() + b * c, which is (a + At<7>()) + (b * c).
template <int N>
struct At {};

template <int N, class A>
struct Left {
  A a;
};

#define SWITCH(operation, other)                                              \
  template <int N, class A>                                                   \
  inline Left<N, A> operator operation(A a, At<N>) {                          \
    return {a};                                                               \
  }                                                                           \
  template <int N, class A, class B>                                          \
  inline auto operator operation(Left<N, A> left, B b)->decltype(left.a operation b) { \
    if (mutant == N) return left.a other b;                                   \
    return left.a operation b;                                                \
  }

SWITCH(+, -)
SWITCH(-, +)
SWITCH(*, /)
SWITCH(/, *)
SWITCH(%, /)
SWITCH(^, |)
SWITCH(<, <=)
SWITCH(<=, <)
SWITCH(>, >=)
SWITCH(>=, >)
SWITCH(==, !=)
SWITCH(&&, ||)
SWITCH(||, &&)

// x.neg() becomes x->*Without<7>(): as it is, or left out.
enum class Method { neg, abs };

template <int N, Method method>
struct Without {};

template <int N, Method method>
inline at::vec::Vectorized<float> operator->*(const at::vec::Vectorized<float>& x, Without<N, method>) {
  if (mutant == N) return x;
  return method == Method::neg ? x.neg() : x.abs();
}

template <int N>
struct Either {
  template <class A>
  static A value(A right, A wrong) {
    return mutant == N ? wrong : right;
  }
  static bool no(bool condition) { return (mutant == N) == condition; }
  template <class A>
  static A min(A a, A b) {
    return mutant == N ? std::max(a, b) : std::min(a, b);
  }
  template <class A>
  static A max(A a, A b) {
    return mutant == N ? std::min(a, b) : std::max(a, b);
  }
  template <class A>
  static A maximum(const A& a, const A& b) {
    return mutant == N ? at::vec::minimum(a, b) : at::vec::maximum(a, b);
  }
};
