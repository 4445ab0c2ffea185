// A proof of order: two pieces of work that touch the same bytes, one of them writing, must be
// ordered by streams, events, graph edges or waits of the host, however the device happens to run
// them. What is not is reported with both call sites.
//
// Every stream and the host has a vector clock that advances where work is enqueued; events and
// waits join clocks (Lamport's happens-before, as in FastTrack, Flanagan and Freund 2009). The last
// write and the reads since are kept for every range of addresses. Memory that the allocator gives
// out again is ordered by its stream, or was recorded on others (record_stream), or is a race.
// Memory that a graph touches outside of its pool and that was freed since its capture is one too.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

struct CUstream_st;
struct CUgraph_st;

namespace testdevice {

using Clock = std::vector<uint64_t>;  // by entity: 0 is the host, streams count from 1

namespace races {

// On: forgets everything and starts. Off: stops; the reports stay.
void watch(bool on);
bool watching();

void on_work(CUstream_st& stream, const Work& work, const char* site);
void on_graph(CUstream_st& stream, CUgraph_st& graph, const char* site);
// The node that was captured last touches these.
void on_capture(CUgraph_st& graph, const std::vector<Access>& accesses);
void on_stream_wait(CUstream_st& stream, const Clock& event);
void on_host_wait(const Clock& clock);
void on_host_wait_for_all();
void on_free(uintptr_t begin, uintptr_t end);
// The host touches memory that the device touches too. Returns whether that is in order.
bool on_host_access(const Access& access, const char* site);

std::vector<std::string> reports();

}  // namespace races
}  // namespace testdevice
