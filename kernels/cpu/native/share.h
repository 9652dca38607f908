/* How threads share work on a machine that other processes use too: each takes it as it comes

   A step of decoding is a few hundred short pieces of work, one after the other ("phases"), each in
   chunks that do not need each other. With fixed shares and a barrier after each phase, a thread
   whose core runs another process for some milliseconds stops all of them, a few hundred times.
   Here no thread waits for such a one:

   - Chunks are handed out: each thread begins with a part of its own, front to back, and takes
     half of what another has left when it is through.
   - A chunk is computed into memory of the thread's own and put into place at the end, by the one
     thread that marks the chunk first. So a chunk that a sleeping thread has in hand is done once
     more by one that waits, and what the sleeper brings later is dropped.
   - All threads run through all phases; no thread depends on which one leads. One that comes
     late finds that a phase is over and goes on to the one at work.

   No bit depends on it: a chunk's result is the same whoever computes it, and it is put into place
   once. Memory is safe, since `together` returns after all threads have: a late one reads
   what is stale and drops what comes of it. */

#pragma once

#include <stdint.h>

typedef struct crew crew;

typedef struct {
    crew *crew;
    long number;    /* among the threads */
    uint32_t phase; /* 1 is the first */
    float *own;     /* this thread's memory, as much as it asked for */
} worker;

/* A chunk's result into me->own; it may return early once `late`. Then from there into place. */
typedef void (*computes)(worker *me, const void *what, long chunk);
typedef void (*puts_there)(const worker *me, const void *what, long chunk);

/* Runs `body` on every thread, or on this one alone; each has `room` floats of its own.
   0, or -1 if no thread could have them: then nothing was done. */
int together(int alone, long room, void (*body)(worker *me, const void *what), const void *what);

/* A phase, within `together`, where every thread calls it alike: chunks 0 ... count - 1. What it
   did is there for the next phase. */
void share(worker *me, long count, computes compute, puts_there put, const void *what);

/* Whether the phase has been finished by others. */
int late(const worker *me);
