/* The functions that python calls, and those that the files here call of each other

   A function that python calls is one phase or several (share.h), and has a form share_... of the
   same arguments, which every thread calls, for use within others. Those that return an int
   give 0, or -1 where memory could not be had: then nothing was done. */

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "share.h"

long panel_columns(void);
void pack(const uint32_t *w, char *out, long bytes, long N, long K);
void pack_quantised(const int8_t *codes, const float *scales, const float *minima, char *out,
                    long form, long N, long K);
void look_up(char *w, long form, const int64_t *rows, uint32_t *y, long n, long K);
int linear(const float *x, const char *w, const float *bias, float *y, long form, long T, long K,
           long N);
long linear_room(long T, long K);
void share_linear(worker *me, const float *x, const char *w, const float *bias, float *y,
                  long form, long T, long K, long N);

int rms_norm(const float *x, const float *residual, const float *w, float *y, float *h, float *rstd,
             long T, long D, float eps);
int rope(float *qkv, const int64_t *positions, const float *cos_sin, long T, long H, long G, long d,
         float sign);
int norm_rope(const float *qkv, const float *norms, const int64_t *positions, const float *cos_sin,
              float *z, long T, long H, long G, long d, float eps);
int swiglu(const float *gate_up, float *h, long T, long F);
long rowwise_room(long width);
void share_rms_norm(worker *me, const float *x, const float *residual, const int64_t *rows,
                    const float *w, float *y, float *h, float *rstd, long T, long D, float eps);
void share_rope(worker *me, float *qkv, const int64_t *positions, const float *cos_sin, long T,
                long H, long G, long d, float sign);
void share_norm_rope(worker *me, const float *qkv, const float *norms, const int64_t *positions,
                     const float *cos_sin, float *z, long T, long H, long G, long d, float eps);
void share_swiglu(worker *me, const float *gate_up, float *h, long T, long F);

int kv_write(const float *qkv, float *k, float *v, const int64_t *pages, const int64_t *offsets,
             long T, long H, long G, long d, long page);
void share_kv_write(worker *me, const float *qkv, float *k, float *v, const int64_t *pages,
                    const int64_t *offsets, long T, long H, long G, long d, long page);

typedef struct {
    const float *qkv, *k, *v;
    float *o;
    const int64_t *table;
    const int32_t *cu, *contexts;
    long B, P, H, G, d, page;
    const int32_t *place; /* (T) token -> row of o, -1 for none; NULL: the same */
    struct { int32_t row, first; } *piece; /* from here on by cut_attention */
    long pieces, room, together;
} attention;
int cached_attention(const float *qkv, const float *k, const float *v, float *o,
                     const int64_t *table, const int32_t *cu, const int32_t *contexts, long B,
                     long P, long H, long G, long d, long page);
int cut_attention(attention *a);
long attention_room(const attention *a);
void share_attention(worker *me, const attention *a);

int sample(const float *logits, const float *z, const double *u, int64_t *tokens, float *logprobs,
           long B, long V, double temperature, long top_k, double top_p, double min_p);
