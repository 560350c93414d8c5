// Operators that other operators are made of.
#pragma once

#include "cpu/tiles.h"

namespace autoq {

// autoq::linear on the CPU: multiplies input rows with a packed weight, with torch's threads or the team's.
void multiply(const PackedWeight& weight, const cpu::InputRows& input, const cpu::OutputRows& output, cpu::Mode mode);

}  // namespace autoq
