// Attention on a band, for every op that is one: y[i] = sum over the keys j that i sees of softmax_j(scale q[i] . k[j]) v[j].
// A query sees the live ones among the keys of one range of rows, and a key is seen from one range of rows (`Span`): by arithmetic for a
// sliding window, from the ids of the bytes for patches. There is no mask in memory and nothing of the size queries x keys.
//
// Flash attention (Dao 2023): a block has 64 rows of one head (32 where a warp's registers or shared memory ask for it), a warp 16 of
// them, and walks the rows of the other side that some of its own meet, in tiles that cp.async brings. A warp leaves out tiles that
// none of its rows meets, and masks none that all of them hold.
#pragma once
#include "attention_tile.cuh"

namespace terrazzo { namespace cuda {

constexpr int kMostChannels = 256;  // P

// A tensor [B, L, heads, P] with unit stride along P.
struct HeadRows {
  void* base;
  int64_t stride_b, stride_l, stride_h;
};
template <class T> TZ_DEVICE T* head_at(const HeadRows& t, int64_t b, int64_t h) { return static_cast<T*>(t.base) + b * t.stride_b + h * t.stride_h; }

struct Attention {
  int B, H, Hk, P, Lq, Lk;
  float scale, unit;                     // unit: of scores as powers of two, scale log2 e
  bool vectors;                          // rows come in accesses of 16 bytes
  HeadRows q, k, v, y;                   // the backward's y is null where delta is to be found from the keys
  HeadRows dy, dq, dk, dv;
  float *lse, *delta;                    // [B, H, Lq]: log2 of the softmax's sum, +inf where nothing is seen (or null); dy . y
  const uint8_t* live;                   // [B, Lk] 0: a key that nobody sees; or null
  // a sliding window: the keys i - before .. i + behind
  int before, behind;
  const int32_t* bounds;                 // [2, L] where the sequence of each position begins and ends, or null; B is 1
  // or patches: the rows of the patches s - window + 1 .. s of a query of patch s
  const int32_t *ids, *starts;           // [B, L] the patch of each byte, null for a sliding window | [B, S + 1] where patches begin
  bool bytes_ask;
  int K, S, window;
};

// Rows [begin, end).
struct Span {
  int begin, end;
};

// ---- who sees whom -------------------------------------------------------------------------------------------
// The rows of patches [first, last) on the side of the bytes, or on the other one.
TZ_DEVICE Span rows_of_patches(const Attention& p, int64_t b, int first, int last, bool bytes) {
  if (!bytes) return {first * p.K, last * p.K};
  const int32_t* starts = p.starts + b * (p.S + 1);
  return {starts[first], starts[last]};
}
TZ_DEVICE Span window_of(const Attention& p, int at, int before, int behind, int length) {
  Span seen{max(at - before, 0), min(at + behind + 1, length)};
  if (p.bounds) seen.begin = max(seen.begin, p.bounds[at]), seen.end = min(seen.end, p.bounds[length + at]);
  return seen;
}
TZ_DEVICE Span keys_of_query(const Attention& p, int64_t b, int i) {
  if (i >= p.Lq) return {0, 0};
  if (!p.ids) return window_of(p, i, p.before, p.behind, p.Lk);
  const int s = p.bytes_ask ? p.ids[b * p.Lq + i] : i / p.K;
  if (s < 0 || s >= p.S) return {0, 0};
  return rows_of_patches(p, b, max(s - p.window + 1, 0), s + 1, !p.bytes_ask);
}
TZ_DEVICE Span queries_of_key(const Attention& p, int64_t b, int j) {
  if (j >= p.Lk || (p.live && !p.live[b * p.Lk + j])) return {0, 0};
  if (!p.ids) return window_of(p, j, p.behind, p.before, p.Lq);
  const int s = p.bytes_ask ? j / p.K : p.ids[b * p.Lk + j];
  if (s < 0 || s >= p.S) return {0, 0};
  return rows_of_patches(p, b, s, min(s + p.window, p.S), p.bytes_ask);
}

// What some of a warp's spans hold, over groups of lanes that are `from` lanes apart.
TZ_DEVICE Span any_of(Span span, int from = 1) {
  if (span.begin >= span.end) span = {INT32_MAX, 0};
  for (int lanes = from; lanes < kWarp; lanes *= 2) {
    span.begin = min(span.begin, __shfl_xor_sync(kAllLanes, span.begin, lanes));
    span.end = max(span.end, __shfl_xor_sync(kAllLanes, span.end, lanes));
  }
  return span;
}

// The spans of a warp's 16 rows; a lane has those of its own two.
struct WarpSpans {
  Span row[2], any, all;

  TZ_DEVICE bool meet(int first, int n) const { return first < any.end && first + n > any.begin; }
  TZ_DEVICE bool hold(int first, int n) const { return all.begin <= first && first + n <= all.end; }
};
// of_row(i): the span of a row. Returns what the block's rows [first, first + rows) meet; every warp finds the same.
template <class F> TZ_DEVICE Span find_spans(WarpSpans& spans, int first, int rows, int warp_row, const F& of_row) {
  Span block{INT32_MAX, 0};
  for (int r = lane_id(); r < rows; r += kWarp) {
    const Span span = of_row(first + r);
    if (span.begin < span.end) block = {min(block.begin, span.begin), max(block.end, span.end)};
  }
#pragma unroll
  for (int r = 0; r < 2; r++) spans.row[r] = of_row(first + warp_row + lane_id() / 4 + 8 * r);
  const Span a = spans.row[0], b = spans.row[1];
  spans.all = {max(a.begin, b.begin), min(a.end, b.end)};
#pragma unroll
  for (int lanes = 4; lanes < kWarp; lanes *= 2) {
    spans.all.begin = max(spans.all.begin, __shfl_xor_sync(kAllLanes, spans.all.begin, lanes));
    spans.all.end = min(spans.all.end, __shfl_xor_sync(kAllLanes, spans.all.end, lanes));
  }
  const Span any_a = any_of(a, 4), any_b = any_of(b, 4);
  spans.any = {min(any_a.begin, any_b.begin), max(any_a.end, any_b.end)};
  return any_of(block);
}

// Bit 2 n + i: whether column 8 n + 2 t + i of a tile is a live key.
template <int kN> TZ_DEVICE unsigned live_columns(const Attention& p, int64_t b, int first) {
  static_assert(kN <= 128, "a bit for each column of a lane");
  if (!p.live) return ~0u;
  unsigned bits = 0;
#pragma unroll
  for (int n = 0; n < kN / 8; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int j = first + 8 * n + fragment_column(i);
      if (j < p.Lk && p.live[b * p.Lk + j]) bits |= 1u << (2 * n + i);
    }
  return bits;
}

// Products of a warp's rows and a tile's become scores, -inf where a row doesn't see a column. The product is rounded on its own:
// where a query sees a single key its score and the logarithm of the sum are then the same number.
template <int kN> TZ_DEVICE void to_scores(float (&s)[kN / 8][4], float unit, const WarpSpans& spans, bool whole, int first, unsigned live) {
#pragma unroll
  for (int n = 0; n < kN / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      s[n][e] = __fmul_rn(s[n][e], unit);
      if (whole) continue;
      const Span span = spans.row[e / 2];
      const int column = first + 8 * n + fragment_column(e);
      if (column < span.begin || column >= span.end || !(live >> (2 * n + e % 2) & 1)) s[n][e] = -INFINITY;
    }
}

// ---- launches ------------------------------------------------------------------------------------------------
// A block's head, row of the batch and first row; heads are the fastest, so that neighbours in a group read the same keys.
struct Place {
  int h, b, first;
};
TZ_DEVICE Place place_of_block(int heads, int length, int rows) {
  const int rest = static_cast<int>(blockIdx.x) / heads, tiles = ceil_div(length, rows);
  return {static_cast<int>(blockIdx.x) % heads, rest / tiles, rest % tiles * rows};
}

template <int value> struct Constant { static constexpr int v = value; };
// fn(T{}, width of a head in tiles).
template <class F> cudaError_t with_head(DType dtype, int P, const F& fn) {
  return with_type(dtype, [&](auto t) {
    if (P <= 64) return fn(t, Constant<64>{});
    if (P <= 128) return fn(t, Constant<128>{});
    return fn(t, Constant<256>{});
  });
}

cudaError_t attention_fwd(const Attention& p, DType dtype, cudaStream_t stream);
cudaError_t attention_bwd_queries(const Attention& p, DType dtype, cudaStream_t stream);  // dq; delta; lse where y is null
cudaError_t attention_bwd_keys(const Attention& p, DType dtype, cudaStream_t stream);     // dk, dv from lse and delta

// A strided tensor, or a contiguous one, as rows of heads.
inline HeadRows rows_of(const void* base, int64_t stride_b, int64_t stride_l, int64_t stride_h) {
  return {const_cast<void*>(base), stride_b, stride_l, stride_h};
}
inline HeadRows contiguous_rows(const void* base, int64_t L, int64_t heads, int64_t P) { return rows_of(base, L * heads * P, heads * P, P); }

// What both ops' params say alike; false where a size is out of the kernels' range. The band is left to the op.
template <class Params> bool fill_attention(Attention& a, const Params& p, int64_t Lq, int64_t Lk) {
  const int64_t most = INT32_MAX / 2;
  if (p.dtype == DType::f64 || p.P > kMostChannels || p.B > most || p.H > most || Lq > most || Lk > most) return false;
  if (p.B * p.H * ceil_div(Lq, 32) > INT32_MAX || p.B * p.Hk * ceil_div(Lk, 32) > INT32_MAX) return false;  // blocks of the smallest kind
  a.B = static_cast<int>(p.B), a.H = static_cast<int>(p.H), a.Hk = static_cast<int>(p.Hk), a.P = static_cast<int>(p.P);
  a.Lq = static_cast<int>(Lq), a.Lk = static_cast<int>(Lk);
  a.scale = static_cast<float>(p.scale), a.unit = static_cast<float>(p.scale * 1.4426950408889634);
  a.q = rows_of(p.q, p.q_stride_b, p.q_stride_l, p.q_stride_h);
  a.k = rows_of(p.k, p.k_stride_b, p.k_stride_l, p.k_stride_h);
  a.v = rows_of(p.v, p.v_stride_b, p.v_stride_l, p.v_stride_h);
  a.y = contiguous_rows(p.y, Lq, p.H, p.P), a.dy = contiguous_rows(p.dy, Lq, p.H, p.P), a.dq = contiguous_rows(p.dq, Lq, p.H, p.P);
  a.dk = contiguous_rows(p.dk, Lk, p.Hk, p.P), a.dv = contiguous_rows(p.dv, Lk, p.Hk, p.P);
  const int64_t bytes = size_of(p.dtype);
  a.vectors = p.P * bytes % kVectorBytes == 0;
  for (const HeadRows& t : {a.q, a.k, a.v, a.y, a.dy, a.dq, a.dk, a.dv})
    a.vectors = a.vectors && aligned(t.base, t.stride_b, bytes) && aligned(t.base, t.stride_l, bytes) && aligned(t.base, t.stride_h, bytes);
  return true;
}

}}  // namespace terrazzo::cuda
