/* What a token meets alone: norm, rotation, SwiGLU. The mathematics stands in rms_norm.py, rope.py
   and swiglu.py. A row is computed by one thread, in an order that its length decides.

   T = tokens, D = model width, F = feed-forward width, H = query heads, G = key/value heads, d =
   head size */

#include <math.h>

#include "native.h"
#include "vec.h"

#define SMALL 16384 /* numbers: waking another thread takes longer than these */

/* h = x + residual (x itself where there is none), y = h rstd w */
void rms_norm(const float *x, const float *residual, const float *w, float *y, float *h,
              float *rstd, long T, long D, float eps) {
#pragma omp parallel for schedule(static) if (T * D > SMALL)
    for (long t = 0; t < T; t++) {
        const float *in = x + t * D;
        if (residual) {
            for (long i = 0; i < D; i += LANES) {
                long n = least(LANES, D - i);
                vec a = load_some(in + i, n), b = load_some(residual + t * D + i, n);
                store_some(h + t * D + i, add(a, b), n);
            }
            in = h + t * D;
        }
        vec squares = all(0);
        for (long i = 0; i < D; i += LANES) {
            vec a = load_some(in + i, least(LANES, D - i));
            squares = fma3(a, a, squares);
        }
        float r = 1 / sqrtf(sum(squares) / D + eps);
        rstd[t] = r;
        for (long i = 0; i < D; i += LANES) {
            long n = least(LANES, D - i);
            vec normed = mul(load_some(in + i, n), all(r));
            store_some(y + t * D + i, mul(normed, load_some(w + i, n)), n);
        }
    }
}

/* q and k heads of qkv (T, (H + 2G) d) in place; cos_sin (positions, d); sign -1: the way back */
void rope(float *qkv, const int64_t *positions, const float *cos_sin, long T, long H, long G,
          long d, float sign) {
#pragma omp parallel for schedule(static) if (T * (H + G) * d > SMALL)
    for (long t = 0; t < T; t++)
        for (long head = 0; head < H + G; head++)
            for (long i = 0; i < d / 2; i += LANES) {
                float *a = qkv + (t * (H + 2 * G) + head) * d + i, *b = a + d / 2;
                const float *angle = cos_sin + positions[t] * d + i;
                long n = least(LANES, d / 2 - i);
                vec x1 = load_some(a, n), x2 = load_some(b, n);
                vec c = load_some(angle, n), s = mul(load_some(angle + d / 2, n), all(sign));
                store_some(a, minus3(x2, s, mul(x1, c)), n);
                store_some(b, fma3(x1, s, mul(x2, c)), n);
            }
}

/* h (T, F) = silu(gate) up of gate_up (T, 2F) */
void swiglu(const float *gate_up, float *h, long T, long F) {
#pragma omp parallel for schedule(static) if (T * F > SMALL)
    for (long t = 0; t < T; t++)
        for (long i = 0; i < F; i += LANES) {
            const float *gate = gate_up + t * 2 * F + i;
            long n = least(LANES, F - i);
            vec g = load_some(gate, n), u = load_some(gate + F, n);
            vec silu = quotient(g, add(all(1), exponential(sub(all(0), g))));
            store_some(h + t * F + i, mul(silu, u), n);
        }
}
