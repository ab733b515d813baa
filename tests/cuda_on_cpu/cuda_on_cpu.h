// What kernels use of CUDA C++, for g++: csrc/cuda.cu runs, thread by thread, on a machine without a GPU.
//
// A CUDA thread is a fiber, a block is an OS thread that runs its fibers in turn, and several blocks run at once (cuda_on_cpu.cpp).
// The kernels get what the programming model promises and nothing more:
//   - threads and blocks run in random order; a thread runs alone until it waits at a barrier or shuffle;
//   - shared memory holds garbage when a block begins;
//   - a barrier or shuffle that not all of its threads reach is an error of the launch, as is a false __builtin_assume;
//   - only barriers and fences order memory. x86 orders more: what lacks a fence needs ThreadSanitizer, for which a fiber is a
//   thread.
// Not here: grids of two or three dimensions, shared memory sized at the launch, textures, cooperative groups, PTX.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static thread_local  // a thread of the OS runs one block at a time

using cudaStream_t = void*;

namespace emulated {

struct Index {
  unsigned x, y, z;
};

struct Thread {
  Index index, block, block_size, grid_size;
};

extern thread_local const Thread* current;  // the CUDA thread that runs now

// Where a barrier or shuffle stands in the source: by it they are told apart.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
};

void barrier(Place place);
// Waits for the lanes of `mask`; returns the values that all lanes of the warp have brought to their last exchange.
const uint64_t* exchange(Place place, unsigned mask, uint64_t value);
void fence();
void pause();                 // gives other blocks the chance to overtake this one
void fail(const char* what);  // the launch has failed
const char* taken_error();    // null if no launch has failed since this was asked last
const char* last_taken_error();

void run(int64_t grid, int64_t block, const std::function<void()>& kernel);

// kernel<<<grid, block, 0, stream>>>(x) is compiled as Launch(grid, block, 0, stream).of([&](auto... x) { kernel(x...); })(x).
struct Launch {
  int64_t grid, block;

  Launch(int64_t grid, int64_t block, size_t shared_bytes = 0, cudaStream_t = nullptr) : grid(grid), block(block) {
    if (shared_bytes != 0) fail("shared memory that is sized at the launch is not emulated");
  }
  template <typename Kernel>
  auto of(Kernel kernel) const {
    return [launch = *this, kernel](auto... x) { run(launch.grid, launch.block, [&] { kernel(x...); }); };
  }
};

inline unsigned lane() { return current->index.x % 32; }
inline unsigned own_or(unsigned other) { return other < 32 ? other : lane(); }

template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename T>
T shuffle(Place place, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* const bits_of_lanes = exchange(place, mask, bits);
  if (!(mask >> source & 1)) fail("a shuffle takes the value of a lane that is not in its mask");
  std::memcpy(&value, &bits_of_lanes[source], sizeof value);
  return value;
}

inline unsigned ballot(Place place, unsigned mask, bool value) {
  const uint64_t* const of_lanes = exchange(place, mask, value);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) votes |= static_cast<unsigned>((mask >> i & 1) && of_lanes[i]) << i;
  return votes;
}

// *address becomes next(*address), at once; no order with other accesses.
template <typename T, typename Next>
T atomic(T* address, const Next& next) {
  pause();
  T old, value;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    value = next(old);
  } while (!__atomic_compare_exchange(address, &old, &value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  pause();
  return old;
}

}  // namespace emulated

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::current->block)
#define blockDim (emulated::current->block_size)
#define gridDim (emulated::current->grid_size)

// ------------------------------------------------------------------------------------- barriers, fences, shuffles, atomics, loads

#define CUDA_ON_CPU_PLACE (emulated::Place{__FILE__, __LINE__})
#define __syncthreads() emulated::barrier(CUDA_ON_CPU_PLACE)
#define __threadfence() emulated::fence()
#define __ballot_sync(mask, value) emulated::ballot(CUDA_ON_CPU_PLACE, mask, value)
#define __shfl_sync(mask, value, source) emulated::shuffle(CUDA_ON_CPU_PLACE, mask, value, (source) % 32u)
#define __shfl_xor_sync(mask, value, bits) emulated::shuffle(CUDA_ON_CPU_PLACE, mask, value, (emulated::lane() ^ (bits)) % 32u)
#define __shfl_up_sync(mask, value, n) emulated::shuffle(CUDA_ON_CPU_PLACE, mask, value, emulated::own_or(emulated::lane() - (n)))
#define __shfl_down_sync(mask, value, n) emulated::shuffle(CUDA_ON_CPU_PLACE, mask, value, emulated::own_or(emulated::lane() + (n)))

// As in CUDA, x takes the type of what the address points to.
#define CUDA_ON_CPU_ATOMIC(name, next)                                  \
  template <typename T>                                                 \
  T name(T* address, std::enable_if_t<true, T> x) {                     \
    return emulated::atomic(address, [x](T old) -> T { return next; }); \
  }
CUDA_ON_CPU_ATOMIC(atomicAdd, old + x)
CUDA_ON_CPU_ATOMIC(atomicMax, old < x ? x : old)
CUDA_ON_CPU_ATOMIC(atomicMin, x < old ? x : old)
CUDA_ON_CPU_ATOMIC(atomicOr, old | x)
CUDA_ON_CPU_ATOMIC(atomicExch, (static_cast<void>(old), x))
CUDA_ON_CPU_ATOMIC(atomicInc, old >= x ? 0 : old + 1)
template <typename T>
T atomicCAS(T* address, std::enable_if_t<true, T> compare, std::enable_if_t<true, T> x) {
  return emulated::atomic(address, [=](T old) { return old == compare ? x : old; });
}

// Caches differ in what they keep, not in the values.
#define CUDA_ON_CPU_ACCESS(load, store) \
  template <typename T>                 \
  T load(const T* address) {            \
    return *address;                    \
  }                                     \
  template <typename T>                 \
  void store(T* address, T value) {     \
    *address = value;                   \
  }
CUDA_ON_CPU_ACCESS(__ldcg, __stcg)
CUDA_ON_CPU_ACCESS(__ldcs, __stcs)
CUDA_ON_CPU_ACCESS(__ldca, __stwb)
CUDA_ON_CPU_ACCESS(__ldg, __stwt)

#define __isGlobal(address) ((address) != nullptr)
#define __builtin_assume(condition) ((condition) ? void() : emulated::fail("not true: " #condition))

// ------------------------------------------------------------------------------------------------------------------------ types

#define CUDA_ON_CPU_VECTORS(T, name)                         \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

// torch's conversions; but a GPU makes the NaN whose bits are all ones of every NaN.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __uint_as_float(unsigned x) { return emulated::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated::bit_cast<unsigned>(x); }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return {x}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __half2float(__half x) { return emulated::bit_cast<torch::headeronly::Half>(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return emulated::bit_cast<torch::headeronly::BFloat16>(x); }
inline __half __float2half_rn(float x) { return {x != x ? uint16_t{0x7fff} : torch::headeronly::Half(x).x}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {x != x ? uint16_t{0x7fff} : torch::headeronly::BFloat16(x).x}; }

// --------------------------------------------------------------------------------------------------------- runtime, on the host
//
// What is launched, or copied, is done when the call returns.

using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice, cudaErrorUnsupportedPtxVersion, cudaErrorLaunchFailure };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
constexpr unsigned cudaEventDisableTiming = 2, cudaHostAllocDefault = 0;

inline cudaError_t cudaGetLastError() { return emulated::taken_error() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulated::last_taken_error(); }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id) {
  *id = 0;
  return cudaStreamIsCapturing(stream, status);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaHostAlloc(T** address, size_t bytes, unsigned) {
  *address = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* address) {
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
#define CUDA_ON_CPU_NOTHING_TO_DO(name) \
  template <typename... T>              \
  cudaError_t name(const T&...) {       \
    return cudaSuccess;                 \
  }
CUDA_ON_CPU_NOTHING_TO_DO(cudaEventRecord)
CUDA_ON_CPU_NOTHING_TO_DO(cudaEventQuery)
CUDA_ON_CPU_NOTHING_TO_DO(cudaEventSynchronize)
CUDA_ON_CPU_NOTHING_TO_DO(cudaEventDestroy)
CUDA_ON_CPU_NOTHING_TO_DO(cudaStreamWaitEvent)
CUDA_ON_CPU_NOTHING_TO_DO(cudaStreamSynchronize)
