/* Products with packed weights      y (T, N) = x (T, K) W^T + bias (N), or without where it is NULL

   W (N, K) is stored in panels of PANEL of its rows: all numbers of a panel for k = 0, then those
   for k = 1, ... so that a product reads a panel once, from front to back. The last panel is filled
   up with rows of 0. A quantised weight is stored as quantised.c says; of any other a number takes
   as many bytes as hold every number of its weight exactly:
       2   bf16: the upper half of the fp32 value; rows j and j + LANES of a panel share a word,
           and one instruction makes either of them fp32
       3   the upper three bytes: enough for fp16
       4   fp32

   Every y is a sum of chains: a chain is CHAIN fused multiply-adds over successive k, beginning
   with 0, and the chains are added in order, then the bias. So the bits of y do not depend on T, on
   the position of its row, or on the number of threads. (One chain over all of K would double the
   rounding error.)
   A chunk of work is a panel: each column of y is computed by one thread.

   T = tokens, K = inputs, N = outputs, P = panels */

#include "panel.h"

#define BLOCK (44 * ROWS) /* tokens multiplied by a panel while it is in the cache */
#define WIDENED 4 /* from so many tiles on, converting a panel to fp32 once is faster */

long panel_columns(void) { return PANEL; }

/* ---- packing */

/* The address in a panel of the upper bytes of its row j at k */
INLINE char *place(char *panel, long bytes, long j, long k) {
    long column = bytes == 2 ? j % LANES * 2 + j / LANES : j; /* pairs share a word */
    long number = k * PANEL + column;
    return panel + number * bytes;
}

/* w (N, K) fp32, as words, into panels: `out` has room for all of the last panel. */
void pack(const uint32_t *w, char *out, long bytes, long N, long K) {
    long panels = (N + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < panels; p++) {
        char *panel = out + p * K * PANEL * bytes;
        for (long j = 0; j < PANEL; j++) {
            long row = p * PANEL + j;
            for (long k = 0; k < K; k++) {
                uint32_t word = row < N ? w[row * K + k] : 0;
                const char *upper = (char *)&word + 4 - bytes; /* little-endian */
                memcpy(place(panel, bytes, j, k), upper, bytes);
            }
        }
    }
}

/* y (n, K) fp32, as words: rows rows[i] of W, bit for bit. For embeddings, and for unpacking. */
void look_up(char *w, long form, const int64_t *rows, uint32_t *y, long n, long K) {
#pragma omp parallel for schedule(static) if (n > 64)
    for (long i = 0; i < n; i++) {
        char *panel = w + rows[i] / PANEL * panel_bytes(form, K);
        long j = rows[i] % PANEL;
        if (block_of(form)) {
            quantised_row(panel, form, j, (float *)(y + i * K), K);
            continue;
        }
        for (long k = 0; k < K; k++) {
            uint32_t word = 0;
            char *upper = (char *)&word + 4 - form;
            memcpy(upper, place(panel, form, j, k), form);
            y[i * K + k] = word;
        }
    }
}

/* ---- products */

/* The numbers of a panel at k as fp32, in two vectors */
INLINE void numbers(const long bytes, const char *panel, long k, vec *a, vec *b) {
    const char *at = panel + k * PANEL * bytes;
    if (bytes == 2) {
        bits words = load_bits(at);
        *a = as_vec(up(words, 16));
        *b = as_vec(upper_half(words));
    } else if (bytes == 3) {
        *a = load3(at);
        *b = load3(at + 3 * LANES);
    } else {
        *a = load((const float *)at);
        *b = load((const float *)at + LANES);
    }
}

/* Memory to prefetch during a tile: for every k, `step` bytes from at + k * step on */
typedef struct { const char *at; long step; } ahead;

/* out (m, PANEL) = m <= ROWS rows of x, times one panel */
INLINE void tile(const int m, const long bytes, const ahead next, const float *x, const char *w,
                 float *out, long K) {
    vec total[ROWS][2], sums[ROWS][2];
    for (long from = 0; from < K; from += CHAIN) {
        EACH for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = all(0);
        for (long k = from; k < least(from + CHAIN, K); k++) {
            vec a, b;
            /* One address for every four rows, hidden from the compiler: with an address for every
               row it runs out of general registers, which costs 6 %. */
            const float *four[3] = {x + k, x + k + 4 * K, x + k + 8 * K};
            __asm__("" : "+r"(four[0]), "+r"(four[1]), "+r"(four[2]));
            _mm_prefetch(next.at + k * next.step, _MM_HINT_T1);
            if (next.step > 64) _mm_prefetch(next.at + k * next.step + 64, _MM_HINT_T1);
            numbers(bytes, w, k, &a, &b);
            EACH for (int i = 0; i < m; i++) {
                vec one = all(four[i / 4][i % 4 * K]);
                sums[i][0] = fma3(a, one, sums[i][0]);
                sums[i][1] = fma3(b, one, sums[i][1]);
            }
        }
        EACH for (int i = 0; i < m; i++)
            EACH for (int j = 0; j < 2; j++)
                total[i][j] = from ? add(total[i][j], sums[i][j]) : sums[i][j];
    }
    EACH for (int i = 0; i < m; i++)
        EACH for (int j = 0; j < 2; j++) store(out + i * PANEL + j * LANES, total[i][j]);
}

#define CASE(m) case m: tile(m, bytes, next, x, w, out, K); break;
INLINE void tiles(const long bytes, const ahead next, long m, const float *x, const char *w,
                  float *out, long K) {
    switch (m) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

#define FORM(bytes)                                                                         \
    static void tiles##bytes(ahead next, long m, const float *x, const char *w, float *out, \
                             long K) {                                                      \
        tiles(bytes, next, m, x, w, out, K);                                                \
    }
FORM(2)
FORM(3)
FORM(4)

/* A panel converted to fp32 */
static void widen(const char *panel, long form, float *wide, long K) {
    if (block_of(form)) {
        widen_quantised(panel, form, wide, K);
        return;
    }
    for (long k = 0; k < K; k++) {
        vec a, b;
        if (form == 2)
            numbers(2, panel, k, &a, &b);
        else
            numbers(3, panel, k, &a, &b);
        store(wide + k * PANEL, a);
        store(wide + k * PANEL + LANES, b);
    }
}

/* Tokens first ... end - 1 of a product */
typedef struct {
    const float *x;
    const char *w;
    const float *bias;
    float *y;
    long form, first, end, K, N;
} product;

/* A thread's own memory: a panel's columns of y, and a panel as fp32 */
long linear_room(long T, long K) { return (least(T, BLOCK) + K) * PANEL; }

static void compute_panel(worker *me, const void *what, long p) {
    const product *a = what;
    long T = a->end - a->first;
    long tiles = (T + ROWS - 1) / ROWS;
    long size = panel_bytes(a->form, a->K);
    const char *panel = a->w + p * size;
    float *wide = NULL; /* the panel in fp32, after the results in this thread's memory */
    if (a->form != 4 && tiles >= WIDENED) {
        wide = me->own + T * PANEL;
        widen(panel, a->form, wide, a->K);
    }
    long t = a->first;
    for (long i = 0; i < tiles && !late(me); i++) {
        long left = tiles - i;
        long m = (a->end - t + left - 1) / left; /* rows of this tile: all are about equal */
        const float *in = a->x + t * a->K;
        float *out = me->own + (t - a->first) * PANEL;
        /* A single tile prefetches its own panel; several prefetch a part each of the next one. */
        ahead next;
        next.at = panel + (tiles == 1 ? AHEAD : size + size / tiles * i);
        next.step = (input_bytes(a->form) + tiles - 1) / tiles;
        if (wide)
            tiles4(next, m, in, (char *)wide, out, a->K);
        else if (block_of(a->form))
            quantised_tile(a->form, m, in, panel, out, a->K);
        else if (a->form == 2)
            tiles2(next, m, in, panel, out, a->K);
        else if (a->form == 3)
            tiles3(next, m, in, panel, out, a->K);
        else
            tiles4(next, m, in, panel, out, a->K);
        t += m;
    }
}

/* As put_panel, with the bias added */
static void put_biased(const product *a, const float *out, long p, long width) {
    const float *bias = a->bias + p * PANEL;
    vec b0 = load_some(bias, least(width, LANES)), b1 = all(0);
    if (width > LANES) b1 = load_some(bias + LANES, width - LANES);
    for (long t = a->first; t < a->end; t++, out += PANEL) {
        float *y = a->y + t * a->N + p * PANEL;
        store_some(y, add(load(out), b0), least(width, LANES));
        if (width > LANES) store_some(y + LANES, add(load(out + LANES), b1), width - LANES);
    }
}

static void put_panel(const worker *me, const void *what, long p) {
    const product *a = what;
    long width = least(PANEL, a->N - p * PANEL);
    if (a->bias) {
        put_biased(a, me->own, p, width);
        return;
    }
    for (long t = a->first; t < a->end; t++) {
        const float *out = me->own + (t - a->first) * PANEL;
        float *y = a->y + t * a->N + p * PANEL;
        store_some(y, load(out), least(width, LANES));
        if (width > LANES) store_some(y + LANES, load(out + LANES), width - LANES);
    }
}

void share_linear(worker *me, const float *x, const char *w, const float *bias, float *y,
                  long form, long T, long K, long N) {
    for (long first = 0; first < T; first += BLOCK) {
        product a = {x, w, bias, y, form, first, least(first + BLOCK, T), K, N};
        share(me, (N + PANEL - 1) / PANEL, compute_panel, put_panel, &a);
    }
}

static void all_of(worker *me, const void *what) {
    const product *a = what;
    share_linear(me, a->x, a->w, a->bias, a->y, a->form, a->end, a->K, a->N);
}

int linear(const float *x, const char *w, const float *bias, float *y, long form, long T, long K,
           long N) {
    product a = {x, w, bias, y, form, 0, T, K, N};
    return together(0, linear_room(T, K), all_of, &a);
}
