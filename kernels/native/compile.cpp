#include "compile.h"

#include <algorithm>

namespace headrace {
namespace {

bool holds(const std::vector<int>& registers, int r) {
  return std::find(registers.begin(), registers.end(), r) != registers.end();
}

// Whether nothing reads register r from instruction `at` on before it is written again.
bool dead(const std::vector<Instruction>& all, size_t at, int r) {
  for (; at < all.size(); at++) {
    if (holds(reads(all[at]), r)) return false;
    if (holds(writes(all[at]), r)) return true;
  }
  return true;
}

LinearStep linear(const Program& program, const Instruction& i, bool wanted) {
  LinearStep step;
  step.in = i.registers[0];
  step.wanted = wanted;
  step.group = i.group;
  for (const auto& name : i.names) step.weights.push_back(program.weight_named(name));
  step.out.assign(i.registers.begin() + 1, i.registers.end());
  return step;
}

// The instructions with add_norm split where the linear before can take the sum, and so on; works on a copy.
class Compiler {
 public:
  Compiler(const Program& program, bool fuse) : program_(program), all_(program.instructions), fuse_(fuse) {}

  std::vector<Step> steps() {
    for (at_ = 0; at_ < all_.size();) step();
    return std::move(steps_);
  }

 private:
  bool next_is(Op op, size_t ahead = 1) const { return at_ + ahead < all_.size() && all_[at_ + ahead].op == op; }

  void step() {
    const Instruction& i = all_[at_];
    if (i.op == Op::kRmsNorm && fuse_ && norm()) return;
    if (i.op == Op::kLinear || i.op == Op::kHead) return add_linear(linear(program_, i, wanted(i)));
    Step s{};
    s.instruction = i;
    s.wanted = wanted(i);
    switch (i.op) {
      case Op::kEmbed: s.kind = Kind::kEmbed, s.table = program_.weight_named(i.names[0]); break;
      case Op::kAttention: s.kind = Kind::kAttention; break;
      case Op::kRopeCache:
        s.kind = Kind::kRope;
        s.cos = program_.floats(i.names[0], program_.geometry.context, program_.geometry.head_dim / 2);
        s.sin = program_.floats(i.names[1], program_.geometry.context, program_.geometry.head_dim / 2);
        break;
      case Op::kRmsNorm: case Op::kAddNorm:
        s.norm = program_.floats(i.names[0], 1, program_.registers[i.registers[0]]);
        [[fallthrough]];
      default: s.kind = Kind::kElementwise;
    }
    finish(s, 1);
  }

  // rms_norm · linear, rms_norm · head, rms_norm · rows · head
  bool norm() {
    const Instruction& i = all_[at_];
    const int in = i.registers[0], out = i.registers[1];
    const bool gather = next_is(Op::kRows) && next_is(Op::kHead, 2) && all_[at_ + 1].registers[0] == out &&
                        all_[at_ + 2].registers[0] == all_[at_ + 1].registers[1];
    const size_t ahead = gather ? 2 : 1;
    if (!next_is(Op::kLinear, ahead) && !next_is(Op::kHead, ahead)) return false;
    const Instruction& l = all_[at_ + ahead];
    if (!gather && (l.registers[0] != out || !dead(all_, at_ + 2, out) || holds(writes(l), in))) return false;
    LinearStep step = linear(program_, l, gather || wanted(l));
    step.in = in, step.gather = gather;
    step.norm = program_.floats(i.names[0], 1, program_.registers[in]);
    mark(all_[at_]);
    if (gather) mark(all_[at_ + 1]);
    at_ += ahead;
    add_linear(std::move(step));
    return true;
  }

  // A linear at at_ with what can follow it: a sum, or silu·mul.
  void add_linear(LinearStep l) {
    Step s{};
    s.kind = all_[at_].op == Op::kHead ? Kind::kHead : Kind::kLinear;
    s.wanted = l.wanted;
    mark(all_[at_]);
    size_t used = 1;
    if (fuse_ && l.out.size() == 1 && (next_is(Op::kAddNorm) || next_is(Op::kAdd))) {
      Instruction& add = all_[at_ + 1];
      const int residual = add.registers[0], sum = add.registers[2];
      const bool fits = add.registers[1] == l.out[0] && residual != l.out[0] && residual != l.in && sum != l.in &&
                        (sum == l.out[0] || dead_after_sum(add, l.out[0]));
      if (fits) {
        l.residual = residual, l.sum = sum;
        mark_register(sum, l.wanted);
        if (add.op == Op::kAddNorm) add = {Op::kRmsNorm, add.layer, 0, {sum, add.registers[3]}, add.names};
        else used = 2;
      }
    } else if (fuse_ && l.out.size() == 2 && next_is(Op::kSiluMul)) {
      const Instruction& silu = all_[at_ + 1];
      const int out = silu.registers[2];
      const auto gone = [&](int r) { return r == out || dead(all_, at_ + 2, r); };
      if (silu.registers[0] == l.out[0] && silu.registers[1] == l.out[1] && out != l.in && gone(l.out[0]) &&
          gone(l.out[1])) {
        l.gated = out;
        mark_register(out, l.wanted);
        used = 2;
      }
    }
    s.linear = std::move(l);
    at_ += used;
    steps_.push_back(std::move(s));
  }

  bool dead_after_sum(const Instruction& add, int r) const {
    return (add.op == Op::kAddNorm && add.registers[3] == r) || dead(all_, at_ + 2, r);
  }

  void finish(Step& s, size_t used) {
    mark(s.instruction);
    at_ += used;
    steps_.push_back(std::move(s));
  }

  bool wanted(const Instruction& i) const { return !reads(i).empty() && is_wanted(reads(i)[0]); }
  bool is_wanted(int r) const { return holds(wanted_, r); }
  void mark_register(int r, bool wanted) {
    wanted_.erase(std::remove(wanted_.begin(), wanted_.end(), r), wanted_.end());
    if (wanted) wanted_.push_back(r);
  }
  void mark(const Instruction& i) {
    const bool rows = i.op == Op::kRows || wanted(i);
    for (const int r : writes(i)) mark_register(r, rows);
  }

  const Program& program_;
  std::vector<Instruction> all_;
  const bool fuse_;
  size_t at_ = 0;
  std::vector<int> wanted_;  // registers that hold wanted rows
  std::vector<Step> steps_;
};

}  // namespace

std::vector<Step> compile(const Program& program, bool fuse) { return Compiler(program, fuse).steps(); }

}  // namespace headrace
