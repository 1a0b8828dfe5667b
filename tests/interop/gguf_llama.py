"""Does llama.cpp see in our GGUF files the model that is in the checkpoint?

    gguf_llama.py STEP_FOLDER FILE.gguf [TEXT MOE_DATA TOKENIZER]

Reads the checkpoint with h5py and runs the model in numpy, so that nothing of ours stands between
the two. Compares (1) every tensor, as the `gguf` package reads it, (2) the next token's whole
distribution after prompts of several lengths, and 24 tokens of greedy text, by llama.cpp (package
`xllamacpp`), (3) with TEXT, the ids that llama.cpp and `moe-data tokenize` give its lines.
Exits 0 when all agree, 77 when a package is not there. gguf.sh makes files and runs this on them.
"""
import json
import os
import subprocess
import sys
import tempfile
import urllib.request

try:
    import gguf
    import h5py
    import numpy as np
    import xllamacpp
except ImportError as missing:
    print(f"skipped: {missing}")
    sys.exit(77)


class Checkpoint:
    """Weights as float64: masters where there are any, else params."""

    def __init__(self, folder):
        self.folder = folder
        manifest = json.load(open(f"{folder}/manifest.json"))
        self.files = [h5py.File(f"{folder}/{f['name']}") for f in manifest["files"]]
        self.parts = {}
        for t in manifest["tensors"]:
            self.parts.setdefault((t["role"], t["name"]), []).append(t)
        self.config, section = {}, ""
        for line in manifest["state"]["config"].splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif "=" in line:
                key, value = line.split("=", 1)
                self.config[f"{section}.{key.strip()}"] = value.strip()
        self.cache = {}

    def names(self):
        return [name for role, name in self.parts if role == "param"]

    def __getitem__(self, name):
        if name not in self.cache:
            role = "master" if ("master", name) in self.parts else "param"
            parts = sorted(self.parts[role, name], key=lambda t: int(t["begin"]))
            flat = [np.asarray(self.files[t["file"]][t["dataset"]][:], np.float64).ravel() for t in parts]
            shape = [int(parts[0][k]) for k in ("rows", "columns") if k in parts[0]]
            self.cache[name] = np.concatenate(flat).reshape(shape)
        return self.cache[name]

    def size(self, key):
        return int(self.config["model." + key])


def norm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def rope(x, base):
    """x [T, heads, d]; pairs (i, i + d/2)."""
    t, _, d = x.shape
    angle = np.arange(t)[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(w, tokens, base):
    """[T, V] in float64, by the formulas of the model alone."""
    heads, groups, d = w.size("num_heads"), w.size("num_kv_heads"), w.size("head_dim")
    eps, top_k, t = float(w.config["model.norm_eps"]), w.size("top_k"), len(tokens)
    x = w["model.embed_tokens.weight"][tokens]
    future = np.triu(np.full((t, t), -np.inf), 1)
    for layer in range(w.size("num_layers")):
        at = lambda name: w[f"model.layers.{layer}.{name}.weight"]
        h = norm(x, at("input_layernorm"), eps)
        q = rope((h @ at("self_attn.q_proj").T).reshape(t, heads, d), base)
        k = rope((h @ at("self_attn.k_proj").T).reshape(t, groups, d), base)
        v = (h @ at("self_attn.v_proj").T).reshape(t, groups, d)
        k, v = (np.repeat(y, heads // groups, 1) for y in (k, v))
        s = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d) + future
        s = np.exp(s - s.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", s / s.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(t, heads * d) @ at("self_attn.o_proj").T
        h = norm(x, at("post_attention_layernorm"), eps)
        p = h @ at("block_sparse_moe.gate").T
        p = np.exp(p - p.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        chosen = np.argsort(-p, -1, kind="stable")[:, :top_k]
        y = np.zeros_like(x)
        for i in range(t):
            total = p[i, chosen[i]].sum()
            for e in chosen[i]:
                expert = lambda m: at(f"block_sparse_moe.experts.{e}.{m}")
                gate, up = expert("w1") @ h[i], expert("w3") @ h[i]
                y[i] += p[i, e] / total * (expert("w2") @ (gate / (1 + np.exp(-gate)) * up))
        x = x + y
    return norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


KINDS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "block_sparse_moe.gate": "ffn_gate_inp",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
         "lm_head.weight": "output.weight"}
EXPERTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}


def in_file(w, tensors, name):
    """The values of one of our tensors in the file, in our layout."""
    if name in WHOLE:
        return tensors[WHOLE[name]]
    parts = name.split(".")
    layer = parts[2]
    if "experts" in parts:
        return tensors[f"blk.{layer}.{EXPERTS[parts[6]]}.weight"][int(parts[5])]
    x = tensors[f"blk.{layer}.{KINDS['.'.join(parts[3:-1])]}.weight"]
    if parts[-2] in ("q_proj", "k_proj"):
        # llama.cpp: head, pair, half; ours: head, half, pair
        d = w.size("head_dim")
        x = x.reshape(-1, d // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return x


def check_tensors(w, path):
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    types = {t.tensor_type.name for t in reader.tensors}
    bound = 0.0 if types == {"F32"} else 2.0**-11 if types <= {"F32", "F16"} else 2.0**-7
    worst = 0.0
    for name in w.names():
        ours, theirs = w[name], in_file(w, tensors, name)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        worst = max(worst, np.abs(ours - theirs).max() / np.abs(ours).max())
        w.cache[name] = theirs  # from here on the model is the one in the file
    print(f"tensors: {len(w.names())} compared, types {sorted(types)}, largest difference {worst:.2g} of a tensor's largest")
    assert worst <= bound, worst
    base = float(reader.fields["llama.rope.freq_base"].contents())
    # llama.cpp rounds activations to the type of the weights they meet
    return base, {"F32": 2e-4, "F16": 0.01, "BF16": 0.1, "Q8_0": 0.1}[max(types, key=["F32", "F16", "BF16", "Q8_0"].index)]


class Llama:
    def __init__(self, path, context):
        p = xllamacpp.CommonParams()
        p.model.path = path
        p.n_ctx = p.n_batch = p.n_ubatch = context
        p.n_parallel, p.n_gpu_layers, p.verbosity = 1, 0, 0
        p.warmup = p.cache_prompt = p.fit_params = False
        p.cache_type_k = p.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        p.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(p)

    def post(self, path, **body):
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=60))

    def complete(self, tokens, n, **more):
        return self.post("/completion", prompt=tokens, n_predict=n, temperature=0.0, cache_prompt=False,
                         return_tokens=True, **more)

    def distribution(self, tokens, vocab):
        """Log probabilities of what follows; of a longer prompt when it is half a character, which the server
        holds back. Returns that prompt too."""
        while True:
            r = self.complete(tokens, 1, n_probs=vocab)
            if r.get("completion_probabilities") and not r["content"].endswith("\ufffd"):
                break
            tokens = tokens + r["tokens"]
        values = np.full(vocab, np.nan)
        for entry in r["completion_probabilities"][0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return tokens, values


def check_logits(w, llama, base, tolerance):
    vocab, context, random = w.size("vocab_size"), w.size("context"), np.random.default_rng(1)
    worst, same, greedy = 0.0, 0, min(24, context // 2 - 1)
    prompts = [[2] + random.integers(4, vocab, n).tolist() for n in (0, 1, 5, 11, context // 2 - 2)]
    for prompt in prompts:
        theirs = llama.complete(prompt, greedy)["tokens"]
        whole, first = llama.distribution(prompt, vocab)
        ours = log_softmax(logits(w, whole, base)[-1])
        known = ~np.isnan(first)
        assert known.sum() >= vocab - 1, "llama.cpp did not give the whole distribution"
        worst = max(worst, np.abs(ours - first)[known].max())
        text, sure = list(prompt), True
        for token in theirs:
            x = logits(w, text, base)[-1]
            best = int(x.argmax())
            # a tie within the tolerance may go either way, and all after it follows
            sure = sure and (best == token or x[best] - x[token] < 2 * tolerance)
            text.append(token)
        same += sure
    print(f"logits: {len(prompts)} prompts, largest difference of a log probability {worst:.2g} (at most {tolerance}); "
          f"{same} greedy texts of {greedy} tokens the same")
    assert worst <= tolerance and same == len(prompts)


def check_tokenizer(llama, text, moe_data, tokenizer):
    lines = [line for line in open(text, encoding="utf-8").read().split("\n\n") if line][:200]
    same = ties = tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        for line in lines:
            with open(f"{folder}/text", "w", encoding="utf-8") as f:
                f.write(line)
            subprocess.run([moe_data, "tokenize", "--input", f"{folder}/text", "--tokenizer", tokenizer, "--output",
                            f"{folder}/t", "--overwrite", "--no-append-eos", "--workers", "1"],
                           check=True, capture_output=True)
            ours = np.fromfile(f"{folder}/t.bin", np.uint16).tolist()
            theirs = llama.post("/tokenize", content=line, add_special=True, parse_special=False)["tokens"]
            back = llama.post("/detokenize", tokens=ours)["content"]
            assert back == line, (line, back)
            tokens += len(ours)
            same += ours == theirs
            # unigram: the same pieces in another order have the same score, and which of them wins is
            # a matter of how each library rounds its sums
            tie = ours != theirs and sorted(ours) == sorted(theirs)
            ties += tie
            if ours != theirs and not tie:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
                print(f"  differs at token {at}: ours {ours[at:at + 6]}, llama.cpp {theirs[at:at + 6]}: {line[:60]!r}")
    print(f"tokenizer: {same} of {len(lines)} texts ({tokens} tokens) encoded the same, {ties} with pieces in another "
          "order of the same score")
    assert same + ties == len(lines) and ties * 10 <= len(lines)


def main(arguments):
    w, path = Checkpoint(arguments[0]), arguments[1]
    base, tolerance = check_tensors(w, path)
    llama = Llama(path, w.size("context"))
    check_logits(w, llama, base, tolerance)
    if len(arguments) > 2:
        check_tokenizer(llama, *arguments[2:])
    sys.stdout.flush()
    os._exit(0)  # the server's threads need no farewell


if len(sys.argv) not in (3, 6):
    print(__doc__)
    sys.exit(2)
main(sys.argv[1:])
