// From instructions to steps: what is recognised is done in one pass over the weights, between two meetings.
//
//   linear · add_norm      the sum is done where a result is made; the norm goes to the next linear
//   rms_norm · linear      every thread, or every row once, norms its input before it is quantized
//   linear · silu_mul      gate and up of the same channels are made together
//   rms_norm · rows · head the norm of wanted rows only
#pragma once
#include <vector>

#include "program.h"

namespace headrace {

enum class Kind { kEmbed, kElementwise, kRope, kAttention, kLinear, kHead };
constexpr int kKinds = 6;
constexpr const char* kKindNames[kKinds] = {"embed", "elementwise", "rope", "attention", "linear", "head"};

// A linear of one input, what happens before it and after it. Registers are −1 where there is none.
struct LinearStep {
  int in = -1;
  const float* norm = nullptr;  // weight of the norm before
  bool gather = false;          // `in` holds all tokens and the wanted ones are taken
  bool wanted = false;          // rows of the results
  int group = 0;                // of coarse activations; 0: all are fine
  std::vector<Weight> weights;
  std::vector<int> out;         // empty for the head
  int residual = -1, sum = -1;  // sum = residual + result, instead of `out`
  int gated = -1;               // gated = silu(first) · second, instead of `out`
};

struct Step {
  Kind kind;
  Instruction instruction;      // of the kinds that are one instruction
  bool wanted = false;          // rows of an elementwise instruction
  Weight table{};               // embed
  const float *norm = nullptr, *cos = nullptr, *sin = nullptr;
  LinearStep linear;
};

// The program must have passed check(). fuse: false gives one step an instruction.
std::vector<Step> compile(const Program& program, bool fuse);

}  // namespace headrace
