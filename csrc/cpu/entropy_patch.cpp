// Entropy patching of the Byte Latent Transformer: how unsure a byte model is, and where patches begin.
//   entropy:  H = log s - t / s with a = x - max, s = sum e^a, t = sum e^a a; nats. Gradient: dx = -dH p (log p + H).
//   cut:      positions 0 and 1 of a text start patches, and position i >= 2 where the entropy at i - 1 says so:
//             threshold  H[i-1] > threshold
//             monotonic  H[i-1] - H[i-2] > threshold; position 2 always
//             combined   H[i-1] > threshold and H[i-1] - H[i-2] > threshold_add; position 2 always, 3 never
//             top        H[i-1] is one of the n / patch_size - 2 largest (ties: the earlier)
//             or where the tokens do: every byte, every patch_size bytes, behind the first of a run of space-like bytes.
//             A patch that would grow past max_length ends there and another starts.
// Logits pass through the cache once, a block at a time, with the sums rescaled where a block has a higher maximum.
// Cutting looks at 64 positions at a time: a bit for each, and a loop over the bits that are set.
// Patching: Pagnoni et al. 2024, "Byte Latent Transformer"; positions 2 and 3 as in facebookresearch/blt's patcher.
#include "../common/parallel.h"
#include "../common/params.h"
#include "reduce_max.h"
#include "tile.h"

namespace terrazzo { namespace cpu { inline namespace TZ_ISA {
namespace {

enum PatchScratch { kKeySlot, kTakenSlot };
constexpr int64_t kSerialElements = 16384;

// ---- entropy -----------------------------------------------------------------------------------------------
// The least a = x - max that is looked at: e^a below this is no normal number, and adds nothing to a sum that holds 1.
template <class A> constexpr A kFloor = sizeof(A) == 4 ? A(-87) : A(-700);

// max(a, floor) in one instruction; NaN stays NaN.
TZ_INLINE Vec<float> floored(Vec<float> a) {
  using V = Vec<float>;
#if defined(__AVX512F__)
  return V((V::native)_mm512_max_ps(_mm512_set1_ps(kFloor<float>), (__m512)a.v));
#elif defined(__AVX2__)
  return V((V::native)_mm256_max_ps(_mm256_set1_ps(kFloor<float>), (__m256)a.v));
#else
  return V((V::native)_mm_max_ps(_mm_set1_ps(kFloor<float>), (__m128)a.v));
#endif
}
TZ_INLINE Vec<double> floored(Vec<double> a) { return max(a, Vec<double>(kFloor<double>)); }

// e^a of n vectors in lockstep for a in [kFloor, 0] or NaN: 2^n 2^f by a degree-5 polynomial, relative error 1e-7 near 0,
// where the large terms are; no special cases are left.
template <int n> TZ_INLINE void exp_below(const Vec<float>* a, Vec<float>* e) {
  using V = Vec<float>;
  typedef V::ints ints;
  const V log2e(1.44269504088896341f), magic(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  V shifted[n], f[n], p[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) shifted[i] = fma(a[i], log2e, magic);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) f[i] = V(a[i].v * log2e.v - (shifted[i] - magic).v);
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(V(0.0013264727f), f[i], V(0.009671513f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.055507336f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.24022242f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(0.693147f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) p[i] = fma(p[i], f[i], V(1.0f));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++) e[i] = V((V::native)((ints)p[i].v + ((ints)shifted[i].v << 23)));
}
template <int n> TZ_INLINE void exp_below(const Vec<double>* a, Vec<double>* e) {
  for (int i = 0; i < n; i++) e[i] = exp(a[i]);
}

// The last n < size elements of x[count], behind -inf; every lane once.
template <class A, class T> TZ_INLINE Vec<A> load_tail(const T* x, int64_t count, int64_t n) {
  constexpr int64_t size = Vec<A>::size;
  alignas(64) A lane[size];
  if (count < size) {
    for (int64_t i = 0; i < size; i++) lane[i] = i < n ? load1<A>(x + count - n + i) : A(-INFINITY);
    return Vec<A>::load(lane);
  }
  for (int64_t i = 0; i < size; i++) lane[i] = static_cast<A>(i);
  const Vec<A> v = Vec<A>::load(x + count - size);  // whole, then without the lanes that came before
  return Vec<A>(Vec<A>::load(lane).v < Vec<A>(static_cast<A>(size - n)).v ? Vec<A>(A(-INFINITY)).v : v.v);
}

template <class A> struct Softmax {
  A top, sum, dot;  // the highest logit; sum of e^a and of e^a a
  TZ_INLINE A entropy() const { return top == A(-INFINITY) ? A(NAN) : std::log(sum) - dot / sum; }
};

// The higher of two, `b` where `a` is NaN.
template <class A> TZ_INLINE Vec<A> higher(Vec<A> a, Vec<A> b) { return Vec<A>(a.v > b.v ? a.v : b.v); }

constexpr int kLanes = 2;         // independent sums
constexpr int64_t kBlock = 2048;  // elements that stay in the first-level cache between the two passes over them

// The highest of n logits; a row is looked at in blocks of at most kBlock.
template <class T> TZ_INLINE acc_t<T> highest_of(const T* x, int64_t n) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t size = V::size, step = kLanes * size;
  const int64_t whole = n / size * size;
  V tops[kLanes];
  for (int i = 0; i < kLanes; i++) tops[i] = V(A(-INFINITY));
  int64_t c = 0;
  for (; c + step <= whole; c += step) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i++) tops[i] = higher(V::load(x + c + i * size), tops[i]);
  }
  for (; c < whole; c += size) tops[0] = higher(V::load(x + c), tops[0]);
  if (whole < n) tops[1] = higher(load_tail<A>(x, n, n - whole), tops[1]);
  return reduce_max(higher(tops[0], tops[1]));
}

template <class T> TZ_INLINE Softmax<acc_t<T>> sums_below(const T* x, int64_t n, acc_t<T> highest) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t size = V::size, step = kLanes * size;
  const int64_t whole = n / size * size;
  const V m(highest == A(-INFINITY) ? A(0) : highest);  // nothing but -inf: nothing to add
  V sum[kLanes], dot[kLanes], a[kLanes], e[kLanes];
  for (int i = 0; i < kLanes; i++) sum[i] = dot[i] = V::zero();
  int64_t c = 0;
  for (; c + step <= whole; c += step) {
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i++) a[i] = floored(V::load(x + c + i * size) - m);
    exp_below<kLanes>(a, e);
#pragma GCC unroll 4
    for (int i = 0; i < kLanes; i++) sum[i] = sum[i] + e[i], dot[i] = fma(e[i], a[i], dot[i]);
  }
  for (; c < whole; c += size) {
    a[0] = floored(V::load(x + c) - m);
    exp_below<1>(a, e);
    sum[0] = sum[0] + e[0], dot[0] = fma(e[0], a[0], dot[0]);
  }
  if (whole < n) {
    a[0] = floored(load_tail<A>(x, n, n - whole) - m);
    exp_below<1>(a, e);
    e[0] = V(a[0].v <= V(kFloor<A>).v ? V::zero().v : e[0].v);  // the lanes outside add nothing at all
    sum[1] = sum[1] + e[0], dot[1] = fma(e[0], a[0], dot[1]);
  }
  return {highest, reduce_add(sum[0] + sum[1]), reduce_add(dot[0] + dot[1])};
}
template <class T> TZ_INLINE Softmax<acc_t<T>> block_softmax(const T* x, int64_t n) { return sums_below(x, n, highest_of(x, n)); }

// s seen from a higher maximum: e^a shrinks by e^-d, and every a by d.
template <class A> TZ_INLINE Softmax<A> raised(Softmax<A> s, A top) {
  if (s.top == top) return s;
  const A d = s.top - top < kFloor<A> ? kFloor<A> : s.top - top, factor = std::exp(d);
  return {top, s.sum * factor, (s.dot + d * s.sum) * factor};
}

template <class T> TZ_INLINE Softmax<acc_t<T>> row_softmax(const T* x, int64_t V) {
  using A = acc_t<T>;
  Softmax<A> total = block_softmax(x, min_of(kBlock, V));
  for (int64_t c = kBlock; c < V; c += kBlock) {
    const Softmax<A> block = block_softmax(x + c, min_of(kBlock, V - c));
    const A top = block.top > total.top ? block.top : total.top;
    const Softmax<A> left = raised(total, top), right = raised(block, top);
    total = {top, left.sum + right.sum, left.dot + right.dot};
  }
  return total;
}

// f(first row, last row) on each thread's rows.
template <class F> void for_rows(const PatchEntropyParams& p, const F& f) { parallel_for(0, p.B * p.L, max_of(1, kSerialElements / p.V), f); }

// nullptr for padding.
template <class T> TZ_INLINE const T* logits_of(const PatchEntropyParams& p, int64_t row) {
  const int64_t b = row / p.L, l = row - b * p.L;
  if (p.valid_lengths && l >= p.valid_lengths[b]) return nullptr;
  return static_cast<const T*>(p.logits) + b * p.logits_stride_b + l * p.logits_stride_l;
}

// Rows of one block are taken a few at a time: all maxima, all sums, all logarithms, so that what each waits for is hidden behind
// the others'.
template <class T> void entropy_forward(const PatchEntropyParams& p) {
  using A = acc_t<T>;
  A* entropies = static_cast<A*>(p.entropies);
  for_rows(p, [&](int64_t begin, int64_t end) {
    constexpr int64_t kRows = 8;
    const T* x[kRows];
    Softmax<A> s[kRows];
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t n = min_of(kRows, end - row);
      for (int64_t r = 0; r < n; r++) {
        x[r] = logits_of<T>(p, row + r);
        if (x[r]) s[r].top = p.V > kBlock ? A(0) : highest_of(x[r], p.V);
      }
      for (int64_t r = 0; r < n; r++)
        if (x[r]) s[r] = p.V > kBlock ? row_softmax(x[r], p.V) : sums_below(x[r], p.V, s[r].top);
      for (int64_t r = 0; r < n; r++) entropies[row + r] = x[r] ? s[r].entropy() : A(0);
    }
  });
}

template <class T> void entropy_backward(const PatchEntropyParams& p) {
  using A = acc_t<T>;
  using V = Vec<A>;
  for_rows(p, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const T* x = logits_of<T>(p, row);
      T* dx = static_cast<T*>(p.dlogits) + row * p.V;
      if (!x) {
        for (int64_t c = 0; c < p.V; c += V::size) store_n(V::zero(), dx + c, p.V - c);
        continue;
      }
      const Softmax<A> s = row_softmax(x, p.V);
      const V top(s.top), shift(s.entropy() - std::log(s.sum)), scale(-static_cast<const A*>(p.dentropies)[row] / s.sum);
      for (int64_t c = 0; c < p.V; c += V::size) {
        V a = floored(load_n<A>(x + c, p.V - c) - top), e;
        a = min(a, V::zero());  // the lanes behind the row hold zeros, which may lie above its maximum
        exp_below<1>(&a, &e);
        store_n(scale * e * (a + shift), dx + c, p.V - c);
      }
    }
  });
}

// ---- cutting -----------------------------------------------------------------------------------------------
// Does position i >= 2 start a patch, given the entropy e at i - 1 and the one before it?
template <PatchRule rule, class A> TZ_INLINE bool starts_at(int64_t i, A e, A before, A threshold, A threshold_add) {
  if (rule == PatchRule::threshold) return e > threshold;
  if (rule == PatchRule::monotonic) return i == 2 || e - before > threshold;
  return i == 2 || (i != 3 && e > threshold && e - before > threshold_add);
}

// The threshold in the entropies' own dtype, as torch compares them.
template <class T> TZ_INLINE acc_t<T> in_dtype(double value) {
  T rounded;
  store1(static_cast<acc_t<T>>(value), &rounded);
  return load1<acc_t<T>>(&rounded);
}

// ids[k] = id + how many of the first k + 1 of eight bytes, each 0 or 1, are set; returns the last.
TZ_INLINE int32_t count_on(uint64_t eight, int32_t id, int32_t* ids) {
  const uint64_t sums = eight * 0x0101010101010101u;  // byte k: the sum of the first k + 1
#if defined(__AVX2__)
  _mm256_storeu_si256((__m256i*)ids, _mm256_add_epi32(_mm256_set1_epi32(id), _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(sums)))));
#else
  for (int k = 0; k < 8; k++) ids[k] = id + static_cast<int32_t>(sums >> (8 * k) & 255);
#endif
  return id + static_cast<int32_t>(sums >> 56);
}

// One text: positions [0, n), always starting the first `first` >= 1 of them. `base` is where it stands in its row, `id` the
// last patch before it. Returns the last patch. ends[id] is the end of each patch: where the next one starts.
template <class Rule>
TZ_INLINE int32_t cut(int64_t n, int64_t first, int32_t base, int32_t id, uint8_t* __restrict__ starts, int32_t* __restrict__ ids,
                      int32_t* __restrict__ ends, const Rule& rule) {
  for (int64_t i = 0; i < min_of(first, n); i++) starts[i] = 1;
  for (int64_t i = first; i < n; i++) starts[i] = rule(i);
  int32_t* end = ends + id + 1;
  for (int64_t at = 0; at < n; at += 64) {  // a loop over the starts of 64 positions, of which there are few, is left once
    const int64_t here = min_of(64, n - at);
    uint64_t set = 0;
    int64_t i = 0;
    for (; i + 8 <= here; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, starts + at + i, 8);
      set |= (eight * 0x0102040810204080u >> 56) << i;
      id = count_on(eight, id, ids + at + i);
    }
    for (; i < here; i++) {
      const uint64_t start = starts[at + i];
      set |= start << i;
      id += static_cast<int32_t>(start), ids[at + i] = id;
    }
    if (at == 0) set &= ~uint64_t(1);  // the first patch ends none
    for (; set; set &= set - 1) *end++ = base + static_cast<int32_t>(at) + __builtin_ctzll(set);
  }
  if (n > 0) *end = base + static_cast<int32_t>(n);
  return id;
}

// The same where no patch may be longer than max_length: whether a position starts one depends on those before it.
template <class Rule>
TZ_INLINE int32_t cut_limited(int64_t n, int64_t first, int32_t max_length, int32_t base, int32_t id, uint8_t* __restrict__ starts,
                              int32_t* __restrict__ ids, int32_t* __restrict__ ends, const Rule& rule) {
  int32_t length = 0;
  for (int64_t i = 0; i < n; i++) {
    const bool start = i < first || length == max_length || rule(i);
    length = start ? 1 : length + 1;
    id += start;
    starts[i] = start, ids[i] = id, ends[id] = base + static_cast<int32_t>(i) + 1;
  }
  return id;
}

TZ_INLINE bool space_like(int64_t byte) {
  return byte < '0' || (byte > '9' && byte < 'A') || (byte > 'Z' && byte < 'a') || (byte > 'z' && byte < 0x80) || byte >= 0xc0;
}

template <class A> struct KeyOf { using type = uint32_t; };
template <> struct KeyOf<double> { using type = uint64_t; };

// Keys in the order of their values; NaN above everything.
template <class A> TZ_INLINE typename KeyOf<A>::type ordered(A value) {
  typename KeyOf<A>::type bits;
  constexpr auto sign = typename KeyOf<A>::type(1) << (8 * sizeof(A) - 1);
  if (value != value) return ~typename KeyOf<A>::type(0);
  value += A(0);  // one zero
  std::memcpy(&bits, &value, sizeof(A));
  return bits & sign ? ~bits : bits | sign;
}

// taken[i]: is values[i] one of the k largest of n? Of equals the first. A radix select: one pass for each byte of a key.
template <class T> void take_largest(const T* values, int64_t stride, int64_t n, int64_t k, uint8_t* taken) {
  using A = acc_t<T>;
  using Key = typename KeyOf<A>::type;
  Key* keys = scratch<Key>(kKeySlot, n);
  for (int64_t i = 0; i < n; i++) keys[i] = ordered(load1<A>(values + i * stride));
  Key prefix = 0, mask = 0;
  int64_t left = k;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < n; i++) counts[(keys[i] >> shift) & 255] += (keys[i] & mask) == prefix;
    int64_t digit = 255;
    for (; digit > 0 && counts[digit] < left; digit--) left -= counts[digit];
    prefix |= static_cast<Key>(digit) << shift, mask |= static_cast<Key>(255) << shift;
  }
  for (int64_t i = 0; i < n; i++) {  // `left` of those that equal the k-th largest
    const bool equal = keys[i] == prefix && left > 0;
    left -= equal;
    taken[i] = keys[i] > prefix || equal;
  }
}

// Cuts [begin, end) of row b; returns its last patch.
template <class T> int32_t cut_segment(const PatchParams& p, const Segment& s, int32_t id) {
  using A = acc_t<T>;
  const int64_t N = p.L + p.next, n = s.end - s.begin + p.next, at = s.batch * N + s.begin;
  int32_t* ends = p.lengths + s.batch * N;
  const auto with_rule = [&](int64_t first, const auto& rule) TZ_LAMBDA {
    const int32_t base = static_cast<int32_t>(s.begin), limit = static_cast<int32_t>(p.max_length);
    return limit ? cut_limited(n, first, limit, base, id, p.starts + at, p.ids + at, ends, rule)
                 : cut(n, first, base, id, p.starts + at, p.ids + at, ends, rule);
  };
  if (p.rule == PatchRule::bytes) return with_rule(n, [](int64_t) TZ_LAMBDA { return true; });
  if (p.rule == PatchRule::fixed) {
    const int64_t size = static_cast<int64_t>(p.patch_size);
    return with_rule(1, [=](int64_t i) TZ_LAMBDA { return i % size == 0; });
  }
  if (p.rule == PatchRule::space) {
    const int64_t *t = p.tokens + s.batch * p.L + s.begin, offset = p.offset;
    return with_rule(2, [=](int64_t i) TZ_LAMBDA {
      return t[i - 1] < offset || (space_like(t[i - 1] - offset) && !space_like(t[i - 2] - offset));
    });
  }
  const T* e = static_cast<const T*>(p.entropies) + s.batch * p.entropies_stride_b + s.begin * p.entropies_stride_l;
  const int64_t stride = p.entropies_stride_l;
  if (p.rule == PatchRule::top) {
    const int64_t candidates = max_of(n - 2, 0), given = s.end - s.begin;
    const int64_t wanted = max_of(0, min_of(candidates, static_cast<int64_t>(std::floor(static_cast<double>(given) / p.patch_size)) - 2));
    uint8_t* taken = scratch<uint8_t>(kTakenSlot, candidates + 1);
    take_largest(e + stride, stride, candidates, wanted, taken);
    return with_rule(2, [=](int64_t i) TZ_LAMBDA { return taken[i - 2] != 0; });
  }
  const A threshold = in_dtype<T>(p.threshold), add = static_cast<A>(p.threshold_add);
  const auto by_entropy = [&](auto rule) TZ_LAMBDA {
    return with_rule(2, [=](int64_t i) TZ_LAMBDA {
      return starts_at<decltype(rule)::value>(i, load1<A>(e + (i - 1) * stride), load1<A>(e + (i - 2) * stride), threshold, add);
    });
  };
  if (p.rule == PatchRule::threshold) return by_entropy(std::integral_constant<PatchRule, PatchRule::threshold>{});
  if (p.rule == PatchRule::monotonic) return by_entropy(std::integral_constant<PatchRule, PatchRule::monotonic>{});
  return by_entropy(std::integral_constant<PatchRule, PatchRule::combined>{});
}

template <class T> void cut_rows(const PatchParams& p) {
  const int64_t N = p.L + p.next;
  parallel_for(0, p.B, max_of(1, kSerialElements / max_of(N, 1)), [&](int64_t first_row, int64_t last_row) {
    for (int64_t b = first_row; b < last_row; b++) {
      const bool packed = p.num_segments != p.B;
      int32_t id = -1;
      int64_t end = 0;
      for (int64_t s = packed ? 0 : b; s < (packed ? p.num_segments : b + 1); s++) {
        id = cut_segment<T>(p, p.segments[s], id);
        end = p.segments[s].end + p.next;
      }
      int32_t *lengths = p.lengths + b * N, before = 0;
      for (int32_t k = 0; k <= id; k++) {
        const int32_t here = lengths[k];
        lengths[k] = here - before, before = here;
      }
      for (int64_t k = id + 1; k < N; k++) lengths[k] = 0;
      for (int64_t i = end; i < N; i++) p.starts[b * N + i] = 0, p.ids[b * N + i] = -1;
      p.counts[b] = id + 1;
    }
  });
}

template <class T> void update(const PatcherUpdateParams& p) {
  using A = acc_t<T>;
  const A threshold = in_dtype<T>(p.threshold), add = static_cast<A>(p.threshold_add);
  for (int64_t b = 0; b < p.B; b++) {
    int64_t &seen = p.state[3 * b], &length = p.state[3 * b + 1], &id = p.state[3 * b + 2];
    T& before = static_cast<T*>(p.before)[b];
    for (int64_t k = 0; k < p.K; k++) {
      const T value = static_cast<const T*>(p.entropies)[b * p.K + k];
      const A e = load1<A>(&value), last = load1<A>(&before);
      const int64_t i = ++seen;  // the position that this entropy decides
      bool start = i < 2 || length == p.max_length;
      if (p.rule == PatchRule::threshold) start |= starts_at<PatchRule::threshold>(i, e, last, threshold, add);
      else if (p.rule == PatchRule::monotonic) start |= starts_at<PatchRule::monotonic>(i, e, last, threshold, add);
      else start |= starts_at<PatchRule::combined>(i, e, last, threshold, add);
      length = start ? 1 : length + 1;
      id += start;
      before = value;
      p.starts[b * p.K + k] = start, p.ids[b * p.K + k] = static_cast<int32_t>(id);
    }
  }
}

}  // namespace

void entropy_patch_fwd(const EntropyPatchParams& p) {
  with_type(p.entropy.dtype, [&](auto t) {
    entropy_forward<decltype(t)>(p.entropy);
    cut_rows<acc_t<decltype(t)>>(p.cut);
  });
}
void entropy_patch_bwd(const PatchEntropyParams& p) {
  with_type(p.dtype, [&](auto t) { entropy_backward<decltype(t)>(p); });
}
void patch_cut(const PatchParams& p) {
  with_type(p.dtype, [&](auto t) { cut_rows<decltype(t)>(p); });
}
void patch_cut_tokens(const PatchParams& p) { cut_rows<float>(p); }  // no entropies: any type
void patcher_update(const PatcherUpdateParams& p) {
  with_type(p.dtype, [&](auto t) { update<decltype(t)>(p); });
}

void patch_ids(const PatchIdsParams& p) {
  parallel_for(0, p.B, max_of(1, kSerialElements / max_of(p.L, 1)), [&](int64_t first_row, int64_t last_row) {
    for (int64_t b = first_row; b < last_row; b++) {
      int64_t at = 0;
      for (int64_t s = 0; s < p.S && at < p.L; s++) {  // the last patch takes what is left
        const int64_t end = s + 1 == p.S ? p.L : min_of(p.L, at + p.lengths[b * p.S + s]);
        for (; at < end; at++) p.ids[b * p.L + at] = static_cast<int32_t>(s);
      }
    }
  });
}

}}}  // namespace terrazzo::cpu::TZ_ISA
