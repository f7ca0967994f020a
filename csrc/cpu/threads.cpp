#include "threads.h"

#include <pthread.h>

namespace pcmecl::cpu {
namespace {

bool forked = false;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int usable_threads(int asked) { return forked || asked < 1 ? 1 : asked; }

}  // namespace pcmecl::cpu
