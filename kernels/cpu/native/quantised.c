/* Panels of quantised numbers, as llama.cpp's formats have them

       w = scale q - minimum      q a code; two roundings, or one where there is no minimum

   For every block of inputs a panel holds the PANEL scales of its rows, their minima where the form
   has them (both fp32), and then, input by input, the codes of its rows:
       8 bits    a signed byte for every row
       4 bits    a byte for rows j (its lower half) and j + LANES; with minima codes are 0 ... 15,
                 without -8 ... 7
   So a number takes 5 bits and, with minima, 6 (blocks of 32, codes of 4 bits). It is decoded in
   registers to the fp32 number that llama.cpp makes of it, bit for bit, and then multiplied as
   linear.c does.

   T = tokens, K = inputs, N = outputs */

#include "panel.h"

/* ---- packing */

/* The code of a panel's row j, at the codes of one input */
INLINE int code_at(const char *codes, long form, long j) {
    if (bits_of(form) == 8) return ((const int8_t *)codes)[j];
    int byte = ((const uint8_t *)codes)[j % LANES];
    int code = j < LANES ? byte & 15 : byte >> 4;
    return has_minima(form) || code < 8 ? code : code - 16;
}

/* A panel's codes of one input, from those of its rows */
INLINE void put_codes(char *codes, long form, const int8_t *of_rows) {
    if (bits_of(form) == 8) {
        memcpy(codes, of_rows, PANEL);
        return;
    }
    for (long j = 0; j < LANES; j++) codes[j] = (of_rows[j] & 15) | (of_rows[j + LANES] & 15) << 4;
}

/* codes (N, K), scales and minima (N, K / block) into panels; minima is NULL for a form without.
   `out` has room for all of the last panel. */
void pack_quantised(const int8_t *codes, const float *scales, const float *minima, char *out,
                    long form, long N, long K) {
    long block = block_of(form), blocks = K / block, panels = (N + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++) {
        for (long b = 0; b < blocks; b++) {
            char *at = out + (p * blocks + b) * block_bytes(form);
            float *scale = (float *)at, *minimum = scale + PANEL;
            for (long j = 0; j < PANEL; j++) {
                long row = p * PANEL + j;
                scale[j] = row < N ? scales[row * blocks + b] : 0;
                if (minima) minimum[j] = row < N ? minima[row * blocks + b] : 0;
            }
            for (long i = 0; i < block; i++) {
                int8_t of_rows[PANEL];
                for (long j = 0; j < PANEL; j++) {
                    long row = p * PANEL + j;
                    of_rows[j] = row < N ? codes[row * K + b * block + i] : 0;
                }
                put_codes(at + scale_bytes(form) + i * code_bytes(form), form, of_rows);
            }
        }
    }
}

/* y (K): row j of a panel */
void quantised_row(const char *panel, long form, long j, float *y, long K) {
    long block = block_of(form);
    for (long first = 0; first < K; first += block, panel += block_bytes(form)) {
        const float *scale = (const float *)panel, *minimum = scale + PANEL;
        const char *codes = panel + scale_bytes(form);
        for (long i = 0; i < block; i++, codes += code_bytes(form)) {
            float number = scale[j] * (float)code_at(codes, form, j);
            y[first + i] = has_minima(form) ? number - minimum[j] : number;
        }
    }
}

/* ---- products */

/* A panel's codes of one input as fp32: rows 0 ... LANES - 1, and the others */
INLINE void decoded_codes(const long form, const char *codes, vec *a, vec *b) {
    if (bits_of(form) == 8) {
        *a = as_floats(signed_bytes(codes));
        *b = as_floats(signed_bytes(codes + LANES));
    } else if (has_minima(form)) {
        bits pairs = unsigned_bytes(codes);
        *a = as_floats(lower_4(pairs));
        *b = as_floats(down(pairs, 4));
    } else {
        bits pairs = signed_bytes(codes); /* the sign of the upper code fills the word */
        *a = as_floats(down_signed(up(pairs, 28), 28));
        *b = as_floats(down_signed(pairs, 4));
    }
}

/* A panel's numbers at one input, from the scales of its block. A product and a difference, never
   one fused instruction: llama.cpp rounds twice. */
INLINE void decoded(const long form, const float *scales, const char *codes, vec *a, vec *b) {
    decoded_codes(form, codes, a, b);
    *a = mul(*a, load(scales));
    *b = mul(*b, load(scales + LANES));
    if (has_minima(form)) {
        *a = sub(*a, load(scales + PANEL));
        *b = sub(*b, load(scales + PANEL + LANES));
    }
}

/* out (m, PANEL) = m <= ROWS rows of x, times one panel; the sums are those of linear.c.
   form: with bits and minima known to the compiler, its block not */
INLINE void tile(const int m, const long kind, const long block, const float *x, const char *w,
                 float *out, long K) {
    vec total[ROWS][2], sums[ROWS][2];
    for (long from = 0; from < K; from += CHAIN) {
        EACH for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = all(0);
        for (long first = from; first < least(from + CHAIN, K); first += block) {
            const float *scales = (const float *)w;
            const char *end = w + scale_bytes(kind) + block * code_bytes(kind);
            for (const char *line = w; line < end; line += 64)
                _mm_prefetch(line + AHEAD, _MM_HINT_T1);
            const char *codes = w + scale_bytes(kind);
            for (long k = first; k < first + block; k++, codes += code_bytes(kind)) {
                vec a, b;
                const float *four[3] = {x + k, x + k + 4 * K, x + k + 8 * K}; /* as in linear.c */
                __asm__("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]));
                decoded(kind, scales, codes, &a, &b);
                EACH for (int i = 0; i < m; i++) {
                    vec one = all(four[i / 4][i % 4 * K]);
                    sums[i][0] = fma3(a, one, sums[i][0]);
                    sums[i][1] = fma3(b, one, sums[i][1]);
                }
            }
            w = end;
        }
        EACH for (int i = 0; i < m; i++)
            EACH for (int j = 0; j < 2; j++)
                total[i][j] = from ? add(total[i][j], sums[i][j]) : sums[i][j];
    }
    EACH for (int i = 0; i < m; i++)
        EACH for (int j = 0; j < 2; j++) store(out + i * PANEL + j * LANES, total[i][j]);
}

/* A panel decoded to fp32 */
INLINE void widen(const long kind, const long block, const char *w, float *wide, long K) {
    for (long first = 0; first < K; first += block) {
        const float *scales = (const float *)w;
        const char *codes = w + scale_bytes(kind);
        for (long i = 0; i < block; i++, codes += code_bytes(kind), wide += PANEL) {
            vec a, b;
            decoded(kind, scales, codes, &a, &b);
            store(wide, a);
            store(wide + LANES, b);
        }
        w = codes;
    }
}

/* The kinds of forms: bits, + 1 with minima */
#define EACH_KIND(DO) DO(4) DO(5) DO(8) DO(9)

#define CASE(m) case m: tile(m, kind, block, x, w, out, K); break;
INLINE void tile_of(const long kind, long block, long m, const float *x, const char *w, float *out,
                    long K) {
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

void quantised_tile(long form, long m, const float *x, const char *w, float *out, long K) {
    long block = block_of(form);
#define KIND(kind) case kind: tile_of(kind, block, m, x, w, out, K); break;
    switch (form & 15) { EACH_KIND(KIND) }
#undef KIND
}

void widen_quantised(const char *panel, long form, float *wide, long K) {
    long block = block_of(form);
#define KIND(kind) case kind: widen(kind, block, panel, wide, K); break;
    switch (form & 15) { EACH_KIND(KIND) }
#undef KIND
}
