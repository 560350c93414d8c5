// Which kernels this processor can run, found out once, and the choice among them.
#include <atomic>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace autoq::cpu {
namespace {

enum class Capability { kPortable, kAvx2, kAvx512, kAmx };

#if defined(__x86_64__)
bool runs_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// VNNI is asked for as well: the integer kernels are built on its byte dot product. Processors with AVX-512 but
// without VNNI (before 2019) take the AVX2 kernels.
bool runs_avx512() {
    return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

// Older compilers do not know these features by name.
bool has_amx_feature(int bit) {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> bit & 1) != 0;
}

bool has_amx_bf16() { return has_amx_feature(22); }
bool has_amx_tile() { return has_amx_feature(24); }
bool has_amx_int8() { return has_amx_feature(25); }

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
    static const bool found = runs_avx512() && has_amx_tile() && has_amx_int8() && has_amx_bf16() && may_use_tiles();
    return found;
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
bool runs_amx() { return false; }
#endif

const char* name_of(Capability capability) {
    switch (capability) {
        case Capability::kAmx:
            return "amx";
        case Capability::kAvx512:
            return "avx512";
        case Capability::kAvx2:
            return "avx2";
        default:
            return "portable";
    }
}

bool runs(Capability capability) {
    switch (capability) {
        case Capability::kAmx:
            return runs_amx();
        case Capability::kAvx512:
            return runs_avx512();
        case Capability::kAvx2:
            return runs_avx2();
        default:
            return true;
    }
}

constexpr Capability kAll[] = {Capability::kPortable, Capability::kAvx2, Capability::kAvx512, Capability::kAmx};

Capability best() {
    Capability found = Capability::kPortable;
    for (Capability capability : kAll) {
        if (runs(capability)) found = capability;
    }
    return found;
}

std::atomic<Capability>& chosen() {
    static std::atomic<Capability> capability{best()};
    return capability;
}

}  // namespace

std::vector<std::pair<std::string, bool>> features() {
    std::vector<std::pair<std::string, bool>> found;
#if defined(__x86_64__)
#define AUTOQ_FEATURE(name) found.emplace_back(name, __builtin_cpu_supports(name) != 0)
    AUTOQ_FEATURE("avx2");
    AUTOQ_FEATURE("fma");
    AUTOQ_FEATURE("f16c");
    AUTOQ_FEATURE("avx512f");
    AUTOQ_FEATURE("avx512bw");
    AUTOQ_FEATURE("avx512vl");
    AUTOQ_FEATURE("avx512dq");
    AUTOQ_FEATURE("avx512vnni");
#undef AUTOQ_FEATURE
    found.emplace_back("amx_tile", has_amx_tile());
    found.emplace_back("amx_int8", has_amx_int8());
    found.emplace_back("amx_bf16", has_amx_bf16());
#endif
    return found;
}

std::vector<std::string> capabilities() {
    std::vector<std::string> names;
    for (Capability capability : kAll) {
        if (runs(capability)) names.emplace_back(name_of(capability));
    }
    return names;
}

std::string capability() { return name_of(chosen()); }

void set_capability(const std::string& name) {
    for (Capability capability : kAll) {
        if (name != name_of(capability)) continue;
        if (!runs(capability)) {
            throw std::invalid_argument("this processor cannot run the " + name + " kernels");
        }
        chosen() = capability;
        return;
    }
    throw std::invalid_argument("there are no " + name + " kernels; choose portable, avx2, avx512 or amx");
}

const Kernels& kernels() {
#if defined(__x86_64__)
    switch (chosen().load(std::memory_order_relaxed)) {
        case Capability::kAmx:
            return amx_kernels;
        case Capability::kAvx512:
            return avx512_kernels;
        case Capability::kAvx2:
            return avx2_kernels;
        default:
            break;
    }
#endif
    return portable_kernels;
}

}  // namespace autoq::cpu
