// The fibers, blocks and launches of cuda_on_cpu.h. Compiled without a sanitizer even where the kernels are compiled with one: it
// tells the sanitizer what a CUDA thread is and where CUDA orders memory.
//
// CUDA_ON_CPU_SEED (0) sets all random orders. CUDA_ON_CPU_PAUSE (0) is how many microseconds a block sleeps at most before and
// after every second atomic or so. ThreadSanitizer sees a race between blocks only if the wrong one is last: a long pause lets it
// be.
#include "cuda_on_cpu.h"

#include <link.h>
#include <sched.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

// The interface of the sanitizers. All are null in a process that runs without.
extern "C" {
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fiber);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fiber, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
}

namespace emulated {

thread_local const Thread* current;

namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;  // of a block
constexpr unsigned kNoOrder = 1;        // for __tsan_switch_to_fiber: taking turns orders nothing
constexpr size_t kStackBytes = 256 << 10;

bool has_thread_sanitizer() { return __tsan_create_fiber != nullptr; }
bool has_address_sanitizer() { return __sanitizer_start_switch_fiber != nullptr; }

// What is done before a release is seen by who acquires later, at the same address.
void acquire(void* address) {
  if (has_thread_sanitizer()) __tsan_acquire(address);
}
void release(void* address) {
  if (has_thread_sanitizer()) __tsan_release(address);
}

long setting(const char* name) {
  const char* given = std::getenv(name);
  return given != nullptr ? std::atol(given) : 0;
}

std::mutex error_mutex;
std::string error, taken;  // the first since an error was taken, and the one that was

enum class State { kReady, kAtBarrier, kAtExchange, kDone };

// A CUDA thread.
struct Fiber {
  Thread thread;
  State state;
  Place place;  // where it waits
  unsigned mask;
  uint64_t value;
  bool has_begun = false;
  void* context[5];  // of __builtin_setjmp
  void* thread_sanitizer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

using Warp = std::vector<Fiber*>;  // in the order in which they run

// The shared memory of the block that this OS thread runs: all thread-local variables of this library.
struct Memory {
  void* begin;
  size_t bytes;
};
Memory shared_memory() {
  current = nullptr;  // the first access allocates them
  Memory found{};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const auto address = reinterpret_cast<uintptr_t>(&shared_memory) - info->dlpi_addr;
        Memory thread_local_memory{};
        bool is_this_library = false;
        for (const auto* part = info->dlpi_phdr; part != info->dlpi_phdr + info->dlpi_phnum; ++part) {
          is_this_library |= part->p_type == PT_LOAD && address - part->p_vaddr < part->p_memsz;
          if (part->p_type == PT_TLS) thread_local_memory = {info->dlpi_tls_data, part->p_memsz};
        }
        if (is_this_library) *static_cast<Memory*>(out) = thread_local_memory;
        return static_cast<int>(is_this_library);
      },
      &found);
  return found;
}

// What all blocks of a launch have in common.
struct Grid {
  unsigned blocks, threads, seed;
  const std::function<void()>& kernel;
};

char launched, ended;  // addresses for acquire and release: fibers see what the host did before, the host what fibers did
class Multiprocessor;
thread_local Multiprocessor* here;

// Runs one block after another with the same fibers.
class Multiprocessor {
 public:
  // False if the block could not come to its end. Its fibers are then stuck, so this must not be used again, nor destroyed.
  bool run(const Grid& grid, unsigned block) {
    const Memory shared = shared_memory();
    std::memset(shared.begin, 0xff, shared.bytes);  // garbage; `here` and `current` are part of it
    here = this;
    begin(grid, block);
    const bool one_by_one = random_() % 2;  // a warp runs as far as it can before the next one; or they take turns
    bool goes_on = true;
    while (goes_on && alive_ > 0) {
      bool progress = false;
      for (Warp& warp : warps_) {
        while (advance(warp)) {
          progress = true;
          if (!one_by_one) break;
        }
      }
      goes_on = progress || pass_barrier();
    }
    for (unsigned i = 0; i < grid.threads; ++i) {
      if (has_thread_sanitizer()) __tsan_destroy_fiber(fibers_[i]->thread_sanitizer);
    }
    return alive_ == 0;
  }

  // By the running fiber.
  void barrier(Place place) {
    char* const address = &barriers_[passed_ % 2];  // two, since a fiber may be at the next one before another has left this one
    release(address);
    wait(State::kAtBarrier, place);
    acquire(address);
  }
  const uint64_t* exchange(Place place, unsigned mask, uint64_t value) {
    running_->mask = mask;
    running_->value = value;
    wait(State::kAtExchange, place);
    return exchanged_ + running_->thread.index.x / kLanes * kLanes;
  }
  unsigned random() { return random_(); }

 private:
  void begin(const Grid& grid, unsigned block) {
    random_.seed(grid.seed + block);
    kernel_ = &grid.kernel;
    alive_ = grid.threads;
    passed_ = 0;
    warps_.assign((grid.threads + kLanes - 1) / kLanes, {});
    while (fibers_.size() < grid.threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned i = 0; i < grid.threads; ++i) {
      Fiber& fiber = *fibers_[i];
      fiber.thread = {{i, 0, 0}, {block, 0, 0}, {grid.threads, 1, 1}, {grid.blocks, 1, 1}};
      fiber.state = State::kReady;
      if (has_thread_sanitizer()) fiber.thread_sanitizer = __tsan_create_fiber(0);
      warps_[i / kLanes].push_back(&fiber);
    }
    // Forward and backward besides shuffled: then a thread that runs ahead meets what its neighbour has not yet done.
    const unsigned order = random_() % 3;
    const auto reorder = [&](auto& list) {
      if (order == 1) std::reverse(list.begin(), list.end());
      if (order == 2) std::shuffle(list.begin(), list.end(), random_);
    };
    for (Warp& warp : warps_) reorder(warp);
    reorder(warps_);
  }

  // Runs the lanes that are ready until they wait, then the exchanges that are complete. False if there was nothing to do.
  bool advance(Warp& warp) {
    bool progress = false;
    for (Fiber* fiber : warp) {
      if (fiber->state == State::kReady) {
        resume(*fiber);
        alive_ -= fiber->state == State::kDone;
        progress = true;
      }
    }
    for (Fiber* first : warp) {
      if (first->state != State::kAtExchange) continue;
      const auto takes_part = [&](const Fiber* x) {
        return x->state == State::kAtExchange && x->mask == first->mask && x->place == first->place;
      };
      unsigned lanes = 0;
      for (const Fiber* fiber : warp) lanes |= static_cast<unsigned>(takes_part(fiber)) << fiber->thread.index.x % kLanes;
      if (lanes != first->mask) continue;
      for (Fiber* fiber : warp) {
        if (!takes_part(fiber)) continue;
        exchanged_[fiber->thread.index.x] = fiber->value;
        fiber->state = State::kReady;
      }
      progress = true;
    }
    return progress;
  }

  bool pass_barrier() {
    const Fiber& first = *fibers_[0];
    for (const Warp& warp : warps_) {
      for (const Fiber* fiber : warp) {
        if (fiber->state != State::kAtBarrier || !(fiber->place == first.place)) {
          fail(("a block is stuck: " + whereabouts(first) + ", " + whereabouts(*fiber)).c_str());
          return false;
        }
      }
    }
    for (const Warp& warp : warps_) {
      for (Fiber* fiber : warp) fiber->state = State::kReady;
    }
    ++passed_;
    return true;
  }

  static std::string whereabouts(const Fiber& fiber) {
    const std::string name = "thread " + std::to_string(fiber.thread.index.x);
    if (fiber.state == State::kDone) return name + " has ended";
    const char* const what = fiber.state == State::kAtBarrier ? " waits at the barrier of " : " waits for lanes of its warp at ";
    const std::string path = fiber.place.file;
    return name + what + path.substr(path.rfind('/') + 1) + ":" + std::to_string(fiber.place.line);
  }

  // Two switches make a turn of a fiber: in here, and back in wait().
  void resume(Fiber& fiber) {
    running_ = &fiber;
    current = &fiber.thread;
    void* fake_stack = nullptr;
    if (has_thread_sanitizer()) {
      scheduler_ = __tsan_get_current_fiber();
      __tsan_switch_to_fiber(fiber.thread_sanitizer, kNoOrder);
    }
    if (has_address_sanitizer()) __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
    fiber.has_begun ? switch_from_to(context_, fiber.context) : start(fiber);
    if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void wait(State state, Place place) {
    Fiber& fiber = *running_;
    fiber.state = state;
    fiber.place = place;
    if (has_thread_sanitizer()) __tsan_switch_to_fiber(scheduler_, kNoOrder);
    if (has_address_sanitizer()) __sanitizer_start_switch_fiber(&fiber.fake_stack, stack_, stack_bytes_);
    switch_from_to(fiber.context, context_);
    if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_, &stack_bytes_);
  }

  // setjmp and longjmp as the compiler has them: no system call, and no sanitizer intercepts them. They stand in two functions: in
  // one the compiler takes the return of setjmp that longjmp causes for unreachable.
  [[gnu::noipa]] static void switch_from_to(void** from, void** to) {
    if (__builtin_setjmp(from) == 0) jump(to);
  }
  [[gnu::noipa]] static void jump(void** to) { __builtin_longjmp(to, 1); }

  [[gnu::noipa]] void start(Fiber& fiber) {
    fiber.has_begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.get();
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, &forever, 0);
    if (__builtin_setjmp(context_) == 0) setcontext(&context);
  }

  // What a fiber runs: the kernel once for every block.
  static void forever() {
    Multiprocessor& own = *here;
    if (has_address_sanitizer()) __sanitizer_finish_switch_fiber(nullptr, &own.stack_, &own.stack_bytes_);
    for (;;) {
      acquire(&launched);
      (*own.kernel_)();
      release(&ended);
      own.wait(State::kDone, {});
    }
  }

  std::mt19937 random_;
  const std::function<void()>* kernel_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;  // in the order in which they run
  uint64_t exchanged_[kMaxThreads];
  Fiber* running_;
  unsigned alive_, passed_;  // fibers that have not ended, barriers that all have passed
  char barriers_[2];         // addresses for acquire and release
  void* context_[5];         // where run() goes on when a fiber waits; then what the sanitizers know of it
  void* scheduler_;
  const void* stack_;
  size_t stack_bytes_;
};

std::mutex fence_mutex;

}  // namespace

void barrier(Place place) { here->barrier(place); }

const uint64_t* exchange(Place place, unsigned mask, uint64_t value) { return here->exchange(place, mask, value); }

void pause() {
  static const long longest = setting("CUDA_ON_CPU_PAUSE");
  const unsigned random = here->random();
  if (random % 2 == 0) longest > 0 ? usleep(random / 2 % longest) : sched_yield();
}

// All fences are in one order, and each comes after what was before the earlier ones: the fence.sc that __threadfence() is.
void fence() {
  const std::lock_guard<std::mutex> hold(fence_mutex);
  acquire(&fence_mutex);
  release(&fence_mutex);
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

void fail(const char* what) {
  const std::lock_guard<std::mutex> hold(error_mutex);
  if (error.empty()) error = what;
}

const char* taken_error() {
  const std::lock_guard<std::mutex> hold(error_mutex);
  taken.clear();
  taken.swap(error);
  return taken.empty() ? nullptr : taken.c_str();
}

const char* last_taken_error() { return taken.c_str(); }

void run(int64_t blocks, int64_t threads, const std::function<void()>& kernel) {
  static const long seed = setting("CUDA_ON_CPU_SEED");
  static std::atomic<unsigned> launches{0};
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > kMaxThreads) return fail("invalid configuration argument");
  std::mt19937 random(seed + 0x9e3779b9u * launches++);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  const Grid grid{static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<unsigned>(random()), kernel};
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t most) {
    auto multiprocessor = std::make_unique<Multiprocessor>();
    for (int64_t i; most > 0 && (i = next++) < blocks; --most) {
      if (multiprocessor->run(grid, order[i])) continue;
      multiprocessor.release();  // stuck
      multiprocessor = std::make_unique<Multiprocessor>();
    }
  };
  release(&launched);
  // Where two blocks had their shared memory in one place, ThreadSanitizer would see races: there each gets an OS thread.
  const int64_t at_once = has_thread_sanitizer() ? 16 : 2;
  while (next < blocks) {
    std::vector<std::thread> workers(std::min(at_once, blocks - next));
    for (std::thread& worker : workers) worker = std::thread(work, has_thread_sanitizer() ? 1 : blocks);
    for (std::thread& worker : workers) worker.join();
  }
  acquire(&ended);
}

}  // namespace emulated

// The one function of a torch with CUDA that csrc/ calls.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
