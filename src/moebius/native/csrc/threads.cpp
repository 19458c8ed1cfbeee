#include "threads.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif
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

// The entry of OpenMP's runtime, of the one that PyTorch has loaded, or null. With threads of our own beside PyTorch's, those
// that wait spin on the cores that the others need.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

Parallel parallel_of_pytorch() {
#if defined(__linux__)
  Parallel found = nullptr;
  const auto look = [](dl_phdr_info* library, size_t, void* result) {
    if (!std::strstr(library->dlpi_name, "libgomp") && !std::strstr(library->dlpi_name, "libiomp5")) return 0;
    void* handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    void* entry = handle ? dlsym(handle, "GOMP_parallel") : nullptr;
    *static_cast<Parallel*>(result) = reinterpret_cast<Parallel>(entry);
    return entry ? 1 : 0;
  };
  dl_iterate_phdr(look, &found);
  return found;
#else
  return nullptr;
#endif
}

struct Job {
  int count;
  void (*task)(void*, int);
  void* context;
  std::atomic<int> next{0};
};

void work(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;) job.task(job.context, i);
}

// Where that is not there. One job at a time. Its number and the next task to hand out are one word, so that a thread that
// wakes up late can never take a task of a job that is over.
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
  static const Parallel parallel = parallel_of_pytorch();
  static const long process = MOEBIUS_PROCESS();
  // The child of a fork has none of the threads: it goes on below, alone.
  if (parallel && process == MOEBIUS_PROCESS()) {
    Job job{count, task, context};
    if (count < 2 || threads < 2) return work(&job);
    return parallel(work, &job, static_cast<unsigned>(threads), 0);
  }
  static Pool* pool = new Pool;  // never destroyed: its threads may outlive main
  pool->run(count, threads, task, context);
}

}  // namespace moebius
