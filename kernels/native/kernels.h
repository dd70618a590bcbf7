// What a variant of the arithmetic offers to the engine: one table of functions an instruction set.
//
// Linears have two forms, chosen by how many tokens of one sequence are computed together:
//
//   fine    int8 activations of which few share a scale, as few as cost nothing, or int16 ones. For decoding, one token or several.
//   coarse  int8 activations, one scale a token and group of 32 or 64 columns. For prompts, which are bound by multiplications.
//
// Attention works on int16 queries and probabilities over the int8 cache, whatever the number of tokens.
#pragma once
#include <cstddef>
#include <cstdint>

namespace headrace {

constexpr int kMostGroup = 64;  // columns that share a scale of coarse activations at most: half of them, or all
constexpr int kColumns = 256;   // columns of coarse activations that lie together, and of weights unpacked at a time
constexpr int kTile = 16;       // positions of a tile of keys
constexpr int kBlock = 64;      // positions whose probabilities share a maximum
constexpr int kTop = 32639;     // largest code of int16: 256 * 127 + 127
constexpr int kUnit = 64;       // columns whose high bits lie together, of 5 and 6 bits
constexpr int kPad = 128;       // rows of activations are padded with zeros to a multiple of this
constexpr int kFew = 8;         // tokens whose fine activations lie together

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// A weight (n, k) as it lies in the file. Code = unsigned code - zero point, 1 << (bits - 1). Codes of 5 and 6 bits are split: what
// they have above their low four bits lies apart, in units of kUnit columns; such weights have blocks. Scales of blocks have two forms:
// float16 each, or, of less than 8 bits, float16 a row times a whole factor 1 … 1 << (8 - bits) a block.
struct Weight {
  int n, k, bits;
  int block;               // columns that share a scale; 0: the whole row
  const uint8_t* packed;   // (n, row_bytes()): bytes, or the low four bits of codes, low nibble first
  const uint8_t* high;     // (n, high_bytes()), of 5 and 6 bits: high bits; null: there are none
  const uint16_t* scale;   // float16 (n, scales())
  const uint8_t* factors;  // (n, factor_bytes()), less 1, low nibble first; null: scales have none
  const float* bias;       // (n) or null
  size_t row_bytes() const { return bits == 8 ? k : size_t(k) / 2; }
  size_t high_bytes() const { return high ? round_up(k, kUnit) / 8 * (bits - 4) : 0; }
  size_t code_bytes() const { return row_bytes() + high_bytes(); }
  int blocks() const { return block ? k / block : 1; }
  int scales() const { return factors ? 1 : blocks(); }
  size_t factor_bytes() const { return (blocks() + 1) / 2; }
  int factor(int row, int b) const { return (factors[row * factor_bytes() + b / 2] >> b % 2 * 4 & 15) + 1; }
};

// One token's fine activations: codes, of which few columns share a scale. The order of codes and the starts are the variant's own: a step of
// some columns lies together, with what it is scaled with, and the same step of up to kFew tokens one behind the other, so that one pointer
// reaches them. A start is what the zero point takes from a sum of products: minus zero point times the sum of the codes.
//
// 4 bits: int8; a scale is that of the token times a whole number, 1 … kMostFactor. In a unit of columns there are 16 of these: the first
// is that of the first 8 columns and of those half a unit further, and so on, or of the 8 neighbours alone where no weight has one scale
// a row. So products that are sums of integers stay such sums until a segment or a block ends.
struct FactorCodes {
  float scale;
  uint8_t* steps;
  int32_t* starts;    // of a step, a lane at a time
  int32_t* segments;  // the same with factors, summed over the steps of a segment
};
// 8 bits, of weights that have one scale a row: int16, and so has the token.
struct WideCodes {
  float scale;
  uint8_t* steps;
  int32_t* segments;  // starts of a segment, a lane at a time; where codes are two bytes, of the high ones and of the low ones
};
// 8 bits, of weights that have blocks: int8; a scale is float32, for 4 neighbours and 4 half a unit of columns further.
struct ScaledCodes {
  int8_t* codes;
  float* scales;    // a lane at a time
  int32_t* starts;  // of a step, a lane at a time
};
struct Fine {
  int number, together;  // which of the tokens that lie together, and how many these are
  FactorCodes four;
  WideCodes wide;
  ScaledCodes eight;
  uint8_t* split[2];  // 5 and 6 bits: int8; a scale is float32, for 8 neighbours
};
constexpr size_t kStepBytes = 2;  // of such steps for a column, at most; not of those of ScaledCodes

// Which codes of a token are needed: for weights of 4 bits with one scale a row, with blocks, of 5 and 6 bits, of 8 bits with one scale a
// row, with blocks.
enum Kinds : unsigned { kRowsOf4 = 1, kBlocksOf4 = 2, kAllOf5 = 4, kAllOf6 = 8, kRowsOf8 = 16, kBlocksOf8 = 32 };

constexpr int unit_of(int bits) { return bits == 4 ? 256 : 128; }
constexpr int kMostFactor = 1024;
constexpr int kSegment = 2048;  // columns of 4-bit weights whose products fit an int32: 1024 * 127 * 8 * 2048
// The same of 8 bits by int16, of which a lane has 512 at most; so few because activations of kFew tokens, 16 KB, shall stay in the first
// level of the cache.
constexpr int segment_of(int bits) { return bits == 8 ? kSegment / 2 : kSegment; }
constexpr float kLeastTop = 1e-30f;    // numbers that are all smaller have codes of 0

// Coarse activations of m tokens: codes [k / kColumns][m][kColumns], in every eight columns the even ones first;
// scales [m][groups]; sums of every 16 codes [m][columns / 16], as the variant likes them, columns rounded up to kColumns. Rows of scales and sums are apart, because
// threads that write to one cache line wait for each other.
struct Coarse {
  int m, k;
  int group;  // columns that share a scale: 32 or 64
  size_t groups() const { return round_up(k, kColumns) / group; }
  int8_t* codes;
  float* scales;
  int32_t* sums16;
  // Of variants with tiles, for rows of one scale, with factors or not: int16 codes in two bytes (linear_tiles.h), scale and sum a token.
  int8_t* tiles;
  float* tile_scales;
  int32_t* tile_sums;
};

// Where results go: row i of the activations to y + rows[i] * stride, columns from `column` on.
struct Out {
  float* y;
  size_t stride;
  const int* rows;
};

// A head's queries against a stretch of its cache. rows x head_dim codes; row r looks at positions below limit[r].
// Result of a row: maximum m (base 2 logarithm), sum l of 2^(score - m) and the values weighted with it, not yet divided.
struct Attend {
  int rows, head_dim, padded;    // padded: head_dim rounded up to kTile
  const int16_t* q;              // (rows, head_dim)
  const float* q_scale;          // (rows): what makes a score a base 2 logarithm
  const int* limit;              // (rows)
  const int8_t* keys;            // [tiles][head_dim / 2][kTile][2]
  const int8_t* values;          // [positions / 2][padded][2]
  int begin, end;                // positions; begin is a multiple of kBlock
  const int8_t *next_keys, *next_values;  // what this thread is likely to read afterwards, or null
  float *m, *l, *sum;            // (rows), (rows), (rows, padded); values without their scale
  int16_t* p;                    // scratch (rows, kBlock)
  int32_t* s;                    // scratch (rows, kBlock)
};

struct Kernels {
  const char* name;
  // int16 codes of x (k), at most kTop; gives the scale. NaN and infinity make the scale so.
  float (*quantize)(const float* x, int k, int16_t* codes);
  void (*fine)(const float* x, int k, unsigned kinds, Fine& out);
  void (*decode)(const Weight& w, const Fine* x, int m, int begin, int end, const Out& out, int column);
  // rows, blocks: what scales the weights have that the activations are for, factors among the first.
  void (*coarse)(const float* x, int row, bool rows, bool blocks, const Coarse& out);
  // Channels begin … end of tokens first … last.
  void (*prompt)(const Weight& w, const Coarse& x, int begin, int end, int first, int last, const Out& out, int column,
                 void* scratch);
  size_t (*prompt_scratch)(int m);
  int panel;   // output channels that prompt likes to do at a time
  int tokens;  // tokens whose coarse activations share cache lines: made by one thread
  void (*rms_norm)(const float* x, const float* weight, float eps, int k, float* y);
  void (*add)(const float* a, const float* b, int k, float* y);
  void (*silu_mul)(const float* gate, const float* up, int k, float* y);
  void (*rope)(float* x, const float* cos, const float* sin, int half);
  // int8 codes of x (k) on a cache's scale, as QuantizeLinear makes them: nearest, ties to even, saturating.
  void (*cache_codes)(const float* x, float scale, int k, int8_t* codes);
  void (*attend)(const Attend& a);
  // The same with a float32 cache: keys and values (positions, head_dim), q float (rows, head_dim), sum (rows, head_dim).
  void (*attend_float)(const Attend& a, const float* q, const float* keys, const float* values);
};

// What a variant with tiles has of its own; all else is avx512vnni's.
struct TileKernels {
  const char* name;
  decltype(Kernels::coarse) coarse;
  decltype(Kernels::prompt) prompt;
  decltype(Kernels::prompt_scratch) prompt_scratch;
  int tokens;
};

// Each is defined as constexpr: a table that were made when the library is loaded would be made with instructions that this machine may lack.
extern const Kernels plain_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx2vnni_kernels, avx512vnni_kernels;
extern const TileKernels amx_tiles, amx_emulated_tiles;
#elif defined(__aarch64__)
extern const Kernels i8mm_kernels, dotprod_kernels, neon_kernels;
#endif

}  // namespace headrace
