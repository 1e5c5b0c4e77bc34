// emu_launch: runs the grid in a forked child, so that a broken kernel cannot take the test process down.
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "runtime.h"

Buffer* buffers;
int buffer_count;
void* buffer_pointers[kMaxBuffers];

// Linked last, so it lies behind the kernel's own threadgroup variables: an overrun comes here first.
__attribute__((section("emu_tg"), used)) static char threadgroup_padding[4096];
uint64_t threadgroup_bytes() { return threadgroup_padding - __start_emu_tg; }
EXPORTED uint64_t emu_threadgroup_bytes() { return threadgroup_bytes(); }

struct Launch {  // mirrored in launch.py
  Buffer* buffers;
  uint32_t buffer_count, grid[3], threadgroup[3], order, check, seconds;
  uint64_t seed;
  char* text;
  uint64_t text_bytes;
};

static const void* program_counter(void* context) {
  mcontext_t& registers = ((ucontext_t*)context)->uc_mcontext;
#if defined(__x86_64__)
  return (const char*)registers.gregs[REG_RIP] + 1;  // at() expects a return address
#else
  return (const char*)registers.pc + 1;
#endif
}

static uint32_t time_limit;

static void on_signal(int signal, siginfo_t* info, void* context) {
  const void* pc = program_counter(context);
  int thread = current ? (int)current->position.thread_index_in_threadgroup : -1;
  if (signal == SIGPROF)
    report("hang: not finished after %u s; thread %d is at " AT, time_limit, thread, at(pc));
  else if (signal == SIGFPE)
    report("arithmetic: thread %d divides an integer by zero, or overflows, at " AT, thread, at(pc));
  else if (signal == SIGILL)
    report("crash: thread %d traps, at " AT, thread, at(pc));
  else if (in_any_stack(info->si_addr))
    report("stack: thread %d needs more than %lu bytes, at " AT, thread, (unsigned long)kStackBytes, at(pc));
  else {
    const char* where = describe_address(info->si_addr);
    report("oob: memory fault of thread %d, %s, at " AT, thread, *where ? where : "nowhere near a buffer", at(pc));
  }
  _exit(1);
}

static void catch_signals(uint32_t seconds) {
  time_limit = seconds;
  stack_t alternate = {};
  alternate.ss_size = 1 << 16;
  alternate.ss_sp = malloc(alternate.ss_size);
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGPROF};
  for (int signal : caught) sigaction(signal, &action, nullptr);
  signal(SIGINT, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  // CPU time, not wall time: a busy machine is no hang
  struct itimerval timer = {{0, 0}, {(time_t)seconds, 0}};
  setitimer(ITIMER_PROF, &timer, nullptr);
}

static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

static void place_threads(emu_uint3 group, emu_uint3 groups, emu_uint3 full, emu_uint3 size, emu_uint3 grid) {
  unsigned threads = size.x * size.y * size.z, full_threads = full.x * full.y * full.z;
  for (unsigned i = 0; i < threads; i++) {
    reset_fiber(i);
    emu_thread& t = fibers[i].position;
    emu_uint3 p = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.thread_position_in_threadgroup = p;
    t.threadgroup_position_in_grid = group;
    t.thread_position_in_grid = {group.x * full.x + p.x, group.y * full.y + p.y, group.z * full.z + p.z};
    t.threads_per_threadgroup = size, t.dispatch_threads_per_threadgroup = full;
    t.threads_per_grid = t.grid_size = grid, t.threadgroups_per_grid = groups;
    t.thread_index_in_threadgroup = i;
    t.thread_index_in_simdgroup = i % kLanes, t.simdgroup_index_in_threadgroup = i / kLanes;
    t.simdgroups_per_threadgroup = (threads + kLanes - 1) / kLanes;
    t.dispatch_simdgroups_per_threadgroup = (full_threads + kLanes - 1) / kLanes;
    t.thread_index_in_quadgroup = i % 4, t.quadgroup_index_in_threadgroup = i / 4;
    t.quadgroups_per_threadgroup = (threads + 3) / 4;
    t.dispatch_quadgroups_per_threadgroup = (full_threads + 3) / 4;
    t.thread_execution_width = t.threads_per_simdgroup = kLanes;
  }
}

// As dispatchThreads: the grid counts threads, and threadgroups at its edge shrink.
static void run_grid(const Launch& launch) {
  emu_uint3 grid = {launch.grid[0], launch.grid[1], launch.grid[2]};
  emu_uint3 full = {smaller(launch.threadgroup[0], grid.x), smaller(launch.threadgroup[1], grid.y),
                    smaller(launch.threadgroup[2], grid.z)};
  emu_uint3 groups = {(grid.x + full.x - 1) / full.x, (grid.y + full.y - 1) / full.y, (grid.z + full.z - 1) / full.z};
  uint32_t total = groups.x * groups.y * groups.z;
  uint32_t* sequence = (uint32_t*)malloc(total * sizeof(uint32_t));
  shuffle(sequence, total, (Order)launch.order);
  create_stacks(full.x * full.y * full.z);
  if (launch.check) start_checker();
  for (uint32_t k = 0; k < total; k++) {
    uint32_t g = sequence[k];
    emu_uint3 group = {g % groups.x, g / groups.x % groups.y, g / groups.x / groups.y};
    emu_uint3 size = {smaller(full.x, grid.x - group.x * full.x), smaller(full.y, grid.y - group.y * full.y),
                      smaller(full.z, grid.z - group.z * full.z)};
    place_threads(group, groups, full, size, grid);
    memset(__start_emu_tg, 0xff, threadgroup_bytes());  // NaN: a threadgroup's memory starts with anything
    start_threadgroup(k + 1);
    if (!run_threadgroup(size.x * size.y * size.z, (Order)launch.order)) return;
  }
}

// Returns 0, or 1 with the problems in `text`.
EXPORTED int emu_launch(Launch* launch) {
  pid_t parent = getpid(), child = fork();
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    start_reports(launch->text, launch->text_bytes);
    catch_signals(launch->seconds);
    buffers = launch->buffers, buffer_count = launch->buffer_count;
    for (int i = 0; i < buffer_count; i++) buffer_pointers[i] = buffers[i].base;
    seed_random(launch->seed);
    run_grid(*launch);
    _exit(report_count() ? 1 : 0);
  }
  start_reports(launch->text, launch->text_bytes);
  int status;
  while (child > 0 && waitpid(child, &status, 0) < 0)
    if (errno != EINTR) child = -1;
  if (child < 0)
    report("launch: no child process: %s", strerror(errno));
  else if (WIFSIGNALED(status)) {
    start_reports(launch->text + strlen(launch->text), launch->text_bytes - strlen(launch->text));
    report("crash: the kernel died of signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
  }
  return child < 0 || status != 0;
}
