#include "emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

// This file itself is compiled without ThreadSanitizer: what it does is not of the program.
#if defined(SMARTBIRD_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if defined(__SANITIZE_ADDRESS__)
// Of sanitizer/asan_interface.h and common_interface_defs.h, which not every compiler brings.
// NOLINTBEGIN(bugprone-reserved-identifier)
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile*, size_t);
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
// NOLINTEND(bugprone-reserved-identifier)
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

Position position;

namespace {

// ---- fibers -------------------------------------------------------------------------------------

#if defined(SMARTBIRD_THREAD_SANITIZER) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = size_t{256} << 10;
#else
constexpr size_t kStackBytes = size_t{64} << 10;
#endif

constexpr size_t kColours = 32, kColourBytes = 320;

// A stack and where to go on with it.
struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;  // null: the thread that launched
#if defined(SMARTBIRD_THREAD_SANITIZER)
  void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* asan_stack = nullptr;
  size_t asan_bytes = 0;
#endif
};

#if defined(__x86_64__)
// Saves the registers that a call preserves on the current stack, changes stacks, restores them.
extern "C" void smartbird_emulation_switch(void** save, void* load);
asm(R"(
.text
.globl smartbird_emulation_switch
.hidden smartbird_emulation_switch
.type smartbird_emulation_switch, @function
smartbird_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size smartbird_emulation_switch, .-smartbird_emulation_switch
)");
#endif

void provide_stack(Fiber* fiber) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::runtime_error("no memory for fibers");
  fiber->stack = static_cast<char*>(stack);
}

// Makes the fiber begin anew, in entry().
void prepare(Fiber* fiber, [[maybe_unused]] size_t colour, void (*entry)()) {
#if defined(SMARTBIRD_THREAD_SANITIZER)
  if (fiber->tsan != nullptr) {  // another thread on the same stack would look like a race
    __tsan_destroy_fiber(fiber->tsan);
    munmap(fiber->stack, kStackBytes);
    provide_stack(fiber);
  }
  fiber->tsan = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  // Tops at one distance would all fall into the same few sets of the caches.
  void** top = reinterpret_cast<void**>(fiber->stack + kStackBytes - colour * kColourBytes);
  top[-1] = nullptr;  // where entry would return to: the stack is aligned as after a call
  top[-2] = reinterpret_cast<void*>(entry);
  std::fill(top - 8, top - 2, nullptr);  // the six registers
  fiber->stack_pointer = static_cast<void*>(top - 8);
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  fiber->asan_stack = fiber->stack;
  fiber->asan_bytes = kStackBytes;
  __asan_unpoison_memory_region(fiber->stack, kStackBytes);
#endif
}

// To be called first thing on a stack that was switched to.
void arrived([[maybe_unused]] Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, from->stack == nullptr ? &from->asan_stack : nullptr,
                                  from->stack == nullptr ? &from->asan_bytes : nullptr);
#endif
}

void switch_fiber(Fiber* from, Fiber* to) {
#if defined(SMARTBIRD_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, to->asan_stack, to->asan_bytes);
#endif
#if defined(__x86_64__)
  smartbird_emulation_switch(&from->stack_pointer, to->stack_pointer);
#else
  swapcontext(&from->context, &to->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// What one thread did before release(x), every thread sees after acquire(x).
void release([[maybe_unused]] void* x) {
#if defined(SMARTBIRD_THREAD_SANITIZER)
  __tsan_release(x);
#endif
}
void acquire([[maybe_unused]] void* x) {
#if defined(SMARTBIRD_THREAD_SANITIZER)
  __tsan_acquire(x);
#endif
}

// Nor is what the functions of include/ do when the lanes of a warp have met.
struct NotOfTheProgram {
#if defined(SMARTBIRD_THREAD_SANITIZER)
  NotOfTheProgram() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~NotOfTheProgram() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  NotOfTheProgram() {}
  ~NotOfTheProgram() {}
#endif
};

// ---- a block ------------------------------------------------------------------------------------

enum class State : uint8_t { kReady, kAtBarrier, kInWarp, kDone };

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  int lane, warp;
  // What it waits for.
  const char* what;
  Where where;
  uint32_t mask;
  void* slot;
};

constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuard = 0xA5, kPoison = 0xFF;  // 0xFF...: NaN in every format

class Order {
 public:
  Order() {
    const char* value = std::getenv("SMARTBIRD_EMULATION_ORDER");
    const std::string name = value == nullptr ? "forward" : value;
    reverse_ = name == "reverse";
    random_ = name.rfind("random", 0) == 0;
    generator_.seed(random_ && name.size() > 7 ? std::stoul(name.substr(7)) : 0);
    if (!reverse_ && !random_ && name != "forward")
      throw std::runtime_error(
          "SMARTBIRD_EMULATION_ORDER must be forward, reverse or random[:seed]");
  }
  void arrange(std::vector<unsigned>* order, size_t n) {
    order->resize(n);
    std::iota(order->begin(), order->end(), 0U);
    if (reverse_) std::reverse(order->begin(), order->end());
    if (random_) std::shuffle(order->begin(), order->end(), generator_);
  }
  bool changes() const { return random_; }

 private:
  bool reverse_, random_;
  std::mt19937_64 generator_{0};  // NOLINT(bugprone-random-generator-seed): repeatable
};

using SharedMemory = std::unique_ptr<void, void (*)(void*)>;

class Machine {
 public:
  void run(const Launch& launch) {
    launch_ = &launch;
    const size_t count = size_t{launch.block.x} * launch.block.y * launch.block.z;
    if (count == 0 || count > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
    provide_threads(count);
    order_ = Order();
    position.block_dim = launch.block;
    position.grid_dim = launch.grid;
    const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    std::vector<unsigned> sequence;
    order_.arrange(&sequence, blocks);
#if defined(SMARTBIRD_THREAD_SANITIZER)
    host_.tsan = __tsan_get_current_fiber();
#endif
    release(&start_);
    for (const unsigned b : sequence) {
      position.block = {b % launch.grid.x, b / launch.grid.x % launch.grid.y,
                        b / launch.grid.x / launch.grid.y};
      run_block();
    }
    acquire(&end_);
    retired_.clear();
  }

  void* shared_memory() { return shared_; }

  [[noreturn]] void fail(const std::string& message) {
    fault_ = message;
    release(&end_);
    go_on(&host_);
    std::abort();
  }

  bool meet_block(bool predicate, const char* what, Where where) {
    Thread* self = current_;
    release(&barrier_);
    any_ |= predicate;
    wait(State::kAtBarrier, what, where);
    acquire(&barrier_);
    return self->mask != 0;
  }

  void meet_warp(uint32_t mask, void* slot, Combine combine, bool orders_memory, const char* what,
                 Where where) {
    Thread* self = current_;
    Thread* warp = &threads_[static_cast<size_t>(self->warp) * kWarpSize];
    if ((mask >> self->lane & 1) == 0) fail(at(what, where) + ": the mask lacks the calling lane");
    self->mask = mask;
    self->slot = slot;
    self->what = what;
    self->where = where;
    self->state = State::kInWarp;
    waiting_[static_cast<size_t>(self->warp)] |= 1U << self->lane;
    if (orders_memory) release(warp);
    if (all_in_warp(warp, *self)) {
      void* slots[kWarpSize] = {};
      for (uint32_t left = mask; left != 0; left &= left - 1) {
        const int lane = std::countr_zero(left);
        slots[lane] = warp[lane].slot;
        warp[lane].state = State::kReady;
      }
      waiting_[static_cast<size_t>(self->warp)] &= ~mask;
      const NotOfTheProgram scope;
      combine(slots, mask);
    } else {
      yield();
    }
    if (orders_memory) acquire(warp);
    self->slot = nullptr;
  }

 private:
  static std::string at(const char* what, Where where) {
    const std::string file = where.file_name();
    return std::string(what) + " at " + file.substr(file.rfind('/') + 1) + ":" +
           std::to_string(where.line());
  }

  void provide_threads(size_t count) {
    const size_t old = threads_.size();
    if (old >= count) return;
    threads_.resize(count);
    for (size_t t = old; t < count; ++t) provide_stack(&threads_[t].fiber);
  }

  static void thread_main();

  void wait(State state, const char* what, Where where) {
    current_->what = what;
    current_->where = where;
    current_->state = state;
    yield();
  }

  // Goes on with the next thread that is ready, or, at the end of a round, with run_block().
  // Straight from thread to thread: at the same place in the program, the processor guesses right
  // where each returns to.
  void yield() { go_on(next_ready() ? &current_->fiber : &host_); }

  void go_on(Fiber* to) {
    left_ = std::exchange(running_, to);
    switch_fiber(left_, to);
  }

  // Makes the next ready thread of this round the current one; false if there is none.
  bool next_ready() {
    while (next_ < count_) {
      Thread& thread = threads_[sequence_[next_++]];
      if (thread.state != State::kReady) continue;
      current_ = &thread;
      position.thread = thread.index;
      position.lane = thread.lane;
      return true;
    }
    return false;
  }

  // Whether every lane that `self` waits for waits for the same.
  bool all_in_warp(const Thread* warp, const Thread& self) const {
    if ((self.mask & ~waiting_[static_cast<size_t>(self.warp)]) != 0) return false;
    for (uint32_t left = self.mask; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      const Thread& other = warp[lane];
      if (other.mask != self.mask || other.where.line() != self.where.line() ||
          other.what != self.what)
        return false;
    }
    return true;
  }

  void run_block() {
    const Launch& launch = *launch_;
    count_ = size_t{launch.block.x} * launch.block.y * launch.block.z;
    // As large as asked for, for AddressSanitizer to see its end; aligned as on a GPU.
    const size_t bytes = (launch.shared_bytes + kGuardBytes + 127) / 128 * 128;
    SharedMemory shared(std::aligned_alloc(128, bytes), std::free);
    shared_ = static_cast<unsigned char*>(shared.get());
    std::memset(shared_, kPoison, launch.shared_bytes);
    std::memset(shared_ + launch.shared_bytes, kGuard, kGuardBytes);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(shared_ + launch.shared_bytes, kGuardBytes);
#endif
    for (unsigned t = 0; t < count_; ++t) {
      Thread& thread = threads_[t];
      prepare(&thread.fiber, t % kColours, &Machine::thread_main);
      thread.state = State::kReady;
      thread.index = {t % launch.block.x, t / launch.block.x % launch.block.y,
                      t / launch.block.x / launch.block.y};
      thread.lane = static_cast<int>(t % kWarpSize);
      thread.warp = static_cast<int>(t / kWarpSize);
    }
    any_ = false;
    waiting_.fill(0);
    order_.arrange(&sequence_, count_);
    done_ = 0;
    while (done_ < count_) {
      if (order_.changes()) order_.arrange(&sequence_, count_);
      next_ = 0;
      if (next_ready()) {
        go_on(&current_->fiber);
        if (!fault_.empty()) throw_fault();
      } else if (!release_barrier()) {
        throw_stuck();
      }
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared_ + launch.shared_bytes, kGuardBytes);
#endif
    for (size_t i = 0; i < kGuardBytes; ++i)
      if (shared_[launch.shared_bytes + i] != kGuard) {
        fault_ = "shared memory was written beyond its " + std::to_string(launch.shared_bytes) +
                 " bytes";
        throw_fault();
      }
#if defined(SMARTBIRD_THREAD_SANITIZER)
    retired_.push_back(std::move(shared));  // the same memory again would look like a race
#endif
  }

  // Lets all threads past a barrier that all of them reached, at one place.
  bool release_barrier() {
    const Thread& first = threads_[0];
    for (size_t t = 0; t < count_; ++t)
      if (threads_[t].state != State::kAtBarrier || threads_[t].what != first.what ||
          threads_[t].where.line() != first.where.line())
        return false;
    for (size_t t = 0; t < count_; ++t) {
      threads_[t].mask = any_;
      threads_[t].state = State::kReady;
    }
    any_ = false;
    return true;
  }

  [[noreturn]] void throw_fault() {
    acquire(&end_);
    std::string message;
    std::swap(message, fault_);
    throw std::runtime_error(message);
  }

  // Not all threads can go on: says where each is.
  [[noreturn]] void throw_stuck() {
    std::map<std::string, std::vector<size_t>> places;
    for (size_t t = 0; t < count_; ++t) {
      const Thread& thread = threads_[t];
      places[thread.state == State::kDone ? "ended" : "in " + at(thread.what, thread.where)]
          .push_back(t);
    }
    std::ostringstream report;
    report << "emulation: divergent threads in block " << position.block.x;
    for (const auto& [place, threads] : places)
      report << "; " << threads.size() << " (first " << threads[0] << ") " << place;
    fault_ = report.str();
    throw_fault();
  }

  const Launch* launch_ = nullptr;
  std::vector<Thread> threads_;
  size_t count_ = 0, done_ = 0;
  std::array<uint32_t, 1024 / kWarpSize> waiting_{};  // by warp: its lanes in State::kInWarp
  Fiber host_;
  Fiber *running_ = &host_, *left_ = nullptr;  // the one before
  Thread* current_ = nullptr;
  Order order_;
  std::vector<unsigned> sequence_;
  size_t next_ = 0;  // in it, of this round
  unsigned char* shared_ = nullptr;
  std::string fault_;
  bool any_ = false;
  std::vector<SharedMemory> retired_;
  char barrier_ = 0, start_ = 0, end_ = 0;  // what ThreadSanitizer orders memory by

  friend struct Access;
};

Machine& machine() {
  static Machine one;
  return one;
}

struct Access {
  static void thread_main() {
    arrived(machine().left_);
    Thread* self = machine().current_;
    acquire(&machine().start_);
    machine().launch_->body();
    release(&machine().end_);
    self->state = State::kDone;
    ++machine().done_;
    machine().yield();
    std::abort();
  }
};

void Machine::thread_main() { Access::thread_main(); }

}  // namespace

void run(const Launch& launch) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  machine().run(launch);
}

void* shared_memory() { return machine().shared_memory(); }

void fail(const std::string& message) { machine().fail(message); }

bool meet_block(bool predicate, const char* what, Where where) {
  return machine().meet_block(predicate, what, where);
}

void meet_warp(uint32_t mask, void* slot, Combine combine, bool orders_memory, const char* what,
               Where where) {
  machine().meet_warp(mask, slot, combine, orders_memory, what, where);
}

void check_aligned(const void* p, size_t bytes, const char* what, Where where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("emulation: misaligned " + std::string(what) + " of " + std::to_string(bytes) +
         " bytes at line " + std::to_string(where.line()));
}

// ---- matrix multiplication ----------------------------------------------------------------------

namespace {

struct MmaSlot {
  Float16Kind kind;
  float* d;
  const uint32_t *a, *b;
};

float half_of(Float16Kind kind, uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  return kind == Float16Kind::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

void combine_mma(void* const slots[kWarpSize], uint32_t) {
  float a[16][16], b[16][8];
  const auto slot = [&](int lane) { return static_cast<const MmaSlot*>(slots[lane]); };
  const Float16Kind kind = slot(0)->kind;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a_i, two to a register
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      a[row][col] = half_of(kind, slot(lane)->a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) {  // b_i
      const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
      b[row][group] = half_of(kind, slot(lane)->b[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) {  // d_i
      const int row = (lane >> 2) + (i < 2 ? 0 : 8), col = lane % 4 * 2 + (i & 1);
      float sum = slot(lane)->d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][col];
      slot(lane)->d[i] = sum;
    }
}

}  // namespace

void mma_m16n8k16(Float16Kind kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Where where) {
  MmaSlot slot{kind, d, a, b};
  meet_warp(0xFFFFFFFFU, &slot, combine_mma, false, "mma.m16n8k16", where);
}

// ---- 16-bit numbers -----------------------------------------------------------------------------

float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t to_bfloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest even
}

float from_float16(uint16_t bits) {
  const float sign = (bits & 0x8000) != 0 ? -1.0F : 1.0F;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction == 0 ? sign * __builtin_inff() : __builtin_nanf("");
  const float magnitude = exponent == 0
                              ? static_cast<float>(fraction) * 0x1p-24F
                              : __builtin_ldexpf(1.0F + fraction * 0x1p-10F, exponent - 15);
  return sign * magnitude;
}

uint16_t to_float16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7FFF;
  const float magnitude = __builtin_fabsf(x);
  if (magnitude >= 65520.0F) return sign | 0x7C00;  // rounds to infinity
  if (magnitude <
      0x1p-14F)  // the grid of the subnormal numbers; a carry gives the least normal one
    return sign | static_cast<uint16_t>(__builtin_rintf(magnitude * 0x1p24F));
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0xFFF + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112U << 10));
}

}  // namespace emulation
