// libFuzzer over the C interface: a small decoder of one of many forms that is right, or has some of its numbers and names
// replaced, and then spans, copies, reads and writes with any values. Whatever comes, a call gives 0 or the number of an error.
// At the end it says how many programs and runs passed, since a fuzzer whose inputs are all refused finds nothing.
//
// What Python guarantees is kept here too: pointers are valid for the counts that go with them, and an engine is used by
// one thread at a time.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

extern "C" {
const char* hk_error();
const char* hk_available_isas();
int hk_program_new(int, int, int, int, int, int, int, float, void**);
void hk_program_free(void*);
int hk_program_file(void*, const char*);
int hk_program_tensor(void*, const char*, int, uint64_t, int, int64_t, int64_t);
int hk_program_array(void*, const char*, const void*, uint64_t, int, int64_t, int64_t);
int hk_program_weight(void*, const char*, int, const char*, const char*, const char*, const char*, int, const char*);
int hk_program_register(void*, int);
int hk_program_cache(void*, int, const float*, int);
int hk_program_instruction(void*, const char*, int, int, int, const int*, int, const char* const*);
int hk_engine_new(void*, int, int, int, const char*, int, int, void**);
void hk_engine_free(void*);
int hk_engine_run(void*, int, const int32_t*, const int32_t*, const int32_t*, float*);
int hk_engine_length(void*, int, int*);
int hk_engine_copy(void*, int, int, int);
int hk_engine_read_bytes(void*, int, int, int, uint64_t*);
int hk_engine_read(void*, int, int, int, uint8_t*);
int hk_engine_write(void*, int, int, int, const uint8_t*, uint64_t);
}

namespace {

constexpr int kMost = 5;  // the largest number of an error that is told with words

// What the calls gave: programs by the form of their scales.
struct Outcomes {
  long engines[3] = {}, refused = 0, runs[3] = {}, refused_runs = 0;
  ~Outcomes() {
    std::fprintf(stderr, "engines made: %ld with a scale a row, %ld with blocks, %ld with whole factors; %ld refused\n",
                 engines[0], engines[1], engines[2], refused);
    std::fprintf(stderr, "runs answered: %ld, %ld, %ld; %ld refused\n", runs[0], runs[1], runs[2], refused_runs);
  }
} outcomes;

struct Chance {
  FuzzedDataProvider data;
  bool lies = true;  // whether anything is replaced
  bool rarely() { return lies && data.remaining_bytes() > 0 && data.ConsumeIntegral<uint8_t>() < 6; }
  template <class T>
  T near(T value) {  // the value, seldom another one
    if (!rarely()) return value;
    switch (data.ConsumeIntegralInRange(0, 4)) {
      case 0: return T(value + 1);
      case 1: return T(value - 1);
      case 2: return T(0);
      case 3: return T(-1);
      default: return data.ConsumeIntegral<T>();
    }
  }
  const char* name(const char* value) {
    static const char* const names[] = {"", "embed", "q", "k", "v", "o", "gate", "n0", "cos", "embed.p", "q.s", "none"};
    return rarely() ? names[data.ConsumeIntegralInRange(0, 11)] : value;
  }
};

// A block of memory of exactly its size, so that one byte beyond it is found.
struct Block {
  explicit Block(size_t size, int fill) : bytes(static_cast<uint8_t*>(std::malloc(size ? size : 1))), size(size) {
    for (size_t i = 0; i < size; i++) bytes[i] = uint8_t(fill == 0 ? i * 37 + 11 : i % 2 ? 0x3c : 0);  // float16 1.0
  }
  ~Block() { std::free(bytes); }
  uint8_t* bytes;
  size_t size;
};

enum Form { kRow, kBlocks, kFactors };  // of weights' scales: one a row, one a block, or one a row and a factor a block

struct Model {
  int hidden, feed, head_dim, form, block, group, bits, table_bits;
  bool bias;
};
Model any_model(FuzzedDataProvider& data) {
  Model m{};
  m.hidden = data.PickValueInArray({32, 96, 128, 256, 272});
  m.feed = data.PickValueInArray({16, 80, 144});
  m.head_dim = data.PickValueInArray({4, 32, 80});
  m.form = data.ConsumeIntegralInRange(0, 2);
  m.block = data.PickValueInArray({16, 32, 64, 128, 256});
  m.group = data.PickValueInArray({0, 32, 64});
  if (m.form != kRow && m.block < m.group) m.group = m.block / 32 * 32;
  m.bits = data.PickValueInArray({4, 5, 6}), m.table_bits = data.PickValueInArray({4, 5, 6, 8});
  m.bias = data.ConsumeBool();
  return m;
}

constexpr int kVocab = 16, kContext = 24;
struct Shape { const char* name; int n, k, bits; };
std::vector<Shape> shapes_of(const Model& m) {
  return {{"embed", kVocab, m.hidden, m.table_bits}, {"q", 2 * m.head_dim, m.hidden, m.bits}, {"k", m.head_dim, m.hidden, 4},
          {"v", m.head_dim, m.hidden, 8}, {"o", m.hidden, 2 * m.head_dim, 4}, {"gate", m.feed, m.hidden, m.bits},
          {"up", m.feed, m.hidden, m.bits}, {"down", m.hidden, m.feed, m.bits}};
}
std::vector<int> widths_of(const Model& m) {
  const int h = m.hidden, d = m.head_dim, f = m.feed;
  return {h, h, 2 * d, d, d, 2 * d, h, h, f, f, f, h};
}
struct Line { const char* op; int layer; std::vector<int> registers; std::vector<const char*> names; };
const std::vector<Line> kLines = {
    {"embed", -1, {0}, {"embed"}},          {"rms_norm", -1, {0, 1}, {"n0"}},
    {"linear", -1, {1, 2, 3, 4}, {"q", "k", "v"}}, {"rope_cache", 0, {2, 3, 4}, {"cos", "sin"}},
    {"attention", 0, {2, 5}, {}},           {"linear", -1, {5, 6}, {"o"}},
    {"add_norm", -1, {0, 6, 7, 1}, {"n0"}}, {"linear", -1, {1, 8, 9}, {"gate", "up"}},
    {"silu_mul", -1, {8, 9, 10}, {}},       {"linear", -1, {10, 6}, {"down"}},
    {"add", -1, {7, 6, 0}, {}},             {"rms_norm", -1, {0, 1}, {"n0"}},
    {"rows", -1, {1, 11}, {}},              {"head", -1, {11}, {"embed"}},
};

void check(int code) {
  if (code < 0 || code > kMost) {
    std::fprintf(stderr, "error %d: %s\n", code, hk_error());
    std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  Chance c{FuzzedDataProvider(bytes, size)};
  std::vector<std::unique_ptr<Block>> blocks;
  c.lies = c.data.ConsumeBool();
  const Model m = any_model(c.data);
  const int vocab = c.near(kVocab), context = c.near(kContext);
  const int wanted_context = c.data.ConsumeBool() ? c.data.ConsumeIntegralInRange(0, kContext + 1) : 0;
  void* program = nullptr;
  const int made =
      hk_program_new(c.near(1), c.near(2), c.near(1), c.near(m.head_dim), c.near(m.hidden), vocab, context, 1e-5f, &program);
  check(made);
  if (made) return 0;
  const auto array = [&](const std::string& name, int dtype, int width, int64_t rows, int64_t columns) {
    const uint64_t count = uint64_t(rows * columns * width);
    blocks.push_back(std::make_unique<Block>(count, dtype));
    check(hk_program_array(program, c.name(name.c_str()), blocks.back()->bytes, count, c.near(dtype), c.near(rows),
                           c.near(columns)));
  };
  for (const char* name : {"cos", "sin"}) array(name, 2, 4, kContext, m.head_dim / 2);
  array("n0", 2, 4, 1, m.hidden);
  for (const Shape& w : shapes_of(m)) {
    const std::string name = w.name;
    const bool fits = m.form != kRow && w.k % m.block == 0, factors = fits && m.form == kFactors && w.bits < 8;
    const int scales = fits && !factors ? w.k / m.block : 1;
    const int bits = fits || w.bits == 8 ? w.bits : 4, above = bits == 5 || bits == 6 ? bits - 4 : 0;
    array(name + ".p", 0, 1, w.n, bits == 8 ? w.k : w.k / 2);
    if (above) array(name + ".h", 0, 1, w.n, (w.k + 63) / 64 * 8 * above);
    array(name + ".s", 1, 2, w.n, scales);
    if (factors) array(name + ".f", 0, 1, w.n, (w.k / m.block + 1) / 2);
    check(hk_program_weight(program, w.name, c.near(bits), c.name((name + ".p").c_str()),
                            c.name(above ? (name + ".h").c_str() : ""), c.name((name + ".s").c_str()), c.name(factors ? (name + ".f").c_str() : ""), c.near(factors ? m.block : 0),
                            (m.bias && w.n == m.hidden) || c.rarely() ? "n0" : ""));
  }
  if (c.rarely()) check(hk_program_tensor(program, "t", c.near(0), c.data.ConsumeIntegral<uint64_t>(), 0, 1, c.near(1)));
  for (const int width : widths_of(m)) check(hk_program_register(program, c.near(width)));
  const float scales[] = {0.03f, 0.02f};
  check(hk_program_cache(program, c.data.ConsumeBool(), scales, c.rarely() ? 0 : 2));
  for (const Line& line : kLines) {
    if (c.rarely()) continue;
    std::vector<int> registers;
    std::vector<const char*> names;
    for (const int r : line.registers) registers.push_back(c.near(r));
    for (const char* name : line.names) names.push_back(c.name(name));
    if (c.rarely() && !registers.empty()) registers.pop_back();
    const char* op = c.rarely() ? kLines[c.data.ConsumeIntegralInRange<size_t>(0, kLines.size() - 1)].op : line.op;
    for (int times = c.rarely() ? 2 : 1; times > 0; times--)
      check(hk_program_instruction(program, op, c.near(line.layer), c.near(m.group), int(registers.size()), registers.data(),
                                   int(names.size()), names.data()));
  }
  std::vector<std::string> isas = {""};
  for (const char* at = hk_available_isas(); *at; at++) {
    if (*at == ' ') isas.emplace_back();
    else isas.back() += *at;
  }
  const std::string isa = isas[c.data.ConsumeIntegralInRange<size_t>(0, isas.size() - 1)];
  const int slots = c.near(2), threads = c.data.ConsumeIntegralInRange(1, 2), fuse = c.data.ConsumeBool();
  if (slots > 64) {  // memory for all of them is what the caller asked for
    hk_program_free(program);
    return 0;
  }
  void* engine = nullptr;
  const int code = hk_engine_new(program, slots, wanted_context, threads, isa.c_str(), fuse, 0, &engine);
  check(code);
  ++(code ? outcomes.refused : outcomes.engines[m.form]);
  if (code) return 0;
  c.lies = true;  // what is done with the engine
  for (int step = 0; step < 6 && c.data.remaining_bytes() > 0; step++) {
    const int slot = c.data.ConsumeIntegralInRange(-1, 2), other = c.data.ConsumeIntegralInRange(-1, 2);
    const int start = c.near(c.data.ConsumeIntegralInRange(0, kContext));
    const int stop = c.near(c.data.ConsumeIntegralInRange(0, kContext));
    uint64_t bytes_read = 0;
    switch (c.data.ConsumeIntegralInRange(0, 3)) {
      case 0: check(hk_engine_copy(engine, slot, other, start)); break;
      case 1: {
        const int known = hk_engine_read_bytes(engine, slot, start, stop, &bytes_read);
        check(known);
        if (known) break;
        Block data(bytes_read, 0);
        check(hk_engine_read(engine, slot, start, stop, data.bytes));
        check(hk_engine_write(engine, other, start, stop, data.bytes, c.near<uint64_t>(data.size) % (data.size + 1)));
        break;
      }
      default: {
        const int many = c.data.ConsumeIntegralInRange(1, 3);
        std::vector<int32_t> spans, ids, wanted;
        for (int i = 0; i < many; i++) {
          const int at = c.near((slot + i) & 1), tokens = c.near(c.data.ConsumeIntegralInRange(1, kContext / 2));
          const int rows = c.data.ConsumeIntegralInRange(0, 3);
          int from = 0;
          const bool anywhere = hk_engine_length(engine, at, &from) != 0 || c.data.ConsumeIntegralInRange(0, 7) == 7;
          if (anywhere) from = c.data.ConsumeIntegralInRange(0, kContext);
          const int count = tokens < 0 || tokens > 2 * kContext ? 0 : tokens;  // of which there are ids
          const int32_t span[] = {at, c.near(from), count, int32_t(ids.size()), rows, int32_t(wanted.size())};
          spans.insert(spans.end(), span, span + 6);
          for (int t = 0; t < count; t++) ids.push_back(c.near(c.data.ConsumeIntegralInRange(0, kVocab - 1)));
          for (int r = 0; r < rows; r++) wanted.push_back(c.near(c.data.ConsumeIntegralInRange(0, std::max(count - 1, 0))));
        }
        Block logits(wanted.size() * size_t(vocab > 0 ? vocab : 0) * 4, 0);
        const int answered =
            hk_engine_run(engine, many, spans.data(), ids.data(), wanted.data(), reinterpret_cast<float*>(logits.bytes));
        check(answered);
        ++(answered ? outcomes.refused_runs : outcomes.runs[m.form]);
      }
    }
    int length = 0;
    check(hk_engine_length(engine, slot, &length));
  }
  hk_engine_free(engine);
  return 0;
}
