// Steps of single rows: embedding, norms, sums, gates.
#include <cstring>

#include "half.h"
#include "scratch.h"

namespace headrace {

void Engine::embed(const Step& step) {
  const Weight& w = step.table;
  for (int i; (i = pool_.take()) < int(batch_.ids.size());) {
    float* out = row(step.instruction.registers[0], i);
    const int block = w.block ? w.block : w.k;
    for (int b = 0; b < w.blocks(); b++) {
      const float scale = scale_of(w, batch_.ids[i], b);
      for (int k = b * block; k < (b + 1) * block; k++) out[k] = float(code_of(w, batch_.ids[i], k)) * scale;
    }
  }
}

void Engine::elementwise(const Step& step) {
  const Instruction& i = step.instruction;
  const auto& r = i.registers;
  const bool rows = i.op == Op::kRows;
  const int count = int(step.wanted || rows ? batch_.wanted.size() : batch_.ids.size()), width = program_->registers[r[0]];
  for (int n; (n = pool_.take()) < count;) {
    const float* in = row(r[0], rows ? batch_.wanted[n] : n);
    switch (i.op) {
      case Op::kRows: std::memcpy(row(r[1], n), in, sizeof(float) * width); break;
      case Op::kRmsNorm: kernels_.rms_norm(in, step.norm, program_->geometry.eps, width, row(r[1], n)); break;
      case Op::kAdd: kernels_.add(in, row(r[1], n), width, row(r[2], n)); break;
      case Op::kSiluMul: kernels_.silu_mul(in, row(r[1], n), width, row(r[2], n)); break;
      case Op::kAddNorm:
        kernels_.add(in, row(r[1], n), width, row(r[2], n));
        kernels_.rms_norm(row(r[2], n), step.norm, program_->geometry.eps, width, row(r[3], n));
        break;
      default: break;
    }
  }
}

}  // namespace headrace
