// In which order the device runs what is on its streams.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "host_access.h"
#include "state.h"

namespace testdevice {

namespace {

bool may_overlap(const Work& work, const Work* next) {
  return work.finish && next && next->finish && next->overlaps_prior;
}

bool is_beyond_limit(const Work& work) {
  const size_t limit = state().work_limit;
  if (limit == SIZE_MAX) return false;
  size_t bytes = 0;
  for (const Access& access : work.accesses) bytes += access.end - access.begin;
  return work.finish || bytes > limit;
}

// Runs work whose failure the host learns of later. A kernel that the `next` one may overlap is
// left to run together with it.
void run_deferred(const Work& work, const char* site, const Work* next = nullptr) {
  State& s = state();
  if (!s.failure.empty()) return;  // the device is lost
  if (is_beyond_limit(work)) return;
  try {
    const host_access::DeviceRights rights(work.accesses);
    work.run();
    if (work.finish && !may_overlap(work, next)) work.finish();
  } catch (const std::exception& error) {
    s.failure = work.name + " failed on the test device, enqueued at " + site + ": " + error.what();
    std::fprintf(stderr, "test device: %s\n", s.failure.c_str());
  }
}

// The node captured next, if it follows this one and no other: what one stream runs in a row.
const CUgraphNode_st* only_dependent(const CUgraph_st& graph, const CUgraphNode_st& node) {
  if (node.index + 1 == graph.nodes.size()) return nullptr;
  const CUgraphNode_st* next = graph.nodes[node.index + 1].get();
  return next->after.size() == 1 && next->after[0] == &node ? next : nullptr;
}

void run_graph(const CUgraph_st& graph) {
  State& s = state();
  s.stats.graph_launches += 1;
  s.stats.graph_nodes += static_cast<long>(graph.nodes.size());
  if (!s.lazy) {
    for (const auto& node : graph.nodes) {
      const CUgraphNode_st* next = only_dependent(graph, *node);
      run_deferred(node->work, node->site, next ? &next->work : nullptr);
    }
    return;
  }
  std::vector<size_t> missing(graph.nodes.size());
  std::vector<std::vector<CUgraphNode_st*>> next(graph.nodes.size());
  std::vector<CUgraphNode_st*> ready;
  for (const auto& node : graph.nodes) {
    missing[node->index] = node->after.size();
    for (const CUgraphNode_st* prior : node->after) next[prior->index].push_back(node.get());
    if (node->after.empty()) ready.push_back(node.get());
  }
  const CUgraphNode_st* joined = nullptr;  // overlaps the node that ran last
  while (!ready.empty()) {
    const auto found = std::ranges::find(ready, joined);
    std::swap(found != ready.end() ? *found : ready[s.random() % ready.size()], ready.back());
    CUgraphNode_st* node = ready.back();
    ready.pop_back();
    joined = only_dependent(graph, *node);
    run_deferred(node->work, node->site, joined ? &joined->work : nullptr);
    if (joined && !may_overlap(node->work, &joined->work)) joined = nullptr;
    for (CUgraphNode_st* later : next[node->index]) {
      if (--missing[later->index] == 0) ready.push_back(later);
    }
  }
}

bool runnable(const CUstream_st& stream) {
  if (stream.queue.empty()) return false;
  const Item& head = stream.queue.front();
  return head.kind != Item::kWait || head.event->completed >= head.generation;
}

void run_head(CUstream_st& stream) {
  State& s = state();
  const Item item = std::move(stream.queue.front());
  stream.queue.pop_front();
  const Work* next = nullptr;
  ++s.running;
  switch (item.kind) {
    case Item::kWork:
      s.stats.tasks += 1;
      if (!stream.queue.empty() && stream.queue.front().kind == Item::kWork) {
        next = &stream.queue.front().work;
      }
      run_deferred(item.work, item.site, next);
      break;
    case Item::kGraph: run_graph(*item.graph); break;
    case Item::kRecord:
      item.event->completed = std::max(item.event->completed, item.generation);
      item.event->when = std::chrono::steady_clock::now();
      break;
    case Item::kWait: break;
  }
  --s.running;
  ++stream.done;
  if (may_overlap(item.work, next)) run_head(stream);
}

bool run_any() {
  State& s = state();
  std::vector<CUstream_st*> ready;
  for (CUstream_st* stream : s.streams) {
    if (runnable(*stream)) ready.push_back(stream);
  }
  if (ready.empty()) return false;
  run_head(*ready[s.random() % ready.size()]);
  return true;
}

// A wait is only ever enqueued behind the record that it waits for, so some head can always run.
template <class Condition>
void run_until(Condition met) {
  while (!met()) {
    if (run_any()) continue;
    std::fprintf(stderr, "test device: deadlock: the host waits, at %s, and no stream can go on\n",
                 site());
    std::abort();
  }
}

}  // namespace

void set_work_limit(size_t bytes) {
  Lock lock;
  state().work_limit = bytes;
}

bool has_work_limit() { return state().work_limit != SIZE_MAX; }

void run_one() { run_any(); }

void drain() {
  run_until([] {
    return std::ranges::all_of(state().streams, [](auto* s) { return s->queue.empty(); });
  });
}

void drain(CUstream_st& stream) {
  const unsigned long long target = stream.enqueued;
  run_until([&] { return stream.done >= target; });
}

void run_until_completed(const CUevent_st& event, unsigned long long generation) {
  run_until([&] { return event.completed >= generation; });
}

void push(CUstream_st& stream, Item item) {
  State& s = state();
  stream.queue.push_back(std::move(item));
  ++stream.enqueued;
  if (s.running > 0) return;
  if (!s.lazy) {
    drain();
  } else if (s.random() % 16 == 0) {  // a device does not wait for the host to wait
    run_one();
  }
}

void count_wait(const char* why) {
  Hooks hooks;
  {
    Lock lock;
    ++state().stats.waits;
    hooks = state().hooks;
  }
  if (hooks.on_wait) hooks.on_wait(why);
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
  const char* where = site();
  Lock lock;
  State& s = state();
  CUstream_st& stream = stream_of(handle);
  if (stream.graph) {
    add_node(stream, std::move(work));
    return cudaSuccess;
  }
  if (const cudaError_t error = sticky()) return error;
  races::on_work(stream, work, where);
  stream.last_name = work.name;
  ++stream.works;
  if (s.lazy || s.running > 0) {
    push(stream, {.kind = Item::kWork, .work = std::move(work), .site = where});
    return cudaSuccess;
  }
  struct Running {
    Running() { ++state().running; }
    ~Running() { --state().running; }
  };
  {
    Running running;
    const host_access::DeviceRights rights(work.accesses);
    s.stats.tasks += 1;
    if (!is_beyond_limit(work)) {
      work.run();
      if (work.finish) work.finish();
    }
  }
  drain();  // what it enqueued
  return cudaSuccess;
}

void add_accesses(cudaStream_t handle, const std::vector<Access>& accesses) {
  const char* where = site();
  Lock lock;
  CUstream_st& stream = stream_of(handle);
  if (stream.graph) {
    auto& known = stream.graph->nodes.back()->work.accesses;
    known.insert(known.end(), accesses.begin(), accesses.end());
    races::on_capture(*stream.graph, accesses);
  } else {
    races::on_work(stream, {.name = stream.last_name, .run = nullptr, .accesses = accesses}, where);
  }
}

size_t count_enqueued(cudaStream_t handle) {
  Lock lock;
  const CUstream_st& stream = stream_of(handle);
  return stream.graph ? stream.graph->nodes.size() : stream.works;
}

cudaError_t wait(cudaStream_t handle, const char* why) {
  {
    Lock lock;
    CUstream_st& stream = stream_of(handle);
    if (stream.graph) {
      stream.graph->invalid = cudaErrorStreamCaptureInvalidated;
      return refuse(cudaErrorStreamCaptureUnsupported,
                    std::string(why) + " waits for a stream that is captured");
    }
    drain(stream);
    races::on_host_wait(stream.clock);
  }
  count_wait(why);
  return sticky();
}

bool lazy() { return state().lazy; }

void set_lazy(bool on, uint64_t seed) {
  Lock lock;
  drain();
  state().lazy = on;
  state().random.seed(seed);
}

}  // namespace testdevice
