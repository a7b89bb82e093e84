// Mamba-2 chunk scan, backward: every gradient of chunk_scan_fwd, recomputing the states instead of storing them.
//
// A unit of work is one segment and a fixed block of heads of one group. States at chunk starts are recomputed
// forward, a stretch of chunks at a time from a checkpoint; then chunks run from last to first with dH, the gradient
// of the state after the chunk. With E[l, s] = exp(cum_l - cum_s) for s <= l, M = (C B^T) * E, w_s = exp(cum_last - cum_s) dt_s:
//   dM   = dY X^T                            (transposed, so that l is the vector)
//   dX   = dt * (exp(cum_last - cum) B dH + M^T dY) + D dY
//   dS   = sum over the heads of dM * E * dt, then once per block  dC += dS B,  dB += dS^T C
//   dC  += exp(cum) dY H^T,   dB += w X dH^T,   dH = exp(cum_last) dH + (exp(cum) C)^T dY
//   ddt  = <X, dX without dt and D> + A * da,   da = gradient of the exponent of each step:
//          da_t = sum of what crosses step t: l-sides at or after t, s-sides before t, the state passing through.
// da is summed from the terms themselves, never as a difference of totals: after a reset it is exactly zero.
// dB and dC of a block go to a buffer of its own; blocks are fixed by the shape, then summed in order. Every sum
// has a fixed order, so results do not depend on the number of threads.
#include "chunk_scan_common.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

// Heads per block: their dH (32 KB each at P 64, N 128) stay in L2.
constexpr int64_t kHeadBlock = 8;
// Chunk-start states kept at a time; longer segments run the state recurrence twice.
constexpr int64_t kStateBytes = int64_t(16) << 20;

// How heads are grouped, and the sums that leave a unit.
template <class A> struct Plan {
  int64_t blocks, block_heads;  // per group
  A *dB, *dC;                   // [blocks][B, L, G, N]; the outputs themselves when blocks == 1
  A *dA, *dbias;                // [num_segments][H]
  A* dD;                        // [num_segments][H, P] (column 0 of P only when D is [H])
};

template <class T> struct BackwardUnit {
  using A = acc_t<T>;
  static constexpr int64_t NR = kTileCols<A>, V = Vec<A>::size;

  const ChunkScanParams& p;
  const Plan<A>& plan;
  int64_t segment, block, group, h0, heads;
  bool stream;
  const Segment& seg = p.segments[segment];
  int64_t panel_P = round_up(p.P, NR);  // P padded to whole panels
  int64_t row_N = padded_row<A>(p.N);   // row stride of B and C
  int64_t state_size = panel_P * p.N;
  int64_t chunks = (seg.end - seg.begin + kChunk - 1) / kChunk;
  int64_t stretch = 1;                  // chunks between checkpoints

  A *starts = nullptr, *checkpoints = nullptr, *dH = nullptr;          // states [*][heads][P / NR][N][NR]
  A *B = nullptr, *C = nullptr, *Ct = nullptr;                         // [q, N], [q, N], panels of C^T
  A *St = nullptr, *dSt = nullptr, *Mt = nullptr, *dS = nullptr,       // [s, l], [s, l], [s, l], [l, s]
    *cross = nullptr;                                                    // [s, l]
  A *dBt = nullptr, *dCt = nullptr;                                    // panels [q / NR][N][NR], sums over the heads
  A *X = nullptr, *Xt = nullptr;                                       // [q, panel_P], panels of X^T
  A *dY = nullptr, *dYw = nullptr, *dYrows = nullptr, *dYt = nullptr;  // panels [P / NR][q][NR]; times exp(cum); rows; transposed
  A *D = nullptr, *dD_sum = nullptr, *ddt = nullptr;                   // [P], [heads][P], [heads][q]
  A *w = nullptr, *enter = nullptr, *through = nullptr, *direct = nullptr, *across = nullptr;
  ChunkDecay<A>* decays = nullptr;

  void reserve() {
    const int64_t q_n = kChunk * row_N, q_p = kChunk * panel_P, q_q = kChunk * kChunk;
    const int64_t per_chunk = heads * state_size * static_cast<int64_t>(sizeof(A));
    stretch = kStateBytes / (per_chunk > 0 ? per_chunk : 1);
    while (stretch * stretch < chunks) stretch++;
    if (stretch > chunks) stretch = chunks;
    if (stretch < 1) stretch = 1;
    starts = scratch<A>(0, stretch * heads * state_size);
    checkpoints = scratch<A>(1, (chunks + stretch - 1) / stretch * heads * state_size);
    dH = scratch<A>(2, heads * state_size);
    Carver<A> carve{scratch<A>(3, 5 * q_n + 6 * q_p + 5 * q_q + (1 + heads) * panel_P + heads * kChunk + (4 + 2 * V) * kChunk + 64 * 16)};
    B = carve.take(q_n);
    C = carve.take(q_n);
    Ct = carve.take(q_n);
    dBt = carve.take(q_n);
    dCt = carve.take(q_n);
    X = carve.take(q_p);
    Xt = carve.take(q_p);
    dY = carve.take(q_p);
    dYw = carve.take(q_p);
    dYrows = carve.take(q_p);
    dYt = carve.take(q_p);
    St = carve.take(q_q);
    dSt = carve.take(q_q);
    Mt = carve.take(q_q);
    dS = carve.take(q_q);
    cross = carve.take(q_q);
    D = carve.take(panel_P);
    dD_sum = carve.take(heads * panel_P);
    ddt = carve.take(heads * kChunk);
    w = carve.take(kChunk);
    through = carve.take(kChunk);
    across = carve.take(kChunk);
    enter = carve.take(kChunk * V);
    direct = carve.take(kChunk * V);
    decays = scratch<ChunkDecay<A>>(4, heads);
  }

  const T* x_row(int64_t l, int64_t h) const {
    return static_cast<const T*>(p.x) + seg.batch * p.x_stride_b + l * p.x_stride_l + h * p.x_stride_h;
  }
  const T* dy_row(int64_t l, int64_t h) const {
    return static_cast<const T*>(p.dy) + seg.batch * p.dy_stride_b + l * p.dy_stride_l + h * p.dy_stride_h;
  }
  int64_t state_offset(int64_t slot, int64_t i) const { return (slot * p.H + h0 + i) * p.P * p.N; }
  int64_t chunk_length(int64_t chunk) const {
    const int64_t left = seg.end - seg.begin - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }
  bool has_init() const { return p.initial_states && seg.init >= 0; }
  bool wants_dinit() const { return p.dinitial_states && seg.init >= 0; }
  bool has_dfinal() const { return p.dfinal_states && seg.final >= 0; }

  void run() {
    const int64_t width = p.D_has_p ? p.P : 1;
    for (int64_t h = h0; h < h0 + heads; h++) plan.dA[segment * p.H + h] = plan.dbias[segment * p.H + h] = 0;
    if (p.dD) std::memset(plan.dD + (segment * p.H + h0) * width, 0, static_cast<size_t>(heads * width) * sizeof(A));
    if (seg.padding) return zero_outputs();
    reserve();
    std::memset(dD_sum, 0, static_cast<size_t>(heads * panel_P) * sizeof(A));
    for (int64_t i = 0; i < heads; i++)
      load_state(has_dfinal() ? static_cast<const A*>(p.dfinal_states) + state_offset(seg.final, i) : nullptr, p.P, p.N, dH + i * state_size);
    for (int64_t i = 0; i < heads && chunks; i++)
      load_state(has_init() ? static_cast<const A*>(p.initial_states) + state_offset(seg.init, i) : nullptr, p.P, p.N, checkpoints + i * state_size);
    const int64_t stretches = chunks ? (chunks + stretch - 1) / stretch : 0;
    for (int64_t k = 0; k + 1 < stretches; k++) recompute_states(k * stretch, (k + 1) * stretch, checkpoints + (k + 1) * heads * state_size);
    for (int64_t k = stretches - 1; k >= 0; k--) {
      const int64_t end = (k + 1) * stretch < chunks ? (k + 1) * stretch : chunks;
      recompute_states(k * stretch, end, nullptr);
      for (int64_t chunk = end - 1; chunk >= k * stretch; chunk--)
        backward_chunk(chunk, starts + (chunk - k * stretch) * heads * state_size);
    }
    if (wants_dinit())
      for (int64_t i = 0; i < heads; i++)
        store_state(dH + i * state_size, p.P, p.N, static_cast<A*>(p.dinitial_states) + state_offset(seg.init, i));
    if (p.dD) store_dD(width);
    if (stream) stream_fence();
  }

  void zero_outputs() const {
    for (int64_t l = seg.begin; l < seg.end; l++) {
      const int64_t row = seg.batch * p.L + l, bc = (row * p.G + group) * p.N;
      std::memset(static_cast<T*>(p.dx) + seg.batch * p.out_stride_b + l * p.out_stride_l + h0 * p.P, 0, static_cast<size_t>(heads * p.P) * sizeof(T));
      std::memset(static_cast<A*>(p.ddt) + row * p.H + h0, 0, static_cast<size_t>(heads) * sizeof(A));
      std::memset(partial(plan.dB) + bc, 0, static_cast<size_t>(p.N) * sizeof(A));
      std::memset(partial(plan.dC) + bc, 0, static_cast<size_t>(p.N) * sizeof(A));
    }
  }
  A* partial(A* sums) const { return sums + block * p.B * p.L * p.G * p.N; }

  void store_dD(int64_t width) const {
    for (int64_t i = 0; i < heads; i++) {
      A* out = plan.dD + (segment * p.H + h0 + i) * width;
      for (int64_t j = 0; j < p.P; j++) out[p.D_has_p ? j : 0] += dD_sum[i * panel_P + j];
    }
  }

  // Runs the state recurrence over chunks [begin, end) from the checkpoint of that stretch. With `after` null, keeps
  // the state before every chunk in `starts`; else leaves only the state after the last one in `after`.
  void recompute_states(int64_t begin, int64_t end, A* after) {
    const int64_t block_size = heads * state_size;
    const size_t bytes = static_cast<size_t>(block_size) * sizeof(A);
    std::memcpy(after ? after : starts, checkpoints + begin / stretch * block_size, bytes);
    for (int64_t chunk = begin; chunk < (after ? end : end - 1); chunk++) {
      const int64_t q = chunk_length(chunk), l0 = seg.begin + chunk * kChunk;
      chunk_decays(p, seg.batch, l0, q, h0, heads, decays);
      copy_rows(static_cast<const T*>(p.Bm) + seg.batch * p.B_stride_b + l0 * p.B_stride_l + group * p.B_stride_g, p.B_stride_l, q, p.N, B);
      A* state = after ? after : starts + (chunk - begin) * block_size;
      A* next = after ? after : state + block_size;
      for (int64_t i = 0; i < heads; i++) {
        const ChunkDecay<A>& d = decays[i];
        for (int64_t l = 0; l < q; l++) {
          const Vec<A> scale(d.to_end[l] * d.dt[l]);
          if (i + 1 < heads)
            for (int64_t j = 0; j < p.P; j += kLine<T>) prefetch_l2(x_row(l0 + l, h0 + i + 1) + j);
          for_row_vectors<A>(x_row(l0 + l, h0 + i), p.P, kChunk * NR, [&](int64_t at, Vec<A> v) { (v * scale).store(X + l * NR + at); });
        }
        update_state(next + i * state_size, d.total, state + i * state_size, B, X, q, p.P, p.N);
      }
    }
  }

  void backward_chunk(int64_t chunk, const A* H) {
    const int64_t q = chunk_length(chunk), l0 = seg.begin + chunk * kChunk;
    const bool state_in = chunk > 0 || has_init();            // H is not zero
    const bool grad_in = chunk + 1 < chunks || has_dfinal();  // dH is not zero
    pack_chunk(l0, q);
    for (int64_t i = 0; i < heads; i++) {
      pack_head(l0, q, i);
      A* dH_i = dH + i * state_size;
      const A* H_i = H + i * state_size;
      grad_scores(q, i);
      grad_x(l0, q, i, grad_in ? dH_i : nullptr);
      if (grad_in) grad_B(q, dH_i);
      std::memset(through, 0, kChunk * sizeof(A));
      if (state_in) grad_C(q, i, H_i);
      const A passing = state_in && grad_in ? decays[i].total * dot(H_i, dH_i) : A(0);
      if (chunk > 0 || wants_dinit()) update_state(dH_i, decays[i].total, dH_i, C, dYw, q, p.P, p.N);
      grad_dt(q, i, passing, grad_in);
    }
    A* out = static_cast<A*>(p.ddt) + (seg.batch * p.L + l0) * p.H + h0;
    for (int64_t l = 0; l < q; l++)
      for (int64_t i = 0; i < heads; i++) out[l * p.H + i] = ddt[i * kChunk + l];
    store_dB_dC(l0, q);
  }

  // What the heads of the block share: dt, B, C, C^T, S^T = B C^T for l >= s; sums start at zero.
  void pack_chunk(int64_t l0, int64_t q) {
    chunk_decays(p, seg.batch, l0, q, h0, heads, decays);
    copy_rows(static_cast<const T*>(p.Bm) + seg.batch * p.B_stride_b + l0 * p.B_stride_l + group * p.B_stride_g, p.B_stride_l, q, p.N, B);
    copy_rows(static_cast<const T*>(p.C) + seg.batch * p.C_stride_b + l0 * p.C_stride_l + group * p.C_stride_g, p.C_stride_l, q, p.N, C);
    pack_transposed(C, row_N, q, p.N, kChunk, Ct);
    for_row_tiles(q, [&](int64_t s, auto rows) {
      for (int64_t l = s / NR * NR; l < q; l += NR) {
        Tile<A, decltype(rows)::value> acc;
        acc.zero();
        acc.multiply(B + s * row_N, row_N, 1, Ct + l * p.N, p.N);
        acc.store(St + s * kChunk + l, kChunk);
      }
    });
    std::memset(dSt, 0, sizeof(A) * kChunk * kChunk);
    std::memset(dBt, 0, sizeof(A) * static_cast<size_t>(kChunk * p.N));
    std::memset(dCt, 0, sizeof(A) * static_cast<size_t>(kChunk * p.N));
  }

  // X and dY of one head, as rows, panels over P and transposed panels over positions; dD on the way.
  void pack_head(int64_t l0, int64_t q, int64_t i) {
    const ChunkDecay<A>& d = decays[i];
    const int64_t h = h0 + i;
    for (int64_t l = 0; l < kChunk; l++) w[l] = d.to_end[l] * d.dt[l];
    A* sum = dD_sum + i * panel_P;
    for (int64_t l = 0; l < q; l++) {
      A* x = X + l * panel_P;
      for_row_vectors<A>(x_row(l0 + l, h), p.P, NR, [&](int64_t at, Vec<A> v) { v.store(x + at); });
      const Vec<A> scale(d.from_start[l]);
      const T* row = dy_row(l0 + l, h);
      const auto place = [&](int64_t at, Vec<A> v) {
        v.store(dYrows + l * panel_P + at);
        const int64_t to = at / NR * kChunk * NR + l * NR + at % NR;
        v.store(dY + to);
        (v * scale).store(dYw + to);
        fma(v, Vec<A>::load(x + at), Vec<A>::load(sum + at)).store(sum + at);
      };
      if (p.dy_stride_p == 1 || p.P == 1) for_row_vectors<A>(row, p.P, NR, place);
      else
        for (int64_t at = 0; at < panel_P; at += V) place(at, Vec<A>(static_cast<A>(to_acc(*row))));
    }
    pack_transposed(X, panel_P, q, p.P, kChunk, Xt);
    pack_transposed(dYrows, panel_P, q, p.P, kChunk, dYt);
    const A* src = static_cast<const A*>(p.D);
    for (int64_t j = 0; j < panel_P; j++) D[j] = !p.D || j >= p.P ? A(0) : p.D_has_p ? src[h * p.P + j] : src[h];
  }

  // dM^T = X dY^T for l >= s; from it M^T, the head's share of dS^T, and dM * M * dt off the diagonal.
  void grad_scores(int64_t q, int64_t i) {
    const ChunkDecay<A>& d = decays[i];
    alignas(64) A lane[V];
    for (int64_t j = 0; j < V; j++) lane[j] = static_cast<A>(j);
    const Vec<A> lanes = Vec<A>::load(lane), zero = Vec<A>::zero();
    for_row_tiles(q, [&](int64_t s0, auto rows) {
      constexpr int R = decltype(rows)::value;
      for (int64_t l0 = s0 / NR * NR; l0 < q; l0 += NR) {
        Tile<A, R> acc;
        acc.zero();
        acc.multiply(X + s0 * panel_P, panel_P, 1, dYt + l0 * p.P, p.P);
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const int64_t l = l0 + j * V;
          const Vec<A> hi = Vec<A>::load(d.hi + l), lo = Vec<A>::load(d.lo + l);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const int64_t s = s0 + r, at = s * kChunk + l;
            if (l + V <= s) continue;
            const Vec<A> e = ChunkDecay<A>::between(hi, lo, Vec<A>(d.hi[s]), Vec<A>(d.lo[s]));
            const Vec<A> score = Vec<A>::load(St + at);
            (score * e).store(Mt + at);
            Vec<A> grad = acc.c[r][j] * e * Vec<A>(d.dt[s]);
            Vec<A> product = grad * score;
            if (l <= s) {
              const Vec<A> diagonal(static_cast<A>(s - l));
              grad = Vec<A>(lanes.v >= diagonal.v ? grad.v : zero.v);
              product = Vec<A>(lanes.v > diagonal.v ? product.v : zero.v);
            }
            (Vec<A>::load(dSt + at) + grad).store(dSt + at);
            product.store(cross + at);
          }
        }
      }
    });
    sum_crossings(q);
  }

  // across[t] = sum of cross[s, l] over s < t <= l, what the steps inside the chunk carry over step t.
  void sum_crossings(int64_t q) {
    alignas(64) A lane[V], sums[kChunk] = {};
    for (int64_t j = 0; j < V; j++) lane[j] = static_cast<A>(j);
    const Vec<A> lanes = Vec<A>::load(lane), zero = Vec<A>::zero();
    across[0] = 0;
    for (int64_t s = 0; s + 1 < q; s++) {
      const int64_t first = s / V * V;
      const Vec<A> diagonal(static_cast<A>(s - first));
      Vec<A> total = zero;
      for (int64_t l = first; l < q; l += V) {
        const Vec<A> v = Vec<A>::load(sums + l) + Vec<A>::load(cross + s * kChunk + l);
        v.store(sums + l);
        total = total + (l > first ? v : Vec<A>(lanes.v > diagonal.v ? v.v : zero.v));
      }
      across[s + 1] = reduce_add(total);
    }
  }

  // dX = dt (exp(cum_last - cum) B dH + M^T dY) + D dY. Its products with X give `enter`, what each position put into
  // the state that leaves the chunk (without dt), and `direct`, the gradient of dt as a factor.
  void grad_x(int64_t l0, int64_t q, int64_t i, const A* dH_i) {
    const ChunkDecay<A>& d = decays[i];
    T* dx = static_cast<T*>(p.dx) + seg.batch * p.out_stride_b + l0 * p.out_stride_l + (h0 + i) * p.P;
    const bool more = i + 1 < heads;
    std::memset(enter, 0, sizeof(A) * kChunk * V);
    std::memset(direct, 0, sizeof(A) * kChunk * V);
    for (int64_t c = 0; c < p.P; c += NR) {
      for_row_tiles(q, [&](int64_t s, auto rows) {
        constexpr int R = decltype(rows)::value;
        if (more)
          for (int r = 0; r < R; r++) {
            prefetch_l2(x_row(l0 + s + r, h0 + i + 1) + c);
            prefetch_l2(dy_row(l0 + s + r, h0 + i + 1) + c * p.dy_stride_p);
          }
        Tile<A, R> acc;
        acc.zero();
        if (dH_i) {
          acc.multiply(B + s * row_N, row_N, 1, dH_i + c * p.N, p.N);
          acc.scale_rows(d.to_end + s);
          add_row_products(acc, X + s * panel_P + c, enter + s * V);
        }
        const A* m = Mt + s * kChunk + s;
        const A* dy = dY + c * kChunk + s * NR;
        acc.template multiply_triangle<false>(m, kChunk, dy);
        acc.multiply(m + R, kChunk, 1, dy + R * NR, q - s - R);
        add_row_products(acc, X + s * panel_P + c, direct + s * V);
        acc.scale_rows(d.dt + s);
        const Vec<A> D0 = Vec<A>::load(D + c), D1 = Vec<A>::load(D + c + V);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          if (p.D) {
            acc.c[r][0] = fma(D0, Vec<A>::load(dy + r * NR), acc.c[r][0]);
            acc.c[r][1] = fma(D1, Vec<A>::load(dy + r * NR + V), acc.c[r][1]);
          }
          store_columns(acc.c[r], dx + (s + r) * p.out_stride_l + c, p.P - c, stream);
        }
      });
    }
  }
  // sums[r] += acc[r] * x[r], V lanes per row.
  template <int R> TZ_INLINE void add_row_products(const Tile<A, R>& acc, const A* x, A* sums) const {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<A> s = fma(acc.c[r][0], Vec<A>::load(x + r * panel_P), Vec<A>::load(sums + r * V));
      fma(acc.c[r][1], Vec<A>::load(x + r * panel_P + V), s).store(sums + r * V);
    }
  }

  // acc += state[n.., :] times panels of a transposed [q, P] matrix (one panel: [P][NR]).
  template <int R> TZ_INLINE void multiply_state(Tile<A, R>& acc, const A* state, int64_t n, const A* panel) const {
    for (int64_t c = 0; c < p.P; c += NR)
      acc.multiply(state + c * p.N + n * NR, NR, 1, panel + c * NR, p.P - c < NR ? p.P - c : NR);
  }

  // dB^T += dH X^T w
  void grad_B(int64_t q, const A* dH_i) {
    for_row_tiles(p.N, [&](int64_t n, auto rows) {
      constexpr int R = decltype(rows)::value;
      for (int64_t l = 0; l < q; l += NR) {
        Tile<A, R> acc;
        acc.zero();
        multiply_state(acc, dH_i, n, Xt + l * p.P);
        const Vec<A> w0 = Vec<A>::load(w + l), w1 = Vec<A>::load(w + l + V);
        A* out = dBt + l * p.N + n * NR;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          fma(acc.c[r][0], w0, Vec<A>::load(out + r * NR)).store(out + r * NR);
          fma(acc.c[r][1], w1, Vec<A>::load(out + r * NR + V)).store(out + r * NR + V);
        }
      }
    });
  }

  // dC^T += H dY^T exp(cum); `through` = its product with C, the gradient of the decay from the start of the chunk.
  void grad_C(int64_t q, int64_t i, const A* H_i) {
    for_row_tiles(p.N, [&](int64_t n, auto rows) {
      constexpr int R = decltype(rows)::value;
      for (int64_t l = 0; l < q; l += NR) {
        Tile<A, R> acc;
        acc.zero();
        multiply_state(acc, H_i, n, dYt + l * p.P);
        const A *from_start = decays[i].from_start + l, *c = Ct + l * p.N + n * NR;
        A* out = dCt + l * p.N + n * NR;
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          const Vec<A> e = Vec<A>::load(from_start + j * V);
          Vec<A> sum = Vec<A>::load(through + l + j * V);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const Vec<A> v = acc.c[r][j] * e;
            sum = fma(v, Vec<A>::load(c + r * NR + j * V), sum);
            (Vec<A>::load(out + r * NR + j * V) + v).store(out + r * NR + j * V);
          }
          sum.store(through + l + j * V);
        }
      }
    });
  }

  A dot(const A* a, const A* b) const {
    Vec<A> s0 = Vec<A>::zero(), s1 = Vec<A>::zero();
    for (int64_t j = 0; j < state_size; j += NR) {
      s0 = fma(Vec<A>::load(a + j), Vec<A>::load(b + j), s0);
      s1 = fma(Vec<A>::load(a + j + V), Vec<A>::load(b + j + V), s1);
    }
    return reduce_add(s0 + s1);
  }

  // From the sums of one head to ddt, and to its shares of dA and ddt_bias.
  void grad_dt(int64_t q, int64_t i, A passing, bool grad_in) {
    const ChunkDecay<A>& d = decays[i];
    const A decay = static_cast<const A*>(p.A)[h0 + i], dt_min = static_cast<A>(p.dt_min), dt_max = static_cast<A>(p.dt_max);
    // da first holds what leaves through later l-sides (from the right), then adds what entered before (from the left).
    alignas(64) A da[kChunk], slope[kChunk];
    A later = 0, earlier = passing, dA = 0, dbias = 0;
    for (int64_t l = q - 1; l >= 0; l--) {
      later += through[l];
      da[l] = later + across[l];
    }
    for (int64_t l = 0; l < q; l++) {
      da[l] += earlier;
      if (grad_in) earlier += d.dt[l] * reduce_add(Vec<A>::load(enter + l * V));
    }
    for (int64_t l = 0; l < kChunk; l += V) (p.dt_softplus ? sigmoid(Vec<A>::load(d.raw + l)) : Vec<A>(A(1))).store(slope + l);
    for (int64_t l = 0; l < q; l++) {
      dA += da[l] * d.dt[l];
      const bool inside = d.soft[l] >= dt_min && d.soft[l] <= dt_max;
      const A g = inside ? slope[l] * (reduce_add(Vec<A>::load(direct + l * V)) + da[l] * decay) : A(0);
      ddt[i * kChunk + l] = g;
      dbias += g;
    }
    plan.dA[segment * p.H + h0 + i] += dA;
    plan.dbias[segment * p.H + h0 + i] += dbias;
  }

  // dC^T += B^T dS^T and dB^T += C^T dS for the heads' summed dS, then both out as rows.
  void store_dB_dC(int64_t l0, int64_t q) {
    transpose(dSt, kChunk, kChunk, kChunk, dS, kChunk);
    const int64_t stride = p.G * p.N, at = ((seg.batch * p.L + l0) * p.G + group) * p.N;
    add_scores(q, B, dSt, dCt, true);
    add_scores(q, C, dS, dBt, false);
    for (int64_t l = 0; l < q; l += NR) {
      const int64_t n = q - l < NR ? q - l : NR;
      transpose(dCt + l * p.N, NR, p.N, n, partial(plan.dC) + at + l * stride, stride);
      transpose(dBt + l * p.N, NR, p.N, n, partial(plan.dB) + at + l * stride, stride);
    }
  }
  // out^T[n, column] += sum over k of rows[k, n] scores[k, column]; scores are zero where k > column (or k < column).
  void add_scores(int64_t q, const A* rows_k, const A* scores, A* out, bool upper) {
    A* panel = Xt;
    for (int64_t l = 0; l < q; l += NR) {
      const int64_t begin = upper ? 0 : l, end = !upper || l + NR > q ? q : l + NR;
      for (int64_t k = begin; k < end; k++) std::memcpy(panel + (k - begin) * NR, scores + k * kChunk + l, NR * sizeof(A));
      for_row_tiles(p.N, [&](int64_t n, auto rows) {
        Tile<A, decltype(rows)::value> acc;
        A* at = out + l * p.N + n * NR;
        acc.load_scaled(at, NR, Vec<A>(A(1)));
        acc.multiply(rows_k + begin * row_N + n, 1, row_N, panel, end - begin);
        acc.store(at, NR);
      });
    }
  }
};

// out[j] = sum over parts of in[part * size + j], parts in order.
template <class A> void sum_parts(const A* in, int64_t parts, int64_t size, A* out) {
  parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) {
      A s = 0;
      for (int64_t part = 0; part < parts; part++) s += in[part * size + j];
      out[j] = s;
    }
  });
}

template <class T> void backward(const ChunkScanParams& p) {
  using A = acc_t<T>;
  const int64_t group_heads = p.G ? p.H / p.G : 0, width = p.D_has_p ? p.P : 1, row_size = p.B * p.L * p.G * p.N;
  Plan<A> plan;
  // The partial sums of dB and dC may take about the room of x, no more.
  const int64_t room = group_heads * p.P * static_cast<int64_t>(sizeof(T)), each = 2 * p.N * static_cast<int64_t>(sizeof(A));
  plan.blocks = (group_heads + kHeadBlock - 1) / kHeadBlock;
  if (plan.blocks * each > room) plan.blocks = each < room ? room / each : 1;
  plan.block_heads = plan.blocks > 0 ? (group_heads + plan.blocks - 1) / plan.blocks : 1;
  plan.blocks = (group_heads + plan.block_heads - 1) / plan.block_heads;
  const int64_t parts = plan.blocks > 1 ? plan.blocks : 0;
  const int64_t heads_size = p.num_segments * p.H, dD_size = p.dD ? heads_size * width : 0;
  Carver<A> carve{scratch<A>(5, 2 * parts * row_size + 2 * heads_size + dD_size + 5 * 16)};
  plan.dB = parts ? carve.take(parts * row_size) : static_cast<A*>(p.dB);
  plan.dC = parts ? carve.take(parts * row_size) : static_cast<A*>(p.dC);
  plan.dA = carve.take(heads_size);
  plan.dbias = carve.take(heads_size);
  plan.dD = carve.take(dD_size);
  const bool stream = stream_output<T>(p, p.dx);
  parallel_for(0, p.G * plan.blocks * p.num_segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; u++) {
      const int64_t block = u / p.num_segments % plan.blocks, group = u / p.num_segments / plan.blocks;
      const int64_t first = block * plan.block_heads, left = group_heads - first;
      BackwardUnit<T> unit{p, plan, u % p.num_segments, block, group, group * group_heads + first,
                           left < plan.block_heads ? left : plan.block_heads, stream};
      unit.run();
    }
  });
  if (parts) {
    sum_parts(plan.dB, parts, row_size, static_cast<A*>(p.dB));
    sum_parts(plan.dC, parts, row_size, static_cast<A*>(p.dC));
  }
  sum_parts(plan.dA, p.num_segments, p.H, static_cast<A*>(p.dA));
  if (p.ddt_bias) sum_parts(plan.dbias, p.num_segments, p.H, static_cast<A*>(p.ddt_bias));
  if (p.dD) sum_parts(plan.dD, p.num_segments, p.H * width, static_cast<A*>(p.dD));
}

}  // namespace

void chunk_scan_bwd(const ChunkScanParams& p) {
  switch (p.x_dtype) {
    case DType::f32: return backward<float>(p);
    case DType::f64: return backward<double>(p);
    case DType::bf16: return backward<bf16>(p);
    case DType::f16: return backward<f16>(p);
  }
}

}}}  // namespace terrazzo::cpu::TZ_ISA
