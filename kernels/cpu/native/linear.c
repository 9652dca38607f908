/* Products with packed weights      y (T, N) = x (T, K) W^T

   W (N, K) lies in panels of PANEL of its rows: all of a panel's numbers for k = 0, then those for
   k = 1, ... so that a product reads it once, from front to back. What a last panel lacks is 0.
   A number takes as many bytes as its weight needs to be held exactly:
       2   bf16: the upper half of the fp32 it means; rows j and j + LANES of a panel share a word,
           which one instruction each makes fp32
       3   the upper three bytes (what fp16 holds, and most 4-bit quantised weights)
       4   fp32

   Every y is a sum of chains over CHAIN numbers k each of fused multiply-adds from 0 on, added in
   order: its bits do not depend on T, on the place of its row, or on the number of threads. (One
   chain over all of K would double the rounding error.) Threads share out panels: each column of y
   is computed by one.

   T = tokens, K = inputs, N = outputs, P = panels */

#include "native.h"
#include "vec.h"

#define PANEL (2 * LANES)
#if LANES == 16
#define ROWS 12 /* x 2 vectors of sums, of 32 registers */
#else
#define ROWS 6 /* of 16 */
#endif
#define CHAIN 128
#define BLOCK (44 * ROWS) /* tokens whose x is passed by a panel while the panel is near */
#define WIDENED 4 /* tiles from which on a panel is better made fp32 once */
#define AHEAD 4096 /* bytes: the hardware's own prefetch leaves a third of the bandwidth */

long panel_columns(void) { return PANEL; }

/* ---- packing */

/* Where the upper bytes of row j of a panel at k lie */
INLINE char *place(char *panel, long bytes, long j, long k) {
    long number = k * PANEL + (bytes == 2 ? j % LANES * 2 + j / LANES : j);
    return panel + number * bytes;
}

void pack(const uint32_t *w, char *out, long bytes, long N, long K) {
#pragma omp parallel for schedule(static)
    for (long p = 0; p < (N + PANEL - 1) / PANEL; p++)
        for (long j = 0; j < PANEL; j++)
            for (long k = 0; k < K; k++) {
                uint32_t a = p * PANEL + j < N ? w[(p * PANEL + j) * K + k] : 0;
                memcpy(place(out + p * K * PANEL * bytes, bytes, j, k), (char *)&a + 4 - bytes,
                       bytes);
            }
}

/* Row rows[i] of W to y (n, K), as it was: a look-up of embeddings, and the way back. */
void look_up(char *w, long bytes, const int64_t *rows, uint32_t *y, long n, long K) {
#pragma omp parallel for schedule(static) if (n > 64)
    for (long i = 0; i < n; i++)
        for (long k = 0; k < K; k++) {
            uint32_t a = 0;
            memcpy((char *)&a + 4 - bytes,
                   place(w + rows[i] / PANEL * K * PANEL * bytes, bytes, rows[i] % PANEL, k),
                   bytes);
            y[i * K + k] = a;
        }
}

/* ---- products */

/* The numbers of a panel at k, as two vectors. */
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

/* What to ask memory for during a tile: `step` bytes from `at` on for every k. */
typedef struct { const char *at; long step; } ahead;

/* m <= ROWS rows of x by one panel: out (m, PANEL) */
INLINE void tile(const int m, const long bytes, const ahead next, const float *x, const char *w,
                 float *out, long K) {
    vec total[ROWS][2], sums[ROWS][2];
    for (long from = 0; from < K; from += CHAIN) {
        EACH for (int i = 0; i < m; i++) sums[i][0] = sums[i][1] = all(0);
        for (long k = from; k < least(from + CHAIN, K); k++) {
            vec a, b;
            /* an address for four rows each, behind the compiler's back: with one for every row
               the general registers do not suffice, which costs 6 % */
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

/* A panel as fp32 */
static void widen(const char *panel, long bytes, float *wide, long K) {
    for (long k = 0; k < K; k++) {
        vec a, b;
        if (bytes == 2)
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
    float *y;
    long bytes, first, end, K, N;
} product;

/* A thread's own memory: a panel's columns of y, and a panel as fp32 */
long linear_room(long T, long K) { return (least(T, BLOCK) + K) * PANEL; }

static void compute_panel(worker *me, const void *what, long p) {
    const product *a = what;
    long tiles = (a->end - a->first + ROWS - 1) / ROWS, size = a->K * PANEL * a->bytes;
    const char *panel = a->w + p * size;
    float *wide = a->bytes < 4 && tiles >= WIDENED ? me->own + (a->end - a->first) * PANEL : NULL;
    if (wide) widen(panel, a->bytes, wide, a->K);
    for (long i = 0, t = a->first, m; i < tiles && !late(me); i++, t += m) {
        m = (a->end - t + tiles - i - 1) / (tiles - i); /* of about the same size */
        const float *in = a->x + t * a->K;
        float *out = me->own + (t - a->first) * PANEL;
        /* one tile asks for what it needs soon, several share out the next panel */
        ahead next = {panel + (tiles == 1 ? AHEAD : size + size / tiles * i),
                      (PANEL * a->bytes + tiles - 1) / tiles};
        if (wide)
            tiles4(next, m, in, (char *)wide, out, a->K);
        else if (a->bytes == 2)
            tiles2(next, m, in, panel, out, a->K);
        else if (a->bytes == 3)
            tiles3(next, m, in, panel, out, a->K);
        else
            tiles4(next, m, in, panel, out, a->K);
    }
}

static void put_panel(const worker *me, const void *what, long p) {
    const product *a = what;
    long width = least(PANEL, a->N - p * PANEL);
    for (long t = a->first; t < a->end; t++) {
        const float *out = me->own + (t - a->first) * PANEL;
        float *y = a->y + t * a->N + p * PANEL;
        store_some(y, load(out), least(width, LANES));
        if (width > LANES) store_some(y + LANES, load(out + LANES), width - LANES);
    }
}

void share_linear(worker *me, const float *x, const char *w, float *y, long bytes, long T, long K,
                  long N) {
    for (long first = 0; first < T; first += BLOCK) {
        product a = {x, w, y, bytes, first, least(first + BLOCK, T), K, N};
        share(me, (N + PANEL - 1) / PANEL, compute_panel, put_panel, &a);
    }
}

static void all_of(worker *me, const void *what) {
    const product *a = what;
    share_linear(me, a->x, a->w, a->y, a->bytes, a->end, a->K, a->N);
}

int linear(const float *x, const char *w, float *y, long bytes, long T, long K, long N) {
    product a = {x, w, y, bytes, 0, T, K, N};
    return together(0, linear_room(T, K), all_of, &a);
}
