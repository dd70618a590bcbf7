#include "program.h"

#include <cmath>

#include "error.h"

namespace headrace {
namespace {

constexpr int64_t kMost = int64_t(1) << 30;  // of any dimension, so that products of two fit 64 bits

struct Shape { const char* name; Op op; int registers, names; };  // -1: one and more

constexpr Shape kShapes[] = {
    {"embed", Op::kEmbed, 1, 1},           {"rms_norm", Op::kRmsNorm, 2, 1},     {"add_norm", Op::kAddNorm, 4, 1},
    {"add", Op::kAdd, 3, 0},               {"linear", Op::kLinear, -1, -1},      {"rope_cache", Op::kRopeCache, 3, 2},
    {"attention", Op::kAttention, 2, 0},   {"silu_mul", Op::kSiluMul, 3, 0},     {"rows", Op::kRows, 2, 0},
    {"head", Op::kHead, 1, 1},
};

int64_t size(Dtype dtype) { return dtype == Dtype::kU8 ? 1 : dtype == Dtype::kF16 ? 2 : 4; }

}  // namespace

Program::Program(const Geometry& g) : geometry(g) {
  for (const int n : {g.layers, g.heads, g.kv_heads, g.head_dim, g.hidden, g.vocab, g.context})
    require<ProgramError>(n > 0 && n <= kMost, "geometry: ", n, " is not between 1 and ", kMost);
  require<ProgramError>(g.heads % g.kv_heads == 0, "geometry: ", g.heads, " heads over ", g.kv_heads, " kv_heads");
  require<ProgramError>(g.head_dim % 2 == 0 && g.head_dim <= 512, "geometry: head_dim ", g.head_dim,
                        " is odd or above 512");
  require<ProgramError>(g.eps >= 0 && g.eps < 1, "geometry: eps ", g.eps, " is not between 0 and 1");
  require<ProgramError>(g.layers <= 4096 && g.heads <= 4096 && g.context <= 1 << 24,
                        "geometry: more than 4096 layers or heads, or 16777216 positions");
}

void Program::file(const std::string& path) { files_.emplace_back(path); }

void Program::stored(const std::string& name, int file, uint64_t offset, int dtype, int64_t rows, int64_t columns) {
  require<ProgramError>(file >= 0 && size_t(file) < files_.size(), "tensor ", name, ": file ", file, " of ", files_.size());
  const Mapping& mapping = files_[file];
  require<ProgramError>(offset <= mapping.size(), "tensor ", name, ": offset ", offset, " is beyond its file's ",
                        mapping.size(), " bytes");
  tensor(name, mapping.data() + offset, mapping.size() - offset, dtype, rows, columns);
}

void Program::array(const std::string& name, const void* data, uint64_t bytes, int dtype, int64_t rows, int64_t columns) {
  tensor(name, static_cast<const uint8_t*>(data), bytes, dtype, rows, columns);
}

void Program::tensor(const std::string& name, const uint8_t* data, uint64_t bytes, int dtype, int64_t rows,
                     int64_t columns) {
  require<ProgramError>(dtype >= 0 && dtype <= 2, "tensor ", name, ": unknown dtype");
  require<ProgramError>(rows > 0 && rows <= kMost && columns > 0 && columns <= kMost, "tensor ", name, ": shape ", rows,
                        " x ", columns, " is not possible");
  const Dtype type = Dtype(dtype);
  require<ProgramError>(uint64_t(rows * columns * size(type)) <= bytes, "tensor ", name, ": ",
                        rows * columns * size(type), " bytes are wanted, ", bytes, " are there");
  require<ProgramError>(reinterpret_cast<uintptr_t>(data) % size(type) == 0, "tensor ", name,
                        ": its offset is no multiple of its element's size");
  require<ProgramError>(tensors_.emplace(name, Tensor{data, type, rows, columns}).second, "tensor ", name,
                        " is named twice");
}

const Tensor& Program::tensor_named(const std::string& name) const {
  const auto found = tensors_.find(name);
  require<ProgramError>(found != tensors_.end(), "there is no tensor ", name);
  return found->second;
}

const float* Program::floats(const std::string& name, int64_t rows, int64_t columns) const {
  const Tensor& t = tensor_named(name);
  require<ProgramError>(t.dtype == Dtype::kF32, "tensor ", name, " is not F32");
  require<ProgramError>(t.rows >= rows && t.columns == columns, "tensor ", name, " is ", t.rows, " x ", t.columns,
                        "; expected ", rows, " x ", columns);
  return reinterpret_cast<const float*>(t.data);
}

void Program::weight(const std::string& name, int bits, const std::string& packed, const std::string& high,
                     const std::string& scale, const std::string& factors, int block, const std::string& bias) {
  require<ProgramError>(bits == 4 || bits == 5 || bits == 6 || bits == 8, "weight ", name, ": ", bits, " bits; expected 4, 5, 6 or 8");
  const Tensor &p = tensor_named(packed), &s = tensor_named(scale);
  require<ProgramError>(p.dtype == Dtype::kU8 && s.dtype == Dtype::kF16, "weight ", name,
                        ": codes are U8 and scales F16");
  Weight w{};
  const int64_t columns = bits == 8 ? p.columns : p.columns * 2;
  w.n = int(p.rows), w.k = int(columns), w.bits = bits;
  require<ProgramError>(columns <= 1 << 24, "weight ", name, ": rows of more than 16777216");
  require<ProgramError>(s.rows == p.rows && w.k % s.columns == 0, "weight ", name, ": scales are ", s.rows, " x ",
                        s.columns, " for codes of ", w.n, " x ", w.k);
  const bool split = bits == 5 || bits == 6;
  w.block = !factors.empty() ? block : s.columns == 1 && !split ? 0 : int(w.k / s.columns);
  const bool one_a_row = w.block == 0 && factors.empty();
  require<ProgramError>(one_a_row || w.block == 16 || w.block == 32 || w.block == 64 || w.block == 128 || w.block == 256,
                        "weight ", name, ": blocks of ", w.block, "; expected 16, 32, 64, 128, 256",
                        split ? "" : " or one scale a row");
  w.packed = p.data;
  w.scale = reinterpret_cast<const uint16_t*>(s.data);
  if (!factors.empty()) {
    const Tensor& f = tensor_named(factors);
    require<ProgramError>(bits < 8 && s.columns == 1, "weight ", name, ": factors over ", s.columns, " scales a row and codes of ",
                          bits, " bits; expected one scale and less than 8 bits");
    require<ProgramError>(w.k % block == 0, "weight ", name, ": rows of ", w.k, " are no whole blocks of ", block);
    require<ProgramError>(f.dtype == Dtype::kU8, "weight ", name, ": factors are U8");
    require<ProgramError>(f.rows == w.n && f.columns == int64_t(w.factor_bytes()), "weight ", name, ": factors are ", f.rows, " x ",
                          f.columns, "; expected ", w.n, " x ", w.factor_bytes(), " for blocks of ", block);
    w.factors = f.data;
  }
  require<ProgramError>(split == !high.empty(), "weight ", name, ": codes of ", bits, split ? " bits without high bits" : " bits with high bits",
                        "; expected them for 5 and 6 bits");
  if (split) {
    const Tensor& h = tensor_named(high);
    w.high = h.data;
    require<ProgramError>(h.dtype == Dtype::kU8, "weight ", name, ": high bits are U8");
    require<ProgramError>(h.rows == w.n && h.columns == int64_t(w.high_bytes()), "weight ", name, ": high bits are ", h.rows, " x ",
                          h.columns, "; expected ", w.n, " x ", w.high_bytes());
  }
  w.bias = bias.empty() ? nullptr : floats(bias, 1, w.n);
  require<ProgramError>(weights_.emplace(name, w).second, "weight ", name, " is named twice");
}

const Weight& Program::weight_named(const std::string& name) const {
  const auto found = weights_.find(name);
  require<ProgramError>(found != weights_.end(), "there is no weight ", name);
  return found->second;
}

void Program::add_register(int width) {
  require<ProgramError>(width > 0 && width <= 1 << 24, "register ", registers.size(), ": width ", width,
                        " is not between 1 and 16777216");
  registers.push_back(width);
}

void Program::cache(bool as_int8, const float* given, int count) {
  int8 = as_int8;
  require<ProgramError>(!int8 || count == 2 * geometry.layers, "cache: ", count / 2, " pairs of scales for ",
                        geometry.layers, " layers");
  scales.assign(given, given + count);
  for (const float s : scales)
    require<ProgramError>(std::isfinite(s) && s > 0, "cache: scale ", s, " is not a number above 0");
}

void Program::instruction(const std::string& op, int layer, int group, std::vector<int> regs,
                          std::vector<std::string> names) {
  const std::string where = "instruction " + std::to_string(instructions.size()) + " (" + op + ")";
  for (const Shape& s : kShapes) {
    if (op != s.name) continue;
    if (s.op == Op::kLinear)
      require<ProgramError>(names.size() >= 1 && names.size() <= 4 && regs.size() == names.size() + 1, where,
                            ": one to four weights, and as many results");
    else
      require<ProgramError>(int(regs.size()) == s.registers && int(names.size()) == s.names, where, ": ", s.registers,
                            " registers and ", s.names, " names are wanted");
    for (const int r : regs)
      require<ProgramError>(r >= 0 && size_t(r) < registers.size(), where, ": register ", r, " of ", registers.size());
    require<ProgramError>((s.op != Op::kRopeCache && s.op != Op::kAttention) || (layer >= 0 && layer < geometry.layers),
                          where, ": layer ", layer, " of ", geometry.layers);
    require<ProgramError>(group == 0 || group == kMostGroup / 2 || group == kMostGroup, where, ": groups of ", group,
                          "; expected 0, 32 or 64");
    instructions.push_back({s.op, layer, group, std::move(regs), std::move(names)});
    return;
  }
  require<ProgramError>(false, where, ": there is no such operation");
}

std::vector<int> writes(const Instruction& i) {
  const auto& r = i.registers;
  switch (i.op) {
    case Op::kEmbed: return {r[0]};
    case Op::kRmsNorm: case Op::kAttention: case Op::kRows: return {r[1]};
    case Op::kAddNorm: return {r[2], r[3]};
    case Op::kAdd: case Op::kSiluMul: return {r[2]};
    case Op::kLinear: return {r.begin() + 1, r.end()};
    case Op::kRopeCache: return {r[0]};
    case Op::kHead: return {};
  }
  return {};
}

std::vector<int> reads(const Instruction& i) {
  const auto& r = i.registers;
  switch (i.op) {
    case Op::kEmbed: return {};
    case Op::kAddNorm: case Op::kAdd: case Op::kSiluMul: return {r[0], r[1]};
    case Op::kRopeCache: return r;
    default: return {r[0]};
  }
}

void Program::check() const {
  enum Rows { kNone, kAll, kWanted };
  const Geometry& g = geometry;
  std::vector<Rows> held(registers.size(), kNone);
  std::vector<bool> cached(g.layers, false);
  require<ProgramError>(!instructions.empty() && instructions.back().op == Op::kHead, "the last instruction is no head");
  require<ProgramError>(!int8 || !scales.empty(), "the cache has no scales");
  for (size_t at = 0; at < instructions.size(); at++) {
    const Instruction& i = instructions[at];
    const std::string where = "instruction " + std::to_string(at) + ": ";
    const auto width = [&](int n, int expected) {
      require<ProgramError>(registers[i.registers[n]] == expected, where, "register ", i.registers[n], " has width ",
                            registers[i.registers[n]], "; expected ", expected);
    };
    const auto apart = [&](int a, int b) {
      require<ProgramError>(i.registers[a] != i.registers[b], where, "register ", i.registers[a], " cannot be both");
    };
    const auto grouped = [&](const std::string& name, const Weight& w) {
      require<ProgramError>(i.group != kMostGroup || w.block == 0 || w.block >= kMostGroup, where, "groups of ", i.group,
                            " columns, but weight ", name, " has blocks of ", w.block, "; expected 0 or 32");
    };
    Rows rows = kAll;
    for (const int r : reads(i)) {
      require<ProgramError>(held[r] != kNone, where, "register ", r, " holds nothing yet");
      require<ProgramError>(r == reads(i)[0] || held[r] == rows, where, "register ", r, " has other rows");
      rows = held[r];
    }
    const int first = registers[i.registers[0]];
    switch (i.op) {
      case Op::kEmbed: {
        const Weight& w = weight_named(i.names[0]);
        width(0, w.k);
        require<ProgramError>(w.n >= g.vocab, where, "the table has ", w.n, " rows for ", g.vocab, " ids");
        break;
      }
      case Op::kRmsNorm: width(1, first); floats(i.names[0], 1, first); break;
      case Op::kAddNorm:
        width(1, first), width(2, first), width(3, first), apart(2, 3), floats(i.names[0], 1, first);
        break;
      case Op::kAdd: case Op::kSiluMul: width(1, first), width(2, first); break;
      case Op::kLinear:
        for (size_t n = 0; n < i.names.size(); n++) {
          const Weight& w = weight_named(i.names[n]);
          require<ProgramError>(w.k == first, where, "weight ", i.names[n], " takes ", w.k, ", not ", first);
          grouped(i.names[n], w);
          width(int(n) + 1, w.n);
          for (size_t other = 0; other <= n; other++) apart(int(other), int(n) + 1);
        }
        break;
      case Op::kRopeCache:
        width(0, g.heads * g.head_dim), width(1, g.kv_heads * g.head_dim), width(2, g.kv_heads * g.head_dim);
        apart(0, 1), apart(0, 2);
        for (const auto& name : i.names) floats(name, g.context, g.head_dim / 2);
        cached[i.layer] = true;
        break;
      case Op::kAttention:
        width(0, g.heads * g.head_dim), width(1, g.heads * g.head_dim), apart(0, 1);
        require<ProgramError>(cached[i.layer], where, "layer ", i.layer, " has no keys and values yet");
        break;
      case Op::kRows: width(1, first), apart(0, 1); break;
      case Op::kHead: {
        const Weight& w = weight_named(i.names[0]);
        require<ProgramError>(w.k == first && w.n == g.vocab, where, "weight ", i.names[0], " is ", w.n, " x ", w.k,
                              "; expected ", g.vocab, " x ", first);
        grouped(i.names[0], w);
        require<ProgramError>(at + 1 == instructions.size(), where, "a head that is not the last");
        require<ProgramError>(rows == kWanted, where, "its register was not written by rows");
        break;
      }
    }
    require<ProgramError>(rows == kAll || (i.op != Op::kRopeCache && i.op != Op::kAttention && i.op != Op::kRows), where,
                          "wanted rows are not enough");
    for (const int r : writes(i)) held[r] = i.op == Op::kRows ? kWanted : rows;
  }
}

}  // namespace headrace
