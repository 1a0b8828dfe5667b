"""Exports as transformers sees them: a model trained for a few steps is exported with each kind of
tokenizer and in each type, loaded by AutoModelForCausalLM and AutoTokenizer, and compared with us:

    logits       ours (interop_logits) against theirs on the same tokens
    token ids    moe-data tokenize against tokenizer.json on texts chosen to be nasty
    text         decoding gives back what was encoded
    import       what transformers saves again, moe-convert imports, to the same weights

Run it through hf.sh."""
import argparse, itertools, json, os, pathlib, random, subprocess, sys, tempfile, warnings

import numpy as np
import torch, transformers, tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
options = argparse.ArgumentParser()
options.add_argument("--build", required=True)
options.add_argument("--keep")
options = options.parse_args()
binaries = pathlib.Path(options.build).resolve() / "bin"
failures = 0


def expect(holds, words):
    global failures
    failures += not holds
    print(("ok      " if holds else "FAILED  ") + words, flush=True)


def run(*command, stdin=None):
    done = subprocess.run([str(c) for c in command], input=stdin, capture_output=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr.decode()}")
    return done.stdout


WORDS = ("the model learns experts token of gate route loss sum node rank lauf über Straße café naïve "
         "x+y if(a) don't \"quoted\" 3.14 2024 one-two snow_case CamelCase").split()


WORDS += ["".join(p) for p in itertools.product("br cl tr st p".split(), "a e i o u ei".split(), "n rd st sch le ng".split())]


def sentence(draw):
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(3, 14))) + draw.choice([".", "!", "?", ""])


def texts(draw):
    """What tokenizers get wrong: blanks, newlines, digits, bytes, marks that mean something."""
    fixed = ["a", " ", "  ", " leading", "trailing ", "   three   blanks   ", "\n", "\n\n a\n b \n", "\t tab\ttab",
             "0123456789 3.14159 -17", "don't \"x\" `y` \\ / {}", "日本語のテキスト", "emoji 🙂🙃 👩‍👩‍👧 flag 🇩🇪",
             "café cafe\u0301 ǆ ﬁ", "zero\u200bwidth \u00a0nbsp", "ÅÄÖ ß ẞ İ ı", "<0x0A> <0x41><0xZZ> < 0x0A>",
             "</s> <s> [INST] <|x|>", "\u2581 already \u2581there", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u0000".replace("\u0000", "nul"),
             "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "the" * 40, "\r\n dos\r\n", "mixed über1 Straße2x3"]
    pool = "ab e\n t0189.,!?é🙂日<>x▁ -_()\"'\\ß"
    return fixed + [sentence(draw) for _ in range(150)] + [
        "".join(draw.choice(pool) for _ in range(draw.randint(1, 60))) for _ in range(150)]


def our_ids(folder, model, lines):
    """Token ids of each text by moe-data, read from the files it writes."""
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    run(binaries / "moe-data", "tokenize", "--input", source, "--tokenizer", model, "--output", folder / "texts",
        "--no-append-eos", "--overwrite")
    index = (folder / "texts.idx").read_bytes()
    count = int.from_bytes(index[18:26], "little")
    lengths = np.frombuffer(index, "<i4", count, 34)
    ids = np.fromfile(folder / "texts.bin", "<u2" if index[17] == 8 else "<i4")
    return [list(map(int, part)) for part in np.split(ids, np.cumsum(lengths)[:-1])]


def train(folder, name, tokenizer, vocab):
    """A run of a few steps of a model whose sizes all differ."""
    settings = f"""[model]
vocab_size = {vocab}
hidden_size = 48
num_layers = 3
num_heads = 6
num_kv_heads = {2 if name == "bpe" else 1}
head_dim = 10
num_experts = 5
top_k = 3
ffn_size = 56
context = 64
rope_base = 5000
init_std = 0.2
[data]
train = {folder / name}
tokenizer = {tokenizer}
[train]
steps = 4
micro_batch = 2
[optim]
lr = 0.01
warmup_steps = 2
[precision]
dtype = {"bf16" if name == "bpe" else "fp32"}
[run]
dir = {folder / ("run-" + name)}
backend = cpu
threads = 2
"""
    (folder / f"{name}.ini").write_text(settings)
    run(binaries / "moe-train", folder / f"{name}.ini")
    return folder / ("run-" + name)


def our_logits(path, tokens, vocab):
    text = " ".join(str(t) for row in tokens for t in row)
    raw = run(binaries / "interop_logits", path, len(tokens[0]), stdin=text.encode())
    return np.frombuffer(raw, "<f4").reshape(len(tokens), len(tokens[0]), vocab)


def check_logits(what, export, reference, vocab, dtype, tolerance, long=48):
    draw = random.Random(7)
    tokens = [[2] + [draw.randrange(vocab) for _ in range(long - 1)] for _ in range(3)]
    model = AutoModelForCausalLM.from_pretrained(export, dtype=dtype, attn_implementation="eager").eval()
    expect(type(model).__name__ == "MixtralForCausalLM", f"{what}: loads as MixtralForCausalLM")
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.float().numpy()
    ours = our_logits(reference, tokens, vocab)
    away = np.abs(ours - theirs).max() / np.abs(ours).max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    expect(away < tolerance, f"{what}: logits {away:.2g} of the largest away (limit {tolerance:g}), "
                             f"same best token at {100 * same:.1f} %")
    return model


def check_tokenizer(what, folder, export, model):
    draw = random.Random(11)
    lines = texts(draw)
    ours = our_ids(folder, model, lines)
    theirs_of = AutoTokenizer.from_pretrained(export)
    expect((theirs_of.pad_token_id, theirs_of.unk_token_id, theirs_of.bos_token_id, theirs_of.eos_token_id)
           == (0, 1, 2, 3), f"{what}: <pad> <unk> <bos> <eos> are 0..3")
    theirs = [theirs_of(t)["input_ids"] for t in lines]
    wrong = [t for t, a, b in zip(lines, ours, theirs) if a != b]
    expect(not wrong, f"{what}: {len(lines) - len(wrong)} of {len(lines)} texts give the same tokens"
           + (f"; first other: {wrong[0]!r}" if wrong else ""))
    back = [theirs_of.decode(ids, skip_special_tokens=True) for ids in theirs]
    lost = [t for t, b in zip(lines, back) if t.replace("\u2581", "\u2581" if what == "bytes" else " ") != b]
    expect(not lost, f"{what}: {len(lines) - len(lost)} of {len(lines)} come back by decoding"
           + (f"; first other: {lost[0]!r}" if lost else ""))


def check(folder, name, tokenizer, vocab):
    source = folder / "corpus.txt"
    run(binaries / "moe-data", "tokenize", "--input", source, "--split-documents", "lines", "--tokenizer", tokenizer,
        "--output", folder / name)
    place = train(folder, name, tokenizer, vocab)
    step = sorted((place / "checkpoints").glob("step-*"))[-1]
    for dtype, tolerance in (("fp32", 2e-5), ("bf16", 0.05), ("fp16", 0.02)):
        export = folder / f"hf-{name}-{dtype}"
        run(binaries / "moe-convert", "export-hf", place, "--output", export, "--dtype", dtype)
        theirs = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        # the weights as exported, in float32: rounding of activations is theirs alone
        model = check_logits(f"{name} {dtype}", export, export, vocab, torch.float32, 2e-5)
        stated = AutoModelForCausalLM.from_pretrained(export, dtype="auto")
        expect(stated.dtype == theirs, f"{name} {dtype}: config.json says the type")
        if dtype == "fp32":
            check_logits(f"{name} against the checkpoint", export, step, vocab, torch.float32, 2e-5)
            again = folder / f"again-{name}"
            model.save_pretrained(again)
            run(binaries / "moe-convert", "import-hf", again, "--output", folder / f"imported-{name}")
            same = subprocess.run([binaries / "moe-convert", "diff", export, folder / f"imported-{name}"], capture_output=True)
            expect(same.returncode == 0, f"{name}: what transformers saves again is imported to the same weights")
    alpha = folder / f"hf-{name}-alpha"
    run(binaries / "moe-convert", "export-hf", place, "--output", alpha, "--dtype", "fp32", "--alpha", 4)
    model = check_logits(f"{name} alpha 4, beyond the training length", alpha, alpha, vocab, torch.float32, 2e-5, long=120)
    expect(model.config.max_position_embeddings == 256, f"{name} alpha 4: the context is four times as long")
    check_tokenizer(name, folder, folder / f"hf-{name}-fp32", tokenizer)


def main(folder):
    draw = random.Random(3)
    (folder / "corpus.txt").write_text("\n".join(sentence(draw) for _ in range(3000)) + "\n")
    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, torch {torch.__version__}")
    for kind in ("unigram", "bpe"):
        run(binaries / "moe-data", "train-tokenizer", "--input", folder / "corpus.txt", "--model-type", kind,
            "--vocab-size", 401, "--output", folder / kind)
        check(folder, kind, folder / f"{kind}.model", 401)
    check(folder, "bytes", "bytes", 260)


torch.set_num_threads(2)
if options.keep:
    os.makedirs(options.keep)
    main(pathlib.Path(options.keep).resolve())
else:
    with tempfile.TemporaryDirectory(prefix="moe-hf-") as place:
        main(pathlib.Path(place))
print(f"{failures} failures")
sys.exit(1 if failures else 0)
