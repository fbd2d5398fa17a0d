/* How the threads of one forward pass share its work.

   A pass is a line of stages, the same for every thread. The n tasks of a stage are divided into equal
   consecutive shares, one for each thread. A thread takes the tasks of its own share in order, which is a
   long stream of memory, then tasks that are left of other shares. It leaves the stage when all tasks are
   done.

   So a thread that the operating system has put aside costs nothing but its help: the others take its share,
   and when it comes back it walks through the stages that were finished without it. The others wait only
   where it was put aside in the middle of a task. Therefore: what a stage writes may be read in a task of a
   later stage, but not between tasks, where a late thread would see what later stages have written since. */
#ifndef QWEN3C_TEAM_H
#define QWEN3C_TEAM_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Counters of all stages of a pass. Those of a stage: tasks done, then for each share the tasks taken. */
typedef struct {
    uint32_t *counters;
    size_t stride;    /* counters of a stage */
    size_t capacity;  /* stages there is room for */
    size_t threads;           /* of this pass */
    int stopped;              /* the pass is given up: nobody takes a task or waits any more */
} Team;

/* One thread in a pass. */
typedef struct {
    Team *team;
    size_t index;          /* of the thread */
    size_t stages;         /* begun so far; the fields below are about the last one */
    uint32_t *counters;
    size_t n;              /* tasks */
    size_t share, taken;   /* shares found empty so far, tasks taken so far */
} Worker;

#define TEAM_SPINS 1000      /* some 10 microseconds: longer than a stage lasts once its tasks are taken */
#define TEAM_SLEEP_NS 20000  /* after them: the thread that is waited for needs a core, perhaps this one */

#if defined(__x86_64__)
#define TEAM_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define TEAM_PAUSE() __asm__ volatile("yield")
#else
#define TEAM_PAUSE() ((void)0)
#endif

/* Allocate counters for passes of `stages` stages, in place of the old. Returns 0, or -1 without memory. */
static inline int team_reserve(Team *team, size_t max_threads, size_t stages) {
    size_t stride = (max_threads + 1 + 15) / 16 * 16;  /* stages do not share a cache line */
    uint32_t *counters = (uint32_t *)calloc(stride * stages, sizeof *counters);
    if (counters == NULL) return -1;
    free(team->counters);
    team->counters = counters;
    team->stride = stride;
    team->capacity = stages;
    return 0;
}

/* Make the team ready for a pass of `threads` threads; no thread may be in one. */
static inline void team_begin(Team *team, size_t threads) {
    team->threads = threads;
    team->stopped = 0;
    memset(team->counters, 0, team->stride * team->capacity * sizeof *team->counters);
}

/* Give the pass up: every thread finishes its task and walks through the remaining stages. Called before a
   pass, it makes the pass a dry run: no task is handed out, and Worker.stages ends as the number of stages to
   reserve. */
static inline void team_stop(Team *team) { __atomic_store_n(&team->stopped, 1, __ATOMIC_RELAXED); }

static inline Worker team_worker(Team *team, size_t index) {
    return (Worker){.team = team, .index = index};
}

/* Begin the worker's next stage, of n tasks. Returns -1, the value of `task` before the first take(). */
static inline ptrdiff_t stage(Worker *w, ptrdiff_t n) {
    w->counters = w->team->counters + w->team->stride * w->stages++;
    w->n = (size_t)n;
    w->share = w->taken = 0;
    return -1;
}

static inline void stage_wait(const Worker *w) {
    struct timespec nap = {0, TEAM_SLEEP_NS};
    for (size_t spins = 0; __atomic_load_n(w->counters, __ATOMIC_ACQUIRE) < w->n; spins++) {
        if (__atomic_load_n(&w->team->stopped, __ATOMIC_RELAXED)) return;
        if (spins < TEAM_SPINS) TEAM_PAUSE();
        else nanosleep(&nap, NULL);
    }
}

/* Put the next task of the stage into *task. Returns 0 when all tasks are done, by this thread or others. */
static inline int take(Worker *w, ptrdiff_t *task) {
    size_t threads = w->team->threads;
    if (__atomic_load_n(&w->team->stopped, __ATOMIC_RELAXED)) return 0;
    for (; w->share < threads; w->share++) {
        size_t owner = (w->index + w->share) % threads;
        size_t first = owner * w->n / threads, end = (owner + 1) * w->n / threads;
        size_t i = first;
        if (first < end) i += __atomic_fetch_add(w->counters + 1 + owner, 1, __ATOMIC_RELAXED);
        if (i < end) {
            w->taken++;
            *task = (ptrdiff_t)i;
            return 1;
        }
    }
    if (w->taken) __atomic_fetch_add(w->counters, (uint32_t)w->taken, __ATOMIC_RELEASE);
    stage_wait(w);
    return 0;
}

#endif
