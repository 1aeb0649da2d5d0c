// One kernel as a library: -include cuda_words.h, -DEMULATED_SOURCE, -DEMULATED_KERNEL.
#include EMULATED_SOURCE

namespace {

template <typename Params>
void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void emulated_entry(const void* params) { call(EMULATED_KERNEL, params); }
EXPORTED unsigned char* emulated_shared_memory() { return shared_memory; }
