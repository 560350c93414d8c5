// What the functions that the tests call through ctypes share.
#pragma once

#define AUTOQ_EXPORT extern "C" __attribute__((visibility("default")))
