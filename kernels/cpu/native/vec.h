/* Vectors of fp32, for x86 with AVX-512 or with AVX2 and FMA, and what is made of them.

   Every multiplication that is followed by an addition is one fused instruction, named as such, so
   that no compiler decides about a rounding. */

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EACH _Pragma("GCC unroll 16")

/* From which bytes four numbers of three bytes come, the last first; -128: a 0 below each */
#define THREES(at)                                                                             \
    at + 11, at + 10, at + 9, -128, at + 8, at + 7, at + 6, -128, at + 5, at + 4, at + 3, -128, \
        at + 2, at + 1, at, -128

#if defined(__AVX512F__) && defined(__AVX512BW__)

#define LANES 16
typedef __m512 vec;
INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE vec all(float a) { return _mm512_set1_ps(a); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec fma3(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }     /* a b + c */
INLINE vec minus3(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  /* c - a b */
INLINE vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }  /* b where one is NaN */
INLINE vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE float sum(vec a) { return _mm512_reduce_add_ps(a); }
INLINE float top(vec a) { return _mm512_reduce_max_ps(a); }
INLINE vec nearest(vec a) { return _mm512_roundscale_ps(a, 0); }
/* One step of LANES sums over lanes: a's half sums in half of the lanes, b's in the others. */
INLINE vec fold8(vec a, vec b) {
    return add(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
INLINE vec fold4(vec a, vec b) {
    vec crossed = _mm512_mask_blend_ps(0x0f0f, a, b);
    return add(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_shuffle_f32x4(crossed, crossed, 0xb1));
}
INLINE vec fold2(vec a, vec b) {
    return add(_mm512_mask_blend_ps(0xcccc, a, b), _mm512_shuffle_ps(a, b, 0x4e));
}
INLINE vec fold1(vec a, vec b) {
    vec crossed = _mm512_mask_blend_ps(0x5555, a, b);
    return add(_mm512_mask_blend_ps(0xaaaa, a, b), _mm512_permute_ps(crossed, 0xb1));
}
INLINE vec power_of_two(vec n) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
typedef __m512i bits;
INLINE bits load_bits(const void *p) { return _mm512_loadu_si512(p); }
INLINE bits up(bits a, int n) { return _mm512_slli_epi32(a, n); }
INLINE bits down(bits a, int n) { return _mm512_srli_epi32(a, n); }
INLINE bits down_signed(bits a, int n) { return _mm512_srai_epi32(a, n); }
INLINE bits upper_half(bits a) { return _mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)); }
INLINE bits lower_4(bits a) { return _mm512_and_si512(a, _mm512_set1_epi32(15)); }
/* LANES bytes as integers, and integers as the nearest fp32 numbers */
INLINE bits signed_bytes(const void *p) { return _mm512_cvtepi8_epi32(_mm_loadu_si128(p)); }
INLINE bits unsigned_bytes(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE vec as_floats(bits a) { return _mm512_cvtepi32_ps(a); }
INLINE vec as_vec(bits a) { return _mm512_castsi512_ps(a); }
INLINE vec load3(const char *p) { /* LANES numbers of three bytes; reads 64 */
#ifdef __AVX512VBMI__
    const __m512i from = _mm512_set_epi8(THREES(36), THREES(24), THREES(12), THREES(0));
    return as_vec(_mm512_maskz_permutexvar_epi8(0xeeeeeeeeeeeeeeee, from, load_bits(p)));
#else
    const __m512i four = _mm512_set_epi32(12, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 3, 3, 2, 1, 0);
    const __m512i from = _mm512_set_epi8(THREES(0), THREES(0), THREES(0), THREES(0));
    return as_vec(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(four, load_bits(p)), from));
#endif
}

#elif defined(__AVX2__) && defined(__FMA__)

#define LANES 8
typedef __m256 vec;
INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
INLINE vec all(float a) { return _mm256_set1_ps(a); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec quotient(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec fma3(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec minus3(vec a, vec b, vec c) { return _mm256_fnmadd_ps(a, b, c); }
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
INLINE vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE float sum(vec a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
INLINE float top(vec a) {
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
INLINE vec nearest(vec a) { return _mm256_round_ps(a, 8); }
INLINE vec fold4(vec a, vec b) {
    return add(_mm256_blend_ps(a, b, 0xf0), _mm256_permute2f128_ps(a, b, 0x21));
}
INLINE vec fold2(vec a, vec b) {
    return add(_mm256_blend_ps(a, b, 0xcc), _mm256_shuffle_ps(a, b, 0x4e));
}
INLINE vec fold1(vec a, vec b) {
    return add(_mm256_blend_ps(a, b, 0xaa), _mm256_permute_ps(_mm256_blend_ps(a, b, 0x55), 0xb1));
}
INLINE vec power_of_two(vec n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
typedef __m256i bits;
INLINE bits load_bits(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE bits up(bits a, int n) { return _mm256_slli_epi32(a, n); }
INLINE bits down(bits a, int n) { return _mm256_srli_epi32(a, n); }
INLINE bits down_signed(bits a, int n) { return _mm256_srai_epi32(a, n); }
INLINE bits upper_half(bits a) { return _mm256_and_si256(a, _mm256_set1_epi32((int)0xffff0000)); }
INLINE bits lower_4(bits a) { return _mm256_and_si256(a, _mm256_set1_epi32(15)); }
INLINE bits signed_bytes(const void *p) { return _mm256_cvtepi8_epi32(_mm_loadl_epi64(p)); }
INLINE bits unsigned_bytes(const void *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE vec as_floats(bits a) { return _mm256_cvtepi32_ps(a); }
INLINE vec as_vec(bits a) { return _mm256_castsi256_ps(a); }
INLINE vec load3(const char *p) { /* reads 28 bytes */
    const __m256i from = _mm256_set_epi8(THREES(0), THREES(0));
    __m128i low = _mm_loadu_si128((const __m128i *)p);
    __m128i high = _mm_loadu_si128((const __m128i *)(p + 12));
    return as_vec(_mm256_shuffle_epi8(_mm256_set_m128i(high, low), from));
}

#else
#error "the native kernels need AVX-512 (F, BW), or AVX2 and FMA"
#endif

/* Lane i: the sum over the lanes of a[i]; every one in the same order. Uses a up. */
INLINE vec sums(vec *a) {
#if LANES == 16
    EACH for (int i = 0; i < 8; i++) a[i] = fold8(a[i], a[i + 8]);
#endif
    EACH for (int i = 0; i < 4; i++) a[i] = fold4(a[i], a[i + 4]);
    EACH for (int i = 0; i < 2; i++) a[i] = fold2(a[i], a[i + 2]);
    return fold1(a[0], a[1]);
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* the first n numbers, n <= LANES, and 0 after them */
INLINE vec load_some(const float *p, long n) {
    if (n == LANES) return load(p);
    float some[LANES] = {0};
    memcpy(some, p, n * sizeof(float));
    return load(some);
}

INLINE void store_some(float *p, vec a, long n) {
    if (n == LANES) {
        store(p, a);
        return;
    }
    float some[LANES];
    store(some, a);
    memcpy(p, some, n * sizeof(float));
}

/* e^x for x in -87 ... 88; what is beyond is taken to be there. x = n ln 2 + r, and a polynomial of
   degree 7 for e^r, |r| <= ln 2 / 2: its next term is below 6e-9. */
INLINE vec exponential(vec x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x));
    vec n = nearest(mul(x, all(1.44269504f)));
    vec r = minus3(n, all(0x1.62e4p-1f), x); /* ln 2 in two parts: n times the first is exact */
    r = minus3(n, all(1.42860682e-6f), r);
    vec p = all(1.0f / 5040);
    p = fma3(p, r, all(1.0f / 720));
    p = fma3(p, r, all(1.0f / 120));
    p = fma3(p, r, all(1.0f / 24));
    p = fma3(p, r, all(1.0f / 6));
    p = fma3(p, r, all(0.5f));
    p = fma3(p, r, all(1.0f));
    p = fma3(p, r, all(1.0f));
    return mul(p, power_of_two(n));
}
