/* How work is shared out: share.h says why.

   All that decides is the state of a chunk. It rises: below 2p before it is done in phase p, 2p
   while its result is put into place, 2p + 1 from then on. Who moves it to 2p, by an atomic
   exchange, puts. Ranges only say who had best compute what; were they wrong, chunks would be
   done twice or by those that wait, never put twice or left out. */

#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "share.h"
#include "vec.h"

#define CHUNKS 1024 /* of a phase; one with more is several */
#define THREADS 256 /* more do not take part */
#define PATIENCE 50000 /* cycles, and twice the longest chunk: then a chunk is done again */
#define NO_MEASURE 1000000 /* cycles, for a thread that had no chunk to go by */

typedef _Atomic uint32_t state;
typedef struct { _Alignas(64) _Atomic uint64_t word; } range; /* phase, first, end: 32, 16, 16 */

struct crew {
    _Alignas(64) state finished; /* the last phase that is over */
    _Alignas(64) long threads;
    state chunk[CHUNKS];
    range left[THREADS];
};

#ifdef STALLED /* a form for tests: threads lose their core at every turn, and have no patience */
#include <unistd.h>
static void stall(void) {
    static __thread uint32_t drawn = 1;
    static _Atomic uint32_t seeds;
    if (drawn == 1) drawn = 2654435761u * (2 * atomic_fetch_add(&seeds, 1) + 3);
    drawn ^= drawn << 13;
    drawn ^= drawn >> 17;
    drawn ^= drawn << 5;
    if (drawn % 16 == 0) usleep(drawn >> 8 & 127);
}
#else
#define stall() ((void)0)
#endif

int late(const worker *me) {
    return atomic_load_explicit(&me->crew->finished, memory_order_acquire) >= me->phase;
}

/* ---- who computes what */

INLINE uint64_t word_of(uint64_t phase, uint64_t first, uint64_t end) {
    return phase << 32 | first << 16 | end;
}

/* What a thread has left of this phase: what its word says, or its whole part if untouched. */
static long left_of(crew *crew, uint32_t phase, long thread, long count, uint64_t *word,
                    long *first) {
    *word = atomic_load_explicit(&crew->left[thread].word, memory_order_acquire);
    uint32_t at = *word >> 32;
    long end = 0;
    *first = 0;
    if (at == phase) {
        *first = *word >> 16 & 0xffff;
        end = *word & 0xffff;
    } else if (at < phase) {
        *first = thread * count / crew->threads;
        end = (thread + 1) * count / crew->threads;
    } /* else the phase is over */
    return end - *first;
}

/* The next chunk of its own part, else the first of half of the longest one; -1: all are taken */
static long take(const worker *me, long count) {
    crew *crew = me->crew;
    for (;;) {
        uint64_t own, word;
        long first, from, length = left_of(crew, me->phase, me->number, count, &own, &first);
        if (length > 0) {
            uint64_t rest = word_of(me->phase, first + 1, first + length);
            if (atomic_compare_exchange_strong(&crew->left[me->number].word, &own, rest))
                return first;
            continue;
        }
        long longest = 0, victim = 0;
        for (long i = 1; i < crew->threads; i++) {
            long thread = (me->number + i) % crew->threads;
            length = left_of(crew, me->phase, thread, count, &word, &from);
            if (length > longest) longest = length, victim = thread;
        }
        if (!longest) return -1;
        length = left_of(crew, me->phase, victim, count, &word, &from);
        if (length < 1) continue;
        long kept = length / 2, end = from + length;
        if (!atomic_compare_exchange_strong(&crew->left[victim].word, &word,
                                            word_of(me->phase, from, from + kept)))
            continue;
        /* fails only when the phase is over */
        atomic_compare_exchange_strong(&crew->left[me->number].word, &own,
                                       word_of(me->phase, from + kept + 1, end));
        return from + kept;
    }
}

/* ---- phases */

typedef struct {
    computes compute;
    puts_there put;
    const void *what;
    long first; /* chunk of the whole that is number 0 here */
} work;

static void do_chunk(worker *me, const work *w, long i) {
    uint32_t putting = 2 * me->phase;
    stall();
    w->compute(me, w->what, w->first + i);
    stall();
    state *at = &me->crew->chunk[i];
    uint32_t before = atomic_load_explicit(at, memory_order_acquire);
    if (before >= putting || !atomic_compare_exchange_strong(at, &before, putting)) return;
    stall();
    w->put(me, w->what, w->first + i);
    atomic_store_explicit(at, putting + 1, memory_order_release);
}

/* Waits until all chunks are done; those that take too long are done here, by each of several
   threads from another one on. */
static void finish(worker *me, const work *w, long count, uint64_t patience) {
    uint64_t began = __rdtsc();
    uint32_t putting = 2 * me->phase;
    long i = me->number * count / me->crew->threads;
    for (long done = 0; done < count && !late(me);) {
        uint32_t now = atomic_load_explicit(&me->crew->chunk[i], memory_order_acquire);
        if (now > putting) {
            done++;
            if (++i == count) i = 0;
        } else if (__rdtsc() - began < patience)
            _mm_pause();
        else if (now < putting)
            do_chunk(me, w, i);
        else
            sched_yield(); /* to the one that puts: a matter of instructions */
    }
    uint32_t finished = atomic_load(&me->crew->finished);
    while (finished < me->phase &&
           !atomic_compare_exchange_weak(&me->crew->finished, &finished, me->phase)) {}
}

void share(worker *me, long count, computes compute, puts_there put, const void *what) {
    for (long first = 0; first < count; first += CHUNKS) {
        work w = {compute, put, what, first};
        long here = least(CHUNKS, count - first);
        me->phase++;
        if (late(me)) continue;
        uint64_t longest = 0, before = __rdtsc();
        for (long i; !late(me) && (i = take(me, here)) >= 0;) {
            do_chunk(me, &w, i);
            uint64_t now = __rdtsc(), took = now - before;
            if (took > longest) longest = took;
            before = now;
        }
#ifdef STALLED
        finish(me, &w, here, 0);
#else
        finish(me, &w, here, longest ? 2 * longest + PATIENCE : NO_MEASURE);
#endif
    }
}

/* ---- threads */

/* Memory of this thread, which it keeps for the next call; NULL where there is none. */
static float *own_memory(long room) {
    static __thread float *memory;
    static __thread long size;
    if (size < room) {
        free(memory);
        size = (room + 15) / 16 * 16;
        memory = aligned_alloc(64, size * sizeof(float));
        if (!memory) size = 0;
    }
    return memory;
}

int together(int alone, long room, void (*body)(worker *me, const void *what), const void *what) {
    crew crew;
    int able = 0;
    crew.threads = alone ? 1 : least(omp_get_max_threads(), THREADS);
    crew.finished = 0;
    memset(crew.chunk, 0, sizeof crew.chunk);
    memset(crew.left, 0, crew.threads * sizeof *crew.left);
    if (room < 1) room = 1;
    if (crew.threads == 1) {
        worker me = {&crew, 0, 0, own_memory(room)};
        if (!me.own) return -1;
        body(&me, what);
        return 0;
    }
#pragma omp parallel num_threads(crew.threads) reduction(| : able)
    {
        worker me = {&crew, omp_get_thread_num(), 0, own_memory(room)};
        if (me.own) {
            body(&me, what);
            able = 1;
        }
    }
    return able ? 0 : -1;
}
