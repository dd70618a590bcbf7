// The C interface that Python calls. No exception passes it: a function gives 0 or the number of what went wrong, and
// hk_error() then tells it in words.
#include <cstring>
#include <mutex>
#include <new>

#include "cpu.h"
#include "engine.h"
#include "error.h"

using namespace headrace;

namespace {

thread_local std::string message;

enum Code { kOk, kProgram, kSpan, kCancelled, kBusy, kMemory, kOther };

template <class Work>
int guarded(Work work) {
  try {
    work();
    return kOk;
  } catch (const ProgramError& e) {
    message = e.what();
    return kProgram;
  } catch (const SpanError& e) {
    message = e.what();
    return kSpan;
  } catch (const Cancelled& e) {
    message = e.what();
    return kCancelled;
  } catch (const Busy& e) {
    message = e.what();
    return kBusy;
  } catch (const std::bad_alloc&) {
    message = "there is not enough memory";
    return kMemory;
  } catch (const std::exception& e) {
    message = e.what();
    return kOther;
  }
}

struct Handle {
  std::unique_ptr<Engine> engine;
  std::mutex mutex;
};

template <class Work>
int with_engine(void* handle, Work work) {
  return guarded([&] {
    auto& h = *static_cast<Handle*>(handle);
    std::unique_lock<std::mutex> lock(h.mutex, std::try_to_lock);
    if (!lock) throw Busy();
    work(*h.engine);
  });
}

Program& program(void* p) { return *static_cast<Program*>(p); }

}  // namespace

extern "C" {

#define API __attribute__((visibility("default")))

API const char* hk_error() { return message.c_str(); }

API const char* hk_known_isas() { return kKnownIsas; }

API const char* hk_available_isas() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* k : available_kernels()) all += (all.empty() ? "" : " ") + std::string(k->name);
    return all;
  }();
  return names.c_str();
}

API int hk_program_new(int layers, int heads, int kv_heads, int head_dim, int hidden, int vocab, int context, float eps,
                       void** out) {
  return guarded([&] { *out = new Program(Geometry{layers, heads, kv_heads, head_dim, hidden, vocab, context, eps}); });
}

API void hk_program_free(void* p) { delete static_cast<Program*>(p); }

API int hk_program_file(void* p, const char* path) {
  return guarded([&] { program(p).file(path); });
}

API int hk_program_tensor(void* p, const char* name, int file, uint64_t offset, int dtype, int64_t rows, int64_t columns) {
  return guarded([&] { program(p).stored(name, file, offset, dtype, rows, columns); });
}

API int hk_program_array(void* p, const char* name, const void* data, uint64_t bytes, int dtype, int64_t rows,
                         int64_t columns) {
  return guarded([&] { program(p).array(name, data, bytes, dtype, rows, columns); });
}

// high: empty where codes are not split. factors: empty where scales have none, and then block is not asked for.
API int hk_program_weight(void* p, const char* name, int bits, const char* packed, const char* high, const char* scale,
                          const char* factors, int block, const char* bias) {
  return guarded([&] { program(p).weight(name, bits, packed, high, scale, factors, block, bias); });
}

API int hk_program_register(void* p, int width) {
  return guarded([&] { program(p).add_register(width); });
}

API int hk_program_cache(void* p, int int8, const float* scales, int count) {
  return guarded([&] { program(p).cache(int8 != 0, scales, count); });
}

API int hk_program_instruction(void* p, const char* op, int layer, int group, int register_count, const int* registers,
                               int name_count, const char* const* names) {
  return guarded([&] {
    program(p).instruction(op, layer, group, {registers, registers + register_count}, {names, names + name_count});
  });
}

// Takes the program, also when it fails.
API int hk_engine_new(void* p, int slots, int context, int threads, const char* isa, int fuse, int settle, void** out) {
  std::unique_ptr<Program> owned(static_cast<Program*>(p));
  return guarded([&] {
    owned->check();
    require<ProgramError>(slots > 0 && slots <= 65536, slots, " slots; expected 1 to 65536");
    require<ProgramError>(context > 0 && context <= owned->geometry.context, "a context of ", context,
                          " positions; expected 1 to ", owned->geometry.context);
    require<ProgramError>(threads > 0 && threads <= 1024, threads, " threads; expected 1 to 1024");
    auto handle = std::make_unique<Handle>();
    handle->engine = std::make_unique<Engine>(std::move(owned), slots, context, threads, choose_kernels(isa), fuse != 0,
                                              static_cast<Settle>(settle));
    *out = handle.release();
  });
}

// Stops what another thread runs, waits for it, and gives everything back.
API void hk_engine_free(void* e) {
  auto* handle = static_cast<Handle*>(e);
  while (!handle->mutex.try_lock()) handle->engine->cancel();
  handle->mutex.unlock();
  delete handle;
}

API int hk_engine_threads(void* e) { return static_cast<Handle*>(e)->engine->pool().threads(); }
API const char* hk_engine_isa(void* e) { return static_cast<Handle*>(e)->engine->kernels().name; }

// starts, counts: six numbers a span: slot, start, tokens, first id, wanted rows, first wanted.
API int hk_engine_run(void* e, int count, const int32_t* spans, const int32_t* ids, const int32_t* wanted, float* logits) {
  return with_engine(e, [&](Engine& engine) {
    thread_local std::vector<Span> list;
    list.clear();
    for (int i = 0; i < count; i++) {
      const int32_t* s = spans + 6 * i;
      list.push_back({s[0], s[1], s[2], ids + s[3], s[4], wanted + s[5]});
    }
    engine.run(list, logits);
  });
}

API void hk_engine_cancel(void* e) { static_cast<Handle*>(e)->engine->cancel(); }

API int hk_engine_length(void* e, int slot, int* out) {
  return with_engine(e, [&](Engine& engine) { *out = engine.length(slot); });
}

API int hk_engine_copy(void* e, int source, int target, int n) {
  return with_engine(e, [&](Engine& engine) { engine.copy(source, target, n); });
}

API int hk_engine_read_bytes(void* e, int slot, int start, int stop, uint64_t* out) {
  return with_engine(e, [&](Engine& engine) { *out = engine.read_bytes(slot, start, stop); });
}

API int hk_engine_read(void* e, int slot, int start, int stop, uint8_t* out) {
  return with_engine(e, [&](Engine& engine) { engine.read(slot, start, stop, out); });
}

API int hk_engine_write(void* e, int slot, int start, int stop, const uint8_t* data, uint64_t bytes) {
  return with_engine(e, [&](Engine& engine) { engine.write(slot, start, stop, data, bytes); });
}

API int hk_kinds() { return kKinds; }
API const char* hk_kind(int i) { return kKindNames[i]; }

// counts: runs, tokens, meetings, bytes copied into huge pages; seconds: one a kind.
API int hk_engine_stats(void* e, int64_t* counts, double* seconds) {
  return with_engine(e, [&](Engine& engine) {
    counts[0] = engine.runs, counts[1] = engine.tokens, counts[2] = engine.meetings;
    counts[3] = int64_t(engine.copied());
    std::memcpy(seconds, engine.seconds, sizeof engine.seconds);
  });
}

}  // extern "C"
