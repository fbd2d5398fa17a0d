/* Threads go through a line of stages: team THREADS JOINING LATE STOP_AT. Of THREADS planned only JOINING
   take part, the last LATE of them once the first has finished all by itself; thread 0 stops the pass before
   stage STOP_AT. Every task must be done once, and none before the stage ahead of it is whole. Prints what
   was wrong. */
#include <pthread.h>
#include <stdio.h>

#include "team.h"

#define STAGES 400
#define MAX_TASKS 70

static Team team;
static int n_tasks[STAGES], done[STAGES][MAX_TASKS], finished, stop_at, wrong;
static unsigned spent;

static int whole(int stage_index) {
    for (int task = 0; task < n_tasks[stage_index]; task++)
        if (__atomic_load_n(&done[stage_index][task], __ATOMIC_RELAXED) != 1) return 0;
    return 1;
}

static void work(size_t index) {
    Worker worker = team_worker(&team, index);
    for (int s = 0; s < STAGES; s++) {
        if (index == 0 && s == stop_at) team_stop(&team);
        ptrdiff_t task = stage(&worker, n_tasks[s]);
        while (take(&worker, &task)) {
            if (s > 0 && !whole(s - 1)) __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
            for (int i = 0; i < (s * 7 + task * 13) % 400; i++)
                __atomic_fetch_add(&spent, 1, __ATOMIC_RELAXED);
            __atomic_fetch_add(&done[s][task], 1, __ATOMIC_RELAXED);
        }
        if (s < stop_at && index == 0 && !whole(s)) __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
    }
}

static int late;
static size_t joining;

static void *run(void *argument) {
    size_t index = (size_t)argument;
    while (index >= joining - (size_t)late && !__atomic_load_n(&finished, __ATOMIC_ACQUIRE)) TEAM_PAUSE();
    work(index);
    return NULL;
}

int main(int n, char **arguments) {
    if (n != 5) return 2;
    size_t threads = (size_t)atoi(arguments[1]);
    joining = (size_t)atoi(arguments[2]);
    late = atoi(arguments[3]);
    stop_at = atoi(arguments[4]);
    for (int s = 0; s < STAGES; s++) n_tasks[s] = s % 5 == 0 ? 1 : s % 7 == 0 ? 0 : (s * 31) % MAX_TASKS;
    if (team_reserve(&team, threads, STAGES)) return 2;
    for (int pass = 0; pass < 20; pass++) {
        pthread_t handles[64];
        memset(done, 0, sizeof done);
        finished = 0;
        team_begin(&team, threads);
        for (size_t i = 1; i < joining; i++) pthread_create(&handles[i], NULL, run, (void *)i);
        work(0);
        __atomic_store_n(&finished, 1, __ATOMIC_RELEASE);
        for (size_t i = 1; i < joining; i++) pthread_join(handles[i], NULL);
        for (int s = 0; s < STAGES; s++)
            for (int task = 0; task < n_tasks[s]; task++)
                if (done[s][task] > 1 || (s < stop_at && done[s][task] != 1)) wrong = 1;
    }
    free(team.counters);
    puts(wrong ? "wrong" : "right");
    return wrong;
}
