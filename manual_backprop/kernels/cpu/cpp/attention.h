// Attention and its gradient, one head and one block of queries at a time. The quoted lines are those of
// ops/attention.py and ops/rotary_attention.py.
//
// The scores of a block are transposed, (S, n): keys in rows, queries in columns. So the maximum, the sum or the mask
// of a query is one lane of a vector, and every product reads its operands without copies. Keys that no query of the
// block sees are rows that are skipped: what a causal mask or padding hides is never computed. The probabilities are
// not stored; backward recomputes them from the log-sum-exp of each query.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "operands.h"

namespace {

constexpr int64_t QUERIES = 32;         // of a block: its scores stay in the cache, and a causal mask spares most of their work

// The memory of a tensor (B, positions, heads, K); the K numbers of a position and head are contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t sequence, position, head;     // strides [numbers]

  T* at(int64_t b, int64_t h) const { return data + b * sequence + h * head; }
};

// Which keys a query sees: ops/visible.py.
struct Visible {
  bool causal;
  const int64_t *key_lengths, *query_segments, *key_segments;  // (B), (B, T), (B, S); null where there are none
  int64_t T, S;

  int64_t keys_of(int64_t b) const { return key_lengths ? std::clamp<int64_t>(key_lengths[b], 0, S) : S; }
  // How many of the first `keys` keys the queries before `query` see at most.
  int64_t keys_up_to(int64_t query, int64_t keys) const {
    return causal ? std::clamp<int64_t>(query + S - T, 0, keys) : keys;
  }
};

// Which probabilities are dropped: ops/dropout.py, bit for bit.
struct Dropout {
  double probability;                   // a float would not have the 31 bits of the threshold
  int64_t key, n_heads, positions;      // of the network
  int64_t first_row, first_head, first_query, first_key;

  bool drops() const { return probability > 0; }

  // 64 bits of a row of the mask: the finalizer of SplitMix64.
  uint64_t row_key(int64_t b, int64_t h, int64_t query) const {
    const uint64_t number = uint64_t((first_row + b) * n_heads + first_head + h) * uint64_t(positions) + uint64_t(first_query + query);
    uint64_t x = number * 0x9E3779B97F4A7C15u + uint64_t(key);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  // 1 if the element of this key is kept, 0 if it is dropped, for rows whose bits have these low and high halves: the
  // finalizer of MurmurHash3.
  Vec kept(int64_t place, const uint32_t* low, const uint32_t* high) const {
    const uint32_t start = uint32_t(first_key + place) * 0x9E3779B1u, threshold = uint32_t(probability * 2147483648.0);
    alignas(64) float result[WIDTH];
    for (int64_t lane = 0; lane < WIDTH; ++lane) {
      uint32_t x = start ^ low[lane];
      x = (x ^ (x >> 16)) * 0x85EBCA6Bu + high[lane];
      x = (x ^ (x >> 13)) * 0xC2B2AE35u;
      x = (x ^ (x >> 16)) & 0x7FFFFFFFu;
      result[lane] = x >= threshold ? 1.f : 0.f;
    }
    return Vec::loadu(result);
  }
};

// The angles by which queries and keys are rotated: ops/rotary_attention.py. Null without rotary positions.
struct Rotation {
  const float *cosine, *sine;           // (positions, K / 2)

  // y (n, K) = x (n, K), rotated for the positions from `first` on; direction -1 rotates back. y may be x.
  template <class Y, class X>
  void turn(Y* y, int64_t y_stride, const X* x, int64_t x_stride, int64_t first, int64_t n, int64_t K, float direction) const {
    const int64_t half = K / 2;
    for (int64_t r = 0; r < n; ++r) {
      const X* from = x + r * x_stride;
      Y* to = y + r * y_stride;
      for_vectors(half, [&](int64_t k, int64_t count) {
        const int64_t angle = (first + r) * half + k;
        const Vec one = load(from + k, count), other = load(from + half + k, count);
        const Vec along = load(cosine + angle, count), across = load(sine + angle, count) * Vec(direction);
        // turned_1 = first cos - second sin, turned_2 = second cos + first sin
        store(to + k, one * along - other * across, count);
        store(to + half + k, other * along + one * across, count);
      });
    }
  }

  // x (n, K) itself, or rotated in `memory`; sets `stride`, the distance of its rows.
  template <class T>
  const T* turned(const T* x, int64_t& stride, int64_t first, int64_t n, int64_t K, T* memory) const {
    if (!cosine) return x;
    turn(memory, K, x, stride, first, n, K, 1);
    stride = K;
    return memory;
  }
};

// out (M, N) = left (M, R) right (R, N), or +=.
template <class T>
inline void small_product(float* out, const T* left, const T* right, int64_t M, int64_t N, int64_t R, int64_t ld_left, int64_t ld_right, bool adds) {
  at::native::cpublas::brgemm(M, N, R, ld_left, ld_right, N, adds, left, right, out, !std::is_same_v<T, float>);
}

// y (n, K) = the first n columns of x (K, columns), transposed, each times its factor.
template <class T>
inline void write_transposed(T* y, int64_t stride, const float* x, int64_t n, int64_t K, int64_t columns, const float* factors) {
  float square[WIDTH * WIDTH];
  for (int64_t first = 0; first < n; first += WIDTH) {
    const int64_t some = std::min(WIDTH, n - first);
    for_vectors(K, [&](int64_t k, int64_t count) {
      transpose(square, WIDTH, x + k * columns + first, columns, count, some);
      for (int64_t c = 0; c < some; ++c) {
        const Vec row = Vec::loadu(square + c * WIDTH, count);
        store(y + (first + c) * stride + k, factors ? row * Vec(factors[first + c]) : row, count);
      }
    });
  }
}

// Queries `first` to `last` of a head.
struct Block {
  int64_t b, first, last, seen, columns;  // seen: most keys that a query sees; columns: n rounded up to whole vectors

  Block(const Visible& visible, int64_t b, int64_t first, int64_t last, int64_t keys)
      : b(b), first(first), last(last), seen(visible.keys_up_to(last, keys)),
        columns(whole_vectors(last - first)) {}

  int64_t n() const { return last - first; }
};

// The keys that the queries of one vector see, from a block's column c on.
class Column {
 public:
  Column(const Visible& visible, const Block& block, int64_t c) : visible_(visible), block_(block), c_(c) {
    const int64_t query = block.first + c;
    all_ = visible.query_segments ? 0 : visible.keys_up_to(query + 1, block.seen);
    seen_ = visible.keys_up_to(std::min(query + WIDTH, block.last), block.seen);
    for (int64_t lane = 0; lane < WIDTH && visible.query_segments; ++lane) {
      segments_[lane] = visible.query_segments[block.b * visible.T + std::min(query + lane, block.last - 1)];
    }
  }

  int64_t all() const { return all_; }    // so many keys, from the first, are seen by all of these queries
  int64_t seen() const { return seen_; }  // by at least one of them

  // x where key j is seen, else `otherwise`.
  Vec visible(int64_t j, const Vec& x, float otherwise) const {
    const int64_t from = visible_.causal ? j - (block_.first + c_ + visible_.S - visible_.T) : 0;  // the first lane
    const Vec causal = where(Vec::arange(0.f, 1.f) >= Vec(float(from)), x, Vec(otherwise));
    if (!visible_.query_segments) return causal;
    alignas(64) float is_same[WIDTH];
    const int64_t segment = visible_.key_segments[block_.b * visible_.S + j];
    for (int64_t lane = 0; lane < WIDTH; ++lane) is_same[lane] = segments_[lane] == segment ? 1.f : 0.f;
    return where(Vec::loadu(is_same) > Vec(0.f), causal, Vec(otherwise));
  }

 private:
  const Visible& visible_;
  const Block& block_;
  int64_t c_, all_, seen_, segments_[WIDTH];
};

// context (B, T, H, K), and sums (B, H, T): the log-sum-exp of each query.
template <class T>
void attention_forward_of(
    Heads<T> context, float* sums, Heads<const T> query, Heads<const T> key, Heads<const T> value, const Visible& visible,
    const Dropout& dropout, const Rotation& rotation, int64_t B, int64_t H, int64_t G, int64_t K) {
  const float scale = 1 / std::sqrt(float(K)), share = float(1 / (1 - dropout.probability));
  const int64_t S = visible.S, S2 = padded<T>(S);
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch_of_thread();
    float* scores = memory.take<float>(S * QUERIES);
    T* probabilities = std::is_same_v<T, float> ? reinterpret_cast<T*>(scores) : memory.take<T>(S2 * QUERIES);
    T *query_t = memory.take<T>(padded<T>(K) * QUERIES), *value_t = memory.take<T>(K * S2);
    float *context_t = memory.take<float>(K * QUERIES), *factors = memory.take<float>(QUERIES);
    uint32_t *low = memory.take<uint32_t>(QUERIES), *high = memory.take<uint32_t>(QUERIES);
    T *turned_keys = memory.take<T>(rotation.cosine ? S * K : 0), *turned_queries = memory.take<T>(QUERIES * K);
    const T* keys_of_head = nullptr;
    int64_t key_stride = 0, prepared = -1;
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / H, h = head % H, g = h / (H / G), keys = visible.keys_of(b);
      if (head / (H / G) != prepared) {  // keys and values that the heads of a group share
        prepared = head / (H / G), key_stride = key.position;
        keys_of_head = rotation.turned(key.at(b, g), key_stride, 0, keys, K, turned_keys);
        transposed_left(value_t, value.at(b, g), keys, K, value.position, S2);
      }
      for (int64_t first = 0; first < visible.T; first += QUERIES) {
        const Block block(visible, b, first, std::min(first + QUERIES, visible.T), keys);
        T* out = context.at(b, h) + first * context.position;
        float* block_sums = sums + head * visible.T + first;
        const int64_t n = block.n(), columns = block.columns, seen = block.seen;
        if (seen == 0) {  // nothing is visible: context is 0
          for (int64_t c = 0; c < n; ++c) {
            std::fill(out + c * context.position, out + c * context.position + K, T(0.f));
            block_sums[c] = INFINITE;
          }
          continue;
        }
        // scores = query key^T scale
        int64_t query_stride = query.position;
        const T* queries = rotation.turned(query.at(b, h) + first * query_stride, query_stride, first, n, K, turned_queries);
        transposed_right(query_t, queries, n, K, query_stride, columns);
        small_product(scores, keys_of_head, query_t, seen, columns, K, key_stride, columns, false);
        if (dropout.drops()) {
          for (int64_t c = 0; c < columns; ++c) {
            const uint64_t bits = dropout.row_key(b, h, first + c);
            low[c] = uint32_t(bits), high[c] = uint32_t(bits >> 32);
          }
        }
        // probabilities = exp(scores - max(scores)) / sum
        for (int64_t c = 0; c < columns; c += WIDTH) {
          const Column column(visible, block, c);
          const auto score = [&](int64_t j) {
            const Vec x = Vec::loadu(scores + j * columns + c);
            return j < column.all() ? x : column.visible(j, x, -INFINITE);
          };
          Vec most(-INFINITE), sum(0.f);
          for (int64_t j = 0; j < column.all(); ++j) most = at::vec::maximum(most, Vec::loadu(scores + j * columns + c));
          for (int64_t j = column.all(); j < column.seen(); ++j) most = at::vec::maximum(most, score(j));
          most = where(most == Vec(-INFINITE), Vec(0.f), most) * Vec(scale);  // a query that sees no key
          const auto probability = [&](int64_t j) {
            if (j >= column.seen()) return Vec(0.f);
            const Vec p = exponential<T>(score(j) * Vec(scale) - most);
            sum = sum + p;
            return dropout.drops() ? p * dropout.kept(j, low + c, high + c) : p;
          };
          for (int64_t j = 0; j < seen; j += 2) {
            const Vec one = probability(j), other = j + 1 < seen ? probability(j + 1) : Vec(0.f);
            if constexpr (std::is_same_v<T, float>) {
              one.store(scores + j * columns + c);
              if (j + 1 < seen) other.store(scores + (j + 1) * columns + c);
            } else {
              store_pairs(probabilities + j * columns + 2 * c, one, other);
            }
          }
          const Vec sees = sum > Vec(0.f);
          where(sees, Vec(share) / sum, Vec(0.f)).store(factors + c);
          where(sees, most + sum.log(), Vec(INFINITE)).store(block_sums + c, std::min(WIDTH, n - c));
        }
        // context = dropout(probabilities) value
        small_product(context_t, value_t, probabilities, K, columns, padded<T>(seen), S2, columns, false);
        write_transposed(out, context.position, context_t, n, K, columns, factors);
      }
    }
    at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
  });
}

// The gradients of all three inputs, from dcontext. They may overwrite the inputs: the last read of a block of queries
// comes before its gradient is written, and the last read of a head's keys and values before theirs.
template <class T>
void attention_backward_of(
    Heads<T> dquery, Heads<T> dkey, Heads<T> dvalue, Heads<const T> dcontext, const float* sums, Heads<const T> query,
    Heads<const T> key, Heads<const T> value, const Visible& visible, const Dropout& dropout, const Rotation& rotation, int64_t B,
    int64_t H, int64_t G, int64_t K) {
  const float scale = 1 / std::sqrt(float(K)), share = float(1 / (1 - dropout.probability));
  const int64_t S = visible.S, S2 = padded<T>(S);
  constexpr bool wide = std::is_same_v<T, float>;
  at::parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {
    Scratch& memory = scratch_of_thread();
    float *scores = memory.take<float>(S * QUERIES), *dscores = memory.take<float>(S * QUERIES);
    // left operands (S, columns), and dscores also as a right operand
    T* dropped = wide ? reinterpret_cast<T*>(scores) : memory.take<T>(S * QUERIES);
    T* dscores_left = wide ? reinterpret_cast<T*>(dscores) : memory.take<T>(S * QUERIES);
    T* dscores_right = wide ? reinterpret_cast<T*>(dscores) : memory.take<T>(S2 * QUERIES);
    T *query_t = memory.take<T>(padded<T>(K) * QUERIES), *dcontext_t = memory.take<T>(padded<T>(K) * QUERIES);
    T *query_right = memory.take<T>(QUERIES * K), *dcontext_right = memory.take<T>(QUERIES * K), *key_t = memory.take<T>(K * S2);
    float *dkey_sum = memory.take<float>(S * K), *dvalue_sum = memory.take<float>(S * K), *dquery_t = memory.take<float>(K * QUERIES);
    uint32_t *low = memory.take<uint32_t>(QUERIES), *high = memory.take<uint32_t>(QUERIES);
    T *turned_keys = memory.take<T>(rotation.cosine ? S * K : 0), *turned_queries = memory.take<T>(QUERIES * K);
    float* dturned = memory.take<float>(QUERIES * K);
    for (int64_t group = begin; group < end; ++group) {
      const int64_t b = group / G, g = group % G, keys = visible.keys_of(b);
      int64_t key_stride = key.position;
      const T* keys_of_head = rotation.turned(key.at(b, g), key_stride, 0, keys, K, turned_keys);
      const T* values_of_head = value.at(b, g);
      std::fill(dkey_sum, dkey_sum + S * K, 0.f);
      std::fill(dvalue_sum, dvalue_sum + S * K, 0.f);
      transposed_left(key_t, keys_of_head, keys, K, key_stride, S2);
      for (int64_t h = g * (H / G); h < (g + 1) * (H / G); ++h) {
        for (int64_t first = 0; first < visible.T; first += QUERIES) {
          const Block block(visible, b, first, std::min(first + QUERIES, visible.T), keys);
          const int64_t n = block.n(), columns = block.columns, seen = block.seen;
          T* dquery_rows = dquery.at(b, h) + first * dquery.position;
          if (seen == 0) {
            for (int64_t c = 0; c < n; ++c) std::fill(dquery_rows + c * dquery.position, dquery_rows + c * dquery.position + K, T(0.f));
            continue;
          }
          int64_t query_stride = query.position;
          const T* query_rows = rotation.turned(query.at(b, h) + first * query_stride, query_stride, first, n, K, turned_queries);
          const T* dcontext_rows = dcontext.at(b, h) + first * dcontext.position;
          // recompute scores = query key^T scale; ddropped = dcontext value^T
          transposed_right(query_t, query_rows, n, K, query_stride, columns);
          transposed_right(dcontext_t, dcontext_rows, n, K, dcontext.position, columns);
          small_product(scores, keys_of_head, query_t, seen, columns, K, key_stride, columns, false);
          small_product(dscores, values_of_head, dcontext_t, seen, columns, K, value.position, columns, false);
          if (dropout.drops()) {
            for (int64_t c = 0; c < columns; ++c) {
              const uint64_t bits = dropout.row_key(b, h, first + c);
              low[c] = uint32_t(bits), high[c] = uint32_t(bits >> 32);
            }
          }
          for (int64_t c = 0; c < columns; c += WIDTH) {
            const Column column(visible, block, c);
            const int64_t count = std::min(WIDTH, n - c);
            const Vec log_sum = Vec::set(Vec(INFINITE), Vec::loadu(sums + (b * H + h) * visible.T + first + c, count), count);
            Vec along(0.f);  // sum(dprobabilities probabilities), of each query
            for (int64_t j = 0; j < column.seen(); ++j) {
              float *score = scores + j * columns + c, *dscore = dscores + j * columns + c;
              Vec p = exponential<T>(Vec::loadu(score) * Vec(scale) - log_sum);
              if (j >= column.all()) p = column.visible(j, p, 0.f);
              Vec dp = Vec::loadu(dscore);
              if (dropout.drops()) {  // the sign of p marks dropped elements
                const Vec kept = dropout.kept(j, low + c, high + c);
                dp = dp * kept * Vec(share);
                along = along + p * dp;
                p = where(kept > Vec(0.f), p, p.neg());
                dp.store(dscore);
              } else {
                along = along + p * dp;
              }
              p.store(score);
            }
            const auto gradient = [&](int64_t j) {
              float *score = scores + j * columns + c, *dscore = dscores + j * columns + c;
              T* left = dropped + j * columns + c;
              if (j >= column.seen()) {
                store(left, Vec(0.f));
                return Vec(0.f);
              }
              const Vec p = Vec::loadu(score), dp = Vec::loadu(dscore);
              // dropped = dropout(probabilities)
              store(left, dropout.drops() ? at::vec::maximum(p, Vec(0.f)) * Vec(share) : p);
              // probabilities = softmax(scores): dscores = probabilities (dprobabilities - along), times the scale
              return (dropout.drops() ? p.abs() : p) * (dp - along) * Vec(scale);
            };
            for (int64_t j = 0; j < seen; j += 2) {
              const Vec one = gradient(j), other = j + 1 < seen ? gradient(j + 1) : Vec(0.f);
              store(dscores_left + j * columns + c, one);
              if (j + 1 < seen) store(dscores_left + (j + 1) * columns + c, other);
              if constexpr (!wide) store_pairs(dscores_right + j * columns + 2 * c, one, other);
            }
          }
          // context = dropped value: dvalue += dropped^T dcontext
          int64_t ld;
          const T* right = right_operand(dcontext_rows, n, K, dcontext.position, dcontext_right, ld);
          small_product(dvalue_sum, dropped, right, seen, K, padded<T>(n), columns, ld, true);
          // scores = query key^T: dkey += dscores^T query, dquery = dscores key
          right = right_operand(query_rows, n, K, query_stride, query_right, ld);
          small_product(dkey_sum, dscores_left, right, seen, K, padded<T>(n), columns, ld, true);
          small_product(dquery_t, key_t, dscores_right, K, columns, padded<T>(seen), S2, columns, false);
          if (rotation.cosine) {
            write_transposed(dturned, K, dquery_t, n, K, columns, nullptr);
            rotation.turn(dquery_rows, dquery.position, dturned, K, first, n, K, -1);
          } else {
            write_transposed(dquery_rows, dquery.position, dquery_t, n, K, columns, nullptr);
          }
        }
      }
      if (rotation.cosine) rotation.turn(dkey_sum, K, dkey_sum, K, 0, S, K, -1);
      T *dkeys = dkey.at(b, g), *dvalues = dvalue.at(b, g);
      for (int64_t j = 0; j < S; ++j) {
        for_vectors(K, [&](int64_t k, int64_t count) {
          store(dkeys + j * dkey.position + k, Vec::loadu(dkey_sum + j * K + k, count), count);
          store(dvalues + j * dvalue.position + k, Vec::loadu(dvalue_sum + j * K + k, count), count);
        });
      }
    }
    at::native::cpublas::brgemm_release(!wide);
  });
}

}  // namespace
