// Tasks of unequal size: each thread takes the next one when it is free.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <atomic>
#include <cstdint>

namespace fastdpo {

// make() -> what a thread does with task t of first .. last-1; its captures by value are the thread's scratch
template <typename Make>
void each_task(int64_t first, int64_t last, const Make& make) {
  std::atomic<int64_t> next{first};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), last - first), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      auto call = make();
      for (int64_t t = next++; t < last; t = next++)
        call(t);
    }
    at::native::cpublas::brgemm_release(true);
  });
}

}  // namespace fastdpo
