// Which kernels this processor can run, found out once, and the choice among them.
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

#include "kernels.h"

namespace autoq::cpu {
namespace {

#if defined(__x86_64__)
// Some compilers do not know these features by name.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1) != 0;
}

bool has_avx512_bf16() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1) != 0;
}

bool has_amx_feature(int bit) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> bit & 1) != 0;
}

bool has_amx_bf16() { return has_amx_feature(22); }
bool has_amx_tile() { return has_amx_feature(24); }
bool has_amx_int8() { return has_amx_feature(25); }

bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

// VNNI is asked for as well: the integer kernels are built on its byte dot product. Processors with AVX-512 but
// without VNNI (before 2019) take the AVX2 kernels.
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

bool runs_avx512_bf16() { return runs_avx512() && has_avx512_bf16(); }

// Tiles are 8 KB of state in every thread that uses them, so Linux gives them only to processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool runs_amx() {
    static const bool found =
        runs_avx512_bf16() && has_amx_tile() && has_amx_int8() && has_amx_bf16() && may_use_tiles();
    return found;
}
#endif

#if defined(__aarch64__)
bool has_asimddp() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__ARM_FEATURE_DOTPROD)
    return true;
#else
    return false;
#endif
}
#endif

bool runs_always() { return true; }

// Kernels with a name; those of other processors than this was compiled for have no more than that.
struct Capability {
    const char* name;
    bool (*runs)();
    const Kernels* kernels;

    bool can_run() const { return kernels != nullptr && runs(); }
};

constexpr Capability kAll[] = {
    {"portable", runs_always, &portable_kernels},
#if defined(AUTOQ_NEON)
    {"neon", has_asimddp, &neon_kernels},
#else
    {"neon", nullptr, nullptr},
#endif
#if defined(__x86_64__)
    {"avx2", runs_avx2, &avx2_kernels},
    {"avx512", runs_avx512, &avx512_kernels},
    {"avx512_bf16", runs_avx512_bf16, &avx512_bf16_kernels},
    {"amx", runs_amx, &amx_kernels},
#else
    {"avx2", nullptr, nullptr},
    {"avx512", nullptr, nullptr},
    {"avx512_bf16", nullptr, nullptr},
    {"amx", nullptr, nullptr},
#endif
};

const Capability* best() {
    const Capability* found = nullptr;
    for (const Capability& capability : kAll) {
        if (capability.can_run()) found = &capability;
    }
    return found;
}

std::atomic<const Capability*>& chosen() {
    static std::atomic<const Capability*> capability{best()};
    return capability;
}

}  // namespace

std::vector<std::pair<std::string, bool>> features() {
    std::vector<std::pair<std::string, bool>> found;
#if defined(__x86_64__)
#define AUTOQ_FEATURE(name) found.emplace_back(name, __builtin_cpu_supports(name) != 0)
    AUTOQ_FEATURE("avx2");
    AUTOQ_FEATURE("fma");
    found.emplace_back("f16c", has_f16c());
    AUTOQ_FEATURE("avx512f");
    AUTOQ_FEATURE("avx512bw");
    AUTOQ_FEATURE("avx512vl");
    AUTOQ_FEATURE("avx512dq");
    AUTOQ_FEATURE("avx512vnni");
#undef AUTOQ_FEATURE
    found.emplace_back("avx512_bf16", has_avx512_bf16());
    found.emplace_back("amx_tile", has_amx_tile());
    found.emplace_back("amx_int8", has_amx_int8());
    found.emplace_back("amx_bf16", has_amx_bf16());
#elif defined(__aarch64__)
    found.emplace_back("asimddp", has_asimddp());
#endif
    return found;
}

std::vector<std::string> capabilities() {
    std::vector<std::string> names;
    for (const Capability& capability : kAll) {
        if (capability.can_run()) names.emplace_back(capability.name);
    }
    return names;
}

std::string capability() { return chosen().load()->name; }

void set_capability(const std::string& name) {
    for (const Capability& capability : kAll) {
        if (name != capability.name) continue;
        if (!capability.can_run()) {
            throw std::invalid_argument("this processor cannot run the " + name + " kernels");
        }
        chosen() = &capability;
        return;
    }
    throw std::invalid_argument("there are no " + name +
                                " kernels; choose portable, neon, avx2, avx512, avx512_bf16 or amx");
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed)->kernels; }

}  // namespace autoq::cpu
