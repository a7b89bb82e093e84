// Mamba-2 chunk scan, forward: y[l] = C[l] state[l] + D x[l], state[l] = exp(dt A) state[l-1] + dt B[l] x[l].
//
// A unit of work is one segment and a block of heads of one group; per chunk of kChunk positions
//   1. B and C are packed once for the block, S = C B^T (lower triangle) once for the block,
//   2. per head M[l, s] = S[l, s] exp(cum_l - cum_s) dt_s for s <= l,
//   3. Y = exp(cum) C state + M X in one pass of register tiles, D x and silu(z) in its epilogue,
//   4. state = exp(cum_last) state + (B^T) (exp(cum_last - cum) dt X).
// States stay in panels [P / 16][N][16] for the whole segment. Memory is O(chunk) and one state per head of the block.
// Mamba-2: Dao and Gu, "Transformers are SSMs", 2024, section 6.
#include "chunk_scan_common.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// Heads per block: sixteen rows of 64 floats are one page of x.
constexpr int64_t kHeadBlock = 16;

template <class T> struct ForwardUnit {
  using A = acc_t<T>;
  static constexpr int64_t NR = kTileCols<A>;

  const ChunkScanParams& p;
  const Segment& seg;
  int64_t group, h0, heads;
  bool stream;
  int64_t panel_P = round_up(p.P, NR);  // P padded to whole panels
  int64_t row_N = padded_row<A>(p.N);   // row stride of B and C
  A *states = nullptr, *B = nullptr, *C = nullptr, *Bt = nullptr, *S = nullptr, *M = nullptr, *X = nullptr, *Xw = nullptr,
    *D = nullptr;
  ChunkDecay<A>* decays = nullptr;

  void reserve() {
    const int64_t q_n = kChunk * row_N, q_p = kChunk * panel_P, pad = 16;
    states = scratch<A>(0, heads * panel_P * p.N);
    Carver<A> carve{scratch<A>(1, 3 * q_n + 2 * kChunk * kChunk + 2 * q_p + panel_P + 9 * pad)};
    B = carve.take(q_n);
    C = carve.take(q_n);
    Bt = carve.take(q_n);
    S = carve.take(kChunk * kChunk);
    M = carve.take(kChunk * kChunk);
    X = carve.take(q_p);
    Xw = carve.take(q_p);
    D = carve.take(panel_P);
    decays = scratch<ChunkDecay<A>>(2, heads);
  }

  A* state(int64_t i) const { return states + i * panel_P * p.N; }
  const T* x_row(int64_t l, int64_t h) const {
    return static_cast<const T*>(p.x) + seg.batch * p.x_stride_b + l * p.x_stride_l + h * p.x_stride_h;
  }
  int64_t state_offset(int64_t slot, int64_t i) const { return (slot * p.H + h0 + i) * p.P * p.N; }

  void run() {
    if (seg.padding) return zero_output();
    reserve();
    const bool has_init = p.initial_states && seg.init >= 0, wants_final = p.final_states && seg.final >= 0;
    for (int64_t i = 0; i < heads; i++)
      load_state(has_init ? static_cast<const A*>(p.initial_states) + state_offset(seg.init, i) : nullptr, p.P, p.N, state(i));
    for (int64_t l0 = seg.begin; l0 < seg.end; l0 += kChunk) {
      const int64_t q = seg.end - l0 < kChunk ? seg.end - l0 : kChunk;
      const bool first = l0 == seg.begin, last = l0 + q == seg.end;
      pack_chunk(l0, q);
      for (int64_t i = 0; i < heads; i++) {
        pack_head(l0, q, i);
        const A* in_state = first && !has_init ? nullptr : state(i);
        output(l0, q, i, in_state);
        if (!last || wants_final) update_state(state(i), decays[i].total, state(i), B, Xw, q, p.P, p.N);
      }
    }
    if (wants_final)
      for (int64_t i = 0; i < heads; i++)
        store_state(state(i), p.P, p.N, static_cast<A*>(p.final_states) + state_offset(seg.final, i));
    if (stream) stream_fence();
  }

  void zero_output() const {
    for (int64_t l = seg.begin; l < seg.end; l++)
      std::memset(static_cast<T*>(p.y) + seg.batch * p.out_stride_b + l * p.out_stride_l + h0 * p.P, 0, static_cast<size_t>(heads * p.P) * sizeof(T));
  }

  // What the heads of the block share: dt, B [q, N], C [q, N], S [q, q].
  void pack_chunk(int64_t l0, int64_t q) {
    chunk_decays(p, seg.batch, l0, q, h0, heads, decays);
    copy_rows(static_cast<const T*>(p.Bm) + seg.batch * p.B_stride_b + l0 * p.B_stride_l + group * p.B_stride_g, p.B_stride_l, q, p.N, B);
    copy_rows(static_cast<const T*>(p.C) + seg.batch * p.C_stride_b + l0 * p.C_stride_l + group * p.C_stride_g, p.C_stride_l, q, p.N, C);
    pack_transposed(B, row_N, q, p.N, round_up(q, NR), Bt);
    for_row_tiles(q, [&](int64_t l, auto rows) {
      constexpr int R = decltype(rows)::value;
      for (int64_t s = 0; s < l + R; s += NR) {
        Tile<A, R> acc;
        acc.zero();
        acc.multiply(C + l * row_N, row_N, 1, Bt + s * p.N, p.N);
        acc.store(S + l * kChunk + s, kChunk);
      }
    });
  }

  // X [q, P] and exp(cum_last - cum) dt X in panels; M [q, q], whose entries right of the diagonal nobody reads.
  void pack_head(int64_t l0, int64_t q, int64_t i) {
    const ChunkDecay<A>& d = decays[i];
    const int64_t h = h0 + i;
    for (int64_t l = 0; l < q; l++) {
      const Vec<A> w(d.to_end[l] * d.dt[l]);
      for_row_vectors<A>(x_row(l0 + l, h), p.P, kChunk * NR, [&](int64_t at, Vec<A> v) {
        v.store(X + l * NR + at);
        (v * w).store(Xw + l * NR + at);
      });
    }
    for (int64_t l = 0; l < q; l++) {
      const Vec<A> hi(d.hi[l]), lo(d.lo[l]);
      for (int64_t s = 0; s <= l; s += Vec<A>::size) {
        const Vec<A> e = ChunkDecay<A>::between(hi, lo, Vec<A>::load(d.hi + s), Vec<A>::load(d.lo + s));
        (e * Vec<A>::load(S + l * kChunk + s) * Vec<A>::load(d.dt + s)).store(M + l * kChunk + s);
      }
    }
    if (p.D) {
      const A* src = static_cast<const A*>(p.D);
      for (int64_t j = 0; j < panel_P; j++) D[j] = j >= p.P ? A(0) : p.D_has_p ? src[h * p.P + j] : src[h];
    }
  }

  void output(int64_t l0, int64_t q, int64_t i, const A* in_state) const {
    const int64_t h = h0 + i;
    T* y = static_cast<T*>(p.y) + seg.batch * p.out_stride_b + l0 * p.out_stride_l + h * p.P;
    const T* z = p.z ? static_cast<const T*>(p.z) + seg.batch * p.z_stride_b + l0 * p.z_stride_l + h * p.z_stride_h : nullptr;
    const bool more = i + 1 < heads;
    for (int64_t c = 0; c < p.P; c += NR) {
      for_row_tiles(q, [&](int64_t l, auto rows) {
        constexpr int R = decltype(rows)::value;
        if (more)
          for (int r = 0; r < R; r++) prefetch_l2(x_row(l0 + l + r, h + 1) + c);
        Tile<A, R> acc;
        acc.zero();
        if (in_state) {
          acc.multiply(C + l * row_N, row_N, 1, in_state + c * p.N, p.N);
          acc.scale_rows(decays[i].from_start + l);
        }
        acc.multiply(M + l * kChunk, kChunk, 1, X + c * kChunk, l);
        acc.template multiply_triangle<true>(M + l * kChunk + l, kChunk, X + c * kChunk + l * NR);
        finish(acc, c, l, y + l * p.out_stride_l + c, z ? z + l * p.z_stride_l + c : nullptr);
      });
    }
  }

  // y = (acc + D x) silu(z)
  template <int R> TZ_INLINE void finish(Tile<A, R>& acc, int64_t c, int64_t l, T* y, const T* z) const {
    constexpr int64_t V = Vec<A>::size;
    const int64_t columns = p.P - c < NR ? p.P - c : NR;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        Vec<A>& v = acc.c[r][j];
        if (p.D) v = fma(Vec<A>::load(D + c + j * V), Vec<A>::load(X + c * kChunk + (l + r) * NR + j * V), v);
        if (z && columns > j * V) v = v * silu(load_n<A>(z + r * p.z_stride_l + j * V, columns - j * V));
      }
      store_columns(acc.c[r], y + r * p.out_stride_l, columns, stream);
    }
  }
};

template <class T> void forward(const ChunkScanParams& p) {
  if (p.num_segments == 0 || p.H == 0) return;
  // As many blocks as keep every thread busy; heads are independent, so the result does not depend on it.
  const int64_t group_heads = p.H / p.G, threads = max_threads();
  int64_t blocks = (group_heads + kHeadBlock - 1) / kHeadBlock;
  const int64_t units_per_block = p.num_segments * p.G;
  if (blocks * units_per_block < 4 * threads) blocks = round_up(blocks * units_per_block, threads) / units_per_block;
  if (blocks > group_heads) blocks = group_heads;
  const int64_t block_heads = (group_heads + blocks - 1) / blocks;
  blocks = (group_heads + block_heads - 1) / block_heads;
  const bool stream = stream_output<T>(p, p.y);
  parallel_for(0, p.G * blocks * p.num_segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; u++) {
      const int64_t block = u / p.num_segments % blocks, group = u / p.num_segments / blocks;
      const int64_t first = block * block_heads, heads = group_heads - first < block_heads ? group_heads - first : block_heads;
      ForwardUnit<T> unit{p, p.segments[u % p.num_segments], group, group * group_heads + first, heads, stream};
      unit.run();
    }
  });
}

}  // namespace

void chunk_scan_fwd(const ChunkScanParams& p) {
  switch (p.x_dtype) {
    case DType::f32: return forward<float>(p);
    case DType::f64: return forward<double>(p);
    case DType::bf16: return forward<bf16>(p);
    case DType::f16: return forward<f16>(p);
  }
}

}}}  // namespace terrazzo::cpu::TZ_ISA
