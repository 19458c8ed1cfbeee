#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#define MOEBIUS_PROCESS() static_cast<long>(getpid())
#else
#define MOEBIUS_PROCESS() 0L
#endif

namespace moebius {
namespace {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. Its number and the next task to hand out are one word, so that a thread that wakes up late can never
// take a task of a job that is over.
class Pool {
 public:
  void run(int count, int threads, void (*task)(void*, int), void* context) {
    std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    // A second caller, or the child of a fork, which has none of the threads, does its work alone.
    if (count < 2 || threads < 2 || !alone.owns_lock() || process_ != MOEBIUS_PROCESS()) {
      for (int i = 0; i < count; ++i) task(context, i);
      return;
    }
    while (started_ < threads - 1) std::thread(&Pool::serve, this, started_++).detach();
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    count_.store(count, std::memory_order_relaxed);
    wanted_.store(threads - 1, std::memory_order_relaxed);
    left_.store(count, std::memory_order_relaxed);
    const uint64_t job = (next_.load(std::memory_order_relaxed) >> 32) + 1;
    next_.store(job << 32);
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleeping_);
      wake_.notify_all();
    }
    while (take(job)) {
    }
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 4096) pause();
      else std::this_thread::yield();  // the others may share this core
    }
  }

 private:
  bool take(uint64_t job) {
    uint64_t next = next_.load(std::memory_order_acquire);
    while (true) {
      const auto task = task_.load(std::memory_order_relaxed);
      void* context = context_.load(std::memory_order_relaxed);
      const int i = static_cast<int>(next & 0xffffffffu);
      if (next >> 32 != job || i >= count_.load(std::memory_order_relaxed)) return false;
      if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
        task(context, i);
        left_.fetch_sub(1, std::memory_order_release);
        return true;
      }
    }
  }

  void serve(int place) {
    uint64_t seen = 0;
    while (true) {
      seen = wait_after(seen);
      if (place < wanted_.load(std::memory_order_relaxed)) {
        while (take(seen)) {
        }
      }
    }
  }

  // The steps of a layer follow each other closely: a moment of watching spares waking up. Then this thread sleeps.
  uint64_t wait_after(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    for (int spins = 1;; ++spins) {
      if (const uint64_t job = next_.load(std::memory_order_acquire) >> 32; job != seen) return job;
      pause();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(sleeping_);
    asleep_.fetch_add(1);
    wake_.wait(lock, [&] { return next_.load() >> 32 != seen; });
    asleep_.fetch_sub(1);
    return next_.load() >> 32;
  }

  std::mutex running_, sleeping_;
  std::condition_variable wake_;
  std::atomic<uint64_t> next_{0};
  std::atomic<void (*)(void*, int)> task_{nullptr};
  std::atomic<void*> context_{nullptr};
  std::atomic<int> count_{0}, wanted_{0}, left_{0}, asleep_{0};
  int started_ = 0;
  const long process_ = MOEBIUS_PROCESS();
};

}  // namespace

void run_tasks(int count, int threads, void (*task)(void*, int), void* context) {
  static Pool* pool = new Pool;  // never destroyed: its threads may outlive main
  pool->run(count, threads, task, context);
}

}  // namespace moebius
