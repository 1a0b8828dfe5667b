/* moe-run, with programs that play mpirun, srun, scontrol, ssh and moe-train.
 *
 * The false mpirun notes its arguments in `calls` and the signals it gets in `signals`, and plays
 * line n of `script` in its n-th call: EXIT_CODE SAVED_STEP LAST_STEP [wait]. The false sleep does
 * not. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tests/support/expect_command.h"

static char folder[] = "/tmp/moe-run-XXXXXX";

static void write_file(const char *name, const char *text) {
  char path[256];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  FILE *f = fopen(path, "w");
  cr_assert(f && fputs(text, f) >= 0 && fclose(f) == 0 && chmod(path, 0755) == 0, "%s", path);
}

static const char play[] =
    "#!/bin/bash\n"
    "cd \"$FOLDER\"\n"
    "trap 'echo USR2 >>signals; asked=75' USR2\n"
    "trap 'echo TERM >>signals; exit 143' TERM\n"
    "echo \"${0##*/} $*\" >>calls\n"
    "read -r code saved last wait < <(sed -n \"$(wc -l <calls)p\" script)\n"
    "for ((i = 1; i < $#; i++)); do\n"
    "  [ \"${!i}\" = --output-filename ] && j=$((i + 1)) && logs=${!j%:nojobid}\n"
    "done\n"
    "[ -z \"$logs\" ] || mkdir -p $logs/rank.0 $logs/rank.1\n"
    "[ -z \"$logs\" ] || echo 'the last words of rank 1' >$logs/rank.1/stdout\n"
    "mkdir -p run/checkpoints\n"
    "printf -v place 'run/checkpoints/step-%08d' \"${saved:-0}\"\n"
    "[ \"${saved:-0}\" = 0 ] || { mkdir -p $place && touch $place/manifest.json; }\n"
    "/bin/sleep 0.02 # a file is newer only by a tick of the clock\n"
    "[ \"${last:-0}\" = 0 ] || echo \"{\\\"step\\\": $last, \\\"tokens\\\": 1}\" "
    ">>run/metrics.jsonl\n"
    "while [ -n \"$wait\" ] && [ -z \"$asked\" ]; do /bin/sleep 0.05; done\n"
    "code=${asked:-$code}\n"
    "[ \"$code\" = 137 ] && echo 'mpirun noticed that process rank 1 with PID 9 on node a' >&2\n"
    "exit \"$code\"\n";

static void set_up(void) {
  cr_assert(mkdtemp(folder));
  write_file("mpirun", play);
  write_file("srun", play);
  write_file("moe-train", "#!/bin/sh\ncat \"$FOLDER/settings\"\n");
  write_file("settings", "run\n2\n24\n0\n"); /* run.dir, micro_batch, global_batch, ep */
  write_file("sleep", "#!/bin/sh\nexit 0\n");
  write_file("scontrol", "#!/bin/sh\necho \"scontrol $*\" >>\"$FOLDER/calls\"\n");
  write_file("agent", "#!/bin/sh\ntest ! -e \"$FOLDER/$1.gone\"\n");
  write_file("calls", "");
  write_file("signals", "");
}

static void tear_down(void) {
  moe_command c = moe_command_run(10, "rm -rf %s", folder);
  moe_command_free(&c);
}

TestSuite(moe_run, .init = set_up, .fini = tear_down);

/* The shell line `line` in the folder, where R is moe-run with the false programs. */
static moe_command shell(const char *line) {
  return moe_command_run(
      30,
      "cd %s; export FOLDER=$PWD PATH=$PWD:$PATH OMPI_MCA_plm_rsh_agent=$PWD/agent; "
      "unset SLURM_JOB_ID $(env | sed -n 's/^\\(\\(CUDA\\|NCCL\\|UCX\\)_[^=]*\\)=.*/\\1/p'); "
      "R='%s/launch/moe-run --program ./moe-train'; %s",
      folder, MOE_SOURCE_DIR, line);
}

#define expect(line, ...) expect_command(shell(line), line, __VA_ARGS__)

/* How many times mpirun and srun were called. */
static void expect_calls(int n) {
  char line[64];
  snprintf(line, sizeof line, "test $(wc -l <calls) -eq %d", n);
  expect(line, 0, NULL);
}

Test(moe_run, prints_the_command_and_runs_nothing) {
  expect("NCCL_DEBUG=INFO $R -n 4 --print-cmd cfg.ini --set 'run.dir=a b'", 0, "mpirun -np 4 ",
         "--bind-to none", "--oversubscribe", "-x NCCL_DEBUG", "attempt-001:nojobid",
         "/moe-train cfg.ini --set run.dir=a\\ b", NULL);
  expect_calls(0);
}

Test(moe_run, starts_a_rank_for_each_visible_gpu) {
  write_file("nvidia-smi",
             "#!/bin/sh\necho 'GPU 0: H200'; echo 'GPU 1: H200'; echo 'GPU 2: H200'\n");
  expect("$R --print-cmd cfg.ini", 0, "-np 3 ", NULL);
  expect("CUDA_VISIBLE_DEVICES=2,0 $R --print-cmd cfg.ini", 0, "-np 2 ", NULL);
  expect("CUDA_VISIBLE_DEVICES= $R --print-cmd cfg.ini", 0, "-np 1 ", NULL);
}

Test(moe_run, fills_machines_one_after_the_other) {
  write_file("hosts", "# mine\na slots=3\n\nb slots = 1 # the small one\n");
  expect("$R --print-cmd --hostfile hosts cfg.ini", 0, "-np 4", "--host a:3\\,b:1 ", NULL);
  expect("$R --print-cmd --hosts a,b --gpus-per-node 8 cfg.ini", 0, "-np 16", "a:8\\,b:8 ", NULL);
  expect("$R --print-cmd --hosts a,b -n 6 cfg.ini", 0, "-np 6", "a:3\\,b:3 ", NULL);
  expect("$R --print-cmd --hosts a:2,b:2 -n 5 cfg.ini", 2, "4 slots", NULL);
  expect("$R --print-cmd --hosts a,b cfg.ini", 2, "give -n", NULL);
}

Test(moe_run, takes_srun_inside_slurm) {
  expect("SLURM_JOB_ID=7 $R -n 8 --gpus-per-node 4 --print-cmd cfg.ini", 0, "srun ", "-n 8 ",
         "--ntasks-per-node=4", "--kill-on-bad-exit=1", "rank-%2t.log", NULL);
  expect("SLURM_JOB_ID=7 $R -n 8 --launcher mpirun --print-cmd cfg.ini", 0, "mpirun -np 8 ", NULL);
}

Test(moe_run, names_what_is_wrong_on_its_command_line) {
  expect("$R", 2, "no configuration", NULL);
  expect("$R -n zero cfg.ini", 2, "-n needs a number", "'zero'", NULL);
  expect("$R -n 0 cfg.ini", 2, "-n needs a number", NULL);
  expect("$R --frobnicate 3 cfg.ini", 2, "--frobnicate", NULL);
  expect("$R --hosts 'a;b' cfg.ini", 2, "not a host name", NULL);
  expect("$R --hosts a:x cfg.ini", 2, "slots of a", NULL);
  expect("$R --hostfile nowhere cfg.ini", 2, "nowhere", NULL);
  expect("$R --launcher pigeon cfg.ini", 2, "pigeon", NULL);
  expect("$R --elastic -n 2 cfg.ini", 2, "--elastic needs --hosts", NULL);
  expect("$R --program nowhere cfg.ini", 2, "cannot run nowhere", NULL);
  write_file("settings", "run\n2\n0\n0\n");
  expect("$R --elastic --hosts a:2,b:2 cfg.ini", 2, "set train.global_batch", NULL);
  write_file("moe-train", "#!/bin/sh\necho 'moe-train: cfg.ini:3: bad' >&2; exit 2\n");
  expect("$R -n 2 cfg.ini", 2, "cfg.ini:3: bad", NULL);
  expect_calls(0);
}

Test(moe_run, is_done_when_the_job_is) {
  write_file("script", "0 60 60\n");
  expect("$R -n 2 cfg.ini", 0, "exit 0, done; at step 60, saved up to step 60; all done", NULL);
  expect_calls(1);
}

Test(moe_run, never_repeats_what_a_person_must_mend) {
  write_file("script", "2\n3\n4\n");
  expect("$R -n 2 cfg.ini", 2, "bad usage or configuration", "not tried again", NULL);
  expect("$R -n 2 cfg.ini", 3, "damaged", NULL);
  expect("$R -n 2 cfg.ini", 4, "diverged", NULL);
  expect_calls(3);
}

Test(moe_run, starts_a_failed_job_again_and_shows_what_the_rank_said) {
  write_file("script", "137 20 25\n76 20 26\n0 60 60\n");
  expect("$R -n 2 cfg.ini", 0, "rank 1 failed first", "  | the last words of rank 1",
         "attempt-001 on 2 ranks: exit 137, killed by KILL; at step 25, saved up to step 20; again "
         "in 10 s",
         "attempt-002 on 2 ranks: exit 76, a rank did not answer in time", "attempt-003",
         "all done", NULL);
  expect_calls(3);
  expect("cat run/logs/attempt-001/rank-01.log; cat run/logs/moe-run.log", 0,
         "the last words of rank 1", "again in 10 s", NULL);
}

Test(moe_run, waits_twice_as_long_each_time_and_gives_up_after_five) {
  write_file("script", "1 0 1\n1 0 2\n1 0 3\n1 0 4\n1 0 5\n1 0 6\n0 9 9\n");
  expect("$R -n 2 --backoff-limit 100 cfg.ini", 1, "again in 10 s", "again in 20 s",
         "again in 40 s", "again in 80 s", "again in 100 s", "5 restarts without a new checkpoint",
         NULL);
  expect_calls(6);
}

Test(moe_run, a_new_checkpoint_begins_the_count_anew) {
  write_file("script", "1 1 1\n1 2 2\n1 3 3\n1 4 4\n1 5 5\n1 6 6\n1 7 7\n0 9 9\n");
  expect("$R -n 2 cfg.ini", 0, "attempt-008", "all done", NULL);
  expect("grep -c 'again in 10 s' run/logs/moe-run.log", 0, "7", NULL);
}

Test(moe_run, gives_up_after_three_attempts_without_a_step) {
  write_file("script", "1\n1\n1\n0 9 9\n");
  expect("$R -n 2 cfg.ini", 1, "three attempts without a step", NULL);
  expect_calls(3);
}

Test(moe_run, turns_a_request_to_stop_into_the_signal_that_saves) {
  write_file("script", "1 5 5 wait\n");
  expect("$R -n 2 cfg.ini & pid=$!; until test -s calls; do /bin/sleep 0.05; done; /bin/sleep 0.2; "
         "kill -TERM $pid; wait $pid",
         75, "TERM: the job saves and stops", "stopped after saving", "run the same command", NULL);
  expect("cat signals; grep -c . signals", 0, "USR2\n1\n", NULL);
}

Test(moe_run, ends_at_once_when_interrupted_twice) {
  write_file("script", "1 5 5 wait\n");
  write_file("mpirun", "#!/bin/bash\ncd $FOLDER; echo >>calls; trap 'echo USR2 >>signals' USR2\n"
                       "trap 'echo TERM >>signals; exit 143' TERM\n"
                       "while :; do /bin/sleep 0.05; done\n");
  expect(
      "env --default-signal=INT $R -n 2 cfg.ini & pid=$!; until test -s calls; do /bin/sleep 0.05; "
      "done; /bin/sleep 0.2; kill -INT $pid; /bin/sleep 0.3; kill -INT $pid; wait $pid",
      143, "INT: the job saves", "ending at once", NULL);
  expect("tr '\\n' ' ' <signals", 0, "USR2 TERM", NULL);
}

Test(moe_run, saves_the_job_when_it_is_killed_itself) {
  write_file("script", "1 5 5 wait\n");
  expect("$R -n 2 cfg.ini & pid=$!; until test -s calls; do /bin/sleep 0.05; done; /bin/sleep 0.2; "
         "kill -KILL $pid; for i in 1 2 3 4 5 6 7 8; do /bin/sleep 0.1; done; cat signals",
         0, "USR2", NULL);
}

Test(moe_run, a_job_that_stopped_by_itself_goes_on_only_if_asked) {
  write_file("script", "75 5 5\n75 9 9\n0 20 20\n");
  expect("$R -n 2 cfg.ini", 75, "run the same command again", NULL);
  expect_calls(1);
  expect("$R -n 2 --restart-on-stop cfg.ini", 0, "saved up to step 9; again", "all done", NULL);
  expect_calls(3);
}

Test(moe_run, requeues_a_slurm_job_that_must_leave) {
  write_file("script", "75 5 5\n0\n1 5 5 wait\n");
  expect("SLURM_JOB_ID=7 $R -n 2 cfg.ini", 75, "requeueing job 7", NULL);
  expect("cat calls", 0, "scontrol requeue 7", NULL);
  /* but not one that a person cancels */
  expect("SLURM_JOB_ID=7 $R -n 2 cfg.ini & pid=$!; until test $(wc -l <calls) -eq 3; do "
         "/bin/sleep 0.05; done; /bin/sleep 0.2; kill -TERM $pid; wait $pid",
         75, "run the same command again", NULL);
  expect("grep -c scontrol calls", 0, "1", NULL);
}

/* As Slurm does: USR2 to the script's own process. */
Test(moe_run, the_slurm_script_saves_and_requeues_before_its_time_is_over) {
  write_file("script", "1 5 5 wait\n");
  expect("export SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD SLURM_NTASKS=8 SLURM_NTASKS_PER_NODE=4 "
         "MOE_RUN=${R%% *}; bash ${R%%/moe-run*}/slurm/moe-train.sbatch --program ./moe-train "
         "cfg.ini & pid=$!; until test -s calls; do /bin/sleep 0.05; done; /bin/sleep 0.2; "
         "kill -USR2 $pid; wait $pid",
         75, "USR2: the job saves", "requeueing job 7", NULL);
  expect("cat signals calls", 0, "USR2", "srun ", "-n 8 ", "--ntasks-per-node=4",
         "scontrol requeue 7", NULL);
}

Test(moe_run, elastic_goes_on_with_the_hosts_that_answer) {
  write_file("script", "1 5 7\n0 20 20\n");
  write_file("mpirun", "#!/bin/bash\ntouch $FOLDER/h2.gone\nexec $FOLDER/srun \"$@\"\n");
  /* 24 sequences in micro-batches of 2: 12 / 9 ranks are none, 12 / 8 neither, 12 / 6 are two */
  expect("$R --elastic --hosts h1:5,h2:3,h3:4 cfg.ini", 0, "no answer from: h2",
         "6 of 12 ranks: a step is still 24 sequences = 6 ranks x micro-batch 2 x 2", "all done",
         NULL);
  expect("tail -n 1 calls", 0, "-np 6 ", "--host h1:5,h3:4 ", NULL);
}

Test(moe_run, elastic_heeds_ep_and_the_least_number_of_ranks) {
  write_file("settings", "run\n2\n24\n4\n");
  write_file("h2.gone", "");
  write_file("script", "0 20 20\n");
  expect("$R --elastic --hosts h1:5,h2:3,h3:4 cfg.ini", 0, "4 of 12 ranks", NULL);
  expect("$R --elastic --min-np 8 --hosts h1:5,h2:3,h3:4 cfg.ini", 1, "no answer from: h2",
         "--min-np 8", "again in 10 s", "three attempts without a step", NULL);
  expect_calls(1);
}

Test(moe_run, preflight_asks_the_hosts_first) {
  write_file("script", "0\n1\n");
  expect("$R --preflight --hosts h1:1,h2:1 cfg.ini", 0, "host h1", "pass", NULL);
  expect("tail -n 1 calls", 0, "--preflight", NULL);
  expect("$R --preflight --hosts h1:1,h2:1 cfg.ini", 1, NULL);
  write_file("h2.gone", "");
  expect("$R --preflight --hosts h1:1,h2:1 cfg.ini", 1, "host h2              FAIL", "ssh", NULL);
  expect_calls(2);
}
