// A libcuda.so.1 of our own: the dozen driver calls a green-context split makes, over an imaginary device.
//
// It rounds as the CUDA 13 driver does on Hopper (a group is rounded up to the alignment, the rest is the
// remainder), refuses what the real driver refuses (a destroyed context, a stream destroyed after its context,
// two resources that overlap), and writes one line per call to $FAKE_CUDA_LOG. Knobs, all environment
// variables: FAKE_CUDA_SMS (132), FAKE_CUDA_MIN (8), FAKE_CUDA_ALIGN (8), FAKE_CUDA_VERSION (13000),
// FAKE_CUDA_CC (9), FAKE_CUDA_FAIL (name of a call that returns an error), FAKE_CUDA_MISSING (a name the driver
// does not have), FAKE_CUDA_GRANT_LESS (SMs taken off every grant).
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
       CONTEXT_IS_DESTROYED = 709, NOT_SUPPORTED = 801 };
enum { TYPE_SM = 1, MAX_OBJECTS = 4096 };

typedef struct { unsigned count, min_partition, alignment; } Sm;
typedef struct { int type; unsigned char padding[92]; union { Sm sm; unsigned char oversize[48]; }; } Resource;
typedef struct { Resource resource; } Descriptor;
typedef struct { int id, alive; Resource resource; } Context;
typedef struct { int id, alive; Context* context; } Stream;

static int contexts, streams;

static unsigned setting(const char* name, unsigned otherwise) {
  const char* value = getenv(name);
  return value ? (unsigned)atoi(value) : otherwise;
}

static int is(const char* variable, const char* name) {
  const char* value = getenv(variable);
  return value && strcmp(value, name) == 0;
}

static void record(const char* format, ...) {
  const char* path = getenv("FAKE_CUDA_LOG");
  if (!path) return;
  FILE* file = fopen(path, "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  fputc('\n', file);
  fclose(file);
}

#define ENTER(name) if (is("FAKE_CUDA_FAIL", #name)) { record(#name " -> failed"); return INVALID_VALUE; }

static Sm sms(unsigned count) {
  Sm sm = {count, setting("FAKE_CUDA_MIN", 8), setting("FAKE_CUDA_ALIGN", 8)};
  return sm;
}

int cuInit(unsigned flags) { (void)flags; ENTER(cuInit) return setting("FAKE_CUDA_SMS", 132) ? OK : NO_DEVICE; }
int cuDriverGetVersion(int* version) { *version = (int)setting("FAKE_CUDA_VERSION", 13000); return OK; }
int cuDeviceGetCount(int* count) { *count = 1; return OK; }
int cuDeviceGet(int* device, int ordinal) { ENTER(cuDeviceGet) *device = ordinal; return ordinal ? 101 : OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? (int)setting("FAKE_CUDA_CC", 9) : 0;
  return OK;
}
int cuGetErrorString(int error, const char** text) { (void)error; *text = "an error of the fake driver"; return OK; }
int cuGetErrorName(int error, const char** text) { (void)error; *text = "FAKE_ERROR"; return OK; }

int cuDeviceGetDevResource(int device, Resource* resource, int type) {
  (void)device;
  ENTER(cuDeviceGetDevResource)
  if (type != TYPE_SM) return INVALID_VALUE;
  memset(resource, 0, sizeof *resource);
  resource->type = TYPE_SM;
  resource->sm = sms(setting("FAKE_CUDA_SMS", 132));
  record("cuDeviceGetDevResource sms=%u", resource->sm.count);
  return OK;
}

int cuDevSmResourceSplitByCount(Resource* result, unsigned* groups, const Resource* input, Resource* rest,
                                unsigned flags, unsigned minimum) {
  ENTER(cuDevSmResourceSplitByCount)
  unsigned align = setting("FAKE_CUDA_ALIGN", 8), total = input->sm.count, size;
  (void)flags;
  if (minimum < setting("FAKE_CUDA_MIN", 8)) minimum = setting("FAKE_CUDA_MIN", 8);
  size = (minimum + align - 1) / align * align;
  // The device's last, incomplete step may be granted whole.
  if (size > total && minimum <= total) size = total;
  unsigned fit = size && size <= total ? total / size : 0, want = result && *groups ? *groups : fit;
  if (want > fit) want = fit;
  record("cuDevSmResourceSplitByCount min=%u of=%u -> %ux%u rest=%u", minimum, total, want, size, total - want * size);
  *groups = want;
  for (unsigned i = 0; result && i < want; i++) {
    result[i] = *input;
    result[i].sm = sms(size);
  }
  if (rest) {
    *rest = *input;
    rest->sm = sms(total - want * size);
  }
  return want ? OK : INVALID_VALUE;
}

int cuDevResourceGenerateDesc(void** descriptor, Resource* resources, unsigned count) {
  ENTER(cuDevResourceGenerateDesc)
  if (count != 1 || resources->sm.count == 0) return INVALID_VALUE;
  Descriptor* made = malloc(sizeof *made);
  made->resource = *resources;
  *descriptor = made;
  return OK;
}

int cuGreenCtxCreate(void** context, void* descriptor, int device, unsigned flags) {
  (void)device;
  ENTER(cuGreenCtxCreate)
  if (flags != 1) return INVALID_VALUE;
  Context* made = calloc(1, sizeof *made);
  made->id = ++contexts;
  made->alive = 1;
  made->resource = ((Descriptor*)descriptor)->resource;
  made->resource.sm.count -= setting("FAKE_CUDA_GRANT_LESS", 0);
  *context = made;
  record("cuGreenCtxCreate ctx=%d sms=%u", made->id, made->resource.sm.count);
  return OK;
}

int cuGreenCtxGetDevResource(void* context, Resource* resource, int type) {
  ENTER(cuGreenCtxGetDevResource)
  Context* self = context;
  if (type != TYPE_SM || !self->alive) return INVALID_CONTEXT;
  *resource = self->resource;
  return OK;
}

int cuGreenCtxStreamCreate(void** stream, void* context, unsigned flags, int priority) {
  ENTER(cuGreenCtxStreamCreate)
  Context* self = context;
  if (!self->alive) return CONTEXT_IS_DESTROYED;
  if (flags != 1) return INVALID_VALUE;
  Stream* made = calloc(1, sizeof *made);
  made->id = ++streams;
  made->alive = 1;
  made->context = self;
  *stream = made;
  record("cuGreenCtxStreamCreate stream=%d ctx=%d priority=%d", made->id, self->id, priority);
  return OK;
}

int cuStreamGetGreenCtx(void* stream, void** context) {
  Stream* self = stream;
  if (!self->alive) return INVALID_HANDLE;
  *context = self->context;
  record("cuStreamGetGreenCtx stream=%d -> ctx=%d", self->id, self->context->id);
  return OK;
}

int cuStreamDestroy_v2(void* stream) {
  Stream* self = stream;
  if (!self->alive) return INVALID_HANDLE;
  if (!self->context->alive) { record("cuStreamDestroy stream=%d -> leaked", self->id); return CONTEXT_IS_DESTROYED; }
  self->alive = 0;
  record("cuStreamDestroy stream=%d", self->id);
  return OK;
}

int cuGreenCtxDestroy(void* context) {
  Context* self = context;
  if (!self->alive) return CONTEXT_IS_DESTROYED;
  self->alive = 0;
  record("cuGreenCtxDestroy ctx=%d", self->id);
  return OK;
}

int cuCtxFromGreenCtx(void** context, void* green) { *context = green; return OK; }
int cuCtxPushCurrent_v2(void* context) { (void)context; return OK; }
int cuCtxPopCurrent_v2(void** context) { *context = NULL; return OK; }
int cuStreamCreate(void** stream, unsigned flags) { (void)stream; (void)flags; return NOT_SUPPORTED; }

// Names with a version suffix are asked for by their base name, as from the real driver.
int cuGetProcAddress_v2(const char* symbol, void** function, int version, unsigned long long flags, int* status) {
  char versioned[128];
  (void)version; (void)flags;
  *function = NULL;
  if (!is("FAKE_CUDA_MISSING", symbol)) {
    snprintf(versioned, sizeof versioned, "%s_v2", symbol);
    *function = dlsym(RTLD_DEFAULT, versioned);
    void* self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_LAZY);
    if (self) {
      void* found = dlsym(self, versioned);
      *function = found ? found : dlsym(self, symbol);
      dlclose(self);
    }
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : 500;
}
