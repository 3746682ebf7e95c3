// Activations of x + bias. The quoted lines are those of activations.py.
#pragma once

#include "vectors.h"

namespace {

const float GATE_LINEAR = 2 * std::sqrt(2 / M_PI);  // of ops/activations.py
const float GATE_CUBIC = 0.044715f * GATE_LINEAR;

template <class T>
inline Vec sigmoid(const Vec& x) {
  return (Vec(1.f) + exponential<T>(x.neg())).reciprocal();
}

// sigmoid(x) and 1 - sigmoid(x), both accurate where they are small, from one exponential that cannot overflow.
template <class T>
inline void gate_and_rest(const Vec& x, Vec& gate, Vec& rest) {
  const Vec decay = exponential<T>(x.abs().neg());
  const Vec large = Vec(1.f) / (Vec(1.f) + decay);
  const Vec small = decay * large;
  const Vec is_positive = x > Vec(0.f);
  gate = where(is_positive, large, small);
  rest = where(is_positive, small, large);
}

struct GeluTanh {
  template <class T>
  static Vec forward(const Vec& z) {
    // y = z * sigmoid(z * (GATE_LINEAR + GATE_CUBIC * z * z))
    return z * sigmoid<T>(z * (Vec(GATE_LINEAR) + Vec(GATE_CUBIC) * z * z));
  }
  template <class T>
  static void backward(const Vec& z, Vec& y, Vec& slope) {
    const Vec squared = z * z;
    Vec gate, rest;
    gate_and_rest<T>(z * (Vec(GATE_LINEAR) + Vec(GATE_CUBIC) * squared), gate, rest);
    y = z * gate;
    // dx = dy * gate * (1 + z * rest * (GATE_LINEAR + 3 * GATE_CUBIC * squared))
    slope = gate * (Vec(1.f) + z * rest * (Vec(GATE_LINEAR) + Vec(3 * GATE_CUBIC) * squared));
  }
};

struct Gelu {
  // (1 + erf(z / sqrt(2))) / 2, without cancellation where z is negative
  static Vec cumulative(const Vec& z) { return Vec(0.5f) * (z * Vec(-std::sqrt(0.5f))).erfc(); }
  template <class T>
  static Vec forward(const Vec& z) {
    return z * cumulative(z);
  }
  template <class T>
  static void backward(const Vec& z, Vec& y, Vec& slope) {
    const Vec below = cumulative(z);
    const Vec density = exponential<T>(Vec(-0.5f) * z * z) * Vec(float(1 / std::sqrt(2 * M_PI)));
    y = z * below;
    // dx = dy * (cumulative + z * density)
    slope = below + z * density;
  }
};

struct Relu {
  template <class T>
  static Vec forward(const Vec& z) {
    return at::vec::maximum(z, Vec(0.f));
  }
  template <class T>
  static void backward(const Vec& z, Vec& y, Vec& slope) {
    y = at::vec::maximum(z, Vec(0.f));
    // dx = dy where z > 0
    slope = where(z > Vec(0.f), Vec(1.f), Vec(0.f));
  }
};

// y = activation(x + bias). y, x (N, F), bias (F).
template <class Activation, class T, class P>
void bias_activation(T* y, const T* x, const P* bias, int64_t N, int64_t F) {
  for_rows(N, F, [&](int64_t n) {
    for_vectors(F, [&](int64_t f, int64_t count) {
      store(y + n * F + f, Activation::template forward<T>(load(x + n * F + f, count) + load(bias + f, count)), count);
    });
  });
}

// Recomputes y = activation(x + bias); dx, which contains dy, becomes the gradient of x; dbias += its sum over the
// rows. All (N, F), dbias (F).
template <class Activation, class T, class P>
void bias_activation_gradient(T* y, T* dx, P* dbias, const T* x, const P* bias, int64_t N, int64_t F) {
  for_rows_with_sums(N, F, {dbias}, [&](int64_t n, float* dbias_sum) {
    for_vectors(F, [&](int64_t f, int64_t count) {
      const int64_t i = n * F + f;
      Vec activated, slope;
      Activation::template backward<T>(load(x + i, count) + load(bias + f, count), activated, slope);
      const Vec gradient = load(dx + i, count) * slope;
      store(y + i, activated, count);
      store(dx + i, gradient, count);
      add(dbias_sum + f, gradient, count);
    });
  });
}

// y = silu(gate) * hidden, which lie side by side in x. x (N, 2F) -> y (N, F).
template <class T, class P>
void swiglu(T* y, const T* x, int64_t N, int64_t F) {
  for_rows(N, F, [&](int64_t n) {
    const T* row = x + n * 2 * F;
    for_vectors(F, [&](int64_t f, int64_t count) {
      const Vec gate = load(row + f, count), hidden = load(row + F + f, count);
      store(y + n * F + f, gate * sigmoid<T>(gate) * hidden, count);
    });
  });
}

// Recomputes y; from dy (N, F), dx (N, 2F) = dgate and dhidden side by side.
template <class T, class P>
void swiglu_gradient(T* y, T* dx, const T* dy, const T* x, int64_t N, int64_t F) {
  for_rows(N, F, [&](int64_t n) {
    const T* row = x + n * 2 * F;
    T* drow = dx + n * 2 * F;
    for_vectors(F, [&](int64_t f, int64_t count) {
      const Vec gate = load(row + f, count), hidden = load(row + F + f, count), upstream = load(dy + n * F + f, count);
      Vec opening, rest;
      gate_and_rest<T>(gate, opening, rest);
      const Vec silu = gate * opening;
      // y = gate * opening * hidden
      store(y + n * F + f, silu * hidden, count);
      store(drow + f, upstream * hidden * opening * (Vec(1.f) + gate * rest), count);
      store(drow + F + f, upstream * silu, count);
    });
  });
}

}  // namespace
