/* Datagrams between the ranks' watchdogs.
 *
 * A host may have several addresses of which only some reach it, and others (as of a container
 * bridge) that mean another machine elsewhere. So a rank is first written to at all its addresses;
 * the token and the addressee in each datagram sort out who was meant, and the address that a rank
 * was heard from is the one used afterwards. */
#include "parallel/side_channel.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ADDRESSES = 8 };

/* How to reach a rank, as it is exchanged. */
typedef struct {
  char host[64];
  char boot[40]; /* with the network namespace: those who share a loopback */
  uint64_t network;
  int32_t pid;
  uint16_t port; /* network order, as the addresses */
  int32_t count; /* of addresses */
  uint32_t address[ADDRESSES];
} card;

typedef struct {
  uint64_t token[2];
  int32_t kind, from, to;
  uint32_t round;
  moe_news news;
} datagram;

struct moe_side_channel {
  int rank, size;
  int socket, wake;
  uint64_t token[2];
  card *cards;               /* [size] */
  struct sockaddr_in *heard; /* [size] where a rank was heard from; family 0: not yet */
};

/* ---- set-up ---------------------------------------------------------------------------------- */

static void read_boot(char *out, size_t size) {
  FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r");
  if (f && !fgets(out, (int)size, f)) out[0] = '\0';
  if (f) fclose(f);
}

/* Addresses of this host that others may reach. */
static void list_addresses(card *mine) {
  struct ifaddrs *all = NULL;
  if (getifaddrs(&all) != 0) return;
  for (struct ifaddrs *i = all; i && mine->count < ADDRESSES; i = i->ifa_next) {
    if (!i->ifa_addr || i->ifa_addr->sa_family != AF_INET) continue;
    if (!(i->ifa_flags & IFF_UP) || (i->ifa_flags & IFF_LOOPBACK)) continue;
    struct sockaddr_in address;
    memcpy(&address, i->ifa_addr, sizeof address);
    mine->address[mine->count++] = address.sin_addr.s_addr;
  }
  freeifaddrs(all);
}

static moe_status open_socket(moe_side_channel *s, card *mine) {
  struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY)};
  socklen_t length = sizeof any;
  memset(mine, 0, sizeof *mine);
  s->socket = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  s->wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (s->socket < 0 || s->wake < 0 || bind(s->socket, (struct sockaddr *)&any, sizeof any) != 0 ||
      getsockname(s->socket, (struct sockaddr *)&any, &length) != 0)
    return moe_fail(MOE_IO, "cannot open a UDP socket: %s", strerror(errno));
  gethostname(mine->host, sizeof mine->host - 1);
  read_boot(mine->boot, sizeof mine->boot);
  struct stat space;
  if (stat("/proc/self/ns/net", &space) == 0) mine->network = space.st_ino;
  mine->pid = (int32_t)getpid();
  mine->port = any.sin_port;
  list_addresses(mine);
  return MOE_OK;
}

static bool share_loopback(const card *a, const card *b) {
  return strcmp(a->boot, b->boot) == 0 && a->network == b->network;
}

static moe_status set_up(moe_side_channel *s, moe_comm *world) {
  card mine;
  memset(&mine, 0, sizeof mine);
  moe_status status = MOE_OK;
  s->cards = calloc((size_t)s->size, sizeof *s->cards);
  s->heard = calloc((size_t)s->size, sizeof *s->heard);
  if (!s->cards || !s->heard)
    status = moe_fail(MOE_NO_MEMORY, "out of memory: addresses of %d ranks", s->size);
  if (status == MOE_OK) status = open_socket(s, &mine);
  if (status == MOE_OK && getrandom(s->token, sizeof s->token, 0) != sizeof s->token)
    status = moe_fail(MOE_IO, "no random numbers: %s", strerror(errno));
  MOE_TRY(moe_agree(world, status));
  MOE_TRY(moe_comm_host_broadcast(world, s->token, sizeof s->token, 0));
  MOE_TRY(moe_comm_host_all_gather(world, &mine, sizeof mine, s->cards));
  for (int r = 0; r < s->size; r++) {
    if (!share_loopback(&mine, &s->cards[r])) continue;
    s->cards[r].count = 1;
    s->cards[r].address[0] = htonl(INADDR_LOOPBACK);
  }
  return MOE_OK;
}

moe_status moe_side_channel_create(moe_comm *world, moe_side_channel **out) {
  *out = NULL;
  moe_side_channel *s = calloc(1, sizeof *s);
  moe_status status = s ? MOE_OK : moe_fail(MOE_NO_MEMORY, "out of memory: side channel");
  if (s) s->socket = s->wake = -1;
  status = moe_agree(world, status);
  if (s && status == MOE_OK) {
    s->rank = moe_comm_rank(world);
    s->size = moe_comm_size(world);
    status = set_up(s, world);
  }
  if (status == MOE_OK)
    *out = s;
  else
    moe_side_channel_destroy(s);
  return status;
}

void moe_side_channel_destroy(moe_side_channel *s) {
  if (!s) return;
  if (s->socket >= 0) close(s->socket);
  if (s->wake >= 0) close(s->wake);
  free(s->cards);
  free(s->heard);
  free(s);
}

/* ---- messages -------------------------------------------------------------------------------- */

static void send_to(moe_side_channel *s, const datagram *d, const struct sockaddr_in *where) {
  sendto(s->socket, d, sizeof *d, MSG_DONTWAIT | MSG_NOSIGNAL, (const struct sockaddr *)where,
         sizeof *where);
}

static void send_message(moe_side_channel *s, moe_side_kind kind, int rank, uint32_t round,
                         const moe_news *news) {
  datagram d;
  memset(&d, 0, sizeof d);
  memcpy(d.token, s->token, sizeof d.token);
  d.kind = (int32_t)kind;
  d.from = s->rank;
  d.to = rank;
  d.round = round;
  if (news) d.news = *news;
  const card *c = &s->cards[rank];
  if (s->heard[rank].sin_family == AF_INET) {
    send_to(s, &d, &s->heard[rank]);
    return;
  }
  for (int i = 0; i < c->count; i++) {
    struct sockaddr_in where = {
        .sin_family = AF_INET, .sin_port = c->port, .sin_addr.s_addr = c->address[i]};
    send_to(s, &d, &where);
  }
}

void moe_side_channel_ask(moe_side_channel *s, int rank, uint32_t round) {
  send_message(s, MOE_SIDE_ASK, rank, round, NULL);
}

void moe_side_channel_answer(moe_side_channel *s, int rank, uint32_t round, const moe_news *news) {
  send_message(s, MOE_SIDE_ANSWER, rank, round, news);
}

/* Is it of this job, for this rank and from another? */
static bool is_for_us(const moe_side_channel *s, const datagram *d, ssize_t bytes) {
  return bytes == (ssize_t)sizeof *d && memcmp(d->token, s->token, sizeof d->token) == 0 &&
         d->to == s->rank && d->from >= 0 && d->from < s->size && d->from != s->rank &&
         (d->kind == MOE_SIDE_ASK || d->kind == MOE_SIDE_ANSWER);
}

/* Take one datagram off the socket; 1: a message, 0: something else, -1: there was none. */
static int take(moe_side_channel *s, moe_side_message *out) {
  datagram d;
  struct sockaddr_in where;
  socklen_t length = sizeof where;
  ssize_t bytes = recvfrom(s->socket, &d, sizeof d, MSG_DONTWAIT | MSG_TRUNC,
                           (struct sockaddr *)&where, &length);
  if (bytes < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? -1 : 0;
  if (!is_for_us(s, &d, bytes)) return 0;
  s->heard[d.from] = where;
  out->kind = (moe_side_kind)d.kind;
  out->from = d.from;
  out->round = d.round;
  out->news = d.news;
  out->news.what[sizeof out->news.what - 1] = '\0';
  out->news.inside[sizeof out->news.inside - 1] = '\0';
  out->news.collective[sizeof out->news.collective - 1] = '\0';
  return 1;
}

bool moe_side_channel_receive(moe_side_channel *s, int timeout_ms, moe_side_message *out) {
  struct pollfd p[2] = {{.fd = s->socket, .events = POLLIN}, {.fd = s->wake, .events = POLLIN}};
  int got = take(s, out);
  if (got < 0 && poll(p, 2, timeout_ms) > 0 && (p[0].revents & POLLIN)) got = take(s, out);
  return got > 0;
}

void moe_side_channel_wake(moe_side_channel *s) {
  uint64_t one = 1;
  ssize_t written = write(s->wake, &one, sizeof one);
  (void)written; /* it fails only when it has been woken already */
}

const char *moe_side_channel_name(const moe_side_channel *s, int rank, char text[MOE_SIDE_NAME]) {
  const card *c = &s->cards[rank];
  snprintf(text, MOE_SIDE_NAME, "rank %d (pid %d on %.63s)", rank, (int)c->pid, c->host);
  return text;
}
