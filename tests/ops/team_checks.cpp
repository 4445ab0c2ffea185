// Checks of csrc/cpu/team.h that need no tensors; prints the first that fails and exits with 1.
// Built by test_team.py, with the thread sanitizer too.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/team.h"

using dflare::cpu::parallel_for;

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

// Every index once, ranges of at least `grain` but the last, for jobs of all sizes in a row.
void covers_every_range(int64_t threads) {
  for (int64_t count : {0, 1, 2, 7, 64, 1000, 4097}) {
    for (int64_t grain : {0, 1, 3, 100}) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<int> seen(count, 0);
        std::atomic<bool> short_range{false};
        parallel_for(threads, count, grain, [&](int64_t begin, int64_t end) {
          if (end - begin < grain && end != count) short_range = true;
          for (int64_t i = begin; i < end; ++i) ++seen[i];
        });
        for (int times : seen) check(times == 1, "every index is visited once");
        check(!short_range, "no range is shorter than the grain but the last");
      }
    }
  }
}

void one_thread_stays_alone() {
  const auto self = std::this_thread::get_id();
  parallel_for(1, 1000, 1, [&](int64_t, int64_t) {
    check(std::this_thread::get_id() == self, "one thread means the calling one");
  });
}

// Work that waits for a second thread would never end if nobody came.
void helpers_come_also_after_they_slept() {
  for (int round = 0; round < 3; ++round) {
    std::atomic<int> inside{0};
    parallel_for(2, 2, 1, [&](int64_t, int64_t) {
      ++inside;
      while (inside < 2) std::this_thread::yield();
    });
    check(inside == 2, "two threads work at the same time");
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
}

void first_error_arrives_after_all_ranges() {
  for (int repeat = 0; repeat < 50; ++repeat) {
    std::atomic<int> ended{0};
    bool thrown = false;
    try {
      parallel_for(3, 24, 1, [&](int64_t begin, int64_t) {
        if (begin == 5) throw std::runtime_error("five");
        ++ended;
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    check(thrown, "an error of a range reaches the caller");
    check(ended == 23, "the other ranges have ended by then");
  }
}

void nested_and_concurrent_callers_finish() {
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(4, 0);
  for (int64_t& sum : sums) {
    callers.emplace_back([&sum] {
      for (int repeat = 0; repeat < 200; ++repeat) {
        std::atomic<int64_t> total{0};
        parallel_for(3, 30, 1, [&](int64_t begin, int64_t end) {
          parallel_for(3, end - begin, 1, [&](int64_t from, int64_t to) { total += to - from; });
        });
        sum += total;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int64_t sum : sums) check(sum == 200 * 30, "callers beside each other get all their ranges");
}

void a_forked_child_has_threads_of_its_own() {
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> inside{0};
    parallel_for(2, 2, 1, [&](int64_t, int64_t) {
      ++inside;
      while (inside < 2) std::this_thread::yield();
    });
    _exit(inside == 2 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child runs jobs");
}

}  // namespace

int main(int, char** arguments) {
  for (int64_t threads : {1, 2, 5}) covers_every_range(threads);
  one_thread_stays_alone();
  helpers_come_also_after_they_slept();
  first_error_arrives_after_all_ranges();
  nested_and_concurrent_callers_finish();
  // The sanitizer starts no threads in a child of a process that had some.
  if (arguments[1] == nullptr) a_forked_child_has_threads_of_its_own();
  std::puts("all hold");
}
