// The Python module: registers the operators and steers the runtime.
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <unordered_set>

#include "../runtime/allocations.h"
#include "../runtime/races.h"
#include "fallback.h"

namespace py = pybind11;

namespace testdevice {
namespace {

// PyTorch's own CUDA kernels of these start nothing on a device.
const std::unordered_set<std::string> kKept = {"aten::_efficientzerotensor",
                                               "aten::_reshape_alias",
                                               "aten::as_strided",
                                               "aten::empty",
                                               "aten::empty_strided",
                                               "aten::is_set_to",
                                               "aten::real",
                                               "aten::record_stream",
                                               "aten::resize_",
                                               "aten::set_",
                                               "aten::unfold",
                                               "aten::view",
                                               "aten::view_as_complex",
                                               "aten::view_as_real"};

void register_kernel(const c10::OperatorName& name, c10::KernelFunction kernel) {
  static auto* registrations = new std::vector<c10::RegistrationHandleRAII>;
  registrations->push_back(c10::Dispatcher::singleton().registerImpl(
      name, c10::DispatchKey::CUDA, std::move(kernel), std::nullopt, nullptr, "test device"));
}

c10::KernelFunction device_kernel() {
  return c10::KernelFunction::makeFromBoxedFunction<&run_on_device>();
}

// Attention by the composite implementation: the fused ones have no CPU kernel of their schema.
int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>&, double, bool, std::optional<double>,
                         bool) {
  return 0;
}

void override_all() {
  const auto names =
      c10::Dispatcher::singleton().getAllOpNamesForDispatchKey(c10::DispatchKey::CUDA);
  for (const c10::OperatorName& name : names) {
    if (name.name.starts_with("aten::") && !kKept.contains(name.name)) {
      register_kernel(name, device_kernel());
    }
  }
  register_kernel({"aten::copy_", ""}, device_kernel());
  register_kernel({"aten::_fused_sdp_choice", ""},
                  c10::KernelFunction::makeFromUnboxedRuntimeFunction(&fused_sdp_choice));
}

// Tells the runtime of every allocation outside of the private pools of graphs.
void follow_allocations() {
  using c10::CachingDeviceAllocator::TraceEntry;
  at::globalContext().lazyInitDevice(c10::kCUDA);
  c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker([](const TraceEntry& entry) {
    if (entry.mempool_ != c10::MempoolId_t{0, 0}) return;
    if (entry.action_ == TraceEntry::ALLOC) {
      allocations::on_allocated(entry.addr_, entry.addr_ + entry.size_);
    } else if (entry.action_ == TraceEntry::FREE_REQUESTED) {
      allocations::on_freed(entry.addr_);
    }
  });
}

void override_op(const std::string& name, const std::string& overload,
                 const std::string& stand_in) {
  if (!stand_in.empty()) redirect(name, overload, stand_in);
  register_kernel({name, overload}, device_kernel());
}

void launch_op(const std::string& name, const std::string& overload, const std::string& stand_in) {
  redirect(name, overload, stand_in);
  register_kernel({name, overload},
                  c10::KernelFunction::makeFromBoxedFunction<&launch_on_device>());
}

// ------------------------------------------------------------ where the host is

// Frames of libraries are left out: they are the same for every caller.
bool is_library(const std::string& file) {
  for (const char* part : {"/torch/", "/triton/", "/numpy/", "/tests/cuda_device/__init__",
                           "/contextlib.py", "<frozen"}) {
    if (file.find(part) != std::string::npos) return true;
  }
  return false;
}

// "package/file.py:12 function", or nothing for a library. Code objects are kept, so that no
// other one takes their address.
const std::string& describe(PyCodeObject* code, int line) {
  static auto* known = new std::map<std::pair<PyCodeObject*, int>, std::string>;
  const auto [entry, is_new] = known->try_emplace({code, line});
  if (is_new) {
    Py_INCREF(code);
    std::string file = py::cast<std::string>(py::handle(code->co_filename));
    if (!is_library(file)) {
      for (const char* root : {"site-packages/", "/python/", "/tests/"}) {
        const size_t at = file.rfind(root);
        if (at != std::string::npos) file = file.substr(at + std::strlen(root));
      }
      entry->second = file + ":" + std::to_string(line) + " " +
                      py::cast<std::string>(py::handle(code->co_qualname));
    }
  }
  return entry->second;
}

const char* python_site() {
  if (!Py_IsInitialized()) return nullptr;
  py::gil_scoped_acquire gil;
  constexpr size_t kMostFrames = 3;
  std::vector<const std::string*> frames;
  auto frame = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame && frames.size() < kMostFrames) {
    auto* raw = reinterpret_cast<PyFrameObject*>(frame.ptr());
    PyCodeObject* code = PyFrame_GetCode(raw);
    const std::string& text = describe(code, PyFrame_GetLineNumber(raw));
    Py_DECREF(code);
    if (!text.empty()) frames.push_back(&text);
    frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(raw)));
  }
  static auto* sites = new std::map<std::vector<const std::string*>, std::string>;
  const auto [site, is_new] = sites->try_emplace(frames);
  if (is_new) {
    for (const std::string* text : frames) {
      site->second += (site->second.empty() ? "" : " < ") + *text;
    }
  }
  return frames.empty() ? nullptr : site->second.c_str();
}

// ------------------------------------------------------------ the interpreter's lock

void* release_interpreter() {
  if (!Py_IsInitialized() || !PyGILState_Check()) return nullptr;
  return PyEval_SaveThread();
}
void restore_interpreter(void* state) { PyEval_RestoreThread(static_cast<PyThreadState*>(state)); }

py::object& wait_callback() {
  static auto* callback = new py::object(py::none());
  return *callback;
}

void on_wait(const char* why) {
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  if (wait_callback().is_none()) return;
  const char* where = python_site();
  try {
    wait_callback()(why, where ? where : "an unknown place");
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable("the test device's wait callback");
  }
}

// ------------------------------------------------------------ work in Python

void enqueue_python(const std::string& name, py::object function,
                    const std::vector<at::Tensor>& reads, const std::vector<at::Tensor>& writes) {
  const std::shared_ptr<py::object> shared(new py::object(std::move(function)), [](py::object* o) {
    if (!Py_IsInitialized()) return;
    py::gil_scoped_acquire gil;
    delete o;
  });
  Work work{.name = name,
            .run =
                [shared] {
                  py::gil_scoped_acquire gil;
                  c10::InferenceMode no_inference(false);
                  (*shared)();
                },
            .accesses = {}};
  for (const at::Tensor& x : reads) add_accesses(x, false, work.accesses);
  for (const at::Tensor& x : writes) add_accesses(x, true, work.accesses);
  py::gil_scoped_release no_gil;
  const cudaError_t error = enqueue(c10::cuda::getCurrentCUDAStream(), std::move(work));
  TORCH_CHECK(error == cudaSuccess, "test device: ", name, ": ", cudaGetErrorString(error));
}

py::dict stats_dict() {
  const Stats s = stats();
  py::dict all;
  all["tasks"] = s.tasks;
  all["graph_launches"] = s.graph_launches;
  all["graph_nodes"] = s.graph_nodes;
  all["waits"] = s.waits;
  all["captures"] = s.captures;
  all["live_bytes"] = s.live_bytes;
  return all;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  set_hooks({on_wait, python_site, release_interpreter, restore_interpreter});
  m.def("override_all", &override_all);
  m.def("follow_allocations", &follow_allocations);
  m.def("override_op", &override_op, py::arg("name"), py::arg("overload") = "",
        py::arg("stand_in") = "");
  m.def("launch_op", &launch_op, py::arg("name"), py::arg("overload"), py::arg("stand_in"));
  m.def("alias", [](const at::Tensor& x) {
    KernelGuard guard;
    return x.is_cuda() ? host_alias(x) : x;
  });
  m.def("enqueue", &enqueue_python, py::arg("name"), py::arg("function"),
        py::arg("reads") = std::vector<at::Tensor>(),
        py::arg("writes") = std::vector<at::Tensor>());
  m.def("capturing", [] { return capturing(c10::cuda::getCurrentCUDAStream()); });
  m.def("lazy", &lazy);
  m.def("set_lazy", &set_lazy, py::arg("on"), py::arg("seed") = 0,
        py::call_guard<py::gil_scoped_release>());
  m.def("set_memory_size", &set_memory_size);
  m.def("set_work_limit", &set_work_limit);
  m.def("set_wait_callback", [](py::object callback) { wait_callback() = std::move(callback); });
  m.def("watch_races", &races::watch, py::call_guard<py::gil_scoped_release>());
  m.def("races", &races::reports);
  m.def("stats", &stats_dict);
}

}  // namespace testdevice
