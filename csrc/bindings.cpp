// Python module dflare._C: facts about the build that are not operators. It needs no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& list) {
  std::istringstream stream(list);
  std::vector<std::string> parts;
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DFLARE_VERSION;
  info["torch"] = DFLARE_TORCH_VERSION;
  info["cpu_isas"] = split(DFLARE_CPU_ISAS);
  info["cuda_archs"] = split(DFLARE_CUDA_ARCHS);
  info["cuda_missing"] = DFLARE_CUDA_MISSING;
  info["compiler"] = DFLARE_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of the DFlare extension.";
  m.def("build_info", &build_info,
        "Versions, CPU instruction sets and CUDA architectures (empty: CPU only) that were "
        "compiled; cuda_missing: why CUDA was left out, empty where it was not.");
}
