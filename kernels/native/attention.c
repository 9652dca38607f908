/* Attention over a paged cache, and the writing of it. The mathematics stands in
   cached_attention.py.

   A query head is computed by one thread and meets its keys one after the other: a score is a sum
   over d in one order, the sum of weights and of weighted values one over the keys in theirs
   (even and odd keys of a page apart). So its bits depend on its row and on the size of a page,
   and on nothing else: not on where the row was cut into forwards, what was drafted with it, its
   neighbours, or the threads. Three passes over the context: scores, weights, values.

   qkv (T, (H + 2G) d)    k, v (pages, G, page, d)    o (T, H d)    table (B, P)
   cu (B + 1): row i's new tokens are cu[i] .. cu[i + 1]    contexts (B): tokens before them
   T = new tokens, B = rows, H = query heads, G = key/value heads, n = H / G, d = head size */

#include <math.h>
#include <omp.h>

#include "native.h"
#include "vec.h"

void kv_write(const float *qkv, float *k, float *v, const int64_t *pages, const int64_t *offsets,
              long T, long H, long G, long d, long page) {
#pragma omp parallel for schedule(static) if (T > 64)
    for (long t = 0; t < T; t++)
        for (long g = 0; g < G; g++) {
            long to = ((pages[t] * G + g) * page + offsets[t]) * d;
            const float *from = qkv + (t * (H + 2 * G) + H + g) * d;
            memcpy(k + to, from, d * sizeof(float));
            memcpy(v + to, from + G * d, d * sizeof(float));
        }
}

/* scores[j] = q . k_j for `count` keys of a page, and room up to whole vectors of scores; c vectors
   hold a head */
INLINE void score(const long c, const float *q, const float *k, float *scores, long count) {
    for (long first = 0; first < count; first += LANES) {
        vec each[LANES];
        long here = least(LANES, count - first);
        const float *keys = k + first * c * LANES;
        if (here == LANES)
            EACH for (int j = 0; j < LANES; j++) {
                each[j] = mul(load(q), load(keys + j * c * LANES));
                EACH for (long i = 1; i < c; i++)
                    each[j] = fma3(load(q + i * LANES), load(keys + (j * c + i) * LANES), each[j]);
            }
        else
            EACH for (int j = 0; j < LANES; j++) {
                each[j] = all(0);
                if (j >= here) continue;
                each[j] = mul(load(q), load(keys + j * c * LANES));
                for (long i = 1; i < c; i++)
                    each[j] = fma3(load(q + i * LANES), load(keys + (j * c + i) * LANES), each[j]);
            }
        store(scores + first, sums(each));
    }
}

/* out += sum of weights[j] v_j; even and odd keys in sums of their own, which halves the wait */
INLINE void gather(const long c, const float *weights, const float *v, float *out, long count) {
    vec even[c], odd[c];
    EACH for (long i = 0; i < c; i++) {
        even[i] = load(out + 2 * i * LANES);
        odd[i] = load(out + (2 * i + 1) * LANES);
    }
    long j = 0;
    for (; j + 1 < count; j += 2) {
        vec a = all(weights[j]), b = all(weights[j + 1]);
        EACH for (long i = 0; i < c; i++) {
            even[i] = fma3(a, load(v + (j * c + i) * LANES), even[i]);
            odd[i] = fma3(b, load(v + ((j + 1) * c + i) * LANES), odd[i]);
        }
    }
    if (j < count)
        EACH for (long i = 0; i < c; i++)
            even[i] = fma3(all(weights[j]), load(v + (j * c + i) * LANES), even[i]);
    EACH for (long i = 0; i < c; i++) {
        store(out + 2 * i * LANES, even[i]);
        store(out + (2 * i + 1) * LANES, odd[i]);
    }
}

#define SIZES(call)                                                 \
    switch (c) {                                                    \
        case 4: { enum { C = 4 }; call; break; }                    \
        case 8: { enum { C = 8 }; call; break; }                    \
        case 16: { enum { C = 16 }; call; break; }                  \
        default: { const long C = c; call; }                        \
    }
static void scores_of(long c, const float *q, const float *k, float *scores, long count) {
    SIZES(score(C, q, k, scores, count))
}
static void values_of(long c, const float *weights, const float *v, float *out, long count) {
    SIZES(gather(C, weights, v, out, count))
}

/* Scores to weights e^(score - largest), of `length` ones; their sum. Room up to whole vectors. */
static float weights_of(float *scores, long length) {
    vec largest = all(-INFINITY), total = all(0);
    for (long i = length; i % LANES; i++) scores[i] = -INFINITY;
    for (long i = 0; i < length; i += LANES) largest = larger(largest, load(scores + i));
    vec most = all(top(largest));
    for (long i = 0; i < length; i += LANES) {
        vec e = exponential(sub(load(scores + i), most));
        if (length - i < LANES) e = load_some((float *)&e, length - i);
        store(scores + i, e);
        total = add(total, e);
    }
    return sum(total);
}

/* The query heads of key/value heads g0 ... g1 - 1, of a token that sees `length` keys; q and o are
   those of its head 0. Page by page, whose heads lie side by side. */
static void attend(const float *q, const float *k, const float *v, float *o, const int64_t *table,
                   float *scratch, long length, long room, long n, long G, long g0, long g1,
                   long d, long page) {
    long c = d / LANES, first = g0 * n, heads = (g1 - g0) * n;
    float *scaled = scratch + heads * room, *out = scaled + heads * d, total[heads];
    for (long i = 0; i < heads * d; i += LANES)
        store(scaled + i, mul(load(q + first * d + i), all(1 / sqrtf(d))));
    memset(out, 0, 2 * heads * d * sizeof(float));
    for (long b = 0; b * page < length; b++)
        for (long h = 0; h < heads; h++)
            scores_of(c, scaled + h * d, k + (table[b] * G + g0 + h / n) * page * d,
                      scratch + h * room + b * page, least(page, length - b * page));
    for (long h = 0; h < heads; h++) total[h] = weights_of(scratch + h * room, length);
    for (long b = 0; b * page < length; b++)
        for (long h = 0; h < heads; h++)
            values_of(c, scratch + h * room + b * page,
                      v + (table[b] * G + g0 + h / n) * page * d, out + 2 * h * d,
                      least(page, length - b * page));
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < c; i++) {
            const float *pair = out + 2 * (h * c + i) * LANES;
            store(o + (first + h) * d + i * LANES,
                  quotient(add(load(pair), load(pair + LANES)), all(total[h])));
        }
}

#define PIECE 16 /* tokens of a row that one thread takes in turn: their keys are at hand */

/* 0, or -1 where memory for the scores could not be had. */
int cached_attention(const float *qkv, const float *k, const float *v, float *o,
                     const int64_t *table, const int32_t *cu, const int32_t *contexts, long B,
                     long P, long H, long G, long d, long page) {
    long n = H / G, longest = 0, pieces = 0, failed = 0;
    struct { int32_t row, first; } *piece = malloc((cu[B] + 1) * sizeof *piece);
    if (!piece) return -1;
    for (long b = 0; b < B; b++) {
        for (long t = cu[b]; t < cu[b + 1]; t += PIECE) {
            piece[pieces].row = b;
            piece[pieces++].first = t;
        }
        long length = contexts[b] + cu[b + 1] - cu[b];
        if (length > longest) longest = length;
    }
    long room = longest + LANES; /* a page's scores may be written beyond it by a vector */
    /* few rows are shared out by heads, too: memory is read in shorter runs then */
    long together = B >= 4 * omp_get_max_threads() ? G : 1, parts = G / together;
#pragma omp parallel reduction(| : failed)
    {
        float *scratch = malloc(together * n * (room + 3 * d) * sizeof(float));
        failed = !scratch;
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < pieces * parts; task++) {
            long i = task % pieces, g = task / pieces * together, b = piece[i].row;
            long first = piece[i].first, end = least(first + PIECE, cu[b + 1]);
            for (long t = first; scratch && t < end; t++)
                attend(qkv + t * (H + 2 * G) * d, k, v, o + t * H * d, table + b * P, scratch,
                       contexts[b] + t - cu[b] + 1, room, n, G, g, g + together, d, page);
        }
        free(scratch);
    }
    free(piece);
    return failed ? -1 : 0;
}
