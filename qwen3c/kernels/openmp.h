/* OpenMP where the compiler has it, one thread where not (Cython cannot say #ifdef). */
#ifndef QWEN3C_OPENMP_H
#define QWEN3C_OPENMP_H
#ifdef _OPENMP
#include <omp.h>
#define HAVE_OPENMP 1
#define team_size() omp_get_num_threads()
#else
#define HAVE_OPENMP 0
#define team_size() 1
#endif
#endif
