/* Attention over a paged cache, and the writing of that cache. The mathematics is in
   kernels/cached_attention/__init__.py.

   A query head is computed by one thread, in three passes over its context: scores, weights,
   values. A score is a sum over d in one order. The weights, and the weighted values, are added up
   in the order of the keys (values of even and odd keys of a page apart). So the bits of a result
   depend on its row and on the size of a page, and on nothing else: not on where the row was cut
   into forwards, on draft tokens beside it, on its neighbours or on the threads.

   qkv (T, (H + 2G) d)    k, v (pages, G, page, d)    o (T, H d)    table (B, P)
   cu (B + 1): row b's new tokens are cu[b] .. cu[b + 1] - 1    contexts (B): tokens before them
   T = new tokens, B = rows, H = query heads, G = key/value heads, n = H / G, d = head size
   page = tokens of a page, LANES = numbers of a vector, c = d / LANES vectors hold a head */

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
    long G = a->G, d = a->d, heads = a->H + 2 * G;
    long first = chunk * TOKENS, end = least(first + TOKENS, a->T);
    for (long t = first; t < end; t++) {
        const float *k = a->qkv + (t * heads + a->H) * d; /* of its key/value heads */
        const float *v = k + G * d;
        for (long g = 0; g < G; g++) {
            long line = (a->pages[t] * G + g) * a->page + a->offsets[t];
            memcpy(a->k + line * d, k + g * d, d * sizeof(float));
            memcpy(a->v + line * d, v + g * d, d * sizeof(float));
        }
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

/* scores[j] = q . k_j for `count` keys of a page. Scores are written in whole vectors: there has to
   be room for them. */
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

/* out += sum of weights[j] v_j over `count` keys of a page. Even and odd keys have sums of their
   own, so that an addition need not wait for the one before; they lie side by side in `out`. */
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

/* `call` with C = c, a constant for the usual head sizes: their loops are unrolled */
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

/* Turns `length` scores into weights e^(score - largest) and returns their sum. There has to be
   room up to a whole vector. */
static float weights_of(float *scores, long length) {
    for (long i = length; i % LANES; i++) scores[i] = -INFINITY;
    vec largest = all(-INFINITY);
    for (long i = 0; i < length; i += LANES) largest = larger(largest, load(scores + i));
    vec total = all(0);
    vec most = all(top(largest));
    for (long i = 0; i < length; i += LANES) {
        vec e = exponential(sub(load(scores + i), most));
        if (length - i < LANES) e = load_some((float *)&e, length - i);
        store(scores + i, e);
        total = add(total, e);
    }
    return sum(total);
}

/* One token that sees `length` keys, for the query heads of key/value heads g0 ... g1 - 1: q and o
   are those of these heads. Page by page, because the heads of a page lie side by side.
   scratch: scores (heads, room), scaled queries (heads, d), even and odd keys' sums (heads, 2 d) */
static void attend(const worker *me, const float *q, const float *k, const float *v, float *o,
                   const int64_t *table, float *scratch, long length, long room, long n, long G,
                   long g0, long g1, long d, long page) {
    long c = d / LANES, heads = (g1 - g0) * n;
    float *scores = scratch, *scaled = scores + heads * room, *out = scaled + heads * d;
    float total[heads];
    for (long i = 0; i < heads * d; i += LANES)
        store(scaled + i, mul(load(q + i), all(1 / sqrtf(d))));
    memset(out, 0, 2 * heads * d * sizeof(float));

    for (long b = 0; b * page < length && !late(me); b++) {
        long first = b * page, count = least(page, length - first), lines = table[b] * G + g0;
        for (long h = 0; h < heads; h++) {
            const float *keys = k + (lines + h / n) * page * d;
            scores_of(c, scaled + h * d, keys, scores + h * room + first, count);
        }
    }
    for (long h = 0; h < heads; h++) total[h] = weights_of(scores + h * room, length);
    for (long b = 0; b * page < length && !late(me); b++) {
        long first = b * page, count = least(page, length - first), lines = table[b] * G + g0;
        for (long h = 0; h < heads; h++) {
            const float *values = v + (lines + h / n) * page * d;
            values_of(c, scores + h * room + first, values, out + 2 * h * d, count);
        }
    }

    for (long h = 0; h < heads; h++)
        for (long i = 0; i < c; i++) {
            const float *pair = out + 2 * (h * c + i) * LANES;
            vec even_and_odd = add(load(pair), load(pair + LANES));
            store(o + h * d + i * LANES, quotient(even_and_odd, all(total[h])));
        }
}

#define PIECE 16 /* tokens of a row that one thread takes in turn: their keys are in its cache */

/* Cuts rows into pieces and sets the sizes, before the first phase. 0, or -1 where memory could not
   be had. The caller frees a->piece. */
int cut_attention(attention *a) {
    long longest = 0, tokens = a->cu[a->B];
    a->pieces = 0;
    a->piece = malloc((tokens + 1) * sizeof *a->piece);
    if (!a->piece) return -1;
    for (long b = 0; b < a->B; b++) {
        long start = a->cu[b], end = a->cu[b + 1];
        for (long t = start; t < end; t += PIECE) {
            a->piece[a->pieces].row = b;
            a->piece[a->pieces].first = t;
            a->pieces++;
        }
        long length = a->contexts[b] + end - start;
        if (length > longest) longest = length;
    }
    a->room = longest + LANES; /* a page's scores may be written beyond it by a vector */
    /* Few rows are also shared out by heads, although memory is then read in shorter runs. */
    a->together = a->B >= 4 * omp_get_max_threads() ? a->G : 1;
    return 0;
}

/* Floats of a thread's own memory: a piece's outputs, and scratch for a token (see attend) */
long attention_room(const attention *a) {
    long heads = a->together * a->H / a->G;
    return heads * (PIECE * a->d + a->room + 3 * a->d);
}

/* Chunk i + pieces * j: the tokens of piece i, for number j of the groups of `together` heads */
typedef struct {
    long row, first, end; /* tokens first ... end - 1 */
    long g, n, width;     /* the first key/value head; query heads of each; numbers of a token */
} chunk_of_attention;

static chunk_of_attention chunk_at(const attention *a, long chunk) {
    chunk_of_attention at;
    long i = chunk % a->pieces;
    at.row = a->piece[i].row;
    at.first = a->piece[i].first;
    at.end = least(at.first + PIECE, a->cu[at.row + 1]);
    at.g = chunk / a->pieces * a->together;
    at.n = a->H / a->G;
    at.width = a->together * at.n * a->d;
    return at;
}

static void compute_piece(worker *me, const void *what, long chunk) {
    const attention *a = what;
    chunk_of_attention at = chunk_at(a, chunk);
    const int64_t *table = a->table + at.row * a->P;
    float *scratch = me->own + PIECE * at.width;
    for (long t = at.first; t < at.end && !late(me); t++) {
        if (a->place && a->place[t] < 0) continue;
        const float *q = a->qkv + (t * (a->H + 2 * a->G) + at.g * at.n) * a->d;
        float *o = me->own + (t - at.first) * at.width;
        long length = a->contexts[at.row] + t - a->cu[at.row] + 1;
        attend(me, q, a->k, a->v, o, table, scratch, length, a->room, at.n, a->G, at.g,
               at.g + a->together, a->d, a->page);
    }
}

static void put_piece(const worker *me, const void *what, long chunk) {
    const attention *a = what;
    chunk_of_attention at = chunk_at(a, chunk);
    for (long t = at.first; t < at.end; t++) {
        long to = a->place ? a->place[t] : t;
        if (to < 0) continue;
        float *o = a->o + (to * a->H + at.g * at.n) * a->d;
        memcpy(o, me->own + (t - at.first) * at.width, at.width * sizeof(float));
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
