// Brings weights near before the first run needs them: a thread maps their pages, in the order of use, while whoever opened
// the engine still reads a tokenizer. A page that is met in the middle of a run costs more, and both threads wait for it.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace headrace {

class Arrival {
 public:
  using Stretch = std::pair<const uint8_t*, size_t>;  // bytes

  ~Arrival() { end(); }
  void begin(std::vector<Stretch> stretches);
  // Leaves the rest as it is; soon over. Nothing where nothing goes on.
  void end();

 private:
  void bring(const std::vector<Stretch>& stretches);

  std::atomic<bool> over_{false};
  std::thread thread_;
};

}  // namespace headrace
