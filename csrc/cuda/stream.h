// The stream that torch works on.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace autoq {

// torch's current stream. Its accessor is looked up by name: a hard reference would keep the extension from being
// imported where torch has no CUDA.
inline void* current_stream(int32_t device) {
    using Accessor = AOTITorchError (*)(int32_t, void**);
    static const auto accessor = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Accessor>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    STD_TORCH_CHECK(accessor != nullptr, "autoq: this torch has no CUDA; install one built with CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(accessor(device, &stream) == 0, "autoq: torch gave no CUDA stream for device ", device);
    return stream;
}

}  // namespace autoq
