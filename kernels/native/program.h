// A program as it was described: tensors, weights, registers, instructions; everything that can be checked without running.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "kernels.h"
#include "mapping.h"

namespace headrace {

struct Geometry {
  int layers, heads, kv_heads, head_dim, hidden, vocab, context;
  float eps;
  int group() const { return heads / kv_heads; }
};

enum class Dtype { kU8, kF16, kF32 };

struct Tensor {
  const uint8_t* data;
  Dtype dtype;
  int64_t rows, columns;  // a vector has one row
};

enum class Op { kEmbed, kRmsNorm, kAddNorm, kAdd, kLinear, kRopeCache, kAttention, kSiluMul, kRows, kHead };

// Registers and names in the order of docs/kernels.md.
struct Instruction {
  Op op;
  int layer;
  int group;  // of a linear: columns that share a scale of coarse activations; 0: fine ones always
  std::vector<int> registers;
  std::vector<std::string> names;
  int in(int i = 0) const { return registers[i]; }
};

class Program {
 public:
  explicit Program(const Geometry& geometry);
  void file(const std::string& path);
  void stored(const std::string& name, int file, uint64_t offset, int dtype, int64_t rows, int64_t columns);
  void array(const std::string& name, const void* data, uint64_t bytes, int dtype, int64_t rows, int64_t columns);
  void weight(const std::string& name, int bits, const std::string& packed, const std::string& high,
              const std::string& scale, const std::string& factors, int block, const std::string& bias);
  void add_register(int width);
  void cache(bool int8, const float* scales, int count);
  void instruction(const std::string& op, int layer, int group, std::vector<int> registers, std::vector<std::string> names);
  void check() const;  // the instructions against each other: raises ProgramError

  const std::vector<Mapping>& files() const { return files_; }
  const Weight& weight_named(const std::string& name) const;
  const float* floats(const std::string& name, int64_t rows, int64_t columns) const;

  Geometry geometry;
  std::vector<int> registers;
  std::vector<Instruction> instructions;
  bool int8 = false;
  std::vector<float> scales;  // key and value of each layer

 private:
  void tensor(const std::string& name, const uint8_t* data, uint64_t bytes, int dtype, int64_t rows, int64_t columns);
  const Tensor& tensor_named(const std::string& name) const;

  std::vector<Mapping> files_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, Weight> weights_;
};

// Which registers an instruction reads and writes.
std::vector<int> reads(const Instruction& i);
std::vector<int> writes(const Instruction& i);

}  // namespace headrace
