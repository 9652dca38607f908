/* All layers of Llama for new tokens over a cache, in one call: the steps of model/llama.py, with
   the same functions and so to the same bits. It is here because Python takes longer to call eleven
   functions for each layer than some of them take, and because one workspace for all layers is less
   memory than a tensor for each of their results.

   table (L, 13): a layer's attn_norm, qkv, o, mlp_norm, gate_up, down as addresses, then the forms
   of qkv, o, gate_up and down (panel.h), then the address of the bias of qkv, 0 for none, and of
   the norms of the q and k heads, 0 for none, and whether q and k are rotated
   h (T, D): the residual stream, changed in place    x (T, D): the last layer's output, to be added
   indices (n), rising, or NULL for all: the tokens that results are needed of. The last layer
   computes no others after its keys and values; the results are the first n rows of h and x
   room: workspace (T, 2D + (H + 2G) d + H d + 3F + 1)    k, v (L, pages, G, page, d) */

#include <stdlib.h>
#include <string.h>

#include "native.h"
#include "vec.h"

typedef struct {
    int64_t T, B, P, H, G, d, page, pages, D, F, L, n;
} sizes;

typedef struct {
    const int64_t *table;
    float *h, *x, *room;
    const int64_t *positions;
    const float *cos_sin;
    float *k, *v;
    const int64_t *write_page, *write_offset, *indices;
    const sizes *s;
    float eps, *kept; /* h after the last layer's attention, where indices are given */
    const int32_t *place;
    attention attention;
} job;

/* What every thread does: phase by phase */
static void all_layers(worker *me, const void *what) {
    const job *a = what;
    const sizes *s = a->s;
    long T = s->T, D = s->D, F = s->F, H = s->H, G = s->G, d = s->d, N = (H + 2 * G) * d;
    float *h = a->h, *x = a->x, *y = a->room, *qkv = y + T * D, *o = qkv + T * N;
    float *gate_up = o + T * H * d, *m = gate_up + T * 2 * F, *rstd = m + T * F;
    attention attention = a->attention;
    attention.qkv = qkv;
    attention.o = o;
    for (long i = 0; i < s->L; i++) {
        const int64_t *w = a->table + 13 * i, *rows = NULL;
        float *k = a->k + i * s->pages * G * s->page * d, *v = a->v + (k - a->k), *next = h;
        share_rms_norm(me, i ? x : h, i ? h : NULL, NULL, (float *)w[0], y, h, rstd, T, D, a->eps);
        share_linear(me, y, (char *)w[1], (float *)w[10], qkv, w[6], T, D, N);
        if (w[11])
            share_norm_rope(me, qkv, (float *)w[11], a->positions, a->cos_sin, qkv, T, H, G, d,
                            a->eps);
        else if (w[12])
            share_rope(me, qkv, a->positions, a->cos_sin, T, H, G, d, 1);
        share_kv_write(me, qkv, k, v, a->write_page, a->write_offset, T, H, G, d, s->page);
        attention.k = k;
        attention.v = v;
        if (a->indices && i == s->L - 1) {
            T = s->n;
            attention.place = a->place;
            rows = a->indices;
            next = a->kept;
        }
        share_attention(me, &attention);
        share_linear(me, o, (char *)w[2], NULL, y, w[7], T, H * d, D);
        share_rms_norm(me, y, h, rows, (float *)w[3], x, next, rstd, T, D, a->eps);
        share_linear(me, x, (char *)w[4], NULL, gate_up, w[8], T, D, 2 * F);
        share_swiglu(me, gate_up, m, T, F);
        share_linear(me, m, (char *)w[5], NULL, x, w[9], T, F, D);
    }
}

static long more(long a, long b) { return a > b ? a : b; }

int layers(const int64_t *table, float *h, float *x, float *room, const int64_t *positions,
           const float *cos_sin, float *k, float *v, const int64_t *write_page,
           const int64_t *write_offset, const int64_t *block_table, const int32_t *cu,
           const int32_t *contexts, const int64_t *indices, const sizes *s, float eps) {
    long T = s->T, D = s->D, F = s->F, H = s->H, G = s->G, d = s->d;
    job a = {table, h, x, room, positions, cos_sin, k, v, write_page, write_offset, indices, s,
             eps};
    a.attention = (attention){.table = block_table, .cu = cu, .contexts = contexts, .B = s->B,
                              .P = s->P, .H = H, .G = G, .d = d, .page = s->page};
    int32_t *place = malloc((T + 1) * sizeof *place);
    int failed = !place || cut_attention(&a.attention);
    if (!failed) {
        for (long t = 0; t < T; t++) place[t] = -1;
        for (long i = 0; indices && i < s->n; i++) place[indices[i]] = i;
        a.place = place;
        a.kept = room + T * (D + (H + 2 * G) * d + H * d + 3 * F + 1);
        long own = more(more(linear_room(T, D), linear_room(T, H * d)), linear_room(T, F));
        own = more(own, more(rowwise_room(D), more(rowwise_room((H + G) * d), rowwise_room(F))));
        failed = together(0, more(own, attention_room(&a.attention)), all_layers, &a);
        free(a.attention.piece);
    }
    if (!failed && indices) memcpy(h, a.kept, s->n * D * sizeof *h);
    free(place);
    return failed ? -1 : 0;
}
