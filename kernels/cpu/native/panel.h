/* The panels of a packed weight, and the forms in which they hold its numbers

   A panel is PANEL rows of a weight W (N, K), which are PANEL columns of a product. The last panel
   is filled up with rows of 0. The form of a weight is one number:

       2, 3, 4    the upper bytes of the fp32 values, as many as hold all of them exactly (linear.c)
       others     quantised: codes of 4 or 8 bits, with a scale for every block of 16 or 32 inputs
                  and in some a minimum (quantised.c). The form is block * 16 + bits, and 1 more
                  where there are minima */

#pragma once

#include "native.h"
#include "vec.h"

#define PANEL (2 * LANES)
#if LANES == 16
#define ROWS 12 /* x 2 vectors of sums, of 32 registers */
#else
#define ROWS 6 /* of 16 */
#endif
#define CHAIN 128 /* fused multiply-adds of a chain; a multiple of every block */
#define AHEAD 4096 /* bytes; the hardware's own prefetch leaves a third of the bandwidth unused */

INLINE long block_of(long form) { return form >> 4; } /* inputs; 0: not quantised */
INLINE long bits_of(long form) { return form & 12; }
INLINE int has_minima(long form) { return form & 1; }

/* Bytes of a panel's scales and minima for one block, and of its codes for one input */
INLINE long scale_bytes(long form) { return PANEL * sizeof(float) * (1 + has_minima(form)); }
INLINE long code_bytes(long form) { return PANEL * bits_of(form) / 8; }
INLINE long block_bytes(long form) { return scale_bytes(form) + block_of(form) * code_bytes(form); }

/* Bytes of a panel for one input, with their part of the scales and minima; and for all of K */
INLINE long input_bytes(long form) {
    long block = block_of(form);
    return block ? block_bytes(form) / block : PANEL * form;
}
INLINE long panel_bytes(long form, long K) { return K * input_bytes(form); }

/* quantised.c */
void quantised_row(const char *panel, long form, long j, float *y, long K);
void quantised_tile(long form, long m, const float *x, const char *w, float *out, long K);
void widen_quantised(const char *panel, long form, float *wide, long K);
