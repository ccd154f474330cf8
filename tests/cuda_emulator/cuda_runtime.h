// A CUDA device in one CPU thread, for tests: enough of the language to run the kernels of csrc/cuda unchanged.
//
// Blocks run one after the other; the threads of a block are fibers that switch at barriers and at instructions of a
// whole warp. Shared memory starts full of NaN at every block and lies between canaries. A kernel fails (launch returns
// an error) where it reads or writes beyond guarded memory, breaks a canary, lets part of a warp miss an instruction of
// the whole warp, or waits for a barrier that not every thread reaches. What it cannot show is in docs/cuda.md.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace emulator {

constexpr size_t STACK = 128 << 10, CANARY = 256;
constexpr unsigned char CANARY_BYTE = 0xA5, POISON = 0xFF;  // 0xFFFF is NaN in every format
constexpr int WARP = 32, LARGEST_SLOT = 64;

struct Barrier {
  unsigned expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  // Two of each, used in turn: a fast lane may be at the next instruction while a slow one still reads its result.
  unsigned char slots[2][WARP][LARGEST_SLOT];
  const char* instruction[2] = {};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Thread {
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
  dim3 index;
  unsigned linear = 0;
  bool done = false;
  Barrier* waits_at = nullptr;
  uint64_t seen = 0;
  unsigned turn = 0;          // instructions of the whole warp that this lane has done
  std::vector<Copy> copies;   // asynchronous copies under way: done at the wait, not before
};

struct Device {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier block_barrier;
  dim3 grid, block, block_index;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  Thread* running = nullptr;
  ucontext_t scheduler;
  sigjmp_buf failed;
  std::string message;
  std::function<void()> kernel;
};

inline Device device;

// The order in which the threads of a block take their turns; results must not depend on it.
inline bool backwards() {
  const char* order = std::getenv("FASTNULL_EMULATOR_ORDER");
  return order != nullptr && std::string(order) == "backwards";
}

// Bytes of shared memory that a block may have: 163 KB as on sm_80, or what a test says.
inline size_t shared_limit() {
  const char* bytes = std::getenv("FASTNULL_EMULATOR_SHARED");
  return bytes != nullptr ? std::strtoull(bytes, nullptr, 10) : 163 << 10;
}

[[noreturn]] inline void fail(const std::string& what) {
  const dim3 b = device.block_index;
  device.message = what + " (block " + std::to_string(b.x) + ", " + std::to_string(b.y);
  if (device.running != nullptr) device.message += ", thread " + std::to_string(device.running->linear);
  device.message += ")";
  siglongjmp(device.failed, 1);
}

inline void wait(Barrier& barrier) {
  Thread& me = *device.running;
  me.seen = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  me.waits_at = &barrier;
  swapcontext(&me.context, &device.scheduler);
}

// One instruction of the whole warp: each lane brings a Slot, `compute` turns the 32 slots into results in place.
template <typename Slot, typename Compute>
Slot of_whole_warp(const char* instruction, const Slot& mine, Compute compute) {
  static_assert(sizeof(Slot) <= LARGEST_SLOT);
  Thread& me = *device.running;
  Warp& warp = device.warps[me.linear / WARP];
  const unsigned lane = me.linear % WARP, turn = me.turn++ % 2;
  if (warp.barrier.arrived == 0) warp.instruction[turn] = instruction;
  if (warp.instruction[turn] == nullptr || std::strcmp(warp.instruction[turn], instruction) != 0)
    fail(std::string("lanes of one warp are at different instructions: ") + instruction);
  std::memcpy(warp.slots[turn][lane], &mine, sizeof(Slot));
  if (warp.barrier.arrived + 1 == WARP) {
    Slot all[WARP];
    for (int i = 0; i < WARP; ++i) std::memcpy(&all[i], warp.slots[turn][i], sizeof(Slot));
    compute(all);
    for (int i = 0; i < WARP; ++i) std::memcpy(warp.slots[turn][i], &all[i], sizeof(Slot));
  }
  wait(warp.barrier);
  Slot result;
  std::memcpy(&result, warp.slots[turn][lane], sizeof(Slot));
  return result;
}

inline void run_thread() {
  device.kernel();
  if (!device.running->copies.empty()) fail("a thread ends with asynchronous copies that it never waited for");
  device.running->done = true;
  swapcontext(&device.running->context, &device.scheduler);
}

inline void run_block(size_t shared_bytes) {
  const unsigned count = device.block.x;
  std::fill(device.memory.begin(), device.memory.end(), CANARY_BYTE);
  std::memset(device.shared, POISON, shared_bytes);
  device.block_barrier = Barrier{count};
  device.warps.assign(count / WARP, Warp{});
  for (Warp& warp : device.warps) warp.barrier.expected = WARP;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = device.threads[i];
    t.index = dim3(i, 0, 0), t.linear = i, t.done = false, t.waits_at = nullptr, t.turn = 0;
    t.copies.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, run_thread, 0);
  }
  // A warp goes on for as long as it can, then the next: far ahead of each other, they miss a missing barrier.
  const bool reversed = backwards();
  const auto turn_of = [&](unsigned i) -> bool {
    Thread& t = device.threads[reversed ? count - 1 - i : i];
    if (t.done || (t.waits_at != nullptr && t.waits_at->generation == t.seen)) return false;
    t.waits_at = nullptr;
    device.running = &t;
    swapcontext(&device.scheduler, &t.context);
    device.running = nullptr;
    return true;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned warp = 0; warp < count; warp += WARP)
      for (bool warp_moved = true; warp_moved; moved |= warp_moved) {
        warp_moved = false;
        for (unsigned lane = 0; lane < WARP; ++lane) warp_moved |= turn_of(warp + lane);
      }
  }
  const auto left = std::count_if(device.threads.begin(), device.threads.begin() + count,
                                  [](const Thread& t) { return !t.done; });
  if (left > 0) fail("deadlock: " + std::to_string(left) + " threads wait at barriers that the others never reach");
  for (size_t i = 0; i < CANARY; ++i)
    if (device.shared[-1 - int64_t(i)] != CANARY_BYTE || device.shared[shared_bytes + i] != CANARY_BYTE)
      fail("a write beyond shared memory");
}

inline void on_signal(int signal, siginfo_t*, void*) {
  fail(signal == SIGFPE ? "an integer division by zero" : "an access beyond the memory given, or misaligned");
}

inline cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  if (block.x % WARP != 0 || block.x == 0 || block.x > 1024 || block.y * block.z != 1 || shared_bytes > shared_limit() ||
      grid.x * uint64_t(grid.y) * grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    device.message = "a grid, a block or shared memory that no device takes";
    return cudaErrorInvalidValue;
  }
  if (device.threads.size() < block.x) device.threads.resize(block.x);
  // Canaries on both sides; what was rounded up for alignment counts as canary.
  device.memory.resize(shared_bytes + 2 * CANARY + 16);
  device.shared = reinterpret_cast<unsigned char*>((uintptr_t(device.memory.data()) + CANARY + 15) / 16 * 16);
  device.grid = grid, device.block = block, device.kernel = std::move(kernel);

  struct sigaction handler = {}, before[3];
  const int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  static std::vector<unsigned char> signal_stack(1 << 16);
  stack_t alternate = {signal_stack.data(), 0, signal_stack.size()}, stack_before;
  sigaltstack(&alternate, &stack_before);
  handler.sa_sigaction = on_signal;
  handler.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &handler, &before[i]);
  cudaError_t error = cudaSuccess;
  if (sigsetjmp(device.failed, 1) == 0) {
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        device.block_index = dim3(x, y, 0);
        run_block(shared_bytes);
      }
  } else {
    error = cudaErrorLaunchFailure;
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  device.running = nullptr;
  return error;
}

}  // namespace emulator

#define threadIdx (emulator::device.running->index)
#define blockIdx (emulator::device.block_index)
#define blockDim (emulator::device.block)
#define gridDim (emulator::device.grid)

inline const char* cudaGetErrorString(cudaError_t) { return emulator::device.message.c_str(); }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline void __syncthreads() { emulator::wait(emulator::device.block_barrier); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  struct Slot { T value; int mask; };
  return emulator::of_whole_warp("shfl.xor", Slot{value, mask}, [](Slot(&all)[32]) {
    Slot given[32];
    std::copy(all, all + 32, given);
    for (int i = 0; i < 32; ++i) all[i].value = given[i ^ all[i].mask].value;
  }).value;
}

inline void __syncwarp() {
  emulator::of_whole_warp("syncwarp", 0, [](int(&)[32]) {});
}

template <typename T>
T __ldcg(const T* from) {
  return *from;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline unsigned atomicInc(unsigned* at, unsigned top) {
  const unsigned old = *at;
  *at = old >= top ? 0 : old + 1;
  return old;
}
