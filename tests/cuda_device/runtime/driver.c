/* A libcuda.so.1 so that libraries load. build.py adds a stub for every other function of cuda.h,
   which returns CUDA_ERROR_NOT_SUPPORTED. */
#define DRIVER_VERSION 13000

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) {
  *version = DRIVER_VERSION;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)1;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = (void*)1;
  return 0;
}
int cuCtxSetCurrent(void* context) { return 0; }
int cuGetErrorString(int error, const char** text) {
  *text = "not supported by the test device's driver";
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = "CUDA_ERROR_NOT_SUPPORTED";
  return 0;
}
