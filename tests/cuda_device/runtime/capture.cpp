// The CUDA API: stream capture and graphs.
#include <algorithm>

#include "state.h"

using namespace testdevice;

namespace {
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// The first node that the captured stream does not depend on, or null.
const CUgraphNode_st* find_unjoined(const CUgraph_st& graph, const CUstream_st& origin) {
  std::vector<bool> joined(graph.nodes.size());
  std::vector<CUgraphNode_st*> todo(origin.after);
  while (!todo.empty()) {
    CUgraphNode_st* node = todo.back();
    todo.pop_back();
    if (joined[node->index]) continue;
    joined[node->index] = true;
    todo.insert(todo.end(), node->after.begin(), node->after.end());
  }
  for (const auto& node : graph.nodes) {
    if (!joined[node->index]) return node.get();
  }
  return nullptr;
}
}  // namespace

namespace testdevice {

void add_node(CUstream_st& stream, Work work) {
  auto& nodes = stream.graph->nodes;
  nodes.push_back(
      std::make_unique<CUgraphNode_st>(std::move(work), site(), stream.after, nodes.size()));
  stream.after = {nodes.back().get()};
  races::on_capture(*stream.graph, nodes.back()->work.accesses);
}

bool capturing(cudaStream_t stream) {
  Lock lock;
  return stream_of(stream).graph != nullptr;
}

cudaError_t check_capture_allows(const char* what) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (CUgraph_st* graph : state().captures) {
    if (graph->mode == cudaStreamCaptureModeRelaxed) continue;
    graph->invalid = cudaErrorStreamCaptureInvalidated;
    return refuse(cudaErrorStreamCaptureUnsupported, std::string(what) + " during a capture");
  }
  return cudaSuccess;
}

}  // namespace testdevice

CUDA_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamBeginCapture(cudaStream_t where, cudaStreamCaptureMode mode) {
  Lock lock;
  State& s = state();
  static unsigned long long next_id = 0;
  CUstream_st& stream = stream_of(where);
  if (&stream == &s.default_stream || stream.graph) {
    return refuse(cudaErrorStreamCaptureUnsupported,
                  stream.graph ? "a second capture of a stream" : "capture of stream 0");
  }
  auto graph = std::make_shared<CUgraph_st>();
  graph->id = ++next_id;
  graph->mode = mode;
  graph->origin = &stream;
  graph->streams = {&stream};
  s.captures.insert(graph.get());
  stream.graph = graph.get();
  stream.after.clear();
  s.graphs[graph.get()] = std::move(graph);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamEndCapture(cudaStream_t where, cudaGraph_t* out) {
  Lock lock;
  State& s = state();
  CUstream_st& stream = stream_of(where);
  CUgraph_st* graph = stream.graph;
  *out = nullptr;
  if (!graph) return fail(cudaErrorIllegalState);
  if (graph->origin != &stream) return fail(cudaErrorStreamCaptureUnmatched);
  cudaError_t error = graph->invalid;
  if (error == cudaSuccess) {
    if (const CUgraphNode_st* node = find_unjoined(*graph, stream)) {
      error = refuse(cudaErrorStreamCaptureUnjoined,
                     node->work.name + ", enqueued at " + node->site +
                         ", is on a stream that never joined the captured one: the capture ends");
    }
  }
  for (CUstream_st* each : graph->streams) {
    each->graph = nullptr;
    each->after.clear();
  }
  s.captures.erase(graph);
  ++s.stats.captures;
  if (error != cudaSuccess) {
    s.graphs.erase(graph);
    return fail(error);
  }
  *out = graph;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  Lock lock;
  const CUgraph_st* graph = stream_of(stream).graph;
  *status = !graph           ? cudaStreamCaptureStatusNone
            : graph->invalid ? cudaStreamCaptureStatusInvalidated
                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                              unsigned long long* id, cudaGraph_t* graph,
                                              const cudaGraphNode_t** after,
                                              const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock;
  cudaStreamIsCapturing(handle, status);
  const CUstream_st& stream = stream_of(handle);
  if (!stream.graph) return cudaSuccess;
  if (id) *id = stream.graph->id;
  if (graph) *graph = stream.graph;
  if (after) *after = stream.after.data();
  if (edges) *edges = nullptr;
  if (count) *count = stream.after.size();
  return cudaSuccess;
}

// ------------------------------------------------------------ graphs

CUDA_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph,
                                                   unsigned long long) {
  Lock lock;
  *out = new CUgraphExec_st{state().graphs.at(graph)};
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}

CUDA_API cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t handle) {
  const char* where = site();
  Lock lock;
  CUstream_st& stream = stream_of(handle);
  if (stream.graph) return missing("a graph launch inside a capture");
  if (const cudaError_t error = sticky()) return error;
  races::on_graph(stream, *graph->graph, where);
  for (const auto& node : graph->graph->nodes) {
    if (!node->recorded) continue;
    node->recorded->recorded += 1;
    // A launch has one time, so what follows the record in its graph counts as waited for too.
    node->recorded->clock = stream.clock;
  }
  push(stream, {.kind = Item::kGraph, .graph = graph->graph});
  return sticky();
}

CUDA_API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

CUDA_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Lock lock;
  state().graphs.erase(graph);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  Lock lock;
  delete graph;  // launches that are still queued share its nodes
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  Lock lock;
  if (!nodes) {
    *count = graph->nodes.size();
    return cudaSuccess;
  }
  for (size_t i = 0; i < std::min(*count, graph->nodes.size()); ++i)
    nodes[i] = graph->nodes[i].get();
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* after,
                                                  cudaGraphEdgeData*, size_t* count) {
  Lock lock;
  if (after) {
    std::copy_n(node->after.begin(), std::min(*count, node->after.size()), after);
  } else {
    *count = node->after.size();
  }
  return cudaSuccess;
}

// ------------------------------------------------------------ objects that live as long as a graph

struct CUuserObject_st {
  void* data;
  cudaHostFn_t destroy;
  unsigned references;
};

static void release(cudaUserObject_t object, unsigned count) {
  if ((object->references -= count) > 0) return;
  object->destroy(object->data);
  delete object;
}

CUDA_API cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data,
                                          cudaHostFn_t destroy, unsigned references, unsigned) {
  *object = new CUuserObject_st{data, destroy, references};
  return cudaSuccess;
}

CUDA_API cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  Lock lock;
  release(object, count);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object,
                                               unsigned count, unsigned flags) {
  Lock lock;
  if (flags != cudaGraphUserObjectMove) object->references += count;
  graph->retained.emplace_back(object, [count](cudaUserObject_t held) { release(held, count); });
  return cudaSuccess;
}
