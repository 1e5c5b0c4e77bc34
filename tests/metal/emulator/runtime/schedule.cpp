// Runs a threadgroup: every thread until it waits, then lets complete simdgroups and barriers go on.
#include "runtime.h"

static uint64_t random_state;
void seed_random(uint64_t seed) { random_state = seed * 2654435761u + 88172645463325252ull; }

static uint32_t random_below(uint32_t bound) {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (uint32_t)(random_state >> 32) % bound;
}

void shuffle(uint32_t* items, uint32_t count, Order order) {
  for (uint32_t i = 0; i < count; i++) items[i] = order == REVERSE ? count - 1 - i : i;
  if (order != RANDOM) return;
  for (uint32_t i = count; i-- > 1;) {
    uint32_t j = random_below(i + 1), held = items[i];
    items[i] = items[j], items[j] = held;
  }
}

static const char* waits_for(const Fiber& f) {
  switch (f.state) {
    case AT_BARRIER:
      return "waits at threadgroup_barrier";
    case AT_SIMD_BARRIER:
      return "waits at simdgroup_barrier";
    case AT_COLLECTIVE:
      return "waits at a simdgroup operation";
    case RETURNED:
      return "has returned";
    default:
      return "runs";
  }
}
static bool together(const Fiber& a, const Fiber& b) { return a.state == b.state && a.site == b.site && a.op == b.op; }

// Names two threads of [begin, end) that are at different places.
static void report_divergence(const char* what, int begin, int end) {
  int a = begin, b = begin;
  while (b + 1 < end && together(fibers[a], fibers[b])) b++;
  if (fibers[a].state == RETURNED) {  // the one that waits comes first
    int held = a;
    a = b, b = held;
  }
  if (!first_time("divergence", nullptr)) return;
  if (fibers[b].state == RETURNED)
    report("divergence: %s: thread %d %s, at " AT ", but thread %d has returned", what, a, waits_for(fibers[a]),
           at(fibers[a].pc), b);
  else
    report("divergence: %s: thread %d %s, at " AT ", but thread %d %s, at " AT, what, a, waits_for(fibers[a]),
           at(fibers[a].pc), b, waits_for(fibers[b]), at(fibers[b].pc));
}

enum Outcome { NOTHING, PROGRESS, FAILED };

static void pass(Fiber& fiber, unsigned* barriers) {
  for (int space = DEVICE; space <= THREADGROUP; space++)
    if (fiber.flags >> space & 1) barriers[space]++;
  fiber.state = RUNNABLE;
}

static Outcome release_simdgroup(int group, int threads) {
  int begin = group * kLanes, end = begin + kLanes < threads ? begin + kLanes : threads;
  int first = -1, returned = 0;
  for (int i = begin; i < end; i++) {
    if (fibers[i].state == RETURNED) {
      returned++;
      continue;
    }
    if (fibers[i].state != AT_COLLECTIVE && fibers[i].state != AT_SIMD_BARRIER) return NOTHING;
    if (first < 0) first = i;
    if (!together(fibers[i], fibers[first])) return NOTHING;
  }
  if (first < 0) return NOTHING;
  if (returned) {
    report_divergence("lanes of one simdgroup", begin, end);
    return FAILED;
  }
  unsigned active = end - begin == kLanes ? ~0u : (1u << (end - begin)) - 1;
  for (int i = begin; i < end; i++) {
    if (fibers[i].state == AT_SIMD_BARRIER)
      pass(fibers[i], fibers[i].simd_barriers);
    else
      simd_slots[group][(fibers[i].collectives - 1) & 1].active = active;
    fibers[i].state = RUNNABLE;
  }
  return PROGRESS;
}

static Outcome release_threadgroup(int threads) {
  for (int i = 0; i < threads; i++)
    if (fibers[i].state != AT_BARRIER || fibers[i].site != fibers[0].site) return NOTHING;
  for (int i = 0; i < threads; i++) pass(fibers[i], fibers[i].barriers);
  return PROGRESS;
}

bool run_threadgroup(int threads, Order order) {
  static uint32_t sequence[kMaxThreads];
  int groups = (threads + kLanes - 1) / kLanes;
  for (int left = threads; left;) {
    shuffle(sequence, threads, order);
    for (int k = 0; k < threads; k++) {
      Fiber* fiber = &fibers[sequence[k]];
      if (fiber->state != RUNNABLE) continue;
      resume(fiber);
      if (fiber->state == RETURNED) left--;
    }
    if (!left) return true;
    bool progress = false;
    for (int group = 0; group < groups; group++) {
      Outcome outcome = release_simdgroup(group, threads);
      if (outcome == FAILED) return false;
      if (outcome == PROGRESS) progress = true;
    }
    if (progress || release_threadgroup(threads) == PROGRESS) continue;
    for (int group = 0; group < groups; group++) {  // a simdgroup that disagrees with itself is the clearer message
      int begin = group * kLanes, end = begin + kLanes < threads ? begin + kLanes : threads;
      for (int i = begin; i < end; i++)
        if (!together(fibers[i], fibers[begin])) {
          report_divergence("lanes of one simdgroup", begin, end);
          return false;
        }
    }
    report_divergence("threads of one threadgroup", 0, threads);
    return false;
  }
  return true;
}
