// The sizes of the GPU that the test device describes itself as: an H100.
#pragma once

namespace testdevice {

constexpr int kSharedBytes = 48 << 10, kSharedBytesOptIn = 227 << 10, kSharedBytesSm = 228 << 10;
constexpr int kReservedSharedBytes = 1 << 10, kRegisters = 65536, kProcessors = 132;
constexpr int kThreadsBlock = 1024, kThreadsSm = 2048, kL2Bytes = 50 << 20, kWarp = 32;

}  // namespace testdevice
