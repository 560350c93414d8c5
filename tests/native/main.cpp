// Tests the kernels of every instruction set that the processor, which may be an emulated one, has. They know no torch,
// so this program needs none to run. With the argument `list` it only names the instruction sets.
#include <cstring>
#include <stdexcept>

#include "support.h"

namespace {

using namespace test;

void test_choice() {
    const std::vector<std::string> names = capabilities();
    check(names.front() == "portable", "portable comes first");
    check(capability() == names.back(), "the best is the default");
    for (const char* name : {"portable", "neon", "avx2", "avx512", "avx512_bf16", "amx"}) {
        const bool known = std::find(names.begin(), names.end(), name) != names.end();
        bool accepted = true;
        try {
            set_capability(name);
        } catch (const std::invalid_argument&) {
            accepted = false;
        }
        check(accepted == known, std::string(name) + " is listed and accepted, or neither");
    }
}

}  // namespace

int main(int count, char** arguments) {
    for (const std::string& name : autoq::cpu::capabilities()) std::printf("%s ", name.c_str());
    std::printf("\n");
    test_choice();
    if (count < 2 || std::strcmp(arguments[1], "list") != 0) {
        test_linear();
        test_block();
        test_search();
    }
    std::printf("%d checks, %d failed\n", tally().checks, tally().failures);
    return tally().failures == 0 ? 0 : 1;
}
