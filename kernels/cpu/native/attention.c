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

/* ---- writing */

typedef struct {
    const float *qkv;
    float *k, *v;
    const int64_t *pages, *offsets;
    long T, H, G, d, page;
} written;

#define TOKENS 8 /* of a chunk */

static void compute_nothing(worker *me, const void *what, long chunk) {}

static void put_tokens(const worker *me, const void *what, long chunk) {
    const written *a = what;
    long G = a->G, d = a->d;
    for (long t = chunk * TOKENS; t < least((chunk + 1) * TOKENS, a->T); t++)
        for (long g = 0; g < G; g++) {
            long to = ((a->pages[t] * G + g) * a->page + a->offsets[t]) * d;
            const float *from = a->qkv + (t * (a->H + 2 * G) + a->H + g) * d;
            memcpy(a->k + to, from, d * sizeof(float));
            memcpy(a->v + to, from + G * d, d * sizeof(float));
        }
}

static void all_written(worker *me, const void *what) {
    const written *a = what;
    share(me, (a->T + TOKENS - 1) / TOKENS, compute_nothing, put_tokens, a);
}

void share_kv_write(worker *me, const float *qkv, float *k, float *v, const int64_t *pages,
                    const int64_t *offsets, long T, long H, long G, long d, long page) {
    written a = {qkv, k, v, pages, offsets, T, H, G, d, page};
    all_written(me, &a);
}

int kv_write(const float *qkv, float *k, float *v, const int64_t *pages, const int64_t *offsets,
             long T, long H, long G, long d, long page) {
    written a = {qkv, k, v, pages, offsets, T, H, G, d, page};
    return together(T <= 64, 0, all_written, &a);
}

/* ---- reading */

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

/* The query heads of key/value heads g0 ... g1 - 1, of a token that sees `length` keys; q is that
   of its head 0, o that of head g0 n. Page by page, whose heads lie side by side. */
static void attend(const worker *me, const float *q, const float *k, const float *v, float *o,
                   const int64_t *table, float *scratch, long length, long room, long n, long G,
                   long g0, long g1, long d, long page) {
    long c = d / LANES, first = g0 * n, heads = (g1 - g0) * n;
    float *scaled = scratch + heads * room, *out = scaled + heads * d, total[heads];
    for (long i = 0; i < heads * d; i += LANES)
        store(scaled + i, mul(load(q + first * d + i), all(1 / sqrtf(d))));
    memset(out, 0, 2 * heads * d * sizeof(float));
    for (long b = 0; b * page < length && !late(me); b++)
        for (long h = 0; h < heads; h++)
            scores_of(c, scaled + h * d, k + (table[b] * G + g0 + h / n) * page * d,
                      scratch + h * room + b * page, least(page, length - b * page));
    for (long h = 0; h < heads; h++) total[h] = weights_of(scratch + h * room, length);
    for (long b = 0; b * page < length && !late(me); b++)
        for (long h = 0; h < heads; h++)
            values_of(c, scratch + h * room + b * page,
                      v + (table[b] * G + g0 + h / n) * page * d, out + 2 * h * d,
                      least(page, length - b * page));
    for (long h = 0; h < heads; h++)
        for (long i = 0; i < c; i++) {
            const float *pair = out + 2 * (h * c + i) * LANES;
            store(o + h * d + i * LANES,
                  quotient(add(load(pair), load(pair + LANES)), all(total[h])));
        }
}

#define PIECE 16 /* tokens of a row that one thread takes in turn: their keys are at hand */

/* What is known before the first phase. 0, or -1 where memory could not be had; free(a->piece). */
int cut_attention(attention *a) {
    long longest = 0;
    a->pieces = 0;
    a->piece = malloc((a->cu[a->B] + 1) * sizeof *a->piece);
    if (!a->piece) return -1;
    for (long b = 0; b < a->B; b++) {
        for (long t = a->cu[b]; t < a->cu[b + 1]; t += PIECE) {
            a->piece[a->pieces].row = b;
            a->piece[a->pieces++].first = t;
        }
        long length = a->contexts[b] + a->cu[b + 1] - a->cu[b];
        if (length > longest) longest = length;
    }
    a->room = longest + LANES; /* a page's scores may be written beyond it by a vector */
    /* few rows are shared out by heads, too: memory is read in shorter runs then */
    a->together = a->B >= 4 * omp_get_max_threads() ? a->G : 1;
    return 0;
}

/* A thread's own memory: a piece's outputs, and scratch for a token */
long attention_room(const attention *a) {
    return a->together * a->H / a->G * (PIECE * a->d + a->room + 3 * a->d);
}

static void compute_piece(worker *me, const void *what, long chunk) {
    const attention *a = what;
    long i = chunk % a->pieces, g = chunk / a->pieces * a->together, b = a->piece[i].row;
    long first = a->piece[i].first, end = least(first + PIECE, a->cu[b + 1]);
    long n = a->H / a->G, width = a->together * n * a->d;
    for (long t = first; t < end && !late(me); t++)
        if (!a->place || a->place[t] >= 0)
            attend(me, a->qkv + t * (a->H + 2 * a->G) * a->d, a->k, a->v,
                   me->own + (t - first) * width, a->table + b * a->P, me->own + PIECE * width,
                   a->contexts[b] + t - a->cu[b] + 1, a->room, n, a->G, g, g + a->together, a->d,
                   a->page);
}

static void put_piece(const worker *me, const void *what, long chunk) {
    const attention *a = what;
    long i = chunk % a->pieces, g = chunk / a->pieces * a->together, b = a->piece[i].row;
    long first = a->piece[i].first, end = least(first + PIECE, a->cu[b + 1]);
    long n = a->H / a->G, width = a->together * n * a->d;
    for (long t = first; t < end; t++) {
        long to = a->place ? a->place[t] : t;
        if (to >= 0)
            memcpy(a->o + (to * a->H + g * n) * a->d, me->own + (t - first) * width,
                   width * sizeof(float));
    }
}

void share_attention(worker *me, const attention *a) {
    share(me, a->pieces * (a->G / a->together), compute_piece, put_piece, a);
}

static void all_attention(worker *me, const void *what) { share_attention(me, what); }

int cached_attention(const float *qkv, const float *k, const float *v, float *o,
                     const int64_t *table, const int32_t *cu, const int32_t *contexts, long B,
                     long P, long H, long G, long d, long page) {
    attention a = {qkv, k, v, o, table, cu, contexts, B, P, H, G, d, page};
    if (cut_attention(&a)) return -1;
    int failed = together(0, attention_room(&a), all_attention, &a);
    free(a.piece);
    return failed;
}
