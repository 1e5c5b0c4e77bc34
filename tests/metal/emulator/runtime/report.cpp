// Collects the problems as text in memory that the parent process can read.
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime.h"

static char* text;
static uint64_t capacity, length;
static int count;

void start_reports(char* buffer, uint64_t bytes) { text = buffer, capacity = bytes, length = 0, count = 0; }
int report_count() { return count; }

bool first_time(const char* kind, const void* where) {
  constexpr int kMax = 64;
  static struct {
    const char* kind;
    const void* where;
  } seen[kMax];
  static int seen_count;
  for (int i = 0; i < seen_count; i++)
    if (seen[i].where == where && !strcmp(seen[i].kind, kind)) return false;
  if (seen_count == kMax) return false;
  seen[seen_count++] = {kind, where};
  return true;
}

void report(const char* format, ...) {
  count++;
  if (length + 2 >= capacity) return;
  va_list arguments;
  va_start(arguments, format);
  int wanted = vsnprintf(text + length, capacity - length - 1, format, arguments);
  va_end(arguments);
  length += (uint64_t)wanted < capacity - length - 1 ? wanted : capacity - length - 2;
  text[length++] = '\n';
}

// A return address points behind the call; one byte back lies in it.
unsigned long at(const void* pc) { return (const char*)pc - 1 - __ehdr_start; }
