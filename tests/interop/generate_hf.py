"""Greedy texts of moe-generate against those of transformers, or of vLLM, on an export of the same
model: 20 prompts of 1 to 60 tokens, continued beyond the training length with alpha 4, one at a time
and in batches. Texts must be equal; only where the two likeliest tokens are within 1e-4 of each other
may one choose the other.

Run it through generate_hf.sh. (vLLM on a CPU takes heads of 32 and hidden sizes divisible by 32.)"""
import argparse, json, os, pathlib, random, subprocess, sys, tempfile, warnings

PROMPTS, NEW, VOCAB, ALPHA = 20, 40, 260, 4
CONFIG = """[model]
vocab_size = 260
hidden_size = 96
num_layers = 3
num_heads = 6
num_kv_heads = 2
head_dim = 32
num_experts = 5
top_k = 3
ffn_size = 56
context = 32
init_std = 0.2
[data]
train = {folder}/tokens
tokenizer = bytes
[train]
steps = 30
micro_batch = 8
[optim]
lr = 0.01
warmup_steps = 2
[run]
dir = {folder}/run
backend = cpu
threads = 1
"""

warnings.filterwarnings("ignore")
parser = argparse.ArgumentParser()
parser.add_argument("--build", required=True)
parser.add_argument("--reader", choices=("transformers", "vllm"), default="transformers")
options = parser.parse_args()
binaries = pathlib.Path(options.build).resolve() / "bin"


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr.decode()}")
    return done.stdout.decode()


def prepare(folder):
    words = "the model learns experts token of gate route loss sum node rank".split()
    draw = random.Random(3)
    lines = [" ".join(draw.choice(words) for _ in range(12)) for _ in range(300)]
    (folder / "text").write_text("\n".join(lines) + "\n")
    (folder / "cfg.ini").write_text(CONFIG.format(folder=folder))
    run(binaries / "moe-data", "tokenize", "--input", folder / "text", "--tokenizer", "bytes",
        "--split-documents", "lines", "--output", folder / "tokens")
    run(binaries / "moe-train", folder / "cfg.ini")
    run(binaries / "moe-convert", "export-hf", folder / "run", "--output", folder / "hf", "--dtype", "fp32",
        "--alpha", ALPHA)
    data = (folder / "text").read_bytes()
    prompts = []
    for i in range(PROMPTS):  # half of them text, half noise
        n, at = 1 + 59 * i // (PROMPTS - 1), draw.randrange(len(data) - 60)
        prompts.append([4 + b for b in data[at:at + n]] if i % 2 else [draw.randrange(4, VOCAB) for _ in range(n)])
    (folder / "prompts").write_text("".join(" ".join(map(str, p)) + "\n" for p in prompts))
    return prompts


def transformers_texts(hf, prompts):
    """A text for each prompt and, for each token of it, how far the next likeliest was behind."""
    import torch, transformers
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager")
    for prompt in prompts:
        ids, gaps, cache, new = [], [], None, torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(NEW):
                out = model(new, past_key_values=cache, use_cache=True)
                best = out.logits[0, -1].topk(2)
                cache = out.past_key_values
                ids.append(int(best.indices[0]))
                gaps.append(float(best.values[0] - best.values[1]))
                new = torch.tensor([[ids[-1]]])
        yield ids, gaps


def vllm_texts(hf, prompts):
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import vllm
    model = vllm.LLM(str(hf), dtype="float32", enforce_eager=True, max_model_len=ALPHA * 32)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=2)
    for out in model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False):
        best = [sorted((x.logprob for x in step.values()), reverse=True) for step in out.outputs[0].logprobs]
        yield list(out.outputs[0].token_ids), [two[0] - two[1] for two in best]


def ours(folder, batch):
    lines = run(binaries / "moe-generate", "--checkpoint", folder / "run", "--ids", "--prompt-file",
                folder / "prompts", "--greedy", "--max-new", NEW, "--alpha", ALPHA, "--dtype", "fp32", "--json",
                "--threads", 1, "--batch", batch)
    return [json.loads(line)["ids"] for line in lines.splitlines()]


def main(folder):
    prompts, failures = prepare(folder), 0
    reader = {"transformers": transformers_texts, "vllm": vllm_texts}[options.reader]
    expected = list(reader(folder / "hf", prompts))
    version = sys.modules[options.reader].__version__
    for batch in (1, 8):
        same = 0
        for i, (mine, (ids, gaps)) in enumerate(zip(ours(folder, batch), expected, strict=True)):
            differ = next((k for k in range(NEW) if mine[k] != ids[k]), None)
            same += differ is None
            if differ is not None and gaps[differ] > 1e-4:
                failures += 1
                print(f"FAILED  batch {batch}, prompt {i} of {len(prompts[i])} tokens: token {differ} is "
                      f"{mine[differ]}, not {ids[differ]}, which is {gaps[differ]:.3g} ahead")
        print(f"batch {batch}: {same} of {PROMPTS} texts of {NEW} tokens are those of {options.reader} "
              f"{version}")
    distinct = len({tuple(ids) for ids, _ in expected})
    if distinct < PROMPTS // 2:
        failures += 1
        print(f"FAILED  only {distinct} different texts: the model shows nothing")
    return failures


with tempfile.TemporaryDirectory(prefix="moe-generate-hf-") as place:
    sys.exit(1 if main(pathlib.Path(place)) else 0)
