#include "races.h"

#include <algorithm>
#include <set>

#include "allocations.h"
#include "host_access.h"
#include "state.h"

namespace testdevice::races {

namespace {

constexpr uint32_t kHost = 0;

// What touched memory, and when: `epoch` on the clock of `entity`.
struct Touch {
  uint32_t entity;
  uint64_t epoch;
  const char* name;
  const char* site;
  const char* launch;  // of the graph that it is in, or null
};

struct Cell {
  uintptr_t end;
  bool written = false;
  Touch write{};
  std::vector<Touch> reads;  // since the write, one an entity
};

const char* interned(const std::string& text) {
  static auto* all = new std::set<std::string>;
  return all->insert(text).first->c_str();
}

std::string describe(const Touch& touch, bool write) {
  std::string text = write ? "write by " : "read by ";
  text += std::string(touch.name) + " at " + touch.site;
  if (touch.launch) text += std::string(", in a graph launched at ") + touch.launch;
  return text;
}

struct Watch {
  bool on = false;
  Clock host;
  std::set<std::string> reports;
} all;

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

uint64_t& at(Clock& clock, uint32_t entity) {
  if (clock.size() <= entity) clock.resize(entity + 1);
  return clock[entity];
}

// The last touches of every range of addresses.
class Shadow {
 public:
  explicit Shadow(std::set<std::string>& reports) : reports_(reports) {}

  // Reports what conflicts with the access and is not `ordered` before it, then notes the access.
  template <class Ordered>
  bool access(const Access& access, const Touch& touch, Ordered ordered) {
    bool in_order = true;
    const auto check = [&](const Touch& prior, bool wrote) {
      if (ordered(prior)) return;
      in_order = false;
      reports_.insert(describe(prior, wrote) + " and " + describe(touch, access.write) +
                      " touch the same memory, and nothing orders them");
    };
    split(access.begin);
    split(access.end);
    uintptr_t next = access.begin;
    for (auto cell = cells_.lower_bound(access.begin); next < access.end; ++cell) {
      if (cell == cells_.end() || cell->first > next) {  // not touched before
        const uintptr_t end = cell == cells_.end() ? access.end : std::min(cell->first, access.end);
        cell = cells_.emplace_hint(cell, next, Cell{.end = end});
      }
      Cell& c = cell->second;
      if (c.written) check(c.write, true);
      if (access.write) {
        for (const Touch& read : c.reads) check(read, false);
        c.written = true;
        c.write = touch;
        c.reads.clear();
      } else {
        std::erase_if(c.reads, [&](const Touch& read) { return read.entity == touch.entity; });
        c.reads.push_back(touch);
      }
      next = c.end;
    }
    return in_order;
  }

  void forget(uintptr_t begin, uintptr_t end) {
    split(begin);
    split(end);
    cells_.erase(cells_.lower_bound(begin), cells_.lower_bound(end));
  }

  void clear() { cells_.clear(); }

 private:
  // Makes the address the border of two cells, if it is inside of one.
  void split(uintptr_t address) {
    auto cell = cells_.upper_bound(address);
    if (cell == cells_.begin()) return;
    --cell;
    if (cell->first == address || cell->second.end <= address) return;
    Cell upper = cell->second;
    cell->second.end = address;
    cells_.emplace(address, std::move(upper));
  }

  std::set<std::string>& reports_;
  std::map<uintptr_t, Cell> cells_;
};

Shadow& shadow() {
  static auto* memory = new Shadow(all.reports);
  return *memory;
}

// Enters the stream's clock: what the host knows is ordered before what it enqueues.
uint64_t advance(CUstream_st& stream) {
  join(stream.clock, all.host);
  return ++at(stream.clock, stream.id);
}

// Conflicts between branches of a graph, found once; then what a launch touches as a whole.
void analyse(CUgraph_st& graph) {
  const size_t count = graph.nodes.size();
  std::vector<std::vector<bool>> before(count, std::vector<bool>(count));
  Shadow inside(graph.conflicts);
  for (const auto& node : graph.nodes) {  // in the order of their capture: edges point back
    auto& mine = before[node->index];
    for (const CUgraphNode_st* prior : node->after) {
      const auto& theirs = before[prior->index];
      for (size_t i = 0; i < prior->index; ++i) mine[i] = mine[i] || theirs[i];
      mine[prior->index] = true;
    }
    const auto index = static_cast<uint32_t>(node->index);
    const Touch touch{index, 0, interned(node->work.name), node->site, nullptr};
    for (const Access& access : node->work.accesses) {
      inside.access(access, touch, [&](const Touch& prior) {
        return prior.entity == index || mine[prior.entity];
      });
    }
  }
  // Borders of all accesses; in each piece between two of them, a write stands for reads as well.
  std::map<uintptr_t, const CUgraphNode_st*> writers, readers;
  std::set<uintptr_t> borders;
  for (const auto& node : graph.nodes) {
    for (const Access& access : node->work.accesses) borders.insert({access.begin, access.end});
  }
  for (const auto& node : graph.nodes) {
    for (const Access& access : node->work.accesses) {
      auto& touched = access.write ? writers : readers;
      for (auto b = borders.find(access.begin); *b != access.end; ++b) touched[*b] = node.get();
    }
  }
  readers.insert(writers.begin(), writers.end());
  for (const auto& [begin, reader] : readers) {
    const auto writer = writers.find(begin);
    const bool write = writer != writers.end();
    graph.footprint.push_back(
        {{begin, *std::next(borders.find(begin)), write}, write ? writer->second : reader});
  }
  graph.analysed = true;
}

}  // namespace

void watch(bool on) {
  Lock lock;
  if (on) {
    drain();
    shadow().clear();
    all.reports.clear();
    all.host.clear();
    for (CUstream_st* stream : state().streams) stream->clock.clear();
    for (auto& [handle, event] : state().events) event->clock.clear();
  } else {
    host_access::unwatch_all();
  }
  all.on = on;
}

bool watching() { return all.on; }

void on_work(CUstream_st& stream, const Work& work, const char* site) {
  if (!all.on) return;
  const Touch touch{stream.id, advance(stream), interned(work.name), site, nullptr};
  for (const Access& access : work.accesses) {
    shadow().access(access, touch, [&](const Touch& prior) {
      return at(stream.clock, prior.entity) >= prior.epoch;
    });
  }
  host_access::watch(work.accesses);
}

void on_graph(CUstream_st& stream, CUgraph_st& graph, const char* site) {
  if (!all.on) return;
  if (!graph.analysed) analyse(graph);
  all.reports.insert(graph.conflicts.begin(), graph.conflicts.end());
  const uint64_t epoch = advance(stream);
  for (const auto& [number, borrowed] : graph.borrowed) {
    if (allocations::find(borrowed.access.begin) == number) continue;
    const CUgraphNode_st& node = *borrowed.node;
    const Touch touch{stream.id, epoch, interned(node.work.name), node.site, site};
    all.reports.insert(describe(touch, borrowed.access.write) +
                       " touches memory that was freed since its capture");
  }
  for (const auto& [access, node] : graph.footprint) {
    const Touch touch{stream.id, epoch, interned(node->work.name), node->site, site};
    shadow().access(access, touch, [&](const Touch& prior) {
      return at(stream.clock, prior.entity) >= prior.epoch;
    });
    host_access::watch({access});
  }
}

void on_capture(CUgraph_st& graph, const std::vector<Access>& accesses) {
  const CUgraphNode_st* node = graph.nodes.back().get();
  for (const Access& access : accesses) {
    const uint64_t number = allocations::find(access.begin);
    if (number) graph.borrowed.try_emplace(number, access, node);
  }
}

void on_stream_wait(CUstream_st& stream, const Clock& event) {
  if (all.on) join(stream.clock, event);
}

void on_host_wait(const Clock& clock) {
  if (all.on) join(all.host, clock);
}

void on_host_wait_for_all() {
  if (!all.on) return;
  for (const CUstream_st* stream : state().streams) join(all.host, stream->clock);
}

void on_free(uintptr_t begin, uintptr_t end) {
  if (!all.on) return;
  on_host_wait_for_all();
  shadow().forget(begin, end);
}

bool on_host_access(const Access& access, const char* site) {
  if (!all.on) return true;
  const Touch touch{kHost, ++at(all.host, kHost), "the host", site, nullptr};
  return shadow().access(
      access, touch, [](const Touch& prior) { return at(all.host, prior.entity) >= prior.epoch; });
}

std::vector<std::string> reports() {
  Lock lock;
  return {all.reports.begin(), all.reports.end()};
}

}  // namespace testdevice::races
