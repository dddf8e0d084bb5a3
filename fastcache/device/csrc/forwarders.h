// Forwarders for C++ symbols that an sgl_kernel wheel expects and the installed torch spells differently.
//
// Each macro defines one function under the MISSING name that calls the TARGET name of this torch. Arguments
// are pointers and integers in both spellings (the Itanium C++ ABI passes references and `this` as pointers),
// so no torch header is needed and nothing here can drift from the installed one.
//
// TARGET is looked up when first called, never at link time: an undefined name in a library that is loaded
// before torch ends the process with "symbol lookup error" and no exception.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace fastcache_shim {

// torch's libraries are loaded RTLD_LOCAL, so only a handle finds their symbols. RTLD_NOLOAD: never load torch.
inline void* resolve(const char* name) {
  static const char* const libraries[] = {"libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so"};
  for (const char* library : libraries) {
    void* handle = dlopen(library, RTLD_NOLOAD | RTLD_LAZY);
    if (handle == nullptr) continue;
    void* symbol = dlsym(handle, name);
    dlclose(handle);
    if (symbol != nullptr) return symbol;
  }
  throw std::runtime_error(std::string("sgl_kernel shim: no loaded torch library exports ") + name);
}

template <typename Function>
Function* resolved(const char* name) {
  return reinterpret_cast<Function*>(resolve(name));
}

// An operator tag is a C++ enum that torch renumbers when it adds one. FASTCACHE_TAG_MAP[i] is the number in
// this torch of the tag that was number i when sgl_kernel was compiled, and -1 where there is none.
using Tags = std::vector<int>;
inline Tags renumbered(const Tags& tags) {
  static const std::vector<int> map = FASTCACHE_TAG_MAP;
  Tags result;
  for (int tag : tags) {
    if (tag < 0 || tag >= static_cast<int>(map.size()) || map[tag] < 0)
      throw std::runtime_error("sgl_kernel shim: operator tag " + std::to_string(tag) +
                               " has no known counterpart in this torch");
    result.push_back(map[tag]);
  }
  return result;
}

}  // namespace fastcache_shim

#define FASTCACHE_EXPORT extern "C" __attribute__((visibility("default")))

// Library& Library::_def(FunctionSchema&&, OperatorName*, vector<Tag> const&, _RegisterOrVerify) &
#define FORWARD_DEF_SCHEMA(ID, MISSING, TARGET)                                                    \
  FASTCACHE_EXPORT void* shim_##ID(void*, void*, void*, const fastcache_shim::Tags*, int)          \
      __asm__(MISSING);                                                                            \
  void* shim_##ID(void* self, void* schema, void* name, const fastcache_shim::Tags* tags, int mode) { \
    static auto* target = fastcache_shim::resolved<void*(void*, void*, void*, const void*, int)>(TARGET); \
    const fastcache_shim::Tags here = fastcache_shim::renumbered(*tags);                           \
    return target(self, schema, name, &here, mode);                                                \
  }

// Library& Library::_def(variant<OperatorName, FunctionSchema>&&, CppFunction&&, vector<Tag> const&) &
#define FORWARD_DEF_VARIANT(ID, MISSING, TARGET)                                                   \
  FASTCACHE_EXPORT void* shim_##ID(void*, void*, void*, const fastcache_shim::Tags*) __asm__(MISSING); \
  void* shim_##ID(void* self, void* what, void* function, const fastcache_shim::Tags* tags) {      \
    static auto* target = fastcache_shim::resolved<void*(void*, void*, void*, const void*)>(TARGET); \
    const fastcache_shim::Tags here = fastcache_shim::renumbered(*tags);                           \
    return target(self, what, function, &here);                                                    \
  }

// cublasHandle_t getCurrentCUDABlasHandle() -> (bool setup), whose declared default is true.
#define FORWARD_BLAS_HANDLE(ID, MISSING, TARGET)                                                   \
  FASTCACHE_EXPORT void* shim_##ID() __asm__(MISSING);                                             \
  void* shim_##ID() {                                                                              \
    static auto* target = fastcache_shim::resolved<void*(bool)>(TARGET);                           \
    return target(true);                                                                           \
  }

// int const* TensorBase::const_data_ptr<int, 0>() const -> const_data_ptr<int>() const
#define FORWARD_SELF_POINTER(ID, MISSING, TARGET)                                                  \
  FASTCACHE_EXPORT const void* shim_##ID(const void*) __asm__(MISSING);                            \
  const void* shim_##ID(const void* self) {                                                        \
    static auto* target = fastcache_shim::resolved<const void*(const void*)>(TARGET);              \
    return target(self);                                                                           \
  }

// void c10_cuda_check_implementation(int, cstr, cstr, line, bool): the line number is int or unsigned, the
// same register; a newer torch adds a CUDAErrorLogCapture* whose declared default is nullptr.
#define FORWARD_CUDA_CHECK(ID, MISSING, TARGET)                                                    \
  FASTCACHE_EXPORT void shim_##ID(int, const char*, const char*, unsigned, bool, void*) __asm__(MISSING); \
  void shim_##ID(int error, const char* file, const char* function, unsigned line, bool dsa, void*) { \
    static auto* target =                                                                          \
        fastcache_shim::resolved<void(int, const char*, const char*, unsigned, bool, void*)>(TARGET); \
    target(error, file, function, line, dsa, nullptr);                                             \
  }

// CUDAErrorLogCapture::CUDAErrorLogCapture() on a torch without the class: it has no data members to set.
#define FORWARD_NOTHING(ID, MISSING, TARGET)                                                       \
  FASTCACHE_EXPORT void shim_##ID(void*) __asm__(MISSING);                                         \
  void shim_##ID(void*) {}
