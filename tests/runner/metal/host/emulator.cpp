// Runs one Metal kernel as Metal runs it: threads are fibers, 32 of them a SIMD group. Reads an order of work from
// stdin, writes the output buffers to stdout; anything that the kernel must not do ends the process with a message.
// Where Metal promises no order, the order is random; `reverse` gives the opposite order of everything.
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../shim/emulated/runtime.h"
#include "fiber.h"
#include "memory.h"

namespace emulated {
namespace {

constexpr size_t stack_size = 512 * 1024;
constexpr size_t max_threadgroup_memory = 32 * 1024;  // of every Apple GPU
constexpr unsigned max_threads = 1024;

enum class State { ready, at_simd, at_barrier, done };

struct Thread {
  Fiber fiber;
  Attributes attributes;
  State state;
  const char* operation;
  int line;
  long argument;
};

struct SimdGroup {
  unsigned first, count;
  std::vector<unsigned> order;  // of its threads
  unsigned next;                // place in `order`
  State state;
  Exchange exchanges[2];  // used in turn: the fast lanes' next values must not overwrite what slow lanes still read
  unsigned turn;
};

struct Order {
  unsigned grid[3], threadgroup[3];
  std::mt19937 random;
  bool reverse;
  Placement placement;
  unsigned char filler;
};

// One kernel call. A process makes exactly one, so that there is one of these.
struct Run {
  Order order;
  std::vector<Guarded> buffers;
  std::vector<void*> arguments;
  std::vector<std::unique_ptr<Guarded>> shared;
  std::vector<bool> shared_is_fresh;
  std::vector<Guarded> stacks;
  std::vector<Thread> threads;
  std::vector<SimdGroup> simdgroups;
  std::vector<unsigned> simdgroup_order;
  unsigned current_simdgroup, current_thread;
  Fiber main;
};
Run* run;

Thread& current() { return run->threads[run->current_thread]; }
SimdGroup& current_group() { return run->simdgroups[run->current_simdgroup]; }

std::string text_of(const char* name, const unsigned (&position)[3]) {
  return std::string(name) + " (" + std::to_string(position[0]) + ", " + std::to_string(position[1]) + ", " +
         std::to_string(position[2]) + ")";
}

// "threadgroup (0, 0, 0)", where one is running.
std::string threadgroup_text() {
  return run->threads.empty() ? "" : text_of("threadgroup", current().attributes.threadgroup_position);
}

void shuffle(std::vector<unsigned>& order, size_t count) {
  order.resize(count);
  for (size_t i = 0; i < count; ++i) order[i] = unsigned(i);
  std::shuffle(order.begin(), order.end(), run->order.random);
  if (run->order.reverse) std::reverse(order.begin(), order.end());
}

// ---- who runs next ----

std::string stopped_at(const Thread& thread) {
  if (thread.state == State::done) return "have left the kernel";
  char text[160];
  snprintf(text, sizeof text, "wait at %s (line %d, argument %ld)", thread.operation, thread.line, thread.argument);
  return text;
}

bool is_same_stop(const Thread& a, const Thread& b) {
  if (a.state != b.state) return false;
  return a.state == State::done ||
         (a.line == b.line && a.argument == b.argument &&
          (a.operation == b.operation || !strcmp(a.operation, b.operation)));
}

[[noreturn]] void fail_divergent(const std::vector<unsigned>& threads, const char* what) {
  std::string text = threadgroup_text() + ": divergent " + what + ":";
  std::vector<unsigned> left = threads;
  while (!left.empty()) {
    const unsigned first = left.front();
    text += text.back() == ':' ? " threads" : "; threads";
    for (unsigned i : left) {
      if (is_same_stop(run->threads[i], run->threads[first])) text += " " + std::to_string(i);
    }
    text += " " + stopped_at(run->threads[first]);
    left.erase(std::remove_if(left.begin(), left.end(),
                              [&](unsigned i) { return is_same_stop(run->threads[i], run->threads[first]); }),
               left.end());
  }
  fprintf(stderr, "%s\n", text.c_str());
  _exit(2);
}

// All lanes of the group have stopped: lets them go on, or notes where the whole group stands.
void settle(SimdGroup& group) {
  const Thread& first = run->threads[group.first];
  for (unsigned i = 1; i < group.count; ++i) {
    if (is_same_stop(run->threads[group.first + i], first)) continue;
    std::vector<unsigned> members(group.count);
    for (unsigned k = 0; k < group.count; ++k) members[k] = group.first + k;
    fail_divergent(members, "SIMD group");
  }
  group.state = first.state;
  group.next = 0;
  if (first.state == State::at_simd) {
    group.turn ^= 1;
    group.exchanges[group.turn].has_result = false;
    group.state = State::ready;
  }
}

// All SIMD groups wait at a barrier or have left: opens the barrier. False if the threadgroup is done.
bool open_barrier() {
  const Thread& first = run->threads[0];
  for (const Thread& thread : run->threads) {
    if (is_same_stop(thread, first)) continue;
    std::vector<unsigned> members(run->threads.size());
    for (unsigned k = 0; k < members.size(); ++k) members[k] = k;
    fail_divergent(members, "threadgroup");
  }
  if (first.state == State::done) return false;
  for (SimdGroup& group : run->simdgroups) group.state = State::ready;
  shuffle(run->simdgroup_order, run->simdgroups.size());
  return true;
}

// The fiber that goes on; the main one when the threadgroup is done.
Fiber& next_fiber() {
  while (true) {
    SimdGroup& group = current_group();
    if (group.state == State::ready) {
      if (group.next < group.count) {
        run->current_thread = group.first + group.order[group.next++];
        return current().fiber;
      }
      settle(group);
      continue;
    }
    const auto ready = std::find_if(run->simdgroup_order.begin(), run->simdgroup_order.end(),
                                    [](unsigned i) { return run->simdgroups[i].state == State::ready; });
    if (ready != run->simdgroup_order.end()) {
      run->current_simdgroup = *ready;
    } else if (!open_barrier()) {
      return run->main;
    }
  }
}

void stop(State state, const char* operation, int line, long argument) {
  Thread& thread = current();
  thread.state = state;
  thread.operation = operation;
  thread.line = line;
  thread.argument = argument;
  Fiber& next = next_fiber();
  if (&next != &thread.fiber) switch_fiber(thread.fiber, next);
}

void run_thread() {
  call_kernel(run->arguments.data(), current().attributes);
  stop(State::done, "", 0, 0);
  abort();
}

// ---- threadgroups ----

void place_threads(const unsigned (&group)[3], const unsigned (&groups)[3]) {
  const Order& order = run->order;
  unsigned size[3];
  for (int d = 0; d < 3; ++d) {
    size[d] = std::min(order.threadgroup[d], order.grid[d] - group[d] * order.threadgroup[d]);
  }
  const unsigned count = size[0] * size[1] * size[2];
  const unsigned nominal = order.threadgroup[0] * order.threadgroup[1] * order.threadgroup[2];
  run->threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = run->threads[i];
    thread.state = State::ready;
    const unsigned at[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    Attributes& a = thread.attributes;
    for (int d = 0; d < 3; ++d) {
      a.position_in_threadgroup[d] = at[d];
      a.position_in_grid[d] = group[d] * order.threadgroup[d] + at[d];
      a.threadgroup_position[d] = group[d];
      a.threads_per_grid[d] = order.grid[d];
      a.threads_per_threadgroup[d] = size[d];
      a.dispatch_threads_per_threadgroup[d] = order.threadgroup[d];
      a.threadgroups_per_grid[d] = groups[d];
    }
    a.index_in_threadgroup = i;
    a.index_in_simdgroup = i % lanes_per_simdgroup;
    a.simdgroup_index = i / lanes_per_simdgroup;
    a.simdgroups_per_threadgroup = (count + lanes_per_simdgroup - 1) / lanes_per_simdgroup;
    a.dispatch_simdgroups_per_threadgroup = (nominal + lanes_per_simdgroup - 1) / lanes_per_simdgroup;
    while (run->stacks.size() <= i) {
      run->stacks.emplace_back("stack", stack_size, page_size(), Placement::at_end);
    }
    start(thread.fiber, run->stacks[i].data(), stack_size, run_thread);
  }
  run->simdgroups.resize((count + lanes_per_simdgroup - 1) / lanes_per_simdgroup);
  for (unsigned i = 0; i < run->simdgroups.size(); ++i) {
    SimdGroup& simdgroup = run->simdgroups[i];
    simdgroup.first = i * lanes_per_simdgroup;
    simdgroup.count = std::min(lanes_per_simdgroup, count - simdgroup.first);
    simdgroup.next = 0;
    simdgroup.turn = 0;
    simdgroup.state = State::ready;
    shuffle(simdgroup.order, simdgroup.count);
  }
  shuffle(run->simdgroup_order, run->simdgroups.size());
}

void run_threadgroup(unsigned index, const unsigned (&groups)[3]) {
  const unsigned group[3] = {index % groups[0], index / groups[0] % groups[1], index / groups[0] / groups[1]};
  place_threads(group, groups);
  run->shared_is_fresh.assign(run->shared_is_fresh.size(), false);
  run->current_simdgroup = run->simdgroup_order[0];
  Fiber& first = next_fiber();
  switch_fiber(run->main, first);
}

// ---- faults ----

void on_fault(int, siginfo_t* info, void* context) {
  const char* access = "touches";
#if defined(__linux__) && defined(__x86_64__)
  access = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[19 /* REG_ERR */] & 2 ? "writes" : "reads";
#else
  (void)context;
#endif
  for (const Guarded& buffer : run->buffers) {
    if (!buffer.owns(info->si_addr)) continue;
    const long offset = buffer.offset_of(info->si_addr);
    if (offset >= 0 && offset < long(buffer.size())) fail("writes to input buffer '%s'", buffer.name().c_str());
    fail("%s outside buffer '%s': byte %ld of %zu", access, buffer.name().c_str(), offset, buffer.size());
  }
  for (const auto& shared : run->shared) {
    if (!shared || !shared->owns(info->si_addr)) continue;
    fail("%s outside threadgroup variable '%s': byte %ld of %zu", access, shared->name().c_str(),
         shared->offset_of(info->si_addr), shared->size());
  }
  for (const Guarded& stack : run->stacks) {
    if (stack.owns(info->si_addr)) fail("stack overflow: the kernel's thread variables need too much memory");
  }
  fail("%s address %p, which belongs to no buffer", access, info->si_addr);
}

void catch_faults() {
  static char signal_stack[256 * 1024];
  stack_t stack = {};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

// ---- order of work ----

[[noreturn]] void refuse(const char* text) {
  fprintf(stderr, "%s\n", text);
  _exit(3);
}

// "grid X Y Z", "threadgroup X Y Z", "seed N", "reverse 0|1", then a line per buffer: its kind ("input", "output" or
// "in_place"), its name and its bytes; "run" ends it. The bytes of all but outputs follow.
// Returns which buffers are asked back.
std::vector<bool> read_order() {
  std::vector<bool> is_result;
  char line[512], kind[32], name[256];
  unsigned seed = 0, reverse = 0;
  size_t bytes;
  Order& order = run->order;
  std::vector<std::pair<std::string, size_t>> sizes;
  std::vector<std::string> kinds;
  while (fgets(line, sizeof line, stdin) && strcmp(line, "run\n")) {
    unsigned(&grid)[3] = order.grid, (&group)[3] = order.threadgroup;
    if (sscanf(line, "grid %u %u %u", &grid[0], &grid[1], &grid[2]) == 3) continue;
    if (sscanf(line, "threadgroup %u %u %u", &group[0], &group[1], &group[2]) == 3) continue;
    if (sscanf(line, "seed %u", &seed) == 1 || sscanf(line, "reverse %u", &reverse) == 1) continue;
    if (sscanf(line, "%31s %255s %zu", kind, name, &bytes) != 3) refuse("unknown line");
    kinds.emplace_back(kind);
    sizes.emplace_back(name, bytes);
  }
  order.random.seed(seed);
  order.reverse = reverse != 0;
  order.placement = reverse ? Placement::at_start : Placement::at_end;
  order.filler = reverse ? 0x5b : 0xff;  // 0xff...: NaN, -1; 0x5b...: large numbers
  for (size_t i = 0; i < sizes.size(); ++i) {
    // outputs start alike in either order, so that what a kernel leaves out is equal
    const bool is_output = kinds[i] == "output";
    run->buffers.emplace_back(sizes[i].first, sizes[i].second, order.placement, is_output ? 0xff : order.filler);
    is_result.push_back(kinds[i] != "input");
    if (is_output) continue;
    if (fread(run->buffers[i].data(), 1, sizes[i].second, stdin) != sizes[i].second) refuse("too few bytes");
    if (!is_result[i]) run->buffers[i].make_read_only();
  }
  if (int(sizes.size()) != num_arguments) refuse("wrong number of buffers");
  for (const Guarded& buffer : run->buffers) run->arguments.push_back(buffer.data());
  return is_result;
}

void run_grid() {
  Order& order = run->order;
  unsigned groups[3], total = 1;
  for (int d = 0; d < 3; ++d) {
    order.threadgroup[d] = std::min(order.threadgroup[d], order.grid[d]);
    if (!order.threadgroup[d]) refuse("empty grid");
    groups[d] = (order.grid[d] + order.threadgroup[d] - 1) / order.threadgroup[d];
    total *= groups[d];
  }
  if (order.threadgroup[0] * order.threadgroup[1] * order.threadgroup[2] > max_threads) {
    fail("a threadgroup has at most %u threads", max_threads);
  }
  run->stacks.reserve(max_threads);
  std::vector<unsigned> sequence;
  shuffle(sequence, total);
  for (unsigned index : sequence) run_threadgroup(index, groups);
  run->threads.clear();
}

}  // namespace

// ---- what kernels call ----

Exchange& meet(const char* operation, int line, long argument, const void* value, size_t size) {
  Thread& thread = current();
  Exchange& exchange = current_group().exchanges[current_group().turn ^ 1];
  memcpy(exchange.values[thread.attributes.index_in_simdgroup], value, size);
  stop(State::at_simd, operation, line, argument);
  return exchange;
}

void meet_all(const char* operation, int line) { stop(State::at_barrier, operation, line, 0); }

unsigned lane_index() { return current().attributes.index_in_simdgroup; }
unsigned lane_count() { return current_group().count; }

void* shared_memory(int variable, const char* name, size_t size, size_t) {
  const size_t index = size_t(variable);
  if (run->shared.size() <= index) {
    run->shared.resize(index + 1);
    run->shared_is_fresh.resize(index + 1);
  }
  std::unique_ptr<Guarded>& memory = run->shared[index];
  if (!memory) {
    memory.reset(new Guarded(name, size, run->order.placement, run->order.filler));
    size_t total = 0;
    for (const auto& each : run->shared) total += each ? each->size() : 0;
    if (total > max_threadgroup_memory) {
      fail("%zu bytes of threadgroup memory, the limit is %zu", total, max_threadgroup_memory);
    }
  }
  if (!run->shared_is_fresh[index]) {
    memory->fill();
    run->shared_is_fresh[index] = true;
  }
  return memory->data();
}

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!run->threads.empty()) {
    const std::string thread = text_of("thread", current().attributes.position_in_threadgroup);
    fprintf(stderr, "%s, %s: ", threadgroup_text().c_str(), thread.c_str());
  }
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  _exit(2);
}

}  // namespace emulated

int main() {
  using namespace emulated;
  Run the_run{};
  run = &the_run;
  const std::vector<bool> is_result = read_order();
  catch_faults();
  run_grid();
  for (size_t i = 0; i < is_result.size(); ++i) {
    const Guarded& buffer = run->buffers[i];
    if (!is_result[i]) continue;
    if (buffer.is_frayed()) fail("writes outside buffer '%s', beside it", buffer.name().c_str());
    if (fwrite(buffer.data(), 1, buffer.size(), stdout) != buffer.size()) return 3;
  }
  fflush(stdout);
  _exit(0);
}
