// What the parts of the runtime share: streams, events, graphs, the lock and errors.
#pragma once

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "device.h"
#include "races.h"

#define CUDA_API extern "C" __attribute__((visibility("default")))

struct CUevent_st;

struct CUgraphNode_st {
  testdevice::Work work;
  const char* site;
  std::vector<CUgraphNode_st*> after;  // nodes that must have run
  size_t index;
  std::shared_ptr<CUevent_st> recorded{};  // that waiters outside the graph may wait for
};

// Memory outside of the graph's own pool that a node touches.
struct Borrowed {
  testdevice::Access access;
  const CUgraphNode_st* node;
};

struct CUgraph_st {
  unsigned long long id;
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;
  std::vector<std::shared_ptr<CUuserObject_st>> retained;
  // What a launch touches, and the node that does (races.cpp).
  std::vector<std::pair<testdevice::Access, const CUgraphNode_st*>> footprint;
  std::set<std::string> conflicts;        // between its branches
  std::map<uint64_t, Borrowed> borrowed;  // by the allocation's number
  bool analysed = false;
  // While it is captured:
  cudaStream_t origin;
  std::set<cudaStream_t> streams;
  cudaStreamCaptureMode mode;
  cudaError_t invalid = cudaSuccess;
};

struct CUgraphExec_st {
  std::shared_ptr<CUgraph_st> graph;
};

struct CUevent_st {
  unsigned long long recorded = 0, completed = 0;
  std::chrono::steady_clock::time_point when;
  testdevice::Clock clock;  // of the last record
  // In a capture: what had been captured when it was recorded.
  CUgraph_st* graph = nullptr;
  std::vector<CUgraphNode_st*> after;
};

namespace testdevice {

struct Item {
  enum Kind { kWork, kGraph, kRecord, kWait } kind;
  Work work{};
  const char* site = nullptr;
  std::shared_ptr<CUgraph_st> graph{};
  std::shared_ptr<CUevent_st> event{};
  unsigned long long generation = 0;  // of the event's record
};

}  // namespace testdevice

struct CUstream_st {
  int priority = 0;
  const uint32_t id = next_id++;
  testdevice::Clock clock;
  std::deque<testdevice::Item> queue;
  unsigned long long enqueued = 0, done = 0;
  size_t works = 0;
  std::string last_name;        // of work
  CUgraph_st* graph = nullptr;  // that it is captured into
  std::vector<CUgraphNode_st*> after;

  static inline uint32_t next_id = 1;
};

namespace testdevice {

struct State {
  std::recursive_mutex mutex;
  CUstream_st default_stream;
  std::set<CUstream_st*> streams{&default_stream};
  std::map<CUevent_st*, std::shared_ptr<CUevent_st>> events;
  std::map<CUgraph_st*, std::shared_ptr<CUgraph_st>> graphs;
  std::set<CUgraph_st*> captures;  // in progress
  bool lazy = false;
  size_t work_limit = SIZE_MAX;
  std::mt19937_64 random;
  int running = 0;  // depth: work may enqueue work
  std::string failure;
  Hooks hooks;
  Stats stats{};

  State();
};
State& state();  // never destroyed: threads may outlive static objects

class Lock {
 public:
  Lock();
  ~Lock() { state().mutex.unlock(); }
  Lock(const Lock&) = delete;
};

const char* site();

// The last error of this thread, as cudaGetLastError returns it.
cudaError_t fail(cudaError_t error);
// Says on stderr what went wrong and fails.
cudaError_t refuse(cudaError_t error, const std::string& what);
// A part of CUDA that the test device does not have.
cudaError_t missing(const char* what);
// The error of work that failed, for every call after it.
cudaError_t sticky();

CUstream_st& stream_of(cudaStream_t handle);
std::shared_ptr<CUevent_st> event_of(cudaEvent_t handle);

// Refuses what may not happen while any stream is captured in a mode that forbids it.
cudaError_t check_capture_allows(const char* what);

// ------------------------------------------------------------ order.cpp

void push(CUstream_st& stream, Item item);
void drain();
void drain(CUstream_st& stream);
void run_one();
void run_until_completed(const CUevent_st& event, unsigned long long generation);
void count_wait(const char* why);

// ------------------------------------------------------------ capture.cpp

void add_node(CUstream_st& stream, Work work);

}  // namespace testdevice
