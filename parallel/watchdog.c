/* The thread that watches: the clock, the inquest, the verdict.
 *
 * The one idea: nobody keeps anyone informed. As long as all is well no rank says anything; one
 * whose limit is used up asks, and every thread answers at once whatever its rank is doing. A
 * stopped or dead process is the one that does not answer. */
#include "parallel/watchdog.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/log.h"
#include "parallel/guard.h"
#include "parallel/side_channel.h"

/* Seconds. */
static const double tick = 0.5;       /* between looks */
static const double most_gap = 2.0;   /* counted between two looks: longer, and we were stopped */
static const double ask_again = 0.25; /* datagrams get lost */
static const double grace = 2.0;      /* for answers */
static const double put_off = 1.0;    /* after an inquest that found somebody at work */
static const double last_wait = 3.0;  /* for the speaker to end the job */
static const double roll_call = 10.0;

typedef enum { WATCHING, ASKING, CONDEMNED } watch_state;

typedef struct {
  bool answered;
  moe_news news;
} peer;

struct moe_watchdog {
  moe_side_channel *channel;
  int rank, size;
  double limit_s[MOE_PHASES];
  pthread_t thread;
  bool started;
  atomic_bool stopping;
  /* the thread's own */
  double clock, looked; /* seconds awake; real time of the last look */
  moe_place place;      /* at the last look */
  double signed_at;     /* on `clock`: when it was new */
  watch_state state;
  double since, asked_at, next_inquest; /* on `clock` */
  uint32_t round;
  bool roll_called;
  peer *peers; /* [size] what was answered in this round; one's own too */
};

/* ---- the clock ------------------------------------------------------------------------------- */

static void look(moe_watchdog *w) {
  double now = moe_clock_s(), gap = now - w->looked;
  w->looked = now;
  w->clock += gap < most_gap ? gap : most_gap;
  moe_place place = moe_place_read();
  if (place.signs != w->place.signs) w->signed_at = w->clock;
  w->place = place;
}

static void say_news(moe_watchdog *w, moe_news *out) {
  moe_place place = w->place;
  double limit = w->limit_s[place.phase];
  memset(out, 0, sizeof *out);
  out->phase = (int32_t)place.phase;
  out->step = place.step;
  out->layer = place.layer;
  out->collectives = place.collectives;
  out->still_s = w->clock - w->signed_at;
  out->used_up = limit > 0.0 && out->still_s >= limit;
  snprintf(out->what, sizeof out->what, "%s", place.what);
  snprintf(out->inside, sizeof out->inside, "%s", place.inside);
  snprintf(out->collective, sizeof out->collective, "%s", place.collective);
}

/* ---- what is said ---------------------------------------------------------------------------- */

/* Be gone in five seconds, whatever stderr does. */
static void last_alarm(int number) {
  (void)number;
  _exit(moe_status_exit_code(MOE_HUNG));
}

static void begin_last_words(void) {
  struct sigaction action = {.sa_handler = last_alarm};
  sigemptyset(&action.sa_mask);
  sigaction(SIGALRM, &action, NULL);
  alarm(5);
}

static void look_after_guards(void) {
  moe_status status = moe_guard_look();
  if (status == MOE_OK) return;
  begin_last_words();
  moe_error_now("%s", moe_error_message());
  _exit(moe_status_exit_code(status));
}

enum { PLACE_TEXT = 256 };

/* "step 7, experts forward of layer 3" */
static const char *place_text(const moe_news *n, char text[PLACE_TEXT]) {
  int used = snprintf(text, PLACE_TEXT, "%s", moe_phase_name((moe_phase)n->phase));
  if (n->phase == MOE_PHASE_STEP)
    used = snprintf(text, PLACE_TEXT, "step %lld", (long long)n->step);
  else if (n->step > 0)
    used = snprintf(text, PLACE_TEXT, "%s of step %lld", moe_phase_name((moe_phase)n->phase),
                    (long long)n->step);
  if (n->what[0]) used += snprintf(text + used, PLACE_TEXT - (size_t)used, ", %s", n->what);
  if (n->layer >= 0)
    snprintf(text + used, PLACE_TEXT - (size_t)used, " of layer %lld", (long long)n->layer);
  return text;
}

static void tell_rank(const moe_watchdog *w, int rank) {
  const peer *p = &w->peers[rank];
  char name[MOE_SIDE_NAME], place[PLACE_TEXT];
  moe_side_channel_name(w->channel, rank, name);
  if (!p->answered)
    moe_error_now("watchdog: %s: no answer", name);
  else if (p->news.inside[0])
    moe_error_now("watchdog: %s: %s: in %s for %.0f s", name, place_text(&p->news, place),
                  p->news.inside, p->news.still_s);
  else
    moe_error_now("watchdog: %s: %s: outside any wait for %.0f s, last collective: %s", name,
                  place_text(&p->news, place), p->news.still_s,
                  p->news.collective[0] ? p->news.collective : "none");
}

/* Names of the ranks for which `is` holds, as many as fit, and their number. */
static int name_ranks(const moe_watchdog *w, bool (*is)(const moe_watchdog *w, const peer *p),
                      char *text, size_t size) {
  int count = 0;
  size_t used = 0;
  text[0] = '\0';
  for (int r = 0; r < w->size; r++) {
    char name[MOE_SIDE_NAME];
    if (!is(w, &w->peers[r])) continue;
    moe_side_channel_name(w->channel, r, name);
    if (used + MOE_SIDE_NAME + 8 < size)
      used += (size_t)snprintf(text + used, size - used, "%s%s", count ? ", " : "", name);
    else if (text[used - 1] != '.')
      used += (size_t)snprintf(text + used, size - used, ", ...");
    count++;
  }
  return count;
}

static bool is_silent(const moe_watchdog *w, const peer *p) {
  (void)w;
  return !p->answered;
}

/* All ranks make the same collective calls, so who has made the fewest is whom others wait for. */
static bool is_behind(const moe_watchdog *w, const peer *p) {
  int64_t least = INT64_MAX;
  for (int r = 0; r < w->size; r++)
    if (w->peers[r].answered && w->peers[r].news.collectives < least)
      least = w->peers[r].news.collectives;
  return p->answered && p->news.collectives == least;
}

/* Print where everyone is and the cause, and end the process. */
static void end_job(const moe_watchdog *w) {
  const moe_news *mine = &w->peers[w->rank].news;
  char names[1024], place[PLACE_TEXT];
  begin_last_words();
  place_text(mine, place);
  for (int r = 0; r < w->size; r++) tell_rank(w, r);
  const char *setting = moe_phase_setting((moe_phase)mine->phase);
  double limit = w->limit_s[mine->phase];
  if (name_ranks(w, is_silent, names, sizeof names) > 0)
    moe_error_now("no answer from %s: the job hung in %s for %.0f s (%s = %.0f): look whether it "
                  "was stopped or its host is gone; the same command goes on from the last "
                  "checkpoint",
                  names, place, mine->still_s, setting, limit);
  else if (name_ranks(w, is_behind, names, sizeof names) < w->size)
    moe_error_now("%s hung: the others waited in %s for %.0f s (%s = %.0f): see its place above; "
                  "the same command goes on from the last checkpoint",
                  names, place, mine->still_s, setting, limit);
  else
    moe_error_now("all ranks hung in %s for %.0f s (%s = %.0f): check the network and the devices, "
                  "or raise the limit; the same command goes on from the last checkpoint",
                  place, mine->still_s, setting, limit);
  _exit(moe_status_exit_code(MOE_HUNG));
}

/* ---- the inquest ----------------------------------------------------------------------------- */

static void ask_all(moe_watchdog *w) {
  w->asked_at = w->clock;
  for (int r = 0; r < w->size; r++)
    if (r != w->rank) moe_side_channel_ask(w->channel, r, w->round);
}

static void begin_asking(moe_watchdog *w) {
  w->state = ASKING;
  w->since = w->clock;
  w->round++;
  for (int r = 0; r < w->size; r++) w->peers[r].answered = r == w->rank;
  ask_all(w);
}

static void hear(moe_watchdog *w, const moe_side_message *m) {
  moe_news mine;
  if (m->kind == MOE_SIDE_ANSWER) {
    if (m->round != w->round) return;
    w->peers[m->from].answered = true;
    w->peers[m->from].news = m->news;
    return;
  }
  say_news(w, &mine);
  moe_side_channel_answer(w->channel, m->from, m->round, &mine);
  /* Who asks has found everyone still. If we are, join: verdicts should come together. */
  if (w->state == WATCHING && mine.used_up) w->next_inquest = w->clock;
}

static int count_answers(const moe_watchdog *w) {
  int n = 0;
  for (int r = 0; r < w->size; r++) n += w->peers[r].answered;
  return n;
}

static bool somebody_has_time(const moe_watchdog *w) {
  for (int r = 0; r < w->size; r++)
    if (w->peers[r].answered && !w->peers[r].news.used_up) return true;
  return false;
}

static bool is_speaker(const moe_watchdog *w) {
  for (int r = 0; r < w->rank; r++)
    if (w->peers[r].answered) return false;
  return true;
}

/* At the start rank 0 asks everyone once, to find who would not be heard when it matters; unless it
 * matters already. */
static void finish_roll_call(moe_watchdog *w, bool matters) {
  char names[1024];
  if (!matters && count_answers(w) < w->size && w->clock - w->since < roll_call) return;
  if (!matters && name_ranks(w, is_silent, names, sizeof names) > 0)
    moe_warn("watchdog: no answer over UDP from %s: should the job hang, that will be taken for "
             "the cause: let UDP through between the hosts",
             names);
  w->roll_called = true;
  w->state = WATCHING;
}

static void conclude(moe_watchdog *w) {
  bool all = count_answers(w) == w->size, working = somebody_has_time(w);
  if (all && !working) {
    w->state = CONDEMNED;
    w->since = w->clock;
  } else if (w->clock - w->since >= grace) {
    w->state = working ? WATCHING : CONDEMNED;
    w->since = w->clock;
    w->next_inquest = w->clock + put_off;
  }
}

static void advance(moe_watchdog *w) {
  moe_news *mine = &w->peers[w->rank].news;
  say_news(w, mine);
  if (!w->roll_called) finish_roll_call(w, mine->used_up);
  if (w->roll_called && !mine->used_up) {
    w->state = WATCHING;
    w->next_inquest = w->clock;
  }
  if (w->state == WATCHING && mine->used_up && w->clock >= w->next_inquest) begin_asking(w);
  if (w->state == ASKING && w->clock - w->asked_at >= ask_again) ask_all(w);
  if (w->state == ASKING && w->roll_called) conclude(w);
  if (w->state == CONDEMNED && (is_speaker(w) || w->clock - w->since >= last_wait)) end_job(w);
}

static void *watch(void *arg) {
  moe_watchdog *w = arg;
  double guards_at = 0.0;
  w->looked = moe_clock_s();
  w->roll_called = w->rank != 0 || w->size == 1;
  if (!w->roll_called) begin_asking(w);
  while (!atomic_load(&w->stopping)) {
    moe_side_message message;
    double wait = w->state == WATCHING ? tick : 0.5 * ask_again;
    bool heard = moe_side_channel_receive(w->channel, (int)(1e3 * wait), &message);
    look(w);
    if (heard) hear(w, &message);
    advance(w);
    if (w->clock - guards_at < tick) continue;
    guards_at = w->clock;
    look_after_guards();
  }
  return NULL;
}

/* ---- start and end --------------------------------------------------------------------------- */

/* Signals are for the training thread. */
static int start_thread(moe_watchdog *w) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int error = pthread_create(&w->thread, NULL, watch, w);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  return error;
}

static moe_status start(moe_watchdog *w, moe_comm *world) {
  MOE_TRY(moe_side_channel_create(world, &w->channel));
  int error = start_thread(w);
  w->started = error == 0;
  if (error)
    return moe_agree(world, moe_fail(MOE_FAILED, "watchdog: no thread: %s", strerror(error)));
  return moe_agree(world, MOE_OK);
}

static moe_status create(moe_comm *world, const double limit_s[MOE_PHASES], moe_watchdog **out) {
  moe_watchdog *w = calloc(1, sizeof *w);
  moe_status status = MOE_OK;
  if (w) w->peers = calloc((size_t)moe_comm_size(world), sizeof *w->peers);
  if (!w || !w->peers) status = moe_fail(MOE_NO_MEMORY, "out of memory: watchdog");
  status = moe_agree(world, status);
  if (w && status == MOE_OK) {
    w->rank = moe_comm_rank(world);
    w->size = moe_comm_size(world);
    memcpy(w->limit_s, limit_s, sizeof w->limit_s);
    status = start(w, world);
  }
  if (status == MOE_OK)
    *out = w;
  else
    moe_watchdog_destroy(w);
  return status;
}

moe_status moe_watchdog_create(moe_comm *world, const double limit_s[MOE_PHASES],
                               moe_watchdog **out) {
  bool any = false;
  *out = NULL;
  for (int i = 0; i < MOE_PHASES; i++) any = any || limit_s[i] > 0.0;
  if (!any) return MOE_OK;
  moe_status status = create(world, limit_s, out);
  if (status != MOE_IO) return status;
  if (moe_comm_rank(world) == 0)
    moe_warn("no watchdog: %s: a hung rank will not end the job", moe_error_message());
  moe_error_clear();
  return MOE_OK;
}

void moe_watchdog_destroy(moe_watchdog *w) {
  if (!w) return;
  if (w->started) {
    atomic_store(&w->stopping, true);
    moe_side_channel_wake(w->channel);
    pthread_join(w->thread, NULL);
  }
  moe_side_channel_destroy(w->channel);
  free(w->peers);
  free(w);
}
