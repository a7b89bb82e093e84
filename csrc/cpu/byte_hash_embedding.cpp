// Hash embeddings of byte n-grams: each position's byte embedding plus one table row for every n-gram size and function.
//   hash of n bytes that end at t: sum over j of tokens[t - n + 1 + j] p^j, in 64 bits that wrap; row = hash mod vocab
//   (never negative) + vocab * (function * sizes + size). Before the text stand zeros.
// By Horner every size comes from the next smaller: h(n) = tokens[t - n + 1] + p h(n - 1). Ids of a block of positions are
// computed first; each row is then fetched while the one before it is summed: a table of 12 GB is never in a cache.
// Backward: the pairs (position, row) come sorted by row, positions rising, and each row's sum is one thread's: neither
// order nor rounding depends on the number of threads.
// Hash embeddings: Pagnoni et al. 2024, "Byte Latent Transformer"; hash and primes as in transformers' BLT.
#include "../common/parallel.h"
#include "../common/params.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum HashScratch { kIdSlot };
constexpr int64_t kSerialElements = 16384;
constexpr int64_t kBlock = 32;         // positions whose ids are computed together
constexpr int64_t kPrefetchBytes = 1024;  // of each row of the next position; the rest the processor fetches by itself
constexpr uint64_t kPrimes[] = {1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
                                9576890767, 3628273133, 2860486313, 5463458053, 3367900313};
constexpr int64_t kNumPrimes = sizeof(kPrimes) / sizeof(kPrimes[0]);

TZ_INLINE int64_t modulo(uint64_t hash, int64_t vocab) {
  const int64_t r = static_cast<int64_t>(hash) % vocab;
  return r < 0 ? r + vocab : r;
}

// Rows of the table for flat positions [begin, end): ids[functions * groups] each.
void hash_rows(const ByteHashParams& p, int64_t begin, int64_t end, int64_t* ids) {
  int64_t s = 0, after = p.num_segments;  // the segment of `begin`, by halving
  while (after - s > 1) {
    const int64_t middle = (s + after) / 2;
    (p.segments[middle].batch * p.L + p.segments[middle].begin <= begin ? s : after) = middle;
  }
  for (int64_t t = begin; t < end; t++) {
    while (t >= p.segments[s].batch * p.L + p.segments[s].end) s++;
    const int64_t available = t - (p.segments[s].batch * p.L + p.segments[s].begin) + 1;
    for (int64_t f = 0; f < p.functions; f++) {
      const uint64_t prime = kPrimes[f % kNumPrimes];
      uint64_t hash = 0;
      int64_t size = 0;
      for (int64_t g = 0; g < p.groups; g++, ids++) {
        if (p.group_sizes[g] < size) hash = 0, size = 0;  // sizes usually rise
        for (; size < p.group_sizes[g]; size++) hash = hash * prime + (size < available ? static_cast<uint64_t>(p.tokens[t - size]) : 0);
        *ids = modulo(hash, p.vocab) + (f * p.groups + g) * p.vocab;
      }
    }
  }
}

template <class T, class W> void forward(const ByteHashParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int kWide = 4;
  const int64_t n = p.functions * p.groups, row_bytes = p.D * static_cast<int64_t>(sizeof(W));
  parallel_for(0, p.B * p.L, max_of(1, kSerialElements / (p.D * (n + 1))), [&](int64_t begin, int64_t end) {
    int64_t* ids = scratch<int64_t>(kIdSlot, kBlock * n);
    for (int64_t t0 = begin; t0 < end; t0 += kBlock) {
      const int64_t t1 = min_of(end, t0 + kBlock);
      hash_rows(p, t0, t1, ids);
      for (int64_t t = t0; t < t1; t++) {
        const int64_t* here = ids + (t - t0) * n;
        if (t + 1 < t1)
          for (int64_t i = 0; i < n; i++) {
            const char* row = reinterpret_cast<const char*>(static_cast<const W*>(p.table) + here[n + i] * p.table_stride);
            for (int64_t c = 0; c < min_of(row_bytes, kPrefetchBytes); c += 64) prefetch(row + c);
          }
        const T* byte = static_cast<const T*>(p.byte_embedding) + p.tokens[t] * p.byte_stride;
        T* y = static_cast<T*>(p.y) + t * p.D;
        const auto sum = [&](auto wide, int64_t d) TZ_LAMBDA {
          constexpr int k = decltype(wide)::value;
          V total[k], row[k];
          load_some<k, A>(byte + d, p.D - d, total);
          for (int64_t i = 0; i < n; i++) {
            load_some<k, A>(static_cast<const W*>(p.table) + here[i] * p.table_stride + d, p.D - d, row);
#pragma GCC unroll 4
            for (int j = 0; j < k; j++) total[j] = total[j] + row[j];
          }
          store_some<k, false, A>(total, y + d, p.D - d);
        };
        int64_t d = 0;
        for (; d + kWide * V::size <= p.D; d += kWide * V::size) sum(std::integral_constant<int, kWide>{}, d);
        for (; d < p.D; d += V::size) sum(std::integral_constant<int, 1>{}, d);
      }
    }
  });
}

// Each thread takes columns of every position, in order: one byte's row may take most of the positions.
template <class T> void bytes_backward(const ByteHashParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t T_ = p.B * p.L, vectors = ceil_div(p.D, V::size);
  parallel_for(0, vectors, max_of(1, kSerialElements / max_of(T_ * V::size, 1)), [&](int64_t first, int64_t last) {
    const int64_t begin = first * V::size, end = min_of(p.D, last * V::size);
    for (int64_t t = 0; t < T_; t++) {
      A* sum = static_cast<A*>(p.dbytes) + p.tokens[t] * p.D;
      const T* dy = static_cast<const T*>(p.dy) + t * p.D;
      for (int64_t d = begin; d < end; d += V::size) store_n(load_n<A>(sum + d, end - d) + load_n<A>(dy + d, end - d), sum + d, end - d);
    }
  });
}

template <class T, class W> void table_backward(const ByteHashParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t n = p.functions * p.groups;
  parallel_for(0, p.num_rows, max_of(1, kSerialElements / p.D), [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; u++) {
      W* out = static_cast<W*>(p.dtable) + (p.sparse ? u : p.rows[u]) * p.D;
      const int64_t begin = p.runs[u], end = p.runs[u + 1];
      for (int64_t d = 0; d < p.D; d += V::size) {
        V sum = V::zero();
        for (int64_t i = begin; i < end; i++) sum = sum + load_n<A>(static_cast<const T*>(p.dy) + p.order[i] / n * p.D + d, p.D - d);
        store_n(sum, out + d, p.D - d);
      }
    }
  });
}

}  // namespace

void byte_hash_ids(const ByteHashParams& p) {
  const int64_t n = p.functions * p.groups;
  parallel_for(0, p.B * p.L, max_of(1, kSerialElements / (16 * n)), [&](int64_t begin, int64_t end) { hash_rows(p, begin, end, p.ids + begin * n); });
}
void byte_hash_rows(const ByteHashParams& p) { byte_hash_ids(p); }  // a step of the backward, not counted as the op
// float64 goes with float64 only; the other dtypes mix.
#define TZ_WITH_TABLE(call)                                                                       \
  with_type(p.dtype, [&](auto t) {                                                                \
    using T = decltype(t);                                                                        \
    with_type(p.table_dtype, [&](auto w) {                                                        \
      using W = decltype(w);                                                                      \
      if constexpr ((sizeof(T) == 8) == (sizeof(W) == 8)) call<T, W>(p);                          \
    });                                                                                           \
  })
void byte_hash_embedding_fwd(const ByteHashParams& p) { TZ_WITH_TABLE(forward); }
void byte_hash_embedding_bwd(const ByteHashParams& p) {
  if (p.dbytes) with_type(p.dtype, [&](auto t) { bytes_backward<decltype(t)>(p); });
  if (p.dtable) TZ_WITH_TABLE(table_backward);
}

}}}  // namespace terrazzo::cpu::TZ_ISA
