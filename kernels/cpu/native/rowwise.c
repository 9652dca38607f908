/* What a token meets alone: norm, rotation, SwiGLU. The mathematics stands in rms_norm.py, rope.py
   and swiglu.py. A row is computed by one thread, in an order that its length decides.

   T = tokens, D = model width, F = feed-forward width, H = query heads, G = key/value heads, d =
   head size */

#include <math.h>

#include "native.h"
#include "vec.h"

#define NUMBERS 4096 /* of a chunk: handing one out takes as long as some hundred */

static long rows_of(long width) { return NUMBERS / width + 1; } /* of a chunk */
static long chunks_of(long T, long width) { return (T + rows_of(width) - 1) / rows_of(width); }

/* A thread's own memory for rows of this width, or two of them and a number */
long rowwise_room(long width) { return rows_of(width) * (2 * width + 1); }

/* ---- norm */

typedef struct {
    const float *x, *residual, *w;
    const int64_t *rows;
    float *y, *h, *rstd;
    long T, D;
    float eps;
} norm;

static void compute_norm(worker *me, const void *what, long chunk) {
    const norm *a = what;
    long D = a->D, count = rows_of(D), first = chunk * count, end = least(first + count, a->T);
    float *y = me->own, *h = y + count * D, *rstd = h + count * D;
    for (long t = first; t < end; t++, y += D, h += D) {
        const float *in = a->x + t * D;
        if (a->residual) {
            const float *residual = a->residual + (a->rows ? a->rows[t] : t) * D;
            for (long i = 0; i < D; i += LANES) {
                long n = least(LANES, D - i);
                store_some(h + i, add(load_some(in + i, n), load_some(residual + i, n)), n);
            }
            in = h;
        }
        vec squares = all(0);
        for (long i = 0; i < D; i += LANES) {
            vec a = load_some(in + i, least(LANES, D - i));
            squares = fma3(a, a, squares);
        }
        float r = 1 / sqrtf(sum(squares) / D + a->eps);
        *rstd++ = r;
        for (long i = 0; i < D; i += LANES) {
            long n = least(LANES, D - i);
            vec normed = mul(load_some(in + i, n), all(r));
            store_some(y + i, mul(normed, load_some(a->w + i, n)), n);
        }
    }
}

static void put_norm(const worker *me, const void *what, long chunk) {
    const norm *a = what;
    long D = a->D, count = rows_of(D), first = chunk * count, n = least(count, a->T - first);
    const float *y = me->own, *h = y + count * D, *rstd = h + count * D;
    memcpy(a->y + first * D, y, n * D * sizeof(float));
    if (a->residual) memcpy(a->h + first * D, h, n * D * sizeof(float));
    memcpy(a->rstd + first, rstd, n * sizeof(float));
}

static void all_norms(worker *me, const void *what) {
    const norm *a = what;
    share(me, chunks_of(a->T, a->D), compute_norm, put_norm, a);
}

/* h = x + residual (x itself where there is none), y = h rstd w. Row t of x is met by row rows[t]
   of residual, by row t where rows is NULL. */
void share_rms_norm(worker *me, const float *x, const float *residual, const int64_t *rows,
                    const float *w, float *y, float *h, float *rstd, long T, long D, float eps) {
    norm a = {x, residual, w, rows, y, h, rstd, T, D, eps};
    all_norms(me, &a);
}

int rms_norm(const float *x, const float *residual, const float *w, float *y, float *h, float *rstd,
             long T, long D, float eps) {
    norm a = {x, residual, w, NULL, y, h, rstd, T, D, eps};
    return together(chunks_of(T, D) <= 1, rowwise_room(D), all_norms, &a);
}

/* ---- rotation */

typedef struct {
    float *qkv;
    const int64_t *positions;
    const float *cos_sin;
    long T, H, G, d;
    float sign;
} rotation;

static void compute_rotation(worker *me, const void *what, long chunk) {
    const rotation *a = what;
    long d = a->d, heads = a->H + a->G, count = rows_of(heads * d), first = chunk * count;
    float *turned = me->own;
    for (long t = first; t < least(first + count, a->T); t++)
        for (long head = 0; head < heads; head++, turned += d)
            for (long i = 0; i < d / 2; i += LANES) {
                const float *from = a->qkv + (t * (heads + a->G) + head) * d + i;
                const float *angle = a->cos_sin + a->positions[t] * d + i;
                long n = least(LANES, d / 2 - i);
                vec x1 = load_some(from, n), x2 = load_some(from + d / 2, n);
                vec c = load_some(angle, n), s = mul(load_some(angle + d / 2, n), all(a->sign));
                store_some(turned + i, minus3(x2, s, mul(x1, c)), n);
                store_some(turned + i + d / 2, fma3(x1, s, mul(x2, c)), n);
            }
}

static void put_rotation(const worker *me, const void *what, long chunk) {
    const rotation *a = what;
    long width = (a->H + a->G) * a->d, count = rows_of(width), first = chunk * count;
    for (long t = first; t < least(first + count, a->T); t++)
        memcpy(a->qkv + t * (width + a->G * a->d), me->own + (t - first) * width,
               width * sizeof(float));
}

static void all_rotations(worker *me, const void *what) {
    const rotation *a = what;
    share(me, chunks_of(a->T, (a->H + a->G) * a->d), compute_rotation, put_rotation, a);
}

/* q and k heads of qkv (T, (H + 2G) d) in place; cos_sin (positions, d); sign -1: the way back */
void share_rope(worker *me, float *qkv, const int64_t *positions, const float *cos_sin, long T,
                long H, long G, long d, float sign) {
    rotation a = {qkv, positions, cos_sin, T, H, G, d, sign};
    all_rotations(me, &a);
}

int rope(float *qkv, const int64_t *positions, const float *cos_sin, long T, long H, long G, long d,
         float sign) {
    rotation a = {qkv, positions, cos_sin, T, H, G, d, sign};
    long width = (H + G) * d;
    return together(chunks_of(T, width) <= 1, rowwise_room(width), all_rotations, &a);
}

/* ---- SwiGLU */

typedef struct {
    const float *gate_up;
    float *h;
    long T, F;
} gated;

static void compute_gated(worker *me, const void *what, long chunk) {
    const gated *a = what;
    long F = a->F, count = rows_of(F), first = chunk * count;
    float *h = me->own;
    for (long t = first; t < least(first + count, a->T); t++, h += F)
        for (long i = 0; i < F; i += LANES) {
            const float *gate = a->gate_up + t * 2 * F + i;
            long n = least(LANES, F - i);
            vec g = load_some(gate, n), u = load_some(gate + F, n);
            vec silu = quotient(g, add(all(1), exponential(sub(all(0), g))));
            store_some(h + i, mul(silu, u), n);
        }
}

static void put_gated(const worker *me, const void *what, long chunk) {
    const gated *a = what;
    long F = a->F, count = rows_of(F), first = chunk * count, n = least(count, a->T - first);
    memcpy(a->h + first * F, me->own, n * F * sizeof(float));
}

static void all_gated(worker *me, const void *what) {
    const gated *a = what;
    share(me, chunks_of(a->T, a->F), compute_gated, put_gated, a);
}

/* h (T, F) = silu(gate) up of gate_up (T, 2F) */
void share_swiglu(worker *me, const float *gate_up, float *h, long T, long F) {
    gated a = {gate_up, h, T, F};
    all_gated(me, &a);
}

int swiglu(const float *gate_up, float *h, long T, long F) {
    gated a = {gate_up, h, T, F};
    return together(chunks_of(T, F) <= 1, rowwise_room(F), all_gated, &a);
}
