/* The side channel: small datagrams between the ranks, for the thread that watches when the one
 * that trains hangs in MPI or NCCL.
 *
 * Every rank has a UDP socket on a port of the system's choice; addresses are exchanged over MPI
 * once. Nothing is sent until somebody asks. Each datagram carries a random token of the job, so
 * strangers are not heard. Datagrams may be lost: ask again. Nothing here but create waits, and
 * nothing but create is collective. One thread uses a channel, but for wake. IPv4.
 * Private to parallel/. */
#ifndef MOE_PARALLEL_SIDE_CHANNEL_H
#define MOE_PARALLEL_SIDE_CHANNEL_H

#include "parallel/comm.h"

typedef struct moe_side_channel moe_side_channel;

/* What a rank says of itself. Plain: it is sent as it lies in memory. */
typedef struct {
  int32_t phase;   /* moe_phase */
  int32_t used_up; /* its limit */
  int64_t step, layer, collectives;
  double still_s; /* since the last sign of life */
  char what[48], inside[48], collective[48];
} moe_news;

typedef enum { MOE_SIDE_ASK, MOE_SIDE_ANSWER } moe_side_kind;
typedef struct {
  moe_side_kind kind;
  int from;
  uint32_t round; /* an answer bears that of its question */
  moe_news news;  /* of an answer */
} moe_side_message;

/* Collective. MOE_IO when a rank can open no socket. */
moe_status moe_side_channel_create(moe_comm *world, moe_side_channel **out);
void moe_side_channel_destroy(moe_side_channel *s);

void moe_side_channel_ask(moe_side_channel *s, int rank, uint32_t round);
void moe_side_channel_answer(moe_side_channel *s, int rank, uint32_t round, const moe_news *news);
/* The next message of another rank, waiting for it at most timeout_ms. False: none came, or wake
 * was called, from any thread. */
bool moe_side_channel_receive(moe_side_channel *s, int timeout_ms, moe_side_message *out);
void moe_side_channel_wake(moe_side_channel *s);

/* "rank 3 (pid 4711 on node12)" */
enum { MOE_SIDE_NAME = 128 };
const char *moe_side_channel_name(const moe_side_channel *s, int rank, char text[MOE_SIDE_NAME]);

#endif
