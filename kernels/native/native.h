/* What the files here offer to python, and to each other */

#pragma once

#include <stddef.h>
#include <stdint.h>

long panel_columns(void);
void pack(const uint32_t *w, char *out, long bytes, long N, long K);
void look_up(char *w, long bytes, const int64_t *rows, uint32_t *y, long n, long K);
void linear(const float *x, const char *w, float *y, long bytes, long T, long K, long N);

void rms_norm(const float *x, const float *residual, const float *w, float *y, float *h,
              float *rstd, long T, long D, float eps);
void rope(float *qkv, const int64_t *positions, const float *cos_sin, long T, long H, long G,
          long d, float sign);
void swiglu(const float *gate_up, float *h, long T, long F);

void kv_write(const float *qkv, float *k, float *v, const int64_t *pages, const int64_t *offsets,
              long T, long H, long G, long d, long page);
int cached_attention(const float *qkv, const float *k, const float *v, float *o,
                     const int64_t *table, const int32_t *cu, const int32_t *contexts, long B,
                     long P, long H, long G, long d, long page);

int sample(const float *logits, const float *z, const double *u, int64_t *tokens, float *logprobs,
           long B, long V, double temperature, long top_k, double top_p, double min_p);
