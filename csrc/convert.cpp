// Conversions between ways to store codes, on the CPU: what loading a checkpoint spends its time on. The schemas and
// the references are where each way is described: autoq/formats and autoq/ops.py. Little-endian, as all of these are.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "packed.h"

namespace autoq {
namespace {

void check_matrix(const Tensor& tensor, ScalarType dtype, const char* name, const char* wanted) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && tensor.scalar_type() == dtype, "autoq: ", name, " must be ",
                    wanted, " of two dimensions on the CPU");
}

void check_bits(int64_t bits) {
    STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "autoq: bits is ", bits,
                    "; it must be 2, 3, 4 or 8");
}

// ---- AutoAWQ's words -----------------------------------------------------------------------------------------------

// Bit offset of each of the eight columns of a word.
constexpr std::array<int, 8> kGemmShifts{0, 16, 4, 20, 8, 24, 12, 28};
constexpr int64_t kTile = 64;

// Word column `column` of rows [first, first + rows), `stride` words apart: eight rows of the codes.
void spread_words(const int32_t* words, int64_t stride, int64_t column, int64_t first, int64_t rows, uint8_t* codes,
                  int64_t inputs) {
    uint32_t tile[kTile];
    for (int64_t k = 0; k < rows; ++k) tile[k] = static_cast<uint32_t>(words[(first + k) * stride + column]);
    for (size_t i = 0; i < kGemmShifts.size(); ++i) {
        uint8_t* row = codes + (column * 8 + static_cast<int64_t>(i)) * inputs + first;
        const int shift = kGemmShifts[i];
        for (int64_t k = 0; k < rows; ++k) row[k] = static_cast<uint8_t>((tile[k] >> shift) & 15);
    }
}

// int32 [inputs, outputs / 8] -> uint8 [outputs, inputs]
Tensor unpack_gemm_codes(const Tensor& words_) {
    check_matrix(words_, ScalarType::Int, "GEMM words", "int32");
    // Some columns of a wider matrix are read where they are.
    const Tensor words = words_.stride(1) == 1 ? words_ : make_contiguous(words_);
    const int64_t inputs = words.size(0), columns = words.size(1), stride = words.stride(0);
    Tensor codes = torch::stable::new_empty(words, {columns * 8, inputs}, ScalarType::Byte);
    const auto* from = static_cast<const int32_t*>(words.data_ptr());
    auto* to = static_cast<uint8_t*>(codes.data_ptr());
    // A cache line of words holds sixteen columns: they are taken together, from `kTile` rows.
    constexpr int64_t kLine = 16;
    torch::stable::parallel_for(0, (columns + kLine - 1) / kLine, 1, [&](int64_t begin, int64_t end) {
        for (int64_t line = begin; line < end; ++line) {
            for (int64_t first = 0; first < inputs; first += kTile) {
                for (int64_t column = line * kLine; column < std::min((line + 1) * kLine, columns); ++column) {
                    spread_words(from, stride, column, first, std::min(kTile, inputs - first), to, inputs);
                }
            }
        }
    });
    return codes;
}

// ---- bit streams ---------------------------------------------------------------------------------------------------

template <int BITS>
void spread_row(const uint8_t* stream, int64_t count, uint8_t* codes) {
    constexpr uint64_t kMask = (1u << BITS) - 1;
    int64_t first = 0;
    for (; first + 8 <= count; first += 8, stream += BITS) {
        uint64_t eight = 0;
        std::memcpy(&eight, stream, BITS);
        for (int i = 0; i < 8; ++i) codes[first + i] = static_cast<uint8_t>((eight >> (BITS * i)) & kMask);
    }
    uint64_t rest = 0;
    std::memcpy(&rest, stream, static_cast<size_t>(((count - first) * BITS + 7) / 8));
    for (int64_t i = 0; first + i < count; ++i) codes[first + i] = static_cast<uint8_t>((rest >> (BITS * i)) & kMask);
}

void spread_row(const uint8_t* stream, int64_t count, int64_t bits, uint8_t* codes) {
    switch (bits) {
        case 2:
            return spread_row<2>(stream, count, codes);
        case 3:
            return spread_row<3>(stream, count, codes);
        case 4:
            return spread_row<4>(stream, count, codes);
        default:
            std::memcpy(codes, stream, static_cast<size_t>(count));
    }
}

// uint8 [rows, bytes], codes one after the other from the lowest bit -> uint8 [rows, count]
Tensor unpack_bit_stream(const Tensor& stream_, int64_t count, int64_t bits) {
    check_matrix(stream_, ScalarType::Byte, "a bit stream", "uint8");
    check_bits(bits);
    const Tensor stream = make_contiguous(stream_);
    const int64_t rows = stream.size(0), bytes = stream.size(1);
    STD_TORCH_CHECK(count >= 0 && bytes == (count * bits + 7) / 8, "autoq: ", count, " codes of ", bits, " bits take ",
                    (count * bits + 7) / 8, " bytes, not ", bytes);
    Tensor codes = torch::stable::new_empty(stream, {rows, count});
    const auto* from = static_cast<const uint8_t*>(stream.data_ptr());
    auto* to = static_cast<uint8_t*>(codes.data_ptr());
    torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) spread_row(from + row * bytes, count, bits, to + row * count);
    });
    return codes;
}

// ---- the packed layout ---------------------------------------------------------------------------------------------

// The low `width` bits of eight bytes, side by side: fields are halved in number and doubled in width, three times.
uint32_t gather_fields(uint64_t bytes, int width) {
    bytes = (bytes | bytes >> (8 - width)) & (0x0001000100010001u * ((uint64_t{1} << 2 * width) - 1));
    bytes = (bytes | bytes >> (16 - 2 * width)) & (0x0000000100000001u * ((uint64_t{1} << 4 * width) - 1));
    return static_cast<uint32_t>(bytes | bytes >> (32 - 4 * width));
}

uint64_t load_eight(const uint8_t* codes) {
    uint64_t bytes;
    std::memcpy(&bytes, codes, 8);
    return bytes;
}

// The words of one row of a unit, from its 32 codes. `words` points at the row's lane.
void pack_unit(const uint8_t* codes, int bits, int32_t* words) {
    if (bits == 8) {
        for (int j = 0; j < 8; ++j) std::memcpy(words + j * kLanes, codes + 4 * j, 4);
    } else if (bits == 4) {
        for (int j = 0; j < 4; ++j)
            words[j * kLanes] = static_cast<int32_t>(gather_fields(load_eight(codes + 8 * j), 4));
    } else if (bits == 3) {
        uint32_t packed[3] = {0, 0, 0};
        for (int i = 0; i < 8; ++i) {  // four codes at a time
            const int half = i / 4, byte = i % 4 * 8;
            uint32_t four;
            std::memcpy(&four, codes + 4 * i, 4);
            packed[half] |= ((four & 7) | (four >> 5 & 0x38) | (four >> 18 & 0xc0)) << byte;
            packed[2] |= ((four >> 16 & 7) | (four >> 23 & 8)) << (byte + 4 * half);
        }
        for (int j = 0; j < 3; ++j) words[j * kLanes] = static_cast<int32_t>(packed[j]);
    } else {
        for (int j = 0; j < 2; ++j) {
            const uint32_t first = gather_fields(load_eight(codes + 16 * j), 2);
            const uint32_t second = gather_fields(load_eight(codes + 16 * j + 8), 2);
            words[j * kLanes] = static_cast<int32_t>(first | second << 16);
        }
    }
}

// uint8 [outputs, inputs] -> int32 [row blocks, units, bits, 16]
void pack_codes(const Tensor& codes_, int64_t bits, const Tensor& packed) {
    check_matrix(codes_, ScalarType::Byte, "codes", "uint8");
    check_bits(bits);
    const Tensor codes = make_contiguous(codes_);
    const int64_t outputs = codes.size(0), inputs = codes.size(1);
    const int64_t row_blocks = (outputs + kLanes - 1) / kLanes, units = (inputs + kUnitColumns - 1) / kUnitColumns;
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Int && packed.is_contiguous() &&
                        packed.dim() == 4 && packed.size(0) == row_blocks && packed.size(1) == units &&
                        packed.size(2) == bits && packed.size(3) == kLanes,
                    "autoq: packed codes must be contiguous int32 [", row_blocks, ", ", units, ", ", bits, ", ", kLanes,
                    "] on the CPU");
    const auto* from = static_cast<const uint8_t*>(codes.data_ptr());
    auto* to = static_cast<int32_t*>(packed.data_ptr());
    torch::stable::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const int64_t row = block * kLanes + lane;
                for (int64_t unit = 0; unit < units; ++unit) {
                    uint8_t padded[kUnitColumns] = {0};
                    const int64_t column = unit * kUnitColumns;
                    const int64_t present = row < outputs ? std::min<int64_t>(kUnitColumns, inputs - column) : 0;
                    std::memcpy(padded, from + (present > 0 ? row * inputs + column : 0),
                                static_cast<size_t>(std::max<int64_t>(present, 0)));
                    pack_unit(padded, static_cast<int>(bits), to + (block * units + unit) * bits * kLanes + lane);
                }
            }
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("unpack_gemm_codes", TORCH_BOX(&unpack_gemm_codes));
    m.impl("unpack_bit_stream", TORCH_BOX(&unpack_bit_stream));
    m.impl("pack_codes", TORCH_BOX(&pack_codes));
}

}  // namespace autoq
