#include "host_access.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "races.h"
#include "state.h"

namespace testdevice::host_access {

namespace {

// Pages without all rights, and the rights that they have.
std::map<uintptr_t, int>& watched() {
  static auto* pages = new std::map<uintptr_t, int>;
  return *pages;
}

const uintptr_t kPage = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));

void protect(uintptr_t page, int rights) { mprotect(reinterpret_cast<void*>(page), kPage, rights); }

struct sigaction previous;

// Runs on the thread that touched the page, at an ordinary memory access: it may allocate, lock and
// ask the interpreter where it is.
void on_fault(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  bool is_ours = false;
  {
    Lock lock;
    is_ours = watched().erase(address / kPage * kPage) > 0;
  }
  if (!is_ours) {  // somebody else's fault: faulthandler's, or the default action
    if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
      return previous.sa_handler(signal);
    }
    sigaction(SIGSEGV, &previous, nullptr);  // the access is repeated and ends the process
    return;
  }
  constexpr greg_t kWriteFault = 2;  // in the error code of an x86 page fault
  const bool write = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & kWriteFault;
  const char* where = site();
  Lock lock;
  races::on_host_access({address, address + 1, write}, where);
  protect(address / kPage * kPage, PROT_READ | PROT_WRITE);
}

void install() {
  static const bool installed = [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    return sigaction(SIGSEGV, &action, &previous) == 0;
  }();
  (void)installed;
}

}  // namespace

void watch(const std::vector<Access>& accesses) {
  for (const Access& access : accesses) {
    if (!is_pinned(reinterpret_cast<const void*>(access.begin))) continue;
    install();
    for (uintptr_t page = access.begin / kPage * kPage; page < access.end; page += kPage) {
      const int wanted = access.write ? PROT_NONE : PROT_READ;
      const auto [entry, is_new] = watched().try_emplace(page, wanted);
      if (!is_new) entry->second = std::min(entry->second, wanted);  // no rights are the least
      protect(page, entry->second);
    }
  }
}

void unwatch_all() {
  for (const auto& [page, rights] : watched()) protect(page, PROT_READ | PROT_WRITE);
  watched().clear();
}

void on_free(uintptr_t begin, uintptr_t end) {
  watched().erase(watched().lower_bound(begin), watched().lower_bound(end));
}

DeviceRights::DeviceRights(const std::vector<Access>& accesses) {
  if (watched().empty()) return;
  for (const Access& access : accesses) {
    const auto last = watched().lower_bound(access.end);
    for (auto page = watched().lower_bound(access.begin / kPage * kPage); page != last; ++page) {
      protect(page->first, PROT_READ | PROT_WRITE);
      pages_.push_back(page->first);
    }
  }
}

DeviceRights::~DeviceRights() {
  for (const uintptr_t page : pages_) {
    const auto found = watched().find(page);
    if (found != watched().end()) protect(page, found->second);
  }
}

}  // namespace testdevice::host_access
