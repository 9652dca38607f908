/* Operations that treat each token by itself: norm, rotation, both of heads, SwiGLU

   The mathematics stands in rms_norm.py, rope.py, norm_rope.py and swiglu.py. A row is computed by
   one thread, in an order of additions that follows from its length alone. A chunk of work is a
   number of rows.

   T = tokens, D = model width, F = feed-forward width, H = query heads, G = key/value heads,
   d = head size */

#include <math.h>

#include "native.h"
#include "vec.h"

#define NUMBERS 4096 /* of a chunk: handing out a chunk takes as long as some hundred numbers */

static long rows_of(long width) { return NUMBERS / width + 1; } /* of a chunk */
static long chunks_of(long T, long width) { return (T + rows_of(width) - 1) / rows_of(width); }

/* A thread's own memory, in floats: for every row of a chunk at most two results and rstd */
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
    long D = a->D;
    long count = rows_of(D);
    long first = chunk * count;
    long end = least(first + count, a->T);
    float *y = me->own;          /* (count, D) */
    float *h = y + count * D;    /* (count, D) */
    float *rstd = h + count * D; /* (count) */
    for (long t = first; t < end; t++) {
        const float *in = a->x + t * D;

        /* h = x + residual */
        if (a->residual) {
            long row = a->rows ? a->rows[t] : t;
            const float *residual = a->residual + row * D;
            for (long i = 0; i < D; i += LANES) {
                long n = least(LANES, D - i);
                vec x = load_some(in + i, n);
                vec other = load_some(residual + i, n);
                store_some(h + i, add(x, other), n);
            }
            in = h;
        }

        /* rstd */
        vec squares = all(0);
        for (long i = 0; i < D; i += LANES) {
            vec x = load_some(in + i, least(LANES, D - i));
            squares = fma3(x, x, squares);
        }
        float mean_square = sum(squares) / D;
        float r = 1 / sqrtf(mean_square + a->eps);

        /* y = h rstd w */
        for (long i = 0; i < D; i += LANES) {
            long n = least(LANES, D - i);
            vec normed = mul(load_some(in + i, n), all(r));
            vec w = load_some(a->w + i, n);
            store_some(y + i, mul(normed, w), n);
        }
        *rstd = r;
        y += D;
        h += D;
        rstd += 1;
    }
}

static void put_norm(const worker *me, const void *what, long chunk) {
    const norm *a = what;
    long D = a->D;
    long count = rows_of(D);
    long first = chunk * count;
    long n = least(count, a->T - first);
    const float *y = me->own;
    const float *h = y + count * D;
    const float *rstd = h + count * D;
    memcpy(a->y + first * D, y, n * D * sizeof(float));
    if (a->residual) memcpy(a->h + first * D, h, n * D * sizeof(float));
    memcpy(a->rstd + first, rstd, n * sizeof(float));
}

static void all_norms(worker *me, const void *what) {
    const norm *a = what;
    share(me, chunks_of(a->T, a->D), compute_norm, put_norm, a);
}

/* h = x + residual, y = h rstd w. Row t of x is added to row rows[t] of residual, or to row t where
   rows is NULL. Where residual is NULL, y = x rstd w and h is not written. */
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
    long d = a->d;
    long half = d / 2;
    long heads = a->H + a->G; /* q and k, the first of a row of qkv */
    long count = rows_of(heads * d);
    long first = chunk * count;
    long end = least(first + count, a->T);
    float *rotated = me->own; /* (count, heads, d) */
    for (long t = first; t < end; t++) {
        const float *row = a->qkv + t * (heads + a->G) * d;
        const float *angles = a->cos_sin + a->positions[t] * d;
        for (long head = 0; head < heads; head++) {
            const float *from = row + head * d;
            for (long i = 0; i < half; i += LANES) {
                long n = least(LANES, half - i);
                vec x1 = load_some(from + i, n);
                vec x2 = load_some(from + half + i, n);
                vec c = load_some(angles + i, n);
                vec s = mul(load_some(angles + half + i, n), all(a->sign));
                store_some(rotated + i, minus3(x2, s, mul(x1, c)), n);
                store_some(rotated + half + i, fma3(x1, s, mul(x2, c)), n);
            }
            rotated += d;
        }
    }
}

static void put_rotation(const worker *me, const void *what, long chunk) {
    const rotation *a = what;
    long width = (a->H + a->G) * a->d;    /* q and k of a token */
    long row_width = width + a->G * a->d; /* and v */
    long count = rows_of(width);
    long first = chunk * count;
    long end = least(first + count, a->T);
    for (long t = first; t < end; t++) {
        const float *rotated = me->own + (t - first) * width;
        memcpy(a->qkv + t * row_width, rotated, width * sizeof(float));
    }
}

static void all_rotations(worker *me, const void *what) {
    const rotation *a = what;
    share(me, chunks_of(a->T, (a->H + a->G) * a->d), compute_rotation, put_rotation, a);
}

/* Rotates the q and k heads of qkv (T, (H + 2G) d) in place. cos_sin (positions, d): cos, then sin.
   sign 1, or -1 for the opposite angle. */
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

/* ---- norm of the q and k heads, and their rotation */

typedef struct {
    const float *qkv, *norms;
    const int64_t *positions;
    const float *cos_sin;
    float *z;
    long T, H, G, d;
    float eps;
} normed_rotation;

static void compute_normed_rotation(worker *me, const void *what, long chunk) {
    const normed_rotation *a = what;
    long d = a->d;
    long half = d / 2;
    long heads = a->H + a->G; /* q and k, the first of a row of qkv */
    long count = rows_of(heads * d);
    long first = chunk * count;
    long end = least(first + count, a->T);
    float *z = me->own; /* (count, heads, d) */
    for (long t = first; t < end; t++) {
        const float *row = a->qkv + t * (heads + a->G) * d;
        const float *angles = a->cos_sin + a->positions[t] * d;
        for (long head = 0; head < heads; head++) {
            const float *from = row + head * d;
            const float *w = head < a->H ? a->norms : a->norms + d;

            /* rstd */
            vec squares = all(0);
            for (long i = 0; i < d; i += LANES) {
                vec x = load_some(from + i, least(LANES, d - i));
                squares = fma3(x, x, squares);
            }
            float mean_square = sum(squares) / d;
            vec r = all(1 / sqrtf(mean_square + a->eps));

            /* z = (x rstd w) rotated */
            for (long i = 0; i < half; i += LANES) {
                long n = least(LANES, half - i);
                vec y1 = mul(mul(load_some(from + i, n), r), load_some(w + i, n));
                vec y2 = mul(mul(load_some(from + half + i, n), r), load_some(w + half + i, n));
                vec c = load_some(angles + i, n);
                vec s = load_some(angles + half + i, n);
                store_some(z + i, minus3(y2, s, mul(y1, c)), n);
                store_some(z + half + i, fma3(y1, s, mul(y2, c)), n);
            }
            z += d;
        }
    }
}

static void put_normed_rotation(const worker *me, const void *what, long chunk) {
    const normed_rotation *a = what;
    long width = (a->H + a->G) * a->d; /* q and k of a token */
    long v_width = a->G * a->d;
    long row_width = width + v_width;
    long count = rows_of(width);
    long first = chunk * count;
    long end = least(first + count, a->T);
    for (long t = first; t < end; t++) {
        const float *v = a->qkv + t * row_width + width;
        float *z = a->z + t * row_width;
        memcpy(z, me->own + (t - first) * width, width * sizeof(float));
        if (a->z != a->qkv) memcpy(z + width, v, v_width * sizeof(float));
    }
}

static void all_normed_rotations(worker *me, const void *what) {
    const normed_rotation *a = what;
    long width = (a->H + a->G) * a->d;
    share(me, chunks_of(a->T, width), compute_normed_rotation, put_normed_rotation, a);
}

/* z (T, (H + 2G) d) = qkv with its q and k heads normalised and rotated; z may be qkv itself.
   norms (2d): the weight of q, then that of k. cos_sin (positions, d): cos, then sin. */
void share_norm_rope(worker *me, const float *qkv, const float *norms, const int64_t *positions,
                     const float *cos_sin, float *z, long T, long H, long G, long d, float eps) {
    normed_rotation a = {qkv, norms, positions, cos_sin, z, T, H, G, d, eps};
    all_normed_rotations(me, &a);
}

int norm_rope(const float *qkv, const float *norms, const int64_t *positions, const float *cos_sin,
              float *z, long T, long H, long G, long d, float eps) {
    normed_rotation a = {qkv, norms, positions, cos_sin, z, T, H, G, d, eps};
    long width = (H + G) * d;
    return together(chunks_of(T, width) <= 1, rowwise_room(width), all_normed_rotations, &a);
}

/* ---- SwiGLU */

typedef struct {
    const float *gate_up;
    float *h;
    long T, F;
} gated;

static void compute_gated(worker *me, const void *what, long chunk) {
    const gated *a = what;
    long F = a->F;
    long count = rows_of(F);
    long first = chunk * count;
    long end = least(first + count, a->T);
    float *h = me->own; /* (count, F) */
    for (long t = first; t < end; t++) {
        const float *gate = a->gate_up + t * 2 * F;
        const float *up = gate + F;
        for (long i = 0; i < F; i += LANES) {
            long n = least(LANES, F - i);
            vec g = load_some(gate + i, n);
            vec u = load_some(up + i, n);
            vec denominator = add(all(1), exponential(sub(all(0), g))); /* 1 + e^-g */
            vec silu = quotient(g, denominator);
            store_some(h + i, mul(silu, u), n);
        }
        h += F;
    }
}

static void put_gated(const worker *me, const void *what, long chunk) {
    const gated *a = what;
    long F = a->F;
    long count = rows_of(F);
    long first = chunk * count;
    long n = least(count, a->T - first);
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
