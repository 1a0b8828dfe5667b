/* THE configuration table: one row per key. Read by the parser, --set, --help, the printed resolved
 * configuration, checkpoints and docs/config.md (generated).
 *
 * Included many times with different macros; each row is one of
 *   INT(section, key, default, min, max, help)        int64_t section_key
 *   REAL(section, key, default, min, max, help)       double
 *   BOOL(section, key, default, help)                 bool
 *   TEXT(section, key, default, help)                 char[MOE_CONFIG_TEXT]
 *   ENUM(section, key, default, choices, help)        int: index into "a|b|c"
 * Members are named section.key: config.train.steps. A `model` size of 0 means "from the preset".
 */
#ifndef SECTION
#define SECTION(name, help)
#endif
#ifndef END_SECTION
#define END_SECTION(name)
#endif

SECTION(model,
        "The model's sizes and mathematics. A preset is a set of defaults; any key overrides it.")
ENUM(model, preset, 3, "tiny|small|1b|6.9b", "sizes to start from")
INT(model, vocab_size, 0, 0, 1 << 24, "vocabulary V")
INT(model, hidden_size, 0, 0, 1 << 17, "hidden size D")
INT(model, num_layers, 0, 0, 4096, "layers L")
INT(model, num_heads, 0, 0, 1024, "query heads H")
INT(model, num_kv_heads, 0, 0, 1024, "key/value heads G; H must be a multiple of it")
INT(model, head_dim, 0, 0, 1024, "head size d; even")
INT(model, num_experts, 0, 0, 4096, "experts per layer E")
INT(model, top_k, 0, 0, 64, "experts per token K")
INT(model, ffn_size, 0, 0, 1 << 20, "hidden size F of one expert")
INT(model, context, 0, 0, 1 << 24, "longest sequence the model is trained for, tokens")
REAL(model, norm_eps, 1e-5, 1e-12, 1e-1, "epsilon inside RMSNorm")
REAL(model, rope_base, 10000.0, 1.0, 1e12, "rotary base before NTK scaling")
REAL(model, rope_alpha, 1.0, 0.01, 1e6, "NTK factor alpha: base * alpha^(d/(d-2))")
REAL(model, init_std, 0.02, 0.0, 10.0,
     "standard deviation of initial weights; o_proj and w2 get std/sqrt(2L)")
END_SECTION(model)

SECTION(
    data,
    "Token files (.bin/.idx pairs, Megatron-Core's indexed format) and how they become batches.")
TEXT(data, train, "", "training blend: prefix, or weight:prefix[,weight:prefix...]")
TEXT(data, valid, "",
     "validation blend; empty: the last valid_fraction of each training file's documents")
REAL(data, valid_fraction, 0.01, 0.0, 0.5,
     "documents held out for validation when `valid` is empty")
TEXT(data, tokenizer, "",
     "SentencePiece model, or `bytes`; kept with the run, needed to generate text")
INT(data, sequence_length, 0, 0, 1 << 24, "tokens per sequence S; 0: the model's context")
BOOL(data, document_mask, false, "attention and positions stop at document boundaries")
INT(data, prefetch, 2, 1, 64, "micro-batches prepared ahead")
END_SECTION(data)

SECTION(train, "Length, batches, the loss and recomputation.")
INT(train, steps, 10000, 0, 1LL << 40, "optimizer steps in all")
INT(train, micro_batch, 1, 1, 1 << 20, "sequences per rank in one forward/backward pass")
INT(train, global_batch, 0, 0, 1 << 24,
    "sequences per step over all ranks; 0: micro_batch * ranks; otherwise a multiple of that, "
    "reached by accumulation")
INT(train, seed, 1234, 0, 1LL << 62, "seed of initial weights and of the sample order")
REAL(train, aux_coef, 0.01, 0.0, 100.0, "coefficient of the load-balancing loss")
ENUM(train, aux_scope, 0, "batch|sequence",
     "the load-balancing loss is over the whole micro-batch of all ranks, or per sequence")
REAL(train, z_coef, 0.0, 0.0, 100.0, "coefficient of the router z loss")
REAL(train, bias_update_rate, 0.0, 0.0, 1.0,
     "auxiliary-loss-free balancing: how far the selection bias moves per step; 0: off")
REAL(train, capacity_factor, 0.0, 0.0, 1e3,
     "0: dropless; otherwise an expert keeps at most factor * T * K / E of a rank's tokens, the "
     "most probable")
ENUM(train, recompute, 1, "none|swiglu|experts|block|auto",
     "activations computed again in backward: none, the experts' SwiGLU, their gate and up "
     "projections too, whole blocks, or what memory demands")
INT(train, recompute_layers, 0, 0, 4096,
    "how many layers (the first ones) `recompute` applies to; 0: all (`experts` and `block` never "
    "need it in the last, whose backward comes first). The others compute SwiGLU again, or with "
    "`swiglu` nothing")
INT(train, eval_interval, 0, 0, 1LL << 40, "steps between evaluations; 0: never")
INT(train, eval_batches, 8, 1, 1LL << 32, "micro-batches per rank in one evaluation")
INT(train, nonfinite_limit, 5, 1, 1 << 20,
    "end the run (exit 4) after this many non-finite steps in a row; each is skipped")
END_SECTION(train)

SECTION(optim, "AdamW and the learning-rate schedule.")
REAL(optim, lr, 1e-4, 0.0, 100.0, "peak learning rate")
REAL(optim, min_lr, -1.0, -1.0, 100.0, "final learning rate; -1: a tenth of lr")
ENUM(optim, schedule, 0, "cosine|linear|constant|wsd",
     "after warm-up: cosine or linear to min_lr, constant, or warm-up/stable/decay")
INT(optim, warmup_steps, 2000, 0, 1LL << 40,
    "linear warm-up; lr = peak * t / warmup for t = 1..warmup")
INT(optim, decay_steps, 0, 0, 1LL << 40, "wsd: length of the final decay; 0: a tenth of the run")
REAL(optim, beta1, 0.9, 0.0, 0.999999, "decay of the first moment")
REAL(optim, beta2, 0.95, 0.0, 0.9999999, "decay of the second moment")
REAL(optim, eps, 1e-8, 1e-20, 1.0, "added to the root of the second moment")
REAL(optim, weight_decay, 0.1, 0.0, 10.0, "decoupled decay, on matrices only")
REAL(optim, clip, 1.0, 0.0, 1e9, "global gradient norm limit; 0: none")
END_SECTION(optim)

SECTION(parallel, "Who owns what. world = ep * edp.")
INT(parallel, ep, 0, 0, 4096,
    "expert-parallel ranks per group; 0: the largest that divides the world and is at most E")
ENUM(parallel, exchange, 0, "auto|alltoall|allgather", "how tokens travel to their experts")
BOOL(parallel, zero1, false, "shard the optimizer state of replicated parameters over their copies")
END_SECTION(parallel)

SECTION(precision, "Number formats.")
ENUM(precision, dtype, 0, "fp32|bf16|fp16",
     "compute type; master weights (beside bf16 as the 2 bytes that it lacks), moments, gradient "
     "sums, router and loss stay fp32")
ENUM(precision, grad_dtype, 0, "fp32|bf16|auto",
     "gradients of the experts' weights: bf16 takes 2 bytes less per parameter, and needs "
     "dtype = bf16 and one micro-batch per step; auto: bf16 only if nothing else fits in memory")
ENUM(precision, moment_dtype, 0, "fp32|bf16|auto",
     "AdamW's moments of the experts' weights: bf16 (stochastically rounded) takes 4 bytes less "
     "per parameter; auto: bf16 only if nothing else fits in memory")
REAL(precision, loss_scale, 65536.0, 1.0, 1.6777216e7, "fp16: initial dynamic loss scale")
INT(precision, loss_scale_window, 1000, 1, 1 << 30, "fp16: finite steps before the scale doubles")
BOOL(precision, tf32, false, "fp32 on GPUs: allow TF32 in matrix products")
END_SECTION(precision)

SECTION(checkpoint, "What is saved and when. Saves go to <run.dir>/checkpoints.")
INT(checkpoint, interval, 1000, 0, 1LL << 40, "steps between saves; 0: only at the end")
INT(checkpoint, keep, 2, 2, 1 << 20,
    "complete checkpoints kept; older ones are deleted after a new one verifies")
INT(checkpoint, keep_every, 0, 0, 1LL << 40,
    "checkpoints of steps that are a multiple of this are kept for ever; 0: none")
REAL(checkpoint, keep_hours, 0.0, 0.0, 1e6, "checkpoints younger than this are kept, too; 0: none")
ENUM(checkpoint, async, 0, "auto|on|off",
     "training goes on while a save is written, from a copy in host memory: with what memory there "
     "is; only with all it takes (else an error); never")
REAL(checkpoint, snapshot_gib, 0.0, 0.0, 1e6,
     "host memory of one rank for that copy; less than a rank's part makes training wait for the "
     "disk while the rest is written; 0: a rank's part")
BOOL(checkpoint, save_final, true, "save after the last step")
END_SECTION(checkpoint)

SECTION(log, "What is reported.")
INT(log, interval, 1, 1, 1LL << 40, "steps between terminal lines (metrics.jsonl has every step)")
BOOL(log, tensorboard, true, "write TensorBoard event files")
REAL(log, peak_tflops, 0.0, 0.0, 1e6,
     "MFU's denominator per rank, TFLOP/s; 0: the device's published bf16 rate, or on a CPU the "
     "matrix rate measured at start")
END_SECTION(log)

SECTION(run, "The run and the machine.")
TEXT(run, dir, "", "the run's directory: checkpoints, metrics, configuration; required to train")
ENUM(run, backend, 0, "auto|cpu|cuda", "where the mathematics runs")
INT(run, threads, 0, 0, 4096, "CPU threads per rank; 0: the node's cores shared by its ranks")
BOOL(run, deterministic, false, "the same bits from run to run at fixed ranks")
BOOL(run, graphs, true,
     "on GPUs that each hold all experts, record a step (with accumulation: its kinds of "
     "micro-batches) as a device graph and launch that")
BOOL(run, debug, false,
     "after every operation check for non-finite values and name the first that made one")
REAL(run, memory_gib, 0.0, 0.0, 1e6,
     "memory one rank may plan for; 0: the device's free memory (GPU), no limit (CPU)")
REAL(run, wall_clock_limit, 0.0, 0.0, 1e7,
     "minutes the program may run: it stops in time to save (exit 75), after at least one step; 0: "
     "no limit")
INT(run, watchdog_start_s, 1800, 0, 1 << 30,
    "end the job (exit 76) when a rank gives no sign of life for this many seconds while it starts "
    "or ends; 0: wait for ever")
INT(run, watchdog_step_s, 600, 0, 1 << 30,
    "the same within a step: seconds between two layers or collectives, not of the step")
INT(run, watchdog_save_s, 3600, 0, 1 << 30, "the same while a checkpoint is saved")
INT(run, watchdog_evaluation_s, 1800, 0, 1 << 30, "the same in an evaluation")
END_SECTION(run)

#undef SECTION
#undef END_SECTION
