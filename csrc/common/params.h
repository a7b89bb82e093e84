// Arguments of every native kernel: raw pointers, element strides, sizes. Shared by csrc/cpu and csrc/cuda.
// Strides are in elements. Optional pointers may be null. Everything has been checked by the caller.
#pragma once
#include "segments.h"
#include "types.h"

namespace terrazzo {

// Causal depthwise convolution: y[b,d,l] = act(bias[d] + sum_w weight[d,w] * x[b,d,l-(W-1)+w]).
// Before the first position of a segment stand its initial state (W-1 values) or zeros.
struct CausalConv1dParams {
  DType x_dtype, weight_dtype, state_dtype;  // x, y, dy, dx | weight, bias | initial and final states
  int64_t B, D, L, W;                        // W in 2..4
  bool silu;
  const void* x;  int64_t x_stride_b, x_stride_d, x_stride_l;        // [B, D, L], stride_d == 1 or stride_l == 1
  const void* weight;  int64_t weight_stride_d, weight_stride_w;     // [D, W]
  const void* bias;                                                  // [D] contiguous, or null
  void* y;  int64_t y_stride_b, y_stride_d, y_stride_l;              // [B, D, L], laid out like x
  const Segment* segments;  int64_t num_segments;                    // cover every position of every row once
  const void* initial_states;  int64_t init_stride_s, init_stride_d, init_stride_w;    // [*, D, W-1] or null
  void* final_states;  int64_t final_stride_s, final_stride_d, final_stride_w;         // [*, D, W-1] or null
  // backward only (dy any strides; dweight, dbias in the accumulation type: float, or double for double)
  const void* dy;  int64_t dy_stride_b, dy_stride_d, dy_stride_l;
  const void* dfinal_states;  int64_t dfinal_stride_s, dfinal_stride_d, dfinal_stride_w;  // state_dtype, or null
  void* dx;  int64_t dx_stride_b, dx_stride_d, dx_stride_l;          // laid out like x
  void* dweight;                                                     // [D, W] contiguous
  void* dbias;                                                       // [D] or null
  void* dinitial_states;  int64_t dinit_stride_s, dinit_stride_d, dinit_stride_w;      // state_dtype, or null
};

// One or a few new positions against a rolling state of the last inputs, updated in place.
struct CausalConv1dUpdateParams {
  DType x_dtype, weight_dtype, state_dtype;
  int64_t B, D, L, W;
  int64_t state_len, num_slots;              // state_len >= W-1
  bool silu;
  const void* x;  int64_t x_stride_b, x_stride_d, x_stride_l;        // [B, D, L]
  void* conv_state;  int64_t state_stride_s, state_stride_d, state_stride_w;  // [num_slots, D, state_len]
  const void* weight;  int64_t weight_stride_d, weight_stride_w;
  const void* bias;
  void* y;  int64_t y_stride_b, y_stride_d, y_stride_l;
  const int32_t* cache_seqlens;              // [B] or null: the state is a circular buffer, next write at seqlen % state_len
  const int32_t* conv_state_indices;         // [B] or null: slot of each row; -1 = padding row (y = 0, no update)
};

// Mamba-2 scan: per head h (group g = h / (H/G)), with dt' = clamp(softplus?(dt + dt_bias), dt_min, dt_max),
//   state[p,n] = exp(dt' A) state[p,n] + dt' B[n] x[p],   y[p] = sum_n C[n] state[p,n] + D x[p],  y *= silu(z).
struct ChunkScanParams {
  DType x_dtype;     // x, z, B, C, y and dy (the glue converts where a caller mixes them)
  DType dt_dtype;    // dt
  DType state_dtype; // f32, or f64 for double: A, D, dt_bias, states, and all their gradients
  int64_t B, L, H, P, G, N;
  bool dt_softplus;  double dt_min, dt_max;
  bool D_has_p;                                                      // D is [H, P] rather than [H]
  const void* x;  int64_t x_stride_b, x_stride_l, x_stride_h;        // [B, L, H, P], P unit stride
  const void* dt;  int64_t dt_stride_b, dt_stride_l, dt_stride_h;    // [B, L, H]
  const void* A;                                                     // [H] contiguous, as are D and dt_bias
  const void* Bm;  int64_t B_stride_b, B_stride_l, B_stride_g;       // [B, L, G, N], N unit stride
  const void* C;  int64_t C_stride_b, C_stride_l, C_stride_g;        // [B, L, G, N], N unit stride
  const void* D;                                                     // [H] or [H, P], or null
  const void* z;  int64_t z_stride_b, z_stride_l, z_stride_h;        // like x, or null (null in the backward)
  const void* dt_bias;                                               // [H] or null
  void* y;                                                           // [B, L, H, P]; P and H contiguous, all of it on a GPU
  int64_t out_stride_b, out_stride_l;                                // of y, and of dx
  const Segment* segments;  int64_t num_segments;                    // cover every position of every row once
  const void* initial_states;                                        // [*, H, P, N] contiguous, or null
  void* final_states;                                                // [*, H, P, N] contiguous, or null
  // backward only; every gradient is contiguous, dx like y
  const void* dy;  int64_t dy_stride_b, dy_stride_l, dy_stride_h, dy_stride_p;  // [B, L, H, P], P stride 0 or 1
  const void* dfinal_states;                                         // [*, H, P, N] or null
  void* dx;                                                          // [B, L, H, P] x_dtype
  void* ddt;                                                         // [B, L, H] state_dtype (w.r.t. the raw dt)
  void* dA;                                                          // [H] state_dtype
  void* dB;  void* dC;                                               // [B, L, G, N] state_dtype
  void* dD;                                                          // like D, or null
  void* ddt_bias;                                                    // [H] or null
  void* dinitial_states;                                             // like initial_states, or null
};

// One decoding step of the scan, state updated in place. Mamba-2 callers expand dt, A, D and dt_bias with stride 0
// over P (and N): such strides take the per-head path. Mamba-1 is H = 1 with A [P, N] and dt [B, P].
struct StateUpdateParams {
  DType state_dtype;   // state
  DType x_dtype;       // x, z, B, C, out
  DType dt_dtype;      // dt
  DType param_dtype;   // A, D, dt_bias: f32, or f64 for double
  int64_t B, H, P, G, N, num_slots;
  bool dt_softplus;
  void* state;  int64_t state_stride_s, state_stride_h, state_stride_p;        // [num_slots, H, P, N], N unit stride
  const void* x;  int64_t x_stride_b, x_stride_h, x_stride_p;                  // [B, H, P]
  const void* dt;  int64_t dt_stride_b, dt_stride_h, dt_stride_p;              // [B, H, P]
  const void* A;  int64_t A_stride_h, A_stride_p, A_stride_n;                  // [H, P, N]
  const void* Bm;  int64_t B_stride_b, B_stride_g, B_stride_n;                 // [B, G, N]
  const void* C;  int64_t C_stride_b, C_stride_g, C_stride_n;                  // [B, G, N]
  const void* D;  int64_t D_stride_h, D_stride_p;                              // [H, P] or null
  const void* z;  int64_t z_stride_b, z_stride_h, z_stride_p;                  // [B, H, P] or null
  const void* dt_bias;  int64_t dt_bias_stride_h, dt_bias_stride_p;            // [H, P] or null
  void* out;                                                                   // [B, H, P] contiguous
  const int32_t* state_batch_indices;                                          // [B] or null; -1 = padding row (out = 0)
};

// Gated RMS norm over groups of the last dimension, as mamba_ssm's RMSNormGated:
//   norm_before_gate: y = rms(x) * weight * silu(z);   else y = rms(x * silu(z)) * weight.
struct RmsnormGatedParams {
  DType x_dtype, weight_dtype;         // x, z, y, dy, dx, dz | weight
  int64_t rows, D, group_size;
  double eps;
  bool norm_before_gate;
  const void* x;  int64_t x_stride;    // [rows, D], row stride
  const void* z;  int64_t z_stride;    // or null
  const void* weight;                  // [D]
  void* y;                             // [rows, D] contiguous
  // backward only
  const void* dy;  int64_t dy_stride;  // [rows, D], row stride
  void* dx;                            // contiguous
  void* dz;                            // contiguous, or null
  void* dweight;                       // [D] in the accumulation type
};

// What stands between the two products of an expert, or behind a linear layer. swiglu_oai is gpt-oss's clamped gate.
enum class Activation : int32_t { none, silu, gelu, gelu_tanh, relu, relu2, swiglu_oai };
constexpr int64_t kActivations = 7;

constexpr int64_t kPanel = 16;  // columns of a packed panel: one cache line of float, whatever the ISA

// A matrix [K, N] for each expert, in any strides; or packed once (panel > 0): [E, panels, K, kPanel], the columns beyond N
// zero up to an even number of panels, each column with a factor when it is int8.
struct WeightMatrix {
  DType dtype;
  const void* data;
  int64_t stride_e, stride_k, stride_n;
  int64_t panel;                                                        // elements of a panel: K * kPanel; 0 when not packed
  bool int8;                                                            // panels of int8_t, whatever the dtype
  const float* scale;  int64_t scale_stride_e;                          // [E, N], or null
};

// One input's products with up to kMaxWeights weights, side by side in y: y = [act(n w[0]), act(n w[1]), ...] + residual with n = x, or the
// RMS norm of x where there is a norm_weight; gated: y = act(n w[0]) * (n w[1]) + residual.
constexpr int64_t kMaxWeights = 3;
struct NormLinearWeight {
  WeightMatrix matrix;                                                  // [K, N], of the one expert
  int64_t N;
};
struct NormLinearParams {
  DType dtype, norm_dtype;                                              // x, residual and y | norm_weight
  int64_t T, K, columns;                                                // of y
  Activation activation;
  bool gated;
  double eps;
  NormLinearWeight weights[kMaxWeights];  int64_t num_weights;
  const void* x;  int64_t x_stride;                                     // [T, K], row stride
  const void* norm_weight;                                              // [K], or null
  const void* residual;  int64_t residual_stride;                       // [T, columns], row stride, or null
  void* y;                                                              // [T, columns] contiguous
};

// Grouped product: c[r] = act(a[r] b[e] + bias[e]) for the rows r of each group e, [offs[e - 1], offs[e]). A linear layer
// is one group. Rows behind the last group are zero.
struct GroupedGemmParams {
  DType a_dtype, bias_dtype;                                            // a and c | bias
  int64_t T, E, K, N;
  Activation activation;
  const void* a;  int64_t a_stride_m, a_stride_k;                       // [T, K]
  WeightMatrix b;                                                       // [E, K, N]
  const void* bias;  int64_t bias_stride_e;                             // [E, N] unit stride n, or null
  const int32_t* offs;                                                  // [E], not decreasing, at most T
  void* c;                                                              // [T, N] contiguous
};

// The weight gradient of a grouped product: db[e] = sum over the rows r of group e of a[r]^T dy[r]; zero for empty groups.
struct GroupedWgradParams {
  DType a_dtype, dy_dtype, db_dtype;
  int64_t T, E, K, N;
  const void* a;  int64_t a_stride_m, a_stride_k;                       // [T, K]
  const void* dy;  int64_t dy_stride_m, dy_stride_n;                    // [T, N]
  const int32_t* offs;                                                  // [E]
  void* db;  int64_t db_stride_e, db_stride_k;                          // [E, K, N] unit stride n
};

// The gradients of a grouped product; parts whose output pointer is null are not wanted. dbias is the weight gradient of
// rows of ones.
struct GroupedGemmBwdParams {
  GroupedGemmParams da;
  GroupedWgradParams db, dbias;
};

// The gradients of a weight gradient: two grouped products.
struct GroupedWgradBwdParams {
  GroupedGemmParams da, dy;
};

// One layer of experts: y[t] = sum over a of weights[t, a] * (gate(x[t] w1[e] + bias1[e]) w2[e] + bias2[e]), e = expert a of t.
// Work happens in slots, the pairs (t, a) sorted by expert: slot s belongs to token tokens[s]; pairs whose index is no
// expert of ours have no slot. The gate reads g and u from columns j and F + j of the first product (2j and 2j + 1 when
// interleaved), u from w_up when there is one; without a gate h = act(g).
struct FusedExpertsParams {
  DType x_dtype;                                                        // x, y, dy, dx
  int64_t T, A, S, D, F, E, N1;                                         // N1 columns of w1: F or 2 F; S slots in use
  Activation activation;
  bool gated, interleaved;
  double alpha, limit;                                                  // of swiglu_oai
  const void* x;  int64_t x_stride_t, x_stride_d;                       // [T, D]
  WeightMatrix w1, w_up, w2;                                            // [E, D, N1], [E, D, F] or none, [E, F, D]
  const void* bias1;  const void* bias_up;  const void* bias2;          // [E, N1], [E, F], [E, D] accumulation type, or null
  const void* weights;                                                  // [T, A] accumulation type
  const int32_t* indices;                                               // [T, A] contiguous
  const int32_t* offs;                                                  // [E] slot ends
  const int32_t* tokens;                                                // [S]
  const int32_t* places;                                                // [T, A] slot of each pair, or -1
  void* saved;                                                          // [S, N1 (+ F)] first products, or null; this and the
                                                                        // scratch below in the accumulation type
  void* h;                                                              // [S, F] scratch
  void* slots;                                                          // [S, D] scratch
  void* y;                                                              // [T, D] contiguous
  // backward only: outputs may be null when nobody wants them
  const void* dy;                                                       // [T, D] contiguous
  void* dh;                                                             // [S, F] scratch: gradient of h, unweighted
  void* dproducts;                                                      // [S, N1 (+ F)] scratch
  void* dx;                                                             // [T, D] contiguous
  void* dweights;                                                       // [T, A] accumulation type
};

// The A experts of each token: the largest scores, with weights; see pyops/moe.py for what each flag means.
struct MoeRouteParams {
  DType dtype;                                                          // logits, weights and their gradients
  int64_t T, E, A;
  bool softmax_first, sigmoid;
  bool two_best;                                                        // a group is worth its two best scores, not one
  int64_t n_group, topk_group;                                          // n_group 0: no groups
  double norm_order, scale;                                             // norm_order 0: none
  const void* logits;  int64_t logits_stride_t, logits_stride_e;        // [T, E]
  const void* bias;                                                     // [E] accumulation type, or null
  void* weights;                                                        // [T, A] contiguous
  int32_t* indices;                                                     // [T, A] contiguous; read by the backward
  // backward only
  const void* dweights;                                                 // [T, A] contiguous
  void* dlogits;                                                        // [T, E] contiguous
};

// Pairs of token and choice, sorted by expert; those of no expert of ours last.
struct MoePermuteParams {
  int64_t pairs, E;
  const int32_t* indices;                                               // [pairs], none negative
  int32_t* order;                                                       // [pairs] the pair at each place
  int32_t* inverse;                                                     // [pairs] the place of each pair
  int32_t* offs;                                                        // [E] the end of each expert's places
};

// y[t] = sum over a of weights[t, a] rows[inverse[t, a]].
struct MoeUnpermuteParams {
  DType dtype;                                                          // rows, y, and their gradients
  int64_t T, A, D;
  const void* rows;  int64_t rows_stride;                               // [T * A, D]
  const int32_t* inverse;                                               // [T * A], a permutation
  const void* weights;                                                  // [T, A] accumulation type
  void* y;                                                              // [T, D] contiguous
  // backward only
  const void* dy;                                                       // [T, D] contiguous
  void* drows;                                                          // [T * A, D] contiguous
  void* dweights;                                                       // [T, A] accumulation type
};

// Loops that measure the machine's limits, for the benchmarks: see csrc/cpu/calibrate.cpp.
enum class CalibrateKind : int32_t { fma, read, copy, scale };
constexpr int64_t kCalibrateFmas = 12 * 16 * 4096;  // multiply-adds of one fma iteration in each of 64 chunks
struct CalibrateParams {
  CalibrateKind kind;
  float* buffer;  int64_t count;       // at least 64 floats, 64-byte aligned
  int64_t iterations;
  double* checksum;                    // written, so that no loop can be optimised away
};

// ---- patches and local attention ---------------------------------------------------------------------------
// Patch ids [B, L] do not decrease along a row, negative ones aside: those belong to no patch, nor do ids >= S. Patch s of
// row b lies within the bytes [starts[b, s], starts[b, s + 1]).

// One row for each patch: the largest, the mean or the smallest of its bytes' rows; zeros where a patch is empty.
enum class PatchReduction : int32_t { amax, mean, amin };
constexpr int64_t kPatchReductions = 3;
struct PatchReduceParams {
  DType dtype;                                                          // h, y, dy, dh
  PatchReduction reduce;
  int64_t B, L, S, D;
  const int32_t* ids;                                                   // [B, L] contiguous
  const int32_t* starts;                                                // [B, S + 1]
  const void* h;  int64_t h_stride_b, h_stride_l;                       // [B, L, D] unit stride d
  void* y;                                                              // [B, S, D] contiguous; read by the backward
  // backward only
  const void* dy;                                                       // [B, S, D] contiguous
  void* dh;                                                             // [B, L, D] contiguous
};

// Attention between patches and bytes. Each patch has K rows on the patch side. A query of patch s sees the keys of the
// patches s - window + 1 .. s; without a key its output is zero. Query head h reads key head h / (H / Hk).
struct PatchCrossAttentionParams {
  DType dtype;                                                          // every tensor but stats
  bool bytes_ask;                                                       // queries are bytes, keys patches; or the reverse
  int64_t B, L, S, K, H, Hk, P, Lq, Lk, window;                         // {Lq, Lk} = {L, S * K} when bytes ask
  double scale;
  const int32_t* ids;                                                   // [B, L] contiguous
  const int32_t* starts;                                                // [B, S + 1]
  const uint8_t* key_mask;                                              // [B, Lk] 0 = not seen, or null
  const void* q;  int64_t q_stride_b, q_stride_l, q_stride_h;           // [B, Lq, H, P] unit stride p
  const void* k;  int64_t k_stride_b, k_stride_l, k_stride_h;           // [B, Lk, Hk, P] unit stride p
  const void* v;  int64_t v_stride_b, v_stride_l, v_stride_h;           // [B, Lk, Hk, P] unit stride p
  void* y;                                                              // [B, Lq, H, P] contiguous
  // backward only; gradients are contiguous
  const void* dy;                                                       // [B, Lq, H, P] contiguous
  void* stats;                                                          // [B, Lq, 3, H] scratch, accumulation type
  void* dq;  void* dk;  void* dv;                                       // like q, k, v
};

// Queries [first, last), first a multiple of kAttentionBlock, of the sequence [begin, end) of row `batch`; first and last count from begin.
constexpr int64_t kAttentionBlock = 64;
struct AttentionRun {
  int64_t batch, begin, end, first, last;
};

// Sliding-window attention: query i sees the keys i - window + 1 .. i of its sequence, or .. i + window - 1 when not causal.
struct LocalAttentionParams {
  DType dtype;                                                          // every tensor but lse and delta
  bool causal;
  int64_t B, L, H, Hk, P, window;
  double scale;
  const AttentionRun* runs;  int64_t num_runs;                          // cover every position once
  const uint8_t* key_mask;                                              // [B, L] 0 = not seen, or null
  const void* q;  int64_t q_stride_b, q_stride_l, q_stride_h;           // [B, L, H, P] unit stride p
  const void* k;  int64_t k_stride_b, k_stride_l, k_stride_h;           // [B, L, Hk, P] unit stride p
  const void* v;  int64_t v_stride_b, v_stride_l, v_stride_h;           // [B, L, Hk, P] unit stride p
  void* y;                                                              // [B, L, H, P] contiguous; read by the backward
  void* lse;                                                            // [B, H, L] log of the sum of exponentials, +inf where
                                                                        // there is no key; accumulation type, kernel's own units
  // backward only; gradients are contiguous
  const void* dy;                                                       // [B, L, H, P] contiguous
  void* delta;                                                          // [B, H, L] scratch, accumulation type
  void* dq;  void* dk;  void* dv;                                       // like q, k, v
};

// Attention of one position of each row, taken into caches that keep the keys and values of the positions before: position t lies in slot
// t, or t % window, and then the last `window` positions are seen.
struct AttentionUpdateParams {
  DType dtype, rotary_dtype;                                            // qkv, caches and y | cos and sin
  int64_t B, H, Hk, P, window, R;                                       // R pairs of channels turn; 0: no rotary embedding
  bool interleaved;                                                     // pairs are neighbours, not R apart
  double scale;
  const void* qkv;  int64_t qkv_stride_b;                               // [B, (H + 2 Hk) P] unit stride: queries, keys, values
  void* k_cache;  int64_t k_stride_b, k_stride_h, k_stride_s;           // [B, Hk, slots, P] unit stride p
  void* v_cache;  int64_t v_stride_b, v_stride_h, v_stride_s;           // [B, Hk, slots, P] unit stride p
  int64_t length;                                                       // positions before this one, where lengths is null
  const int64_t* lengths;                                               // [B], or null
  const void* cos;  int64_t cos_stride_b;                               // [B, R] unit stride; stride 0: the same for all rows
  const void* sin;  int64_t sin_stride_b;
  void* y;                                                              // [B, H P] contiguous
};

// ---- byte-latent: patches and hash embeddings ----
// Where a position starts a patch, from the entropies before it or from tokens: see csrc/cpu/entropy_patch.cpp.
enum class PatchRule : int32_t { threshold, monotonic, combined, top, bytes, fixed, space };
constexpr int64_t kPatchRules = 7;

// Entropy of the softmax of every row of logits, in nats: H = log sum e^x - sum p x.
struct PatchEntropyParams {
  DType dtype;                                                          // logits and their gradient
  int64_t B, L, V;
  const void* logits;  int64_t logits_stride_b, logits_stride_l;        // [B, L, V], V unit stride
  const int32_t* valid_lengths;                                         // [B] or null; padding behind has entropy 0
  void* entropies;                                                      // [B, L] accumulation type, contiguous
  // backward only
  const void* dentropies;                                               // [B, L] accumulation type, contiguous
  void* dlogits;                                                        // [B, L, V] contiguous
};

// Positions cut into patches. A row has N = L positions, or L + 1 with `next`: that of the byte behind the last.
struct PatchParams {
  DType dtype;                                                          // entropies
  PatchRule rule;
  double threshold, threshold_add, patch_size;
  int64_t max_length;                                                   // 0: none
  int64_t offset;                                                       // token of byte 0 (space)
  int64_t B, L;
  bool next;
  const void* entropies;  int64_t entropies_stride_b, entropies_stride_l;  // [B, L], or null
  const int64_t* tokens;                                                // [B, L] contiguous, or null
  const Segment* segments;  int64_t num_segments;                       // one for each row, or all of them of row 0
  uint8_t* starts;                                                      // [B, N]
  int32_t* ids;                                                         // [B, N]; -1 is padding
  int32_t* lengths;                                                     // [B, N]; zeros behind the last patch
  int32_t* counts;                                                      // [B]
};

// Entropies first, patches from them.
struct EntropyPatchParams {
  PatchEntropyParams entropy;
  PatchParams cut;                                                      // its entropies are the first one's
};

// The same decisions for K more positions of each row, from where the last call left off.
struct PatcherUpdateParams {
  DType dtype;                                                          // entropies and `before`
  PatchRule rule;                                                       // threshold, monotonic or combined
  double threshold, threshold_add;
  int64_t max_length;
  int64_t B, K;
  const void* entropies;                                                // [B, K] contiguous
  int64_t* state;                                                       // [B, 3]: entropies seen, length and id of the open patch
  void* before;                                                         // [B] the last entropy seen
  uint8_t* starts;                                                      // [B, K] the byte behind each starts a patch
  int32_t* ids;                                                         // [B, K] the patch of the byte behind each
};

// ids[b, t]: how many patches start at or before t, less one.
struct PatchIdsParams {
  int64_t B, S, L;
  const int64_t* lengths;                                               // [B, S] contiguous
  int32_t* ids;                                                         // [B, L]
};

// y[t] = byte_embedding[token] + sum over n-gram sizes and hash functions of table[row(n-gram that ends at t)].
struct ByteHashParams {
  DType dtype, table_dtype;                                             // y, byte_embedding, dy | table, and their gradients
  int64_t B, L, D, byte_rows, table_rows;
  int64_t groups, functions, vocab;
  const int64_t* group_sizes;                                           // [groups]
  const int64_t* tokens;                                                // [B, L] contiguous
  const Segment* segments;  int64_t num_segments;                       // n-grams stay inside one
  int64_t* ids;                                                         // [B, L, functions * groups] rows of the table, or null
  const void* table;  int64_t table_stride;                             // [table_rows, D]
  const void* byte_embedding;  int64_t byte_stride;                     // [byte_rows, D]
  void* y;                                                              // [B, L, D] contiguous
  // backward only
  const void* dy;                                                       // [B, L, D] contiguous
  void* dbytes;                                                         // [byte_rows, D] accumulation type, zeros on entry, or null
  const int32_t* order;                                                 // [runs[U]] pairs (position, id) sorted by row, positions rising
  const int64_t* runs;                                                  // [U + 1] where the pairs of each row begin
  const int64_t* rows;                                                  // [U] the rows
  int64_t num_rows;                                                     // U
  void* dtable;  bool sparse;                                           // [U, D], or [table_rows, D] zeros on entry
};

}  // namespace terrazzo
