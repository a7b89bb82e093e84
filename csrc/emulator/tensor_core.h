// ldmatrix and mma.sync, lane by lane as the PTX manual lays the fragments out. Products are exact in float, sums are float.
#pragma once
#include "emulator.h"

namespace emu {

template <bool kTranspose> void ldmatrix_x4(uint32_t (&fragment)[4], const void* row, Site site) {
  // PTX "ldmatrix": lane 8 i + k names row k of matrix i; lane l receives of each matrix the elements (l / 4, 2 (l % 4)) and
  // its right neighbour, or with .trans those of the transposed matrix.
  struct In { uint16_t row[8]; uint32_t offset; } in;
  in.offset = shared_offset(row, 16, site);
  if (in.offset % 16) fail("ldmatrix: the row is not aligned to 16 bytes", site);
  memcpy(in.row, row, 16);
  collective(~0u, Collective::ldmatrix, "ldmatrix", &in, fragment, [](const Lanes& lanes) {
    for (int i = 0; i < 4; i++) {
      const In* rows[8];
      int uses[8] = {}, wavefronts = 0;
      for (int k = 0; k < 8; k++) {
        rows[k] = static_cast<const In*>(lanes.in[8 * i + k]);
        wavefronts = max(wavefronts, ++uses[rows[k]->offset / 16 % 8]);
      }
      count_ldmatrix(wavefronts - 1);
      for (int l = 0; l < 32; l++) {
        const int r = l / 4, c = l % 4 * 2;
        const uint32_t low = kTranspose ? rows[c]->row[r] : rows[r]->row[c], high = kTranspose ? rows[c + 1]->row[r] : rows[r]->row[c + 1];
        static_cast<uint32_t*>(lanes.out[l])[i] = low | high << 16;
      }
    }
  }, site);
}

inline float half_of(uint32_t pair, int i, __nv_bfloat16) { return from_bits<float>(i ? pair & 0xffff0000u : pair << 16); }
inline float half_of(uint32_t pair, int i, __half) { return __half2float(from_bits<__half>(i ? pair >> 16 : pair & 0xffffu)); }

struct MmaIn { const uint32_t *a, *b; const float* c; };

// The fragment of C and D is the same for every shape m16n8: rows g and g + 8, columns 2 t and 2 t + 1, g = lane / 4, t = lane % 4.
template <int K> void multiply(const Lanes& lanes, const float (&A)[16][K], const float (&B)[K][8]) {
  float C[16][8];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = static_cast<const MmaIn*>(lanes.in[l])->c[i];
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < K; k++)
      for (int n = 0; n < 8; n++) C[m][n] += A[m][k] * B[k][n];
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) static_cast<float*>(lanes.out[l])[i] = C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}

// PTX "Matrix Fragments for mma.m16n8k16 with floating point type": pairs of neighbours along k; T is __nv_bfloat16 or __half.
template <class T> void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaIn in{a, b, acc};
  float out[4];
  collective(~0u, Collective::mma, "mma.sync", &in, out, [](const Lanes& lanes) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++) {
      const MmaIn* p = static_cast<const MmaIn*>(lanes.in[l]);
      const int g = l / 4, t = l % 4 * 2;
      for (int i = 0; i < 8; i++) A[g + i / 2 % 2 * 8][t + i / 4 * 8 + i % 2] = half_of(p->a[i / 2], i % 2, T{});
      for (int i = 0; i < 4; i++) B[t + i / 2 * 8 + i % 2][g] = half_of(p->b[i / 2], i % 2, T{});
    }
    multiply<16>(lanes, A, B);
  }, site);
  memcpy(acc, out, sizeof(out));
}

// PTX "Matrix Fragments for mma.m16n8k8", .tf32: the low 13 bits of a register are not read.
inline void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  MmaIn in{a, b, acc};
  float out[4];
  collective(~0u, Collective::mma, "mma.sync", &in, out, [](const Lanes& lanes) {
    float A[16][8], B[8][8];
    for (int l = 0; l < 32; l++) {
      const MmaIn* p = static_cast<const MmaIn*>(lanes.in[l]);
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; i++) A[g + i % 2 * 8][t + i / 2 * 4] = from_bits<float>(p->a[i] & ~0x1fffu);
      for (int i = 0; i < 2; i++) B[t + i * 4][g] = from_bits<float>(p->b[i] & ~0x1fffu);
    }
    multiply<8>(lanes, A, B);
  }, site);
  memcpy(acc, out, sizeof(out));
}

// PTX "cvt.rna.tf32.f32": to the nearest tf32, ties away from zero; infinities and NaN stay.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = static_cast<uint32_t>(to_bits(x));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

}  // namespace emu
