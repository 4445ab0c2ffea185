// The CUDA API: streams and events.
#include <algorithm>

#include "state.h"

using namespace testdevice;

// ------------------------------------------------------------ streams

CUDA_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  Lock lock;
  *stream = new CUstream_st{.priority = priority};
  state().streams.insert(*stream);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

CUDA_API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamNonBlocking, 0);
}

CUDA_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock;
  drain(*stream);
  state().streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags =
      &stream_of(stream) == &state().default_stream ? cudaStreamDefault : cudaStreamNonBlocking;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  {
    Lock lock;
    if (!stream_of(stream).graph) {
      if (const cudaError_t error = check_capture_allows("cudaStreamSynchronize")) return error;
    }
  }
  return testdevice::wait(stream, "cudaStreamSynchronize");
}

CUDA_API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  if (!stream_of(stream).queue.empty()) run_one();
  if (const cudaError_t error = sticky()) return error;
  if (!stream_of(stream).queue.empty()) return fail(cudaErrorNotReady);
  races::on_host_wait(stream_of(stream).clock);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaDeviceSynchronize() {
  {
    Lock lock;
    if (const cudaError_t error = check_capture_allows("cudaDeviceSynchronize")) return error;
    drain();
    races::on_host_wait_for_all();
  }
  count_wait("cudaDeviceSynchronize");
  return sticky();
}

CUDA_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream, {.name = "host function", .run = [=] { function(data); }, .accesses = {}});
}

CUDA_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback,
                                           void* data, unsigned) {
  const auto run = [=] { callback(stream, cudaSuccess, data); };
  return enqueue(stream, {.name = "stream callback", .run = run, .accesses = {}});
}

// ------------------------------------------------------------ events

CUDA_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  Lock lock;
  auto made = std::make_shared<CUevent_st>();
  *event = made.get();
  state().events[made.get()] = std::move(made);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, cudaEventDefault);
}

CUDA_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Lock lock;
  state().events.erase(event);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t where) {
  Lock lock;
  CUstream_st& stream = stream_of(where);
  const auto event = event_of(handle);
  event->graph = stream.graph;
  event->after = stream.after;
  if (stream.graph) return cudaSuccess;
  event->clock = stream.clock;
  push(stream, {.kind = Item::kRecord, .event = event, .generation = ++event->recorded});
  return cudaSuccess;
}

CUDA_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                              unsigned flags) {
  Lock lock;
  CUstream_st& recording = stream_of(stream);
  if (!(flags & cudaEventRecordExternal) || !recording.graph) {
    return cudaEventRecord(event, stream);
  }
  // A node of the graph: every launch is a record, which its waiters wait for.
  const auto recorded = event_of(event);
  recorded->graph = nullptr;
  add_node(recording, {.name = "record of an event",
                       .run =
                           [recorded] {
                             recorded->completed += 1;
                             recorded->when = std::chrono::steady_clock::now();
                           },
                       .accesses = {}});
  recording.after.front()->recorded = recorded;
  return cudaSuccess;
}

CUDA_API cudaError_t cudaStreamWaitEvent(cudaStream_t where, cudaEvent_t handle, unsigned flags) {
  if (flags != cudaEventWaitDefault) return missing("cudaStreamWaitEvent with flags");
  Lock lock;
  CUstream_st& stream = stream_of(where);
  const auto event = event_of(handle);
  if (event->graph && state().captures.contains(event->graph)) {
    if (!stream.graph) {  // the capture spreads to this stream
      stream.graph = event->graph;
      stream.after.clear();
      event->graph->streams.insert(&stream);
    }
    for (CUgraphNode_st* node : event->after) {
      if (std::ranges::find(stream.after, node) == stream.after.end()) stream.after.push_back(node);
    }
    return cudaSuccess;
  }
  if (event->recorded == 0) return cudaSuccess;
  if (stream.graph) {
    stream.graph->invalid = cudaErrorStreamCaptureInvalidated;
    return refuse(cudaErrorStreamCaptureIsolation,
                  "a captured stream waits for an event from outside the capture");
  }
  races::on_stream_wait(stream, event->clock);
  push(stream, {.kind = Item::kWait, .event = event, .generation = event->recorded});
  return cudaSuccess;
}

CUDA_API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock;
  const auto event = event_of(handle);
  if (event->graph && state().captures.contains(event->graph)) return fail(cudaErrorCapturedEvent);
  if (const cudaError_t error = check_capture_allows("cudaEventQuery")) return error;
  if (event->completed < event->recorded) run_one();
  if (const cudaError_t error = sticky()) return error;
  if (event->completed < event->recorded) return fail(cudaErrorNotReady);
  races::on_host_wait(event->clock);
  return cudaSuccess;
}

CUDA_API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  {
    Lock lock;
    const auto event = event_of(handle);
    if (const cudaError_t error = check_capture_allows("cudaEventSynchronize")) return error;
    run_until_completed(*event, event->recorded);
    races::on_host_wait(event->clock);
  }
  count_wait("cudaEventSynchronize");
  return sticky();
}

CUDA_API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  Lock lock;
  if (from->completed < from->recorded || to->completed < to->recorded) {
    return fail(cudaErrorNotReady);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(to->when - from->when).count();
  return cudaSuccess;
}
