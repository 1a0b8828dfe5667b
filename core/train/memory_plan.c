/* Sizes in words. */
#include "core/train/memory_plan.h"

#include "core/base/log.h"

moe_memory_plan moe_memory_plan_of(const moe_memory *memory, int64_t program_bytes) {
  moe_memory_plan p = {.program = program_bytes};
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) p.purpose[i] = memory->arena[i].used;
  return p;
}

int64_t moe_memory_plan_total(const moe_memory_plan *p) {
  int64_t total = p->program;
  for (int i = 0; i < MOE_MEM_PURPOSES; i++) total += p->purpose[i];
  return total;
}

moe_status moe_memory_plan_check(const moe_memory_plan *p, int64_t budget, const char *remedy) {
  int64_t total = moe_memory_plan_total(p);
  if (total <= budget) return MOE_OK;
  char need[MOE_TEXT], have[MOE_TEXT], most[MOE_TEXT];
  int largest = 0;
  for (int i = 1; i < MOE_MEM_PURPOSES; i++)
    if (p->purpose[i] > p->purpose[largest]) largest = i;
  return moe_fail(MOE_NO_MEMORY, "the plan needs %s and %s may be used: most of it is %s (%s): %s",
                  moe_text_bytes(need, (double)total), moe_text_bytes(have, (double)budget),
                  moe_memory_purpose_text((moe_memory_purpose)largest),
                  moe_text_bytes(most, (double)p->purpose[largest]), remedy);
}

static void print_line(const char *what, int64_t bytes, FILE *out) {
  char text[MOE_TEXT];
  if (bytes > 0) fprintf(out, "  %-32s %12s\n", what, moe_text_bytes(text, (double)bytes));
}

void moe_memory_plan_print(const moe_memory_plan *p, FILE *out) {
  for (int i = 0; i < MOE_MEM_PURPOSES; i++)
    print_line(moe_memory_purpose_text((moe_memory_purpose)i), p->purpose[i], out);
  print_line("program and libraries", p->program, out);
}
