/* A token of each row of logits, and its log-probability. The mathematics is in
   kernels/sampling/__init__.py: the order is by falling z and, of equals, rising id; sums of
   probabilities run in that order, in fp64. Where top_k keeps more than FEW tokens, all of them are
   sorted, by digits (a radix sort), which keeps equals in order.

   logits (B, V)    z (B, V): with the repetition penalty    u (B): the uniform numbers
   B = rows, V = vocabulary */

#include <math.h>

#include "native.h"
#include "vec.h"

#define FEW 256  /* up to so many of the largest are found by insertion */
#define DIGIT 11 /* bits; three make up a key */
#define BUCKETS (1 << DIGIT)

typedef struct { uint32_t key, id; } entry;

/* Numbers that rise as z falls; -0 is 0 */
INLINE uint32_t key_of(float z) {
    uint32_t bits;
    z += 0.0f;
    memcpy(&bits, &z, 4);
    return bits >> 31 ? bits : ~bits & 0x7fffffff;
}

/* The first n <= FEW entries of the order, by insertion */
static void first_few(const float *z, long V, entry *out, long n) {
    long have = 0;
    for (long id = 0; id < V; id++) {
        int full = have == n;
        if (full && !(z[id] > z[out[n - 1].id])) continue;
        if (!full) have++;
        entry e = {key_of(z[id]), id};
        long at = have - 1; /* the last place: a full list loses what is there */
        for (; at && out[at - 1].key > e.key; at--) out[at] = out[at - 1];
        out[at] = e;
    }
}

INLINE uint32_t digit(entry e, int shift) { return e.key >> shift & (BUCKETS - 1); }

/* All V entries of the order, by a radix sort; `other` is room for as many */
static void sorted(const float *z, long V, entry *out, entry *other) {
    entry *from = other, *to = out;
    for (long id = 0; id < V; id++) from[id] = (entry){key_of(z[id]), id};
    for (int shift = 0; shift < 32; shift += DIGIT) {
        uint32_t place[BUCKETS] = {0}; /* first counts, then the next place of each digit */
        for (long i = 0; i < V; i++) place[digit(from[i], shift)]++;
        uint32_t before = 0;
        for (long b = 0; b < BUCKETS; b++) {
            uint32_t count = place[b];
            place[b] = before;
            before += count;
        }
        for (long i = 0; i < V; i++) {
            uint32_t at = place[digit(from[i], shift)]++;
            to[at] = from[i];
        }
        entry *swap = from;
        from = to;
        to = swap;
    }
} /* three passes: the last one wrote into `out` */

static float largest_of(const float *z, long V) {
    vec most = all(-INFINITY);
    long i = 0;
    for (; i + LANES <= V; i += LANES) most = larger(load(z + i), most);
    float best = top(most);
    for (; i < V; i++)
        if (z[i] > best) best = z[i];
    return best;
}

static long first_largest(const float *z, long V) {
    float best = largest_of(z, V);
    for (long id = 0; id < V; id++)
        if (z[id] == best) return id;
    return 0; /* all are NaN */
}

/* The log of the sum of e^z. 64 vectors at a time are added up in fp32, those sums in fp64. */
static float log_sum(const float *z, long V) {
    float best = largest_of(z, V);
    double total = 0;
    for (long first = 0; first < V; first += 64 * LANES) {
        vec part = all(0);
        for (long i = first; i < least(V, first + 64 * LANES); i += LANES) {
            long n = least(LANES, V - i);
            vec e = exponential(sub(load_some(z + i, n), all(best)));
            part = add(part, n == LANES ? e : load_some((float *)&e, n));
        }
        total += sum(part);
    }
    return best + (float)log(total);
}

/* The token of a row by inverse CDF over those of order[0 ... n) that top_p and min_p keep: these
   are order[0 ... last], at least the first. */
static long drawn(const float *z, const entry *order, double *cumulative, long n, double u,
                  double temperature, double top_p, double min_p) {
    double best = z[order[0].id], total = 0;
    for (long i = 0; i < n; i++) {
        total += exp((z[order[i].id] - best) / temperature);
        cumulative[i] = total;
    }
    long last = n - 1;
    if (top_p < 1 || min_p > 0) last = 0;
    for (long i = 1; i < n && last == i - 1; i++) {
        double p = exp((z[order[i].id] - best) / temperature);
        if (cumulative[i] - p < top_p * total && p >= min_p) last = i;
    }
    double reached = u * cumulative[last];
    for (long i = 0; i < last; i++)
        if (cumulative[i] > reached) return order[i].id;
    return order[last].id;
}

typedef struct {
    const float *logits, *z;
    const double *u;
    int64_t *tokens;
    float *logprobs;
    long V, n, room; /* n: tokens that top_k keeps; room: entries of the order */
    double temperature, top_p, min_p;
    long B;
} draws;

typedef struct { int64_t token; float logprob; } draw;
#define HEAD 16 /* floats of a thread's memory before the order: there its draw is kept */

static void compute_draw(worker *me, const void *what, long b) {
    const draws *a = what;
    const float *row = a->z + b * a->V, *logits = a->logits + b * a->V;
    draw *drew = (draw *)me->own;
    if (a->temperature > 0) {
        entry *order = (entry *)(me->own + HEAD), *after = order + a->room;
        double *cumulative;
        if (a->n <= FEW) {
            cumulative = (double *)after;
            first_few(row, a->V, order, a->n);
        } else {
            cumulative = (double *)(after + a->V);
            sorted(row, a->V, order, after);
        }
        if (late(me)) return;
        drew->token = drawn(row, order, cumulative, a->n, a->u[b], a->temperature, a->top_p,
                            a->min_p);
    } else
        drew->token = first_largest(row, a->V);
    if (late(me)) return;
    drew->logprob = logits[drew->token] - log_sum(logits, a->V);
}

static void put_draw(const worker *me, const void *what, long b) {
    const draws *a = what;
    const draw *drew = (const draw *)me->own;
    a->tokens[b] = drew->token;
    a->logprobs[b] = drew->logprob;
}

static void all_draws(worker *me, const void *what) {
    const draws *a = what;
    share(me, a->B, compute_draw, put_draw, a);
}

/* 0, or -1 where memory could not be had. temperature 0 takes the largest; top_k 0 keeps all. */
int sample(const float *logits, const float *z, const double *u, int64_t *tokens, float *logprobs,
           long B, long V, double temperature, long top_k, double top_p, double min_p) {
    long n = top_k && top_k < V ? top_k : V;
    int sorts = n > FEW;
    long room = sorts ? V : n, other = sorts ? V : 0;
    draws a = {logits, z, u, tokens, logprobs, V, n, room, temperature, top_p, min_p, B};
    long own = HEAD;
    if (temperature > 0) own += 2 * (room + other + n); /* an entry or a double is 2 floats */
    return together(B <= 1, own, all_draws, &a);
}
