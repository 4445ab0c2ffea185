#include "cpu/isa.h"

#include <cstdlib>
#include <string>
#ifdef DFLARE_HAVE_avx512
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "stable_torch.h"

namespace dflare::cpu {

namespace baseline {
extern const Kernels kernels;
}
#ifdef DFLARE_HAVE_avx2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef DFLARE_HAVE_avx512
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

#ifdef DFLARE_HAVE_avx512
// Whether the processor has the tile unit and the system lets this process use it (Linux gives the
// state of the tiles, 8 KB a thread, only to those that ask).
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Best first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> levels;
#ifdef DFLARE_HAVE_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      if (may_use_tiles()) levels.push_back(&amx::kernels);
      levels.push_back(&avx512bf16::kernels);
    }
    levels.push_back(&avx512::kernels);
  }
#endif
#ifdef DFLARE_HAVE_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(&avx2::kernels);
  }
#endif
  levels.push_back(&baseline::kernels);
  return levels;
}

const Kernels& choose() {
  const auto levels = runnable();
  const char* wanted = std::getenv("DFLARE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *levels.front();
  std::string names;
  for (const Kernels* level : levels) {
    if (std::string(wanted) == level->isa) return *level;
    names += std::string(names.empty() ? "" : ", ") + level->isa;
  }
  TORCH_CHECK(false, "DFLARE_CPU_ISA is '", wanted, "'; this CPU and build can run: ", names);
}

std::string cpu_isa() { return kernels().isa; }

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dflare::cpu

STABLE_TORCH_LIBRARY_IMPL(dflare, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&dflare::cpu::cpu_isa));
}
