/* OpenMP where the compiler has it, one thread where not (Cython cannot say #ifdef). */
#ifndef QWEN3C_OPENMP_H
#define QWEN3C_OPENMP_H
#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#define HAVE_OPENMP 1
#define team_size() omp_get_num_threads()

#define MAX_TEAM 1024

static void *wait_at_gate(void *gate) {
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* How many threads, at most `wanted`, a parallel region of the calling thread can have. OpenMP ends the whole
   process when it cannot start a thread. So this function first starts plain threads to see how many the
   system allows: all at once, because limits count threads that are alive. Threads that OpenMP already keeps
   for the calling thread, those of its last team, exist and are not tried again. */
static int startable_team(int wanted) {
    static _Thread_local int kept = 1;
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t threads[MAX_TEAM];
    int n = 0;
    if (wanted > MAX_TEAM) wanted = MAX_TEAM;
    if (wanted <= 1) return 1;
    if (wanted > kept) {
        pthread_mutex_lock(&gate);
        while (kept + n < wanted && pthread_create(&threads[n], NULL, wait_at_gate, &gate) == 0) n++;
        pthread_mutex_unlock(&gate);
    }
    kept = wanted > kept ? kept + n : wanted;
    while (n > 0) pthread_join(threads[--n], NULL);
    return kept;
}
#else
#define HAVE_OPENMP 0
#define team_size() 1
static int startable_team(int wanted) {
    (void)wanted;
    return 1;
}
#endif
#endif
