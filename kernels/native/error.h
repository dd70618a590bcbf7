// What can go wrong, by kind; api.cpp turns each into a code that Python raises as an exception of its own.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace headrace {

struct ProgramError : std::runtime_error { using std::runtime_error::runtime_error; };
struct SpanError : std::runtime_error { using std::runtime_error::runtime_error; };
struct Cancelled : std::runtime_error { Cancelled() : std::runtime_error("the run was cancelled") {} };
struct Busy : std::runtime_error { Busy() : std::runtime_error("the engine is running in another thread") {} };

// Raises E with its arguments written one after the other, unless the condition holds.
template <class E, class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw E(text.str());
}

}  // namespace headrace
