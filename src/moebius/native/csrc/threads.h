// The threads of PyTorch's OpenMP if it is loaded, otherwise some of this extension's own.
#pragma once

#include <type_traits>

namespace moebius {

// Runs task(context, i) for every i < count on this thread and at most threads - 1 others, and returns when all are done.
// Tasks are handed out one by one, so a thread that the system holds up holds up no more than what it is working on.
void run_tasks(int count, int threads, void (*task)(void*, int), void* context);

template <typename Task>
void for_each(int count, int threads, Task&& task) {
  run_tasks(count, threads, [](void* context, int i) { (*static_cast<std::remove_reference_t<Task>*>(context))(i); }, &task);
}

}  // namespace moebius
