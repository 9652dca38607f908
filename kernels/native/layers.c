/* All layers of Llama for new tokens over a cache, in one call: what model/llama.py says line by
   line, with the same functions and so to the same bits. It is here because Python takes longer to
   call eleven functions for each layer than some of them take, and because one room for all layers
   is less memory than a tensor for each of their results.

   table (L, 10): a layer's attn_norm, qkv, o, mlp_norm, gate_up, down as addresses, then how many
   bytes a number of qkv, o, gate_up and down takes
   h (T, D): the residual stream, changed in place    x (T, D): the last layer's output, to be added
   wanted (n), rising, or NULL: the tokens that go on behind the last layer's attention; what is
   returned of them is the first n rows of h and x
   room: (T, D + (H + 2G) d + H d + 3F + 1), used up    k, v (L, pages, G, page, d) */

#include <string.h>

#include "native.h"

typedef struct {
    int64_t T, B, P, H, G, d, page, pages, D, F, L, n;
} sizes;

/* Rows rows[0 ... n), rising, of x to its front */
static void keep(float *x, const int64_t *rows, long n, long width) {
    for (long i = 0; i < n; i++) memmove(x + i * width, x + rows[i] * width, width * sizeof *x);
}

int layers(const int64_t *table, float *h, float *x, float *room, const int64_t *positions,
           const float *cos_sin, float *k, float *v, const int64_t *write_page,
           const int64_t *write_offset, const int64_t *block_table, const int32_t *cu,
           const int32_t *contexts, const int64_t *wanted, const sizes *s, float eps) {
    long T = s->T, D = s->D, F = s->F, H = s->H, G = s->G, d = s->d, N = (H + 2 * G) * d;
    float *y = room, *qkv = y + T * D, *o = qkv + T * N, *gate_up = o + T * H * d;
    float *m = gate_up + T * 2 * F, *rstd = m + T * F;
    for (long i = 0; i < s->L; i++) {
        const int64_t *w = table + 10 * i;
        long at = i * s->pages * G * s->page * d;
        rms_norm(i ? x : h, i ? h : NULL, (float *)w[0], y, h, rstd, T, D, eps);
        linear(y, (char *)w[1], qkv, w[6], T, D, N);
        rope(qkv, positions, cos_sin, T, H, G, d, 1);
        kv_write(qkv, k + at, v + at, write_page, write_offset, T, H, G, d, s->page);
        if (cached_attention(qkv, k + at, v + at, o, block_table, cu, contexts, s->B, s->P, H, G, d,
                             s->page))
            return -1;
        if (wanted && i == s->L - 1) {
            T = s->n;
            keep(o, wanted, T, H * d);
            keep(h, wanted, T, D);
        }
        linear(o, (char *)w[2], y, w[7], T, H * d, D);
        rms_norm(y, h, (float *)w[3], x, h, rstd, T, D, eps);
        linear(x, (char *)w[4], gate_up, w[8], T, D, 2 * F);
        swiglu(gate_up, m, T, F);
        linear(m, (char *)w[5], x, w[9], T, F, D);
    }
    return 0;
}
