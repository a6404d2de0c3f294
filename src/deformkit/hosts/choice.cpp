#include "hosts/choice.h"

#include <cstdlib>

#include "hosts/isas.h"

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#include <unistd.h>
#endif

// The C library moved these in 2.34, and would otherwise ask for that version where the library runs.
#if defined(__GLIBC__) && defined(__x86_64__)
#define DEFORMKIT_OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define DEFORMKIT_OLDEST_GLIBC "GLIBC_2.17"
#endif
#ifdef DEFORMKIT_OLDEST_GLIBC
__asm__(".symver dlopen,dlopen@" DEFORMKIT_OLDEST_GLIBC);
__asm__(".symver dlsym,dlsym@" DEFORMKIT_OLDEST_GLIBC);
__asm__(".symver dlerror,dlerror@" DEFORMKIT_OLDEST_GLIBC);
__asm__(".symver dladdr,dladdr@" DEFORMKIT_OLDEST_GLIBC);
#endif

namespace deformkit {
namespace {

// The best instruction set that torch's own variable allows, as an index of isas(); none means no limit.
size_t first_allowed() {
  const char* const value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string allowed = value ? value : "";
  return allowed == "avx2" ? 1 : allowed == "default" ? 2 : 0;
}

#ifdef _WIN32
const char separator = '\\';

std::string own_path() {
  HMODULE self = nullptr;
  char path[MAX_PATH] = "";
  GetModuleHandleExA(GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                     reinterpret_cast<LPCSTR>(&choice), &self);
  GetModuleFileNameA(self, path, MAX_PATH);
  return path;
}

bool exists(const std::string& path) {
  return GetFileAttributesA(path.c_str()) != INVALID_FILE_ATTRIBUTES;
}

void* open(const std::string& path) {
  return LoadLibraryA(path.c_str());
}

void* find(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

std::string last_error() {
  return "error " + std::to_string(GetLastError());
}
#else
const char separator = '/';

std::string own_path() {
  Dl_info info;
  return dladdr(reinterpret_cast<void*>(&choice), &info) && info.dli_fname ? info.dli_fname : "";
}

bool exists(const std::string& path) {
  return access(path.c_str(), F_OK) == 0;
}

void* open(const std::string& path) {
  return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
}

void* find(void* library, const char* name) {
  return dlsym(library, name);
}

std::string last_error() {
  const char* const error = dlerror();
  return error ? error : "unknown error";
}
#endif

// Loads a library. Returns why it cannot be used, or an empty string and its kernels.
std::string load(const std::string& path, const Kernels*& kernels) {
  void* const library = open(path);
  if (!library) return "it does not load: " + last_error();
  const auto table = reinterpret_cast<deformkit_kernels_type*>(find(library, deformkit_kernels_name));
  const Kernels* const found = table ? table() : nullptr;
  if (found && found->bytes == sizeof(Kernels) && found->tensor_bytes == sizeof(Tensor) &&
      std::string(found->version) == DEFORMKIT_VERSION) {
    kernels = found;
    return "";
  }
  const std::string version = found && found->version ? found->version : "an older version";
  return "it does not load: it is of deformkit " + version + ", and what loads it of " + DEFORMKIT_VERSION +
         ": reinstall deformkit";
}

Choice choose() {
  const std::string self = own_path();
  const size_t end = self.find_last_of(separator), start = end == std::string::npos ? 0 : end + 1;
  const std::string folder = self.substr(0, start);
  const size_t allowed = first_allowed();
  Choice choice;
  size_t index = 0;
  for (const Isa& each : isas()) {
    const std::string name = "deformkit_" + std::string(each.name) + ".so", path = folder + name;
    std::string reason;
    if (!each.supported) {
      reason = "this processor does not support it";
    } else if (!exists(path)) {
      reason = "no " + name + " beside " + self.substr(start) + ": it was not built";
    } else if (index < allowed) {
      reason = "ATEN_CPU_CAPABILITY excludes it";
    } else if (choice.kernels) {
      reason = choice.isa + " is loaded, which is better";
    } else if ((reason = load(path, choice.kernels)).empty()) {
      choice.isa = each.name;
    }
    if (!reason.empty()) choice.reasons += std::string(each.name) + ": " + reason + "\n";
    ++index;
  }
  return choice;
}

}  // namespace

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace deformkit
