/* Which kernels this build holds and which of them this CPU runs. */
#define _DEFAULT_SOURCE 1  /* syscall */
#include "kernels.h"

#if HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

extern const Kernels kernels_scalar, kernels_avx2, kernels_avxvnni, kernels_avx512vnni, kernels_amx;
extern const Kernels kernels_neon, kernels_neon_dotprod;

const Kernels *const all_kernels[] = {
    &kernels_scalar,
#if defined(__x86_64__)
    &kernels_avx2, &kernels_avxvnni, &kernels_avx512vnni,
#if HAVE_AMX
    &kernels_amx,
#endif
#elif defined(__aarch64__)
    &kernels_neon, &kernels_neon_dotprod,
#endif
};
const size_t n_kernels = sizeof all_kernels / sizeof *all_kernels;

#if defined(QWEN3C_EMULATE_AVXVNNI)
static int cpu_has_avxvnni(void) { return kernels_runnable(&kernels_avx512vnni); }
#elif defined(__x86_64__)
/* By cpuid: gcc before 11 and clang before 12 do not know the name for __builtin_cpu_supports. */
static int cpu_has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

#if defined(__x86_64__)
/* By cpuid: clang does not know the name f16c. The operating system need not be asked: f16c uses the
   registers of avx, which are saved where avx2 is supported. */
static int cpu_has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if HAVE_AMX
#define ARCH_REQ_XCOMP_PERM 0x1023  /* of arch_prctl */
#define XFEATURE_XTILEDATA 18

/* Linux gives a process the tile registers when it asks for them; threads then have them too. */
static int cpu_has_amx(void) {
    unsigned a, b, c, d;
    int listed = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);  /* tile, int8 */
    return listed && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

int kernels_runnable(const Kernels *kernels) {
    if (kernels == &kernels_scalar) return 1;
#if defined(__x86_64__)
    /* __builtin_cpu_supports also asks whether the operating system saves the wide registers */
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has_f16c();
    if (kernels == &kernels_avx2) return avx2;
    if (kernels == &kernels_avxvnni) return avx2 && cpu_has_avxvnni();
    if (kernels == &kernels_avx512vnni)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#if HAVE_AMX
    if (kernels == &kernels_amx) return kernels_runnable(&kernels_avx512vnni) && cpu_has_amx();
#endif
#elif defined(__aarch64__)
    if (kernels == &kernels_neon) return 1;
#if defined(__linux__)
    if (kernels == &kernels_neon_dotprod) return (getauxval(AT_HWCAP) & (1 << 20)) != 0;  /* HWCAP_ASIMDDP */
#else
    if (kernels == &kernels_neon_dotprod) return 1;  /* every Mac with an ARM CPU */
#endif
#endif
    return 0;
}
