// Whether tensors are still where they were: autoq/nn/held.py asks for every token.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "kept.h"

namespace autoq {
namespace {

using torch::stable::Tensor;

struct Places {
    std::vector<std::pair<Tensor, const void*>> places;
};

Kept<Places>& kept_places() {
    static Kept<Places> all;
    return all;
}

int64_t keep_places(const std::vector<Tensor>& tensors) {
    auto found = std::make_shared<Places>();
    for (const Tensor& tensor : tensors) found->places.emplace_back(tensor, tensor.data_ptr());
    return kept_places().add(std::move(found));
}

bool are_in_places(int64_t number) {
    // All are looked at, so that fetching one from memory does not wait for another.
    bool same = true;
    for (const auto& [tensor, place] : kept_places().at(number)->places) same &= tensor.data_ptr() == place;
    return same;
}

void drop_places(int64_t number) { kept_places().drop(number); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(autoq, m) {
    m.def("keep_places(Tensor[] tensors) -> int");
    m.def("are_in_places(int number) -> bool");
    m.def("drop_places(int number) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(autoq, CompositeExplicitAutograd, m) {
    m.impl("keep_places", TORCH_BOX(&keep_places));
    m.impl("are_in_places", TORCH_BOX(&are_in_places));
    m.impl("drop_places", TORCH_BOX(&drop_places));
}

}  // namespace autoq
