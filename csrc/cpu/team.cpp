#include "cpu/team.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>

namespace dflare::cpu {
namespace {

using Clock = std::chrono::steady_clock;

// How long a thread without work looks for some before it sleeps: about ten times what lies between
// two operators of a step, so that a step finds it awake and a waiting server costs nothing.
constexpr auto kSpin = std::chrono::microseconds(200);
// Looks between two glances at the clock and an offer of the core to whoever wants it.
constexpr int kLooks = 64;
// Chunks a thread: enough that one which comes late or is taken off its core holds nobody up, few
// enough that each reads its weights in one long stream.
constexpr int64_t kChunksPerThread = 8;
constexpr int64_t kMostThreads = 255;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `ready`, spinning for kSpin at most; false if it was not by then.
template <typename Ready>
bool spin_until(Ready ready) {
  const auto deadline = Clock::now() + kSpin;
  do {
    for (int look = 0; look < kLooks; ++look) {
      if (ready()) return true;
      pause();
    }
    sched_yield();
  } while (Clock::now() < deadline);
  return false;
}

// The state of a job in one word, so that whoever takes a chunk knows which job it belongs to: the
// job's number (wrapping), how many helpers may join, its chunks, and the next that is free.
struct Ticket {
  uint64_t word;

  static Ticket open(uint64_t job, int64_t helpers, int64_t chunks) {
    return {job << 40 | static_cast<uint64_t>(helpers) << 32 | static_cast<uint64_t>(chunks) << 16};
  }
  int64_t helpers() const { return word >> 32 & 0xff; }
  int64_t chunks() const { return word >> 16 & 0xffff; }
  int64_t next() const { return word & 0xffff; }
  bool has_work() const { return next() < chunks(); }
};

thread_local bool in_team = false;

class Team {
 public:
  // Runs all chunks, with up to `helpers` other threads. One caller at a time.
  void run(int64_t helpers, int64_t count, int64_t size, RangeFunction f) {
    start_helpers(helpers);
    count_ = count;
    size_ = size;
    function_ = &f;
    error_ = nullptr;
    done_.store(0, std::memory_order_relaxed);
    const int64_t chunks = (count + size - 1) / size;
    ticket_.store(Ticket::open(++job_, helpers, chunks).word);
    if (sleepers_.load() > 0) {
      wake_.fetch_add(1);
      wake_.notify_all();
    }
    while (take_chunk(kCaller)) {
    }
    // Chunks that helpers hold. A helper may have lost its core to another process: sleep then.
    const auto all_done = [&] { return done_.load() == static_cast<uint32_t>(chunks); };
    if (!spin_until(all_done)) {
      caller_sleeps_.store(true);
      for (uint32_t done; (done = done_.load()) != static_cast<uint32_t>(chunks);) done_.wait(done);
      caller_sleeps_.store(false);
    }
    if (error_) std::rethrow_exception(error_);
  }

  std::mutex in_use;

 private:
  static constexpr int64_t kCaller = -1;

  void start_helpers(int64_t wanted) {
    if (started_ >= wanted) return;
    // Signals are for the threads that the process knows of.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; started_ < wanted; ++started_) {
      std::thread([this, index = started_] { help(index); }).detach();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void help(int64_t index) {
    in_team = true;
    const auto may_join = [&] {
      const Ticket ticket{ticket_.load()};
      return ticket.has_work() && index < ticket.helpers();
    };
    while (true) {
      while (take_chunk(index)) {
      }
      if (spin_until(may_join)) continue;
      // Whoever opens a job looks for sleepers after it has opened it, and we for jobs after we are
      // among the sleepers: one of the two sees the other.
      sleepers_.fetch_add(1);
      const uint32_t woken = wake_.load();
      if (!may_join()) wake_.wait(woken);
      sleepers_.fetch_sub(1);
    }
  }

  // Takes the next chunk of the open job and runs it; false if there is none for this thread.
  bool take_chunk(int64_t index) {
    Ticket ticket{ticket_.load()};
    do {
      if (!ticket.has_work() || index >= ticket.helpers()) return false;
    } while (!ticket_.compare_exchange_weak(ticket.word, ticket.word + 1));
    // The job stays as it is until this chunk is done.
    const int64_t begin = ticket.next() * size_;
    try {
      (*function_)(begin, std::min(begin + size_, count_));
    } catch (...) {
      const std::lock_guard lock(error_lock_);
      if (!error_) error_ = std::current_exception();
    }
    const bool last = done_.fetch_add(1) + 1 == static_cast<uint32_t>(ticket.chunks());
    if (last && caller_sleeps_.load()) done_.notify_all();
    return true;
  }

  // Of the open job; written by the caller while no chunk is free or held.
  int64_t count_ = 0, size_ = 0;
  const RangeFunction* function_ = nullptr;
  std::exception_ptr error_;
  std::mutex error_lock_;
  uint64_t job_ = 0;
  int64_t started_ = 0;

  // On lines of their own: helpers look at the first while the caller writes the others.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  std::atomic<bool> caller_sleeps_{false};
  alignas(64) std::atomic<uint32_t> wake_{0};
  std::atomic<int32_t> sleepers_{0};
};

// Never destroyed: its threads sleep in it until the process ends. A forked child has none of them,
// and a lock that another thread held stays locked there, so the child begins anew.
Team* the_team = nullptr;

Team& team() {
  static const bool ready = [] {
    the_team = new Team;
    pthread_atfork(nullptr, nullptr, [] { the_team = new Team; });
    return true;
  }();
  static_cast<void>(ready);
  return *the_team;
}

}  // namespace

void parallel_for(int64_t threads, int64_t count, int64_t grain, RangeFunction f) {
  if (count <= 0) return;
  threads = std::min(threads, kMostThreads);
  grain = std::max<int64_t>(1, grain);
  if (threads > 1 && count > grain && !in_team) {
    Team& all = team();
    if (const std::unique_lock lock(all.in_use, std::try_to_lock); lock) {
      in_team = true;
      const struct Leave {
        ~Leave() { in_team = false; }
      } leave;
      const int64_t chunks = threads * kChunksPerThread;
      all.run(threads - 1, count, std::max(grain, (count + chunks - 1) / chunks), f);
      return;
    }
  }
  f(0, count);
}

}  // namespace dflare::cpu
