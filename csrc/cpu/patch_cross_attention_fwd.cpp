// Attention between patches and their bytes, forward:
//   y[i] = sum over the keys j that i sees of softmax_j(scale q[i] . k[j]) v[j];   zero without such a key.
//   q [B, Lq, H, P], k and v [B, Lk, Hk, P]. Patches ask (each patch's K queries see its bytes) or bytes ask (each byte sees
//   its patch's K keys); a window lets them see the patches before as well. (Pagnoni et al. 2024, Byte Latent Transformer.)
//
// For each patch and block of heads: scores, a softmax over a handful of keys, and the weighted sum, straight from the rows as
// they lie. Every row of k and v leaves memory once; there is no mask and nothing of the size bytes x patches.
#include "patch_cross_attention.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// kStream: outputs larger than the caches go past them, in whole vectors.
template <class T, bool kStream> void forward(const PatchCrossAttentionParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const CrossPlan<A> plan(p);
  plan.template for_items<kStream>([&](const CrossItem<A>& item) {
    const int64_t b = item.b;
    T* y = static_cast<T*>(p.y) + b * p.Lq * p.H * p.P;
    const auto [queries, list, n] = asking(p, item, y);
    const int64_t queries_n = queries.end - queries.begin;
    int32_t* live = scratch<int32_t>(kQueryListSlot, queries_n + 1);
    const int64_t live_n = n == 0 ? 0 : list_rows(queries, live, [&](int64_t row) TZ_LAMBDA { return query_is_live(p, b, row); });
    if (live_n < queries_n)
      for (int64_t row = queries.begin; row < queries.end; row++)
        if (n == 0 || !query_is_live(p, b, row)) clear_heads(y, row, row + 1, p.H, p.P, item.h_begin, item.h_end);
    const int64_t tile = queries_at_a_time(n), blocks = item.end_blocks - item.begin_blocks, size = n * V::size;
    A* scores = scratch<A>(kScoreSlot, tile * blocks * size + 1);
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride_b;
    const T* k = static_cast<const T*>(p.k) + b * p.k_stride_b;
    const T* v = static_cast<const T*>(p.v) + b * p.v_stride_b;
    for (int64_t first = 0; first < live_n; first += tile) {
      const int64_t rows = min_of(tile, live_n - first);
      // The bytes' rows come from memory: outside, each whole, whichever side they are.
      for (int64_t pair = 0; pair < rows * n; pair++) {
        const int64_t row = p.bytes_ask ? pair / n : pair % rows, i = p.bytes_ask ? pair % n : pair / rows;
        for (int64_t block = 0; block < blocks; block++) {
          const HeadBlock<A>& heads = item.begin_blocks[block];
          score(p, q + live[first + row] * p.q_stride_l + heads.begin * p.q_stride_h, k + list[i] * p.k_stride_l, heads,
                scores + (row * blocks + block) * size + i * V::size);
        }
      }
      for (int64_t at = 0; at < rows * blocks; at++) {
        V top, inverse;
        softmax(scores + at * size, n, &top, &inverse);
      }
      for (int64_t at = 0; at < rows * blocks; at++) {
        const HeadBlock<A>& heads = item.begin_blocks[at % blocks];
        for (int64_t i = 0; i < heads.n; i++) {
          T* out = y + (live[first + at / blocks] * p.H + heads.begin + i) * p.P;
          weighted_sum(scores + at * size + i, v + heads.v_offset[i], list, p.v_stride_l, n, p.P, [&](int64_t c, V value) TZ_LAMBDA {
            if constexpr (kStream) value.stream(out + c);
            else store_n(value, out + c, p.P - c);
          });
        }
      }
    }
  });
}

}  // namespace

void patch_cross_attention_fwd(const PatchCrossAttentionParams& p) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    const bool large = p.B * p.Lq * p.H * p.P * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
    if (large && p.P % Vec<acc_t<T>>::size == 0 && reinterpret_cast<uintptr_t>(p.y) % 64 == 0) forward<T, true>(p);
    else forward<T, false>(p);
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
