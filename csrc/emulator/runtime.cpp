// The emulator's scheduler: a block's threads are fibers that run until they meet others, in the order the options say.
// Always built without sanitizers; the kernels may be built with any.
#include <sys/mman.h>

#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "races.h"

#undef threadIdx
#undef blockIdx

namespace emu {

Thread* current = nullptr;
Options options;
Statistics statistics;
std::string last_error;

namespace {

constexpr int kMaxThreads = 1024;
constexpr size_t kSharedDefault = 48 * 1024, kSharedMost = 99 * 1024;  // of sm_86, sm_89 and sm_120: what fits there fits everywhere

enum class State { ready, at_barrier, at_collective, done };
struct Copy { void* shared; const void* global; size_t bytes, source_bytes; };
struct Worker : Thread {
  Fiber fiber;
  State state = State::done;
  const char* waits_in = "";
  Site site;
  std::vector<Copy> copies;      // cp.async not yet waited for, oldest first
  std::vector<size_t> groups;    // how many of them each committed group has
  size_t open = 0;               // and those not committed
};
struct Meeting : Lanes {
  Collective kind;
  uint32_t arrived = 0;
};
struct Shared { void* data; size_t bytes; };

struct Block {
  std::vector<Worker> workers;   // kept between blocks: their stacks are
  std::vector<Worker*> ready;
  std::vector<Meeting> meetings[kMaxThreads / 32];
  uint32_t warp_epochs[kMaxThreads / 32];
  uint32_t barrier_epoch;
  int threads, done, arrived, votes, result;
  int64_t number;
  Site barrier_site;
  std::map<const void*, Shared> variables;
  Shared dynamic;
  size_t static_bytes;
  Fiber host;
  std::string error;
  void (*body)(void*);
  void* arguments;
} block;

char* stacks = nullptr;
std::map<const void*, size_t> allowed_shared;
enum Answer { ran, failed, run_here };
int (*elsewhere)(const Launch*) = nullptr;  // asked before fibers run a launch; gives an Answer
uint64_t random_state;

Worker* me() { return static_cast<Worker*>(current); }

std::string place(Site site) {
  std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}
std::string name_of(const Thread* t) {
  const auto three = [](uint3 i) { return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")"; };
  return "block " + three(t->block) + " thread " + three(t->index);
}
bool same(Site a, Site b) { return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name()); }

// ---- scheduling
void wake(Worker* w) {
  w->state = State::ready;
  block.ready.push_back(w);
}

Worker* next() {
  if (block.ready.empty() || !block.error.empty()) return nullptr;
  size_t i = 0;
  if (options.order == Order::reversed) i = block.ready.size() - 1;  // the latest first: one warp runs as far ahead as it can
  if (options.order == Order::random) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    i = random_state % block.ready.size();
  }
  Worker* w = block.ready[i];
  block.ready.erase(block.ready.begin() + static_cast<ptrdiff_t>(i));
  return w;
}

// Runs somebody else; returns when this thread's turn comes again.
void park(Worker* from) {
  Worker* to = next();
  current = to;
  if (to != from) switch_fibers(from->fiber, to ? to->fiber : block.host);
}
void wait(State state, const char* in, Site site) {
  Worker* w = me();
  w->state = state, w->waits_in = in, w->site = site;
  park(w);
}

void leave() {
  Worker* w = me();
  if (!w->copies.empty()) throw std::runtime_error("cp.async is still in flight at the end of the kernel, " + name_of(w));
  if (block.arrived)
    throw std::runtime_error("divergent barrier: a thread leaves the kernel while others wait in __syncthreads (" + place(block.barrier_site) + "), " + name_of(w));
}

void thread_main() {
  fiber_started();
  for (;;) {
    try {
      block.body(block.arguments);
      leave();
    } catch (const std::exception& e) {
      if (block.error.empty()) block.error = e.what();
    }
    Worker* w = me();
    w->state = State::done;
    block.done++;
    park(w);
  }
}

// ---- one block
Shared allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) throw std::bad_alloc();
  memset(p, 0xff, bytes);  // NaN, -1
  forget(p, bytes);
  return {p, bytes};
}

void run_block(uint3 index, size_t shared_bytes) {
  block.ready.clear();
  for (auto& m : block.meetings) m.clear();
  memset(block.warp_epochs, 0, sizeof(block.warp_epochs));
  block.barrier_epoch = 0, block.done = block.arrived = block.votes = 0, block.static_bytes = 0;
  block.dynamic = allocate(shared_bytes);
  for (int t = 0; t < block.threads; t++) {
    Worker& w = block.workers[static_cast<size_t>(t)];
    const unsigned n = static_cast<unsigned>(t);
    w.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    w.block = index, w.number = t, w.lane = t % 32;
    w.copies.clear(), w.groups.clear(), w.open = 0;
    wake(&w);
  }
  current = next();
  switch_fibers(block.host, me()->fiber);
  current = nullptr;
  if (block.error.empty() && block.done < block.threads) {
    block.error = "deadlock:";
    int shown = 0;
    for (int t = 0; t < block.threads; t++) {
      const Worker& w = block.workers[static_cast<size_t>(t)];
      if (w.state != State::done && shown++ < 4) block.error += " [" + name_of(&w) + " waits in " + w.waits_in + " (" + place(w.site) + ")]";
    }
  }
  for (auto& [key, variable] : block.variables) free(variable.data);
  block.variables.clear();
  free(block.dynamic.data);
}

void prepare_workers(size_t threads) {
  if (!stacks) {
    void* p = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(p);
  }
  while (block.workers.size() < threads) {
    block.workers.emplace_back();
    prepare(block.workers.back().fiber, stacks + (block.workers.size() - 1) * kStackBytes, thread_main);
  }
}

}  // namespace

// ---- what threads call
void fail(const std::string& what, Site site) {
  throw std::runtime_error(what + " (" + place(site) + "), " + (current ? name_of(current) : "outside a kernel"));
}

void check_aligned(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access of " + std::to_string(bytes) + " bytes", site);
}

void* static_shared(const void* key, size_t bytes) {
  auto [it, fresh] = block.variables.try_emplace(key);
  if (fresh) {
    block.static_bytes += bytes;
    if (block.static_bytes > kSharedDefault || block.static_bytes + block.dynamic.bytes > kSharedMost)
      throw std::runtime_error("too much shared memory: " + std::to_string(block.static_bytes) + " bytes static");
    it->second = allocate(bytes);
  }
  return it->second.data;
}
void* dynamic_shared() { return block.dynamic.data; }

uint32_t shared_offset(const void* p, size_t bytes, Site site) {
  const auto base = reinterpret_cast<uintptr_t>(block.dynamic.data), address = reinterpret_cast<uintptr_t>(p);
  if (address < base || address + bytes > base + block.dynamic.bytes) fail("the address is not in this block's dynamic shared memory", site);
  return static_cast<uint32_t>(address - base);
}

int barrier(bool predicate, Site site) {
  if (block.done) fail("divergent barrier: __syncthreads after some threads have left the kernel", site);
  if (block.arrived && !same(block.barrier_site, site))
    fail("divergent barrier: others wait in another __syncthreads (" + place(block.barrier_site) + ")", site);
  block.barrier_site = site;
  block.votes += predicate;
  if (++block.arrived < block.threads) {
    wait(State::at_barrier, "__syncthreads", site);
    return block.result;
  }
  block.result = block.votes;
  block.arrived = block.votes = 0;
  block.barrier_epoch++;
  for (int t = 0; t < block.threads; t++)
    if (block.workers[static_cast<size_t>(t)].state == State::at_barrier) wake(&block.workers[static_cast<size_t>(t)]);
  return block.result;
}

void collective(uint32_t mask, Collective kind, const char* name, const void* in, void* out, void (*combine)(const Lanes&), Site site) {
  const Worker* w = me();
  const uint32_t bit = 1u << w->lane;
  if (!(mask & bit)) fail(std::string(name) + ": the calling lane is not in its own mask", site);
  auto& meetings = block.meetings[w->number / 32];
  Meeting* found = nullptr;
  for (Meeting& m : meetings) {
    if (m.arrived && m.mask == mask) found = &m;
    else if (m.arrived && (m.mask & mask)) fail(std::string(name) + ": lanes of this mask wait in a warp operation with another mask", site);
  }
  if (!found) {
    for (Meeting& m : meetings)
      if (!m.arrived) found = &m;
    if (!found) found = &meetings.emplace_back();
    found->mask = mask, found->kind = kind;
  }
  if (found->kind != kind) fail(std::string(name) + ": lanes of this mask wait in another warp operation (divergent warp)", site);
  found->in[w->lane] = in, found->out[w->lane] = out;
  found->arrived |= bit;
  if (found->arrived != mask) return wait(State::at_collective, name, site);
  found->arrived = 0;
  combine(*found);
  if (kind == Collective::syncwarp) block.warp_epochs[w->number / 32]++;
  for (int l = 0; l < 32; l++)
    if (l != w->lane && (mask >> l & 1)) wake(&block.workers[static_cast<size_t>(w->number / 32 * 32 + l)]);
}

void count_ldmatrix(int conflicts) { statistics.ldmatrix++, statistics.bank_conflicts += conflicts; }

void async_copy(void* shared, const void* global, size_t bytes, size_t source_bytes, Site site) {
  if (shared_offset(shared, bytes, site) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) fail("cp.async: misaligned address", site);
  if (source_bytes > bytes) fail("cp.async: the source is larger than the copy", site);
  Worker* w = me();
  w->copies.push_back({shared, global, bytes, source_bytes});
  w->open++;
  note(shared, bytes, Access::write);
  note(global, source_bytes, Access::read);
  memset(shared, 0xff, bytes);
}
void async_commit() {
  Worker* w = me();
  w->groups.push_back(w->open);
  w->open = 0;
}
void async_wait(size_t pending) {
  Worker* w = me();
  size_t landed = 0;
  while (w->groups.size() > pending) {
    landed += w->groups.front();
    w->groups.erase(w->groups.begin());
  }
  for (size_t i = 0; i < landed; i++) {
    const Copy& c = w->copies[i];
    note(c.shared, c.bytes, Access::write);
    memcpy(c.shared, c.global, c.source_bytes);
    memset(static_cast<char*>(c.shared) + c.source_bytes, 0, c.bytes - c.source_bytes);
  }
  w->copies.erase(w->copies.begin(), w->copies.begin() + static_cast<ptrdiff_t>(landed));
}

void fence() { fences_used(); }
uint64_t atomic(void* p, size_t bytes, uint64_t (*change)(uint64_t, uint64_t, uint64_t), uint64_t operand, uint64_t expected) {
  uint64_t old = 0;
  note(p, bytes, Access::atomic);
  memcpy(&old, p, bytes);
  const uint64_t value = change(old, operand, expected);
  memcpy(p, &value, bytes);
  return old;
}

// ---- for the race detector
Clock clock_now() {
  if (!current) return {-1, 0, 0, 0};
  return {block.number, current->number, block.barrier_epoch, block.warp_epochs[current->number / 32]};
}
bool on_a_stack(const void* p) { return p >= stacks && p < stacks + kStackBytes * kMaxThreads; }
void report_race(const char* what, const void*, int64_t other_block, int other_thread) {
  if (!block.error.empty()) return;  // noted, not thrown: compiled code does not expect an exception at an access
  block.error = "data race: " + name_of(current) + " " + what + " thread " + std::to_string(other_thread) +
                (other_block == block.number ? " of its block" : " of block number " + std::to_string(other_block)) + ", unordered";
}

// ---- launches
cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedMost) return cudaErrorInvalidValue;
  allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments, const Value* values, size_t count_values) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const dim3 grid = config.gridDim, threads = config.blockDim;
  const uint64_t count = uint64_t{threads.x} * threads.y * threads.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  const auto refuse = [](cudaError_t error, const std::string& why) {
    last_error = why;
    return error;
  };
  if (!blocks || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return refuse(cudaErrorInvalidConfiguration, "invalid grid");
  if (!count || count > kMaxThreads || threads.z > 64 || count % 32)
    return refuse(cudaErrorInvalidConfiguration, "invalid block: whole warps, at most 1024 threads");
  const size_t allowed = allowed_shared.count(kernel) ? allowed_shared[kernel] : kSharedDefault;
  if (config.dynamicSmemBytes > allowed)
    return refuse(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) + " bytes of dynamic shared memory, allowed are " + std::to_string(allowed));
  if (config.numAttrs) return refuse(cudaErrorNotSupported, "launch attributes are not emulated");
  statistics.launches++;
  if (elsewhere) {
    const Launch whole{kernel, {grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z}, config.dynamicSmemBytes, count_values, values};
    const int answer = elsewhere(&whole);
    if (answer != run_here) return answer == ran ? cudaSuccess : refuse(cudaErrorLaunchFailure, "it failed where launches run instead");
  }
  prepare_workers(count);
  forget_everything();
  blockDim = threads, gridDim = grid;
  block.threads = static_cast<int>(count), block.body = body, block.arguments = arguments, block.error.clear();
  random_state = options.seed * 0x9e3779b97f4a7c15u | 1;
  for (uint64_t i = 0; i < blocks && block.error.empty(); i++) {
    const uint64_t b = options.order == Order::reversed ? blocks - 1 - i : i;
    block.number = static_cast<int64_t>(b);
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / grid.x / grid.y)},
              config.dynamicSmemBytes);
  }
  if (block.error.empty()) return cudaSuccess;
  block.workers.clear();  // their stacks hold half a kernel
  return refuse(cudaErrorLaunchFailure, block.error);
}

}  // namespace emu

// ---- for tests, by ctypes
#define TZ_EXPORT extern "C" __attribute__((visibility("default")))
TZ_EXPORT void emulator_order(int order, uint64_t seed) { emu::options = {static_cast<emu::Order>(order), seed}; }
TZ_EXPORT int64_t emulator_launches() { return emu::statistics.launches; }
TZ_EXPORT void emulator_run_elsewhere(int (*run)(const emu::Launch*)) { emu::elsewhere = run; }
TZ_EXPORT int emulator_detects_races() { return emu::detecting_races(); }
