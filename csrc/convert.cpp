// Conversions into the packed layout, on the CPU: what loading a checkpoint spends its time on. The schemas and the
// references are where each way to store codes is described: autoq/formats and autoq/packed.py. Little-endian, as all
// of these are.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>

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

// Codes of a weight that something is packed into.
void check_packed(const Tensor& packed, int64_t outputs, int64_t inputs, int64_t bits) {
    const int64_t row_blocks = (outputs + kLanes - 1) / kLanes, units = (inputs + kUnitColumns - 1) / kUnitColumns;
    STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Int && packed.is_contiguous() &&
                        packed.dim() == 4 && packed.size(0) == row_blocks && packed.size(1) == units &&
                        packed.size(2) == bits && packed.size(3) == kLanes,
                    "autoq: packed codes must be contiguous int32 [", row_blocks, ", ", units, ", ", bits, ", ", kLanes,
                    "] on the CPU");
}

// ---- from bytes ---------------------------------------------------------------------------------------------------

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

// The words of one row of a unit of 3 bits.
struct ThreeBits {
    uint32_t words[3] = {0, 0, 0};

    // Codes 4 i .. 4 i + 3, the first in the lowest bits.
    void put(int i, uint32_t four) {
        const int half = i / 4, byte = i % 4 * 8;
        words[half] |= ((four & 0x3f) | (four >> 3 & 0xc0)) << byte;
        words[2] |= ((four >> 6 & 7) | (four >> 8 & 8)) << (byte + 4 * half);
    }

    void store(int32_t* lane) const {
        for (int j = 0; j < 3; ++j) lane[j * kLanes] = static_cast<int32_t>(words[j]);
    }
};

// The words of one row of a unit, from its 32 codes. `words` points at the row's lane.
void pack_unit(const uint8_t* codes, int bits, int32_t* words) {
    if (bits == 8) {
        for (int j = 0; j < 8; ++j) std::memcpy(words + j * kLanes, codes + 4 * j, 4);
    } else if (bits == 4) {
        for (int j = 0; j < 4; ++j)
            words[j * kLanes] = static_cast<int32_t>(gather_fields(load_eight(codes + 8 * j), 4));
    } else if (bits == 3) {
        ThreeBits unit;
        for (int i = 0; i < 8; ++i) {
            uint32_t four;
            std::memcpy(&four, codes + 4 * i, 4);
            unit.put(i, (four & 7) | (four >> 5 & 0x38) | (four >> 10 & 0x1c0) | (four >> 15 & 0xe00));
        }
        unit.store(words);
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
    check_packed(packed, outputs, inputs, bits);
    const int64_t row_blocks = packed.size(0), units = packed.size(1);
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

// ---- from AutoAWQ's words -------------------------------------------------------------------------------------------

constexpr int64_t kPerWord = 8;       // outputs of a word; and as many inputs make a packed word
constexpr int64_t kTileColumns = 16;  // word columns that are packed together: a cache line
// Rows are far apart: they are asked for so many packed words ahead.
constexpr int64_t kWordsAhead = 2;
// The output that nibble i of a word belongs to.
constexpr std::array<int, kPerWord> kNibbleOutput{0, 2, 4, 6, 1, 3, 5, 7};

// Exchanges the fields of `one` that are `SHIFT` bits above the mask's with those of `other` under the mask.
template <int SHIFT>
void exchange(uint64_t& one, uint64_t& other, uint64_t mask) {
    const uint64_t changed = ((one >> SHIFT) ^ other) & mask;
    other ^= changed;
    one ^= changed << SHIFT;
}

// Nibble i of word k becomes nibble k of word i, in either half of the words.
void transpose_nibbles(std::array<uint64_t, kPerWord>& words) {
    for (size_t k : {0, 2, 4, 6}) exchange<4>(words[k], words[k + 1], 0x0f0f0f0f0f0f0f0f);
    for (size_t k : {0, 1, 4, 5}) exchange<8>(words[k], words[k + 2], 0x00ff00ff00ff00ff);
    for (size_t k : {0, 1, 2, 3}) exchange<16>(words[k], words[k + 4], 0x0000ffff0000ffff);
}

// One packed word of a row block, from two columns (or one, the last) of `count` inputs, at most eight, in rows that
// are `stride` words apart.
void pack_words(const int32_t* from, int64_t stride, int64_t columns, int64_t count, int32_t* lanes) {
    std::array<uint64_t, kPerWord> words{};
    if (columns == 2 && count == kPerWord) {  // nearly always, and with sizes that are known a copy is a load
        for (int64_t k = 0; k < kPerWord; ++k) std::memcpy(&words[static_cast<size_t>(k)], from + k * stride, 8);
    } else {
        for (int64_t k = 0; k < count; ++k) {
            std::memcpy(&words[static_cast<size_t>(k)], from + k * stride, static_cast<size_t>(columns) * 4);
        }
    }
    transpose_nibbles(words);
    for (size_t i = 0; i < words.size(); ++i) {
        lanes[kNibbleOutput[i]] = static_cast<int32_t>(words[i]);
        lanes[kPerWord + kNibbleOutput[i]] = static_cast<int32_t>(words[i] >> 32);
    }
}

// int32 [inputs, outputs / 8] -> int32 [row blocks, units, 4, 16]
void repack_gemm_codes(const Tensor& words_, const Tensor& packed) {
    check_matrix(words_, ScalarType::Int, "GEMM words", "int32");
    const Tensor words = make_contiguous(words_);
    const int64_t inputs = words.size(0), columns = words.size(1);
    check_packed(packed, columns * kPerWord, inputs, 4);
    const int64_t packed_words = packed.size(1) * 4;  // of a row
    const auto* from = static_cast<const int32_t*>(words.data_ptr());
    auto* to = static_cast<int32_t*>(packed.data_ptr());
    const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kTileColumns, last = std::min(first + kTileColumns, columns);
            for (int64_t word = 0; word < packed_words; ++word) {
                const int64_t input = word * kPerWord, count = std::clamp<int64_t>(inputs - input, 0, kPerWord);
                const int32_t* rows = from + (count > 0 ? input : 0) * columns;
                for (int64_t k = 0; k < kPerWord && input + kWordsAhead * kPerWord + k < inputs; ++k) {
                    __builtin_prefetch(rows + (kWordsAhead * kPerWord + k) * columns + first);
                }
                for (int64_t column = first; column < last; column += 2) {
                    pack_words(rows + column, columns, std::min<int64_t>(2, last - column), count,
                               to + (column / 2 * packed_words + word) * kLanes);
                }
            }
        }
    });
}

// ---- from a bit stream --------------------------------------------------------------------------------------------

// The words of one row of a unit, from the 4 * bits bytes of its codes. `words` points at the row's lane.
void pack_unit_of_stream(const uint8_t* stream, int bits, int32_t* words) {
    if (bits != 3) {  // in the same order
        for (int j = 0; j < bits; ++j) std::memcpy(words + j * kLanes, stream + 4 * j, 4);
        return;
    }
    ThreeBits unit;
    for (int i = 0; i < 8; i += 2, stream += 3) {
        uint32_t eight = 0;
        std::memcpy(&eight, stream, 3);
        unit.put(i, eight & 0xfff);
        unit.put(i + 1, eight >> 12);
    }
    unit.store(words);
}

// The bytes that are left of a row whose last unit is not full, and zeros behind its last code.
void take_rest(const uint8_t* stream, int64_t codes, int64_t bits, uint8_t* unit) {
    const int64_t full = codes * bits / 8, over = codes * bits % 8;
    std::memcpy(unit, stream, static_cast<size_t>(full));
    if (over > 0) unit[full] = static_cast<uint8_t>(stream[full] & ((1 << over) - 1));
}

// uint8 [outputs, bytes], codes one after the other from the lowest bit -> int32 [row blocks, units, bits, 16]
void repack_bit_stream(const Tensor& stream_, int64_t inputs, int64_t bits, const Tensor& packed) {
    check_matrix(stream_, ScalarType::Byte, "a bit stream", "uint8");
    check_bits(bits);
    const Tensor stream = make_contiguous(stream_);
    const int64_t outputs = stream.size(0), bytes = stream.size(1);
    STD_TORCH_CHECK(inputs >= 0 && bytes == (inputs * bits + 7) / 8, "autoq: ", inputs, " codes of ", bits,
                    " bits take ", (inputs * bits + 7) / 8, " bytes, not ", bytes);
    check_packed(packed, outputs, inputs, bits);
    const int64_t row_blocks = packed.size(0), units = packed.size(1), unit_bytes = 4 * bits;
    const auto* from = static_cast<const uint8_t*>(stream.data_ptr());
    auto* to = static_cast<int32_t*>(packed.data_ptr());
    torch::stable::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            for (int64_t unit = 0; unit < units; ++unit) {
                int32_t* words = to + (block * units + unit) * bits * kLanes;
                const int64_t codes = std::min<int64_t>(kUnitColumns, inputs - unit * kUnitColumns);
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    const int64_t row = block * kLanes + lane;
                    uint8_t rest[4 * 8] = {0};
                    const uint8_t* source = rest;
                    if (row < outputs) {
                        source = from + row * bytes + unit * unit_bytes;
                        if (codes < kUnitColumns) {
                            take_rest(source, codes, bits, rest);
                            source = rest;
                        }
                    }
                    pack_unit_of_stream(source, static_cast<int>(bits), words + lane);
                }
            }
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(autoq, CPU, m) {
    m.impl("pack_codes", TORCH_BOX(&pack_codes));
    m.impl("repack_gemm_codes", TORCH_BOX(&repack_gemm_codes));
    m.impl("repack_bit_stream", TORCH_BOX(&repack_bit_stream));
}

}  // namespace autoq
