"""The examiner: word error rates with Ins/Del/Sub and bootstrap intervals, by set and by language; single files too.

    python eval.py --ckpt runs/embedded-0/grpo-wer                          # the embedded test sets
    python eval.py --ckpt runs/embedded-0/grpo-wer --data PATH --beam 4     # recorded speech
    python eval.py --ckpt runs/embedded-0/grpo-wer --against runs/embedded-0/speech      # the two, pairwise
    python eval.py --ckpt runs/embedded-0/grpo-wer my.wav                   # what does it hear?
    python eval.py --table 2 --run                                          # a paper's table in miniature: 2 3 4 sqa ast rewards rba
    python eval.py --bench                                                  # speed and memory, beside transformers and TRL if installed

WER is the corpus's: all edits over all reference words, on normalised text (rewards.normalize), in percent. An
interval is the 95% bootstrap over utterances (Bisani and Ney, ICASSP 2004): draw as many utterances with replacement,
recompute, 10,000 times; for two systems the same draw serves both ("paired"), so what they share cancels.

Letters: B utterances, T frames (10 ms for mel, 40 ms after the encoder), M mel bins, D encoder channels.
"""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import inspect
import itertools
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from encoder import HOP, N_FFT, SAMPLE_RATE, WINDOW, EncoderConfig, length_mask, log_mel, mel_filters, n_frames, spec_augment
from model import BOS, EOS, INSTRUCTION, LLAMAS, PAD, LlamaConfig, SpeechLM, beam_search, generate, linear, train_tokenizer
from rewards import REWARDS, bleu_counts, bleu_of, edit_counts, normalize, sentence_bleu


# ---------------------------------------------------------------------------------------------- loading
def pick_device(name=None):
    """"cuda" where there is a GPU, else "cpu", unless a name is given. One that is not there ends the program."""
    there = ["cpu", "cuda"][:1 + torch.cuda.is_available()]
    with contextlib.suppress(RuntimeError):  # no device's name, or no such GPU
        device = torch.device(name or there[-1])
        if device.type in there:
            if device.type == "cuda" and device.index is not None:
                torch.cuda.set_device(device)  # what asks for no device by name, a CUDA graph and the bench's clock, means this one
            return device
    data.die(f"--device {name}: not here, or not to be used; give cpu, cuda or cuda:N, or leave the flag out")


def keep_pages():
    """Has glibc's malloc keep what is freed for the next tensor; whether it agrees. By default each tensor of over 32 MB gets new pages
    from the system, and the first touch of each page is a fault, a tenth of a 29M decoder's learning (LOG.md, "eleventh: speed")."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD, smaller ones come from the heap (an old glibc refuses more than 32 MB); M_TRIM_THRESHOLD, it is not given back
        return bool(mallopt(-3, 2**30) and mallopt(-1, 2**31 - 1))
    return False


def autocast(device):
    """bf16 compute on a GPU; the weights stay fp32. On CPU nothing changes."""
    return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else contextlib.nullcontext()


def read_json(path):
    """What a .json file of a run holds. A file that is damaged ends the program."""
    try:
        return {**json.loads(Path(path).read_text())}
    except (OSError, ValueError, TypeError) as e:  # TypeError: of what is JSON, but no object
        data.die(f"{path}: cannot be read ({e}); remove {os.path.dirname(path)} to make it again, or put the file back")


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write under a name of this process's own, which then becomes `path`: others see all of it, or the one before."""
    name = f"{path}.{os.getpid()}.tmp"
    try:
        with open(name, mode) as f:
            yield f
        os.replace(name, path)
    except OSError as e:  # of a full disk says no name
        e.filename = e.filename or path
        raise
    finally:
        with contextlib.suppress(OSError):  # gone, where all went well
            os.remove(name)


def write_json(path, found):
    """Writes a .json file of a run."""
    with replacing(path) as f:
        json.dump(found, f, indent=1)


def read_log(folder, name="metrics.jsonl"):
    """The lines of such a file in a run's folder as dictionaries, up to one that was cut off or is none."""
    rows = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError), open(os.path.join(folder, name)) as f:
        for line in f:
            rows.append({**json.loads(line)})
    return rows


def finished(folder):
    """Whether a stage has come to its end: a checkpoint that was best so far is there before."""
    if not os.path.exists(os.path.join(folder, "best.pt")):
        return False
    steps = read_json(os.path.join(folder, "config.json")).get("steps")  # none for --init
    return not steps or [row.get("step") for row in read_log(folder)[-1:]] == [steps]


def load_model(path, device="cpu"):
    """A run's folder (its best.pt) or a checkpoint file -> SpeechLM in evaluation mode; `run` is its config. Bad input ends the program."""
    path = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    if not os.path.exists(path):
        data.die(f"{path}: no such checkpoint; give a folder under runs/ that holds best.pt, or a .pt file")
    try:
        with torch.serialization.safe_globals([EncoderConfig, LlamaConfig]):  # and no other code that a stranger's file may name
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = os.path.join(os.path.dirname(path), "config.json")
        if "run" in saved and os.path.exists(config) and saved["run"] != read_json(config):
            raise ValueError("it is of another run than the config.json beside it")
        model = SpeechLM(*saved["configs"])
        model.load_state_dict(saved["model"])
        model.run = saved.get("run") or {}
    except Exception as e:  # a damaged zip, a pickle of something else, a state dict of another shape: all bad input
        data.die(f"{path}: not a checkpoint of this code ({str(e).splitlines()[0][:150]}); train it again or give another")
    return model.to(device).eval()


FEATURES = os.path.join("runs", "features")  # 115 MB an hour of speech
# What makes features is part of their key, with its code: whoever changes a line of it hears new features, not the old ones.
MAKERS = log_mel, mel_filters, n_frames, length_mask, data.load_audio, data.resample
RECIPE = (SAMPLE_RATE, WINDOW, HOP, N_FFT, *map(inspect.getsource, MAKERS))


def features(path):
    """Log-mel features (T, M) of an audio file, made once and kept under FEATURES."""
    if not os.path.exists(path):
        data.die(f"{path}: no such file; check the path")
    about = os.stat(path)
    key = hashlib.sha256(repr((os.path.abspath(path), about.st_size, about.st_mtime_ns, RECIPE)).encode()).hexdigest()
    file = os.path.join(FEATURES, key[:2], f"{key}.npy")
    with contextlib.suppress(Exception):  # not there, cut short, or whatever else a broken disk makes of a file
        return torch.from_numpy(np.load(file))
    audio = torch.from_numpy(data.load_audio(path))
    mel = log_mel(audio[None], torch.tensor([len(audio)]))[0][0]
    with contextlib.suppress(OSError):  # a disk that is full or not ours to write to: made again next time
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with replacing(file, "wb") as f:
            np.save(f, mel.numpy())
    return mel


def collate(items):
    """Items -> mel (B, T, M), lengths (B,) in frames of 10 ms, and the items without `audio`: samples (n,), or None to read the file."""
    rest = [{k: v for k, v in item.items() if k != "audio"} for item in items]
    # Padded to the next third of a second, 32 frames: fewer shapes, so that the allocator and oneDNN's caches stay small.
    if items[0]["audio"] is None:
        rows = [features(item["audio_filepath"]) for item in items]
        mel = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return torch.nn.functional.pad(mel, (0, 0, 0, -mel.shape[1] % 32)), torch.tensor(list(map(len, rows))), rest
    lengths = torch.tensor([len(item["audio"]) for item in items])
    audio = torch.zeros(len(items), -(-int(lengths.max()) // 5120) * 5120 + 240)
    for row, item in zip(audio, items):
        row[:len(item["audio"])] = torch.from_numpy(item["audio"])
    return (*log_mel(audio, lengths), rest)


def careful(make, key):
    """make(key), or the SystemExit with which data.die ended it: for the process that asked, where this is a worker."""
    try:
        return make(key)
    except SystemExit as end:
        return end


def end_with_parent(worker):
    """Has Linux end this worker when the thread that began it (here the main one) is gone, however that went: one with much to tell would
    wait for a listener for ever."""
    with contextlib.suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def loader(make, keys, workers, depth=4):
    """make(key) for each of a list of keys, in order, made in worker processes, each up to `depth` of them ahead."""
    # A generator of its own: a loader draws a seed, and from the global one that would shift our random numbers.
    made = DataLoader(keys, batch_size=None, num_workers=workers, prefetch_factor=depth if workers else None,
                      collate_fn=functools.partial(careful, make), generator=torch.Generator(), worker_init_fn=end_with_parent,
                      multiprocessing_context="fork" if workers and sys.platform == "linux" else None)  # sft.MADE goes along
    for batch in made:
        if isinstance(batch, SystemExit):
            raise batch
        yield batch


def chunk(corpus, name, rows):
    """These utterances of a set as a batch of features."""
    return collate([corpus.item(name, i) for i in rows])


def chunks(corpus, name, n=None, workers=0, size=32):
    """The first n utterances of a set, in batches of features, made in workers beside the model."""
    n = min(n or corpus.sets[name], corpus.sets[name])
    yield from loader(functools.partial(chunk, corpus, name), [range(k, min(n, k + size)) for k in range(0, n, size)], workers)


def listen(model, batch, device, augment=False):
    """(mel (B, T, M), lengths, items) -> the frozen encoder's frames (B, T', D), lengths, items."""
    mel, lengths, items = batch
    mel, lengths = mel.to(device), lengths.to(device)
    with autocast(device):
        frames, lengths = model.hear(spec_augment(mel, lengths) if augment else mel, lengths)
    return frames, lengths, items


def hear_set(model, corpus, name, workers=1, n=None):
    """Runs the frozen encoder once over a set, or its first n -> items, each with `frames` (T, D) on the CPU: 3 s of speech are 38 kB."""
    heard = []
    for batch in tqdm(chunks(corpus, name, n, workers), desc=f"hear {name}", leave=False):
        frames, lengths, items = listen(model, batch, next(model.parameters()).device)
        heard += [{**item, "frames": row[:n].clone()} for item, row, n in zip(items, frames.float().cpu(), lengths.tolist())]
    return heard


# ---------------------------------------------------------------------------------------------- decoding a set
@torch.no_grad()
def transcribe(model, heard, beam=1, max_new=64, batch=64, temperature=0.0, top_p=1.0):
    """Items with `frames` (T, D) and perhaps a `prompt` -> hypotheses in the items' order: greedy, the best of `beam`, or one sample each
    at a temperature above 0. In batches by length, so that little of a batch is padding."""
    device = next(model.parameters()).device
    model.eval()
    order = sorted(range(len(heard)), key=lambda i: len(heard[i]["frames"]))
    hyps = [""] * len(heard)
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]
        lengths = torch.tensor([len(heard[i]["frames"]) for i in rows])
        frames = torch.nn.utils.rnn.pad_sequence([heard[i]["frames"] for i in rows], batch_first=True)
        with autocast(device):
            prompt = model.prefill(*model.embed_prompt(frames.to(device), lengths.to(device), [heard[i].get("prompt") for i in rows]))
            if beam > 1:
                tokens, n, _ = beam_search(model, prompt, beam, max_new)
                tokens, n = tokens[::beam], n[::beam]
            else:
                tokens, n, _ = generate(model, prompt, 1, max_new, temperature, top_p=top_p)
        for i, hyp in zip(rows, model.decode(tokens, n)):
            hyps[i] = hyp
    return hyps


# ---------------------------------------------------------------------------------------------- statistics
TEXT_METRICS = {"R-1": "rouge1", "R-2": "rouge2", "R-L": "rougeL", "METEOR": "meteor"}
# What a task's tables show; in result.json the same in lower case.
COLUMNS = {"asr": ("WER", "Ins", "Del", "Sub", "CER", "ED", "EM"), **dict.fromkeys(("ast", "sqa"), ("BLEU", *TEXT_METRICS))}


def counts_of(task, refs, hyps, metric=None):
    """(n, c): for each of n utterances c numbers, from whose sums over the corpus `rate` makes one of COLUMNS[task], None: its first.

    WER: (substitutions, deletions, insertions, reference words); Sub, Del, Ins: the same with the other two at 0; CER: in characters; ED:
    as WER, with 100 for the words; EM and TEXT_METRICS: (score, 0, 0, 1); BLEU: the 10 of rewards.bleu_counts. References are
    normalised, and for asr hypotheses, too; else these are taken as written."""
    metric, parts = metric or COLUMNS[task][0], ("Sub", "Del", "Ins")
    pairs = list(zip(map(normalize, refs), map(normalize, hyps) if task == "asr" else hyps, strict=True))
    if metric == "BLEU":
        return np.array([bleu_counts(*pair) for pair in pairs])
    if mean := {"EM": "em", **TEXT_METRICS}.get(metric):
        return np.array([(REWARDS[mean](*pair), 0, 0, 1) for pair in pairs]).reshape(-1, 4)
    if metric == "CER":
        pairs = [[" ".join(text.replace(" ", "_")) for text in pair] for pair in pairs]  # characters as words
    counts = [(*edit_counts(ref, hyp), 100 if metric == "ED" else len(ref.split())) for ref, hyp in pairs]  # ED alone is not in percent
    return np.array(counts).reshape(-1, 4) * [*(metric not in parts or metric == part for part in parts), 1]


def rate(totals):
    """Sums of `counts_of` over a corpus, (draws, c) -> the figure of each draw, (draws,): with 10 columns BLEU, with 4 the first three by
    the last, both times 100: percent, but for ED, whose divisor is 100 an utterance: edits an utterance."""
    if totals.shape[1] == 4:
        return 100.0 * totals[:, :3].sum(1) / np.maximum(1, totals[:, 3])
    return np.array([100.0 * bleu_of(row, False) for row in totals.tolist()])


def summary(task, refs, hyps):
    """One system on one set: its COLUMNS in lower case, and how many utterances and, of ASR, reference words it is over."""
    found = {name.lower(): float(rate(counts_of(task, refs, hyps, name).sum(0, keepdims=True))[0]) for name in COLUMNS[task]}
    words = {"words": sum(len(normalize(ref).split()) for ref in refs)} if task == "asr" else {}
    return {**found, "utterances": len(refs), **words}


def draws(counts, seed=0):
    """A corpus's rate, and those (10000,) of 10,000 bootstrap draws: n of its n utterances with replacement, as how often each comes. With
    one seed every system's k-th draw has the same utterances: that makes `change` a paired comparison."""
    rng, n = np.random.default_rng(seed), len(counts)
    drawn = [rate(rng.multinomial(n, np.full(n, 1 / n), size=1000) @ counts) for _ in range(10)]
    return rate(counts.sum(0, keepdims=True))[0], np.concatenate(drawn)


def interval(drawn):
    """The middle 95% of draws."""
    return [float(x) for x in np.percentile(drawn, [2.5, 97.5])]


def change(a, b):
    """From system a to system b, both what `draws` gives with one seed: relative change in percent and its paired interval; in points
    where a is 0."""
    relative = lambda x, y: 100.0 * (y - x) / np.where(x > 0, x, 100.0)
    return float(relative(a[0], b[0])), interval(relative(a[1], b[1]))


def print_table(name, task, refs, hyps, bases=()):
    """Prints a test set's table, a row for each model in hyps {model: transcripts}, then the last against each of `bases`. Returns the
    figures, as result.json holds them."""
    names, entry, drawn, last = COLUMNS[task], {}, {}, list(hyps)[-1]
    print(f"\n{name}: {len(refs)} utterances\n{'':<26}" + "".join(f"{c:>7}" for c in names) + f"   95% interval of the {names[0]}")
    for model, rows in hyps.items():
        drawn[model] = draws(counts_of(task, refs, rows))
        low, high = interval(drawn[model][1])
        entry[model] = {**summary(task, refs, rows), "interval": [low, high]}
        print(f"{model:<26}" + "".join(f"{entry[model][c.lower()]:7.2f}" for c in names) + f"   [{low:.2f}, {high:.2f}]")
    for base in bases:
        by, (low, high) = change(drawn[base], drawn[last])
        print(f"from {base} to {last}: {by:+.1f}% [{low:+.1f}, {high:+.1f}] of the {names[0]}, relative, paired bootstrap")
        entry[last][f"against {base}"] = {"relative_change": by, "interval": [low, high]}
    return entry


# Of the code in data.py, encoder.py and model.py: with other code transcripts are made anew. What is in this file, such as `transcribe`,
# is not in it: after a change of that remove the *.hyps.json.
MAKER = zlib.crc32("".join(inspect.getsource(sys.modules[name]) for name in ("data", "encoder", "model")).encode())


def set_and_source(name, own):
    """NAME, of a run's `own` corpus, NAME@PATH or NAME@embedded -> NAME and the corpus's path, None for the embedded one."""
    name, _, path = name.partition("@")
    return name, {"": own, "embedded": None}.get(path, path)


def kept_transcripts(folder, name, ears, test_size, device=None, temperature=0.0, top_p=1.0, workers=1, reuse=True):
    """References and transcripts of a finished stage on a set (see set_and_source), greedy, or sampled at a temperature above 0: those kept
    in its folder, if they are of this best.pt, corpus and MAKER; else, or without `reuse`, new ones, which are kept there. ears, which
    this fills: (corpus's path, seed, test size, task, lang) -> corpus, and (run, set, corpus's path) -> items with frames, made once since
    a run's stages share their encoder."""
    config, run = read_json(os.path.join(folder, "config.json")), os.path.dirname(folder)
    test, source = set_and_source(name, config["data"])
    source = source and os.path.abspath(source)
    stem = test + f"-{data.name_of(source)}" * ("@" in name) + f"-T{temperature}-p{top_p}" * (temperature > 0)
    key = source, config["seed"], test_size, config["task"], config["lang"]
    corpus = ears[key] = ears.get(key) or data.open_corpus(*key)
    file, of = os.path.join(folder, f"{stem}.hyps.json"), [source, MAKER, os.stat(os.path.join(folder, "best.pt")).st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        found = json.loads(Path(file).read_text())
        same = found["refs"] == [item["target"] for item in corpus.data[test]] if source else len(found["refs"]) == test_size
        if reuse and found["of"] == of and same:
            return found["refs"], found["hyps"]
    model = load_model(folder, pick_device(device))
    heard = ears[run, test, source] = ears.get((run, test, source)) or hear_set(model, corpus, test, workers)
    if "max_new" not in config:  # of the stage read, which never wrote a transcript
        config = read_json(os.path.join(run, "speech", "config.json"))
    torch.manual_seed(0)  # of the samples, if any
    hyps = transcribe(model, heard, max_new=config["max_new"], temperature=temperature, top_p=top_p)
    refs = [item["target"] for item in heard]
    with contextlib.suppress(OSError):  # no right to write there, or no room: made again the next time
        write_json(file, {"of": of, "refs": refs, "hyps": hyps})
    return refs, hyps


# ---------------------------------------------------------------------------------------------- the papers' tables
def spoken_table(task, of, base, sft, grpo):
    """SQA's and AST's tables have the same rows; base, sft and grpo are the paper's figures, on its test set `of`."""
    return dict(task=task, title=f"{task.upper()}, 2509.16990 (2B), BLEU", sets={"clean": of, "hard": "", "ood": ""}, rows=[
        ("before speech", "read", base), ("SFT", "speech", sft), ("SFT continued", "control"),
        ("GRPO (BLEU)", "--algo ibm --reward bleu", grpo),
        ("MP-GRPO", "--algo ibm --reward bleu --off-policy reference"),
        ("MP-GRPO, shaped", "--algo ibm --reward bleu --off-policy reference --shaping 0.1"),
        ("MP-GRPO, duplicate", "--algo ibm --reward bleu --off-policy duplicate")])


# sets: {test set: what the paper's figures beside it are of}; bases: the rows that the others are compared with, if not SFT and SFT
# continued; rows: a label, a stage of SFT's or grpo.py's flags, in the order of its SWITCHES, and the paper's figures.
TABLES = {
    "2": dict(task="asr", title="Table II of 2509.01939 (2B), WER (here beta 0 but where it is named; draws: dynamic sampling)",
              sets={"clean": "MLS, all", "hard": "People's Speech", "ood": "VoxPopuli, all (in domain there)"}, rows=[
        ("SFT", "speech", "5.48", "23.5", "10.12"), ("SFT continued", "control"),
        ("GRPO (WER), beta 0", "--reward wer", "5.59", "21.3", "9.24"),
        ("GRPO (WER), beta .04", "--reward wer --beta 0.04", "5.49", "21.53", "9.47"),
        ("GRPO (ED)", "--reward ed", "5.64", "21.48", "9.51"),
        ("GRPO (EM)", "--reward em", "5.62", "22.29", "9.76"),
        ("DAPO (EM)", "--algo dapo --reward em --no-dynamic-sampling", "5.51", "21.71", "9.57"),
        ("DAPO (WER)", "--algo dapo --reward wer --no-dynamic-sampling", "5.53", "21.30", "9.30"),
        ("DAPO (EM), draws", "--algo dapo --reward em"), ("DAPO (WER), draws", "--algo dapo --reward wer"),
        ("Dr. GRPO (EM)", "--algo dr_grpo --reward em", "5.56", "22.24", "9.70"),
        ("GRPO (WER), beam", "--reward wer -G 6 --rollout beam"),
        ("GRPO (WER), G 6", "--reward wer -G 6"), ("GRPO (WER), G 10", "--reward wer -G 10")]),
    "3": dict(task="asr", title="Table III of 2509.01939 (2B), out of domain, Ins/Del/Sub (other conditions than its sets)",
              sets={"far": "AMI-SDM", "babble": "AMI-IHM", "pauses": "TED-LIUM", "test@../shared/speech/digit_strings": ""}, rows=[
        ("SFT", "speech", "56.7/16.6/14.6", "38.4/10.3/7.3", ".5/1.7/1.6"), ("SFT continued", "control"),
        ("GRPO (WER)", "--reward wer", "7.4/18.1/12.1", "2.8/10.96/6.3", ".4/1.6/1.6"),
        ("GRPO (ED)", "--reward ed", "8.9/17.6/12.1", "5.6/11/6.3", ".5/1.7/1.6"),
        ("GRPO (EM)", "--reward em", "7.4/18.1/12.1", "2.7/11.1/6.3", ".4/1.8/1.7")]),
    "4": dict(task="asr", title="Table IV of 2509.01939 (2B), adapting to another domain (echo), WER", bases=("base", "SFT"),
              sets={"far": "AMI-SDM", "clean": "MLS En (old)", "hard": "VoxPopuli En (old)", "ood": ""}, rows=[
        ("base", "base", "87.88", "4.83", "7.92"), ("SFT", "control", "44.34", "6.91", "9.80"),
        ("GRPO (WER)", "--reward wer", "31.98", "6.59", "9.10")]),
    "sqa": spoken_table("sqa", "LibriSQA I", "27.74", "40.88", "44.90"),
    "ast": spoken_table("ast", "CoVoST2 En-De", "29.06", "30.50", "31.47"),
    "rewards": dict(task="sqa", title="Reward choice, 2509.16990 (2B), BLEU/R-1/R-2/R-L/METEOR", bases=("SFT",),
                    sets={"clean": "LibriSQA I", "hard": ""}, rows=[
        ("SFT", "speech", "40.88/65.1/49.1/61.5/64.6"), ("SFT continued", "control"),
        *((f"GRPO ({reward})", f"--algo ibm --reward {reward}", theirs) for reward, theirs in
          [("bleu", "44.9/68.6/53.4/64.9/68.5"), ("rouge1", "38.8/68.9/53.5/64.8/60.7"), ("rouge2", "37.8/68.6/54.2/65.3/58.9"),
           ("rougeL", "38.0/68.7/53.8/65.4/59.3"), ("meteor", "37.7/67.0/51.7/62.6/70.3")])]),
    "rba": dict(task="sqa", taught="taught", title="RBA, 2509.03526", bases=("SFT, teacher's", "SFT continued"),
                sets={"clean": "BLEU, translation En-X", "hard": "", "voices": "agreement over 4 voices, its own measure"}, rows=[
        ("before speech", "read", "30.3", "", "82.6"), ("SFT, teacher's", "speech", "30.5", "", "89.3"), ("SFT continued", "control"),
        ("RBA-Group", "--algo rba_group --reward bleu", "33.0", "", "94.5"),
        ("RBA-Single", "--algo rba_single --reward bleu", "32.6"),
        ("RBA-Group, CE", "--algo rba_group --reward bleu --ce 0.2"),
        ("RBA-Single, CE", "--algo rba_single --reward bleu --ce 0.2")]),
}


def ast_name(lang):
    """What a run of --task ast calls its task: each language has runs of its own, German's are plain."""
    return "ast" + f"-{lang}" * (lang != "de")


def stage_of(how):
    """A row's folder within its run: a stage of SFT's or what grpo.py calls an RL stage with these flags, such as grpo-wer-beta0.04."""
    if not how.startswith("-"):
        return how
    flags = dict(re.findall(r"--?(\S+) (\S+)", re.sub(r"--no-(\S+)", r"--\1 False", how)))
    return "-".join([flags.pop("algo", "grpo"), flags.pop("reward"), *(f"{k.replace('-', '_')}{v}" for k, v in flags.items())])


def paper_table(name, path=None, more="", lang="de", called=None):
    """One of TABLES, with rows (label, folder under runs/, flags of grpo.py, the paper's figures) in which {s} stands for the seed.

    On recorded speech, at `path`: runs on that, its test sets, and nothing of the paper's to put beside them. more: flags of grpo.py before
    the rows' own; called: what the runs' names begin with, if not with the corpus's."""
    table, corpus = {"bases": ("SFT", "SFT continued"), **TABLES[name]}, data.name_of(path)
    task, first = table["task"], next(how for _, how, *_ in table["rows"] if how.startswith("-"))  # on whose way SFT's stages are made
    own = called or corpus
    run = "-".join(filter(None, [own, {"asr": "", "ast": ast_name(lang)}.get(task, task), table.get("taught"), "{s}"]))
    source = f" --data {shlex.quote(path)}" + f" --lang {lang}" * (task == "ast") if path else ""
    # Of a flag given twice the row's own counts. With `more` the folder were called after these flags, too, without --rl-name.
    flags = lambda made, source: (f"--task {task} " * (task != "asr") + f"{more} ".lstrip() + made + source
                                  + f" --rl-name {stage_of(made)}" * bool(more))
    begin = source + f" --name {run}" * bool(called)
    if path:
        table["sets"] = dict.fromkeys(data.open_corpus(path, 0, task=task, lang=lang).tests, "")
    if name == "4":  # adapts a run on the embedded corpus to this one, or to echo
        base, makes_base = ("embedded-{s}", first) if path else (run, flags(first, begin))
        run = f"{own}-from-{{s}}" if path else "-".join(filter(None, [called, "far-{s}"]))
        begin = f" --init runs/{base}/speech{source or ' --domain far'} --name {run}"
        if path:
            table["title"] = table["title"].replace("(echo)", f"(from embedded to {corpus})")
            table["sets"] = dict.fromkeys([*(f"{test}@{path}" for test in table["sets"]), "clean@embedded", "hard@embedded"], "")
    rows = []
    for label, how, *paper in table["rows"]:
        made = how if how.startswith("-") else first
        where = (f"{base}/speech", makes_base) if how == "base" else (f"{run}/{stage_of(how)}", flags(made, begin))
        rows.append((label, *where, [] if path else paper))
    return {**table, "rows": rows}


def mean_change(a, b):
    """Two rows {seed: draws} -> relative change of the mean over the seeds that both have, and its 95% interval, as text."""
    by, (low, high) = change(*([np.mean([row[s][i] for s in a.keys() & b.keys()], axis=0) for i in (0, 1)] for row in (a, b)))
    return f"{by:+.1f}% [{low:+.1f}, {high:+.1f}]"


def agreement(hyps):
    """Sentence BLEU of the answers to the same words in two voices, 1 of equal ones: a row of counts for each group of voices (sum over
    all such pairs, 0, 0, pairs), whose `rate` over all groups is the mean in percent; 100 if the voice changes nothing."""
    groups = [list(itertools.permutations(hyps[i:i + data.TAKES], 2)) for i in range(0, len(hyps), data.TAKES)]
    return np.array([(sum(1.0 if a == b else sentence_bleu(a, b) for a, b in pairs), 0, 0, len(pairs)) for pairs in groups])


def folder_of(row, seed):
    """Where a row's stage lies, of this seed."""
    return os.path.join("runs", row[1].replace("{s}", seed))


def missing_commands(rows, seeds):
    """What makes the rows' stages that are not finished, in the order in which they stand on each other."""
    return list(dict.fromkeys(f"grpo.py {row[2].replace('{s}', s)} --seed {s}" for s in seeds for row in rows
                              if not finished(folder_of(row, s))))


def run_commands(commands):
    """Runs them one after the other, with a bar; the first that fails ends the program with its last words."""
    print(f"{len(commands)} runs; on two cores about 2 minutes each, IBM's 4, and 5 to 8 more where their SFT does not exist yet")
    for command in tqdm(commands, desc="runs"):
        script, *flags = shlex.split(command)
        done = subprocess.run([sys.executable, Path(__file__).with_name(script), *flags], capture_output=True, text=True)
        if done.returncode:
            data.die(f"python {command} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")


def print_paper_set(name, column, table, rows, bases, seeds, args, ears):
    """One set of a paper's table, the one whose figures stand in its rows' `column`: the means over the seeds that are there, and the
    changes from each of `bases`."""
    (test, source), of, names = set_and_source(name, args.data), table["sets"][name], COLUMNS[table["task"]]
    if source and not os.path.exists(source):
        print(f"\n{name}: not on this machine, left out")
        return
    shown = [*names, *["Agree"] * (name == "voices")]
    print(f"\n{test + f' of {data.name_of(source)}' * ('@' in name):<20}" + "".join(f"{c:>7}" for c in shown)
          + "".join(f"   {'from ' + base:<26}" for base in bases) + f"   paper: {of}" * bool(of))
    seen = {}
    for row in rows:
        (label, _, _, paper), figures, drawn = row, [], seen.setdefault(row[0], {})
        for s in filter(lambda s: finished(folder_of(row, s)), seeds):
            refs, hyps = kept_transcripts(folder_of(row, s), name, ears, args.test_size, args.device, args.temperature, args.top_p)
            counts = agreement(hyps) if name == "voices" else counts_of(table["task"], refs, hyps, args.metric)
            drawn[s] = draws(counts, 0 if source else int(s))  # of recorded speech every seed has the same utterances
            entry = {**summary(table["task"], refs, hyps), "agree": drawn[s][0]}
            figures.append([entry[c.lower()] for c in shown])
        cells = "".join(f"{x:7.2f}" for x in np.mean(figures, 0)) if figures else "      -" * len(shown)
        for base in bases:
            both = base != label and seen.get(base, {}).keys() & drawn.keys()
            cells += f"   {mean_change(seen[base], drawn) if both else '':<26}"
        few = f"   ({len(drawn)} of {len(seeds)} seeds)" * (len(drawn) < len(seeds))
        print(f"{label:<20}{cells}   {''.join(paper[column:column + 1])}{few}")


def print_paper_table(args):
    """The miniature of a paper's table, from the runs that exist, and its rows' commands; what is missing is named, or run."""
    table = paper_table(args.table, args.data, args.flags, args.lang, args.name)
    seeds = list(dict.fromkeys(str(int(seed)) for seed in args.seeds.split(",")))
    rows, bases, names, labels = table["rows"], table["bases"], COLUMNS[table["task"]], [label for label, *_ in table["rows"]]
    if args.metric and args.metric not in names:
        data.die(f"--metric {args.metric}: table {args.table} has {', '.join(names)}; give one of these, or leave it out")
    if args.against:
        bases = [base.strip() for base in args.against.split(";")]
        if not set(bases) <= set(labels):
            data.die(f"--against {args.against}: no row of table {args.table}; give {'; '.join(labels)}")
        rows = sorted(rows, key=lambda row: row[0] not in bases)
    if args.run and (commands := missing_commands(table["rows"], seeds)):
        run_commands(commands)
    how = f"sampled at temperature {args.temperature}, top_p {args.top_p}" if args.temperature else "greedy"
    compared = (args.metric or names[0]) + " (on voices: Agree)" * ("voices" in table["sets"])
    runs = f" (runs {args.name}-S, however they were made; --flags are for what is missing)" if args.name else ""
    print(f"{table['title']}; here {how}, the mean of seeds {', '.join(seeds)}{runs}.\nChanges are of the mean {compared}, with the 95% "
          "interval of a paired bootstrap over utterances: what another seed of training would change is not in it")
    ears = {}
    for column, name in enumerate(table["sets"]):
        print_paper_set(name, column, table, rows, bases, seeds, args, ears)
    print("\nthe rows' commands")
    for label, _, flags, _ in rows:
        print(f"  {label:<22}python grpo.py {flags.replace('{s}', 'S')} --seed S")
    for command in missing_commands(table["rows"], seeds):
        print(f"missing: python {command}")


# ---------------------------------------------------------------------------------------------- speed
# Decoder, prompt positions, utterances, G (and beams), new tokens. B's prompt is 30 s of audio; D is for a GPU.
SHAPES = {"A": "29m,200,4,8,40", "B": "29m,750,4,8,40", "C": "tiny,84,24,12,16", "D": "2b,750,16,8,64"}


def forward_flops(c, B, P, N, T):
    """Operations (a multiplication and an addition are two) of the matrix products that nobody can leave out: B prompts of P
    positions, whose last layer makes keys and values alone, and N responses of T tokens after them; attention to the past alone."""
    kv = 2 * c.d * c.n_kv_heads * (c.d // c.n_heads)
    layer = 2 * c.d * c.d + kv + 3 * c.d * c.ffn
    prompt = 2 * B * P * ((c.n_layers - 1) * layer + kv) + 2 * B * P * (P + 1) * c.d * (c.n_layers - 1)
    return prompt + 2 * N * T * (c.n_layers * layer + c.d * c.vocab) + 2 * N * T * (2 * P + T + 1) * c.d * c.n_layers


def micro_batch(c, P, G, T, device):
    """Utterances in one backward pass, without --micro: as many as keep attention's scores of G responses of T tokens against prompts of
    P positions, often the largest tensor, to 16 MB on a CPU and 128 on a GPU; larger pieces take more memory and are no quicker."""
    return max(1, (2**25 if device.type == "cuda" else 2**22) // (c.n_heads * G * T * P))


def shape_of(name):
    """A shape by its letter, or as it is written above: 29m,750,4,16,40."""
    llm, *sizes = SHAPES.get(name, name).split(",")
    if llm not in LLAMAS or len(sizes) != 4 or not all(n.isdecimal() and int(n) for n in sizes) or int(sizes[0]) <= 20:
        data.die(f"--bench {name}: give letters of {''.join(SHAPES)}, or DECODER,PROMPT,UTTERANCES,G,NEW such as 29m,750,4,16,40; "
                 f"decoders: {', '.join(LLAMAS)}")
    return llm, *map(int, sizes)


def clock(run, device, times=3):
    """Median seconds of run() over a few times, after one that does not count."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def limits(device):
    """What this machine can do: operations a second of a large matrix product (fp32, on a GPU bf16) by torch's own route, which any program
    gets, and by the quicker of that and model.linear's; and bytes a second of a copy, read and written."""
    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, layer = torch.randn(n, n, device=device, dtype=kind), torch.nn.Linear(n, n, bias=False, device=device, dtype=kind)
    source, target = torch.ones(2, 2**26, device=device)  # both written to: the first touch of a page costs more than a copy
    with torch.no_grad():
        own, ours = clock(lambda: a @ layer.weight, device), clock(lambda: linear(a, layer), device)
    return 2 * n**3 / own, 2 * n**3 / min(own, ours), 2 * source.nbytes / clock(lambda: target.copy_(source), device)


def peak_memory(device):
    """Bytes: a GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_model(shape):
    """A speech LM with random weights and this shape's frames (B, T, 128), lengths and, in place of a rollout, tokens (B * G, new)."""
    name, P, B, G, new = shape_of(shape)
    torch.manual_seed(0)
    model = SpeechLM(EncoderConfig(units=("a",)), LLAMAS[name], train_tokenizer(["a"], 40))
    frames = torch.randn(B, P - 4 - len(model.tokenizer.encode(INSTRUCTION)), 128)
    return model, frames, torch.full((B,), frames.shape[1]), torch.randint(7, LLAMAS[name].vocab, (B * G, new))


def bench_earshot(shape, device):
    """Seconds of the parts of one GRPO step and of beam search, the peak memory of a step, and the machine's limits."""
    model, *tensors = bench_model(shape)
    model, (frames, lengths, tokens) = model.to(device), [x.to(device) for x in tensors]
    name, P, B, G, new = shape_of(shape)
    parameters = [p for part in (model.projection, model.llm) for p in part.parameters()]
    opt = torch.optim.AdamW(parameters, lr=1e-6)
    micro = min(B, micro_batch(LLAMAS[name], P, G, new, device))

    def after_prompt(write, **how):
        with autocast(device), torch.no_grad():
            write(model, model.prefill(*model.embed_prompt(frames, lengths)), G, new, **how)

    def learn():
        for rows in torch.arange(B, device=device).split(micro):
            y = tokens.view(B, G, new)[rows].flatten(0, 1)
            with autocast(device):
                prompt = model.prefill(*model.embed_prompt(frames[rows], lengths[rows]))
                logp, _ = model.token_logps(y, prompt)
            advantage = torch.arange(len(y), device=device).cos()[:, None]
            (-(logp - logp.detach()).exp() * advantage).mean().backward()      # Eq. 3 with one update and beta 0
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

    out = {"sampling": clock(lambda: after_prompt(generate), device), "learning": clock(learn, device)}
    out |= {"GRPO step": sum(out.values()), "peak": peak_memory(device)}       # of a step: what follows may need more
    out |= zip(("torch", "quicker", "copy"), limits(device))
    out |= {"prompt": clock(lambda: after_prompt(lambda *prompt: None), device),
            "beam search": clock(lambda: after_prompt(beam_search), device, 2)}
    if device.type == "cuda":
        out["graph"] = clock(lambda: after_prompt(generate, graph=True), device)
    return out


def as_transformers(llm):
    """The same decoder, weights and all, as transformers' LlamaForCausalLM: an oracle, and a peer to race."""
    from transformers import LlamaConfig as PeerConfig, LlamaForCausalLM
    c = llm.config
    peer = LlamaForCausalLM(PeerConfig(vocab_size=c.vocab, hidden_size=c.d, intermediate_size=c.ffn, num_hidden_layers=c.n_layers,
                                       num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, tie_word_embeddings=c.tie,
                                       rms_norm_eps=c.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
                                       max_position_embeddings=4096, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD))
    names = {"embed": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "head": "lm_head", "attn": "self_attn",
             "norm1": "input_layernorm", "norm2": "post_attention_layernorm", **{f"w{x}": f"{x}_proj" for x in "qkvo"},
             **{x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}}
    state = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in llm.state_dict().items()}
    missing, unknown = peer.load_state_dict(state, strict=False)
    assert not unknown and all(c.tie and key == "lm_head.weight" for key in missing), (missing, unknown)
    return peer.eval()


def bench_transformers(shape, device):
    """The same sampling and beam search by transformers' generate, from token prompts as long as ours."""
    _, P, B, G, new = shape_of(shape)
    peer = as_transformers(bench_model(shape)[0].llm).to(device)
    ids = torch.randint(7, peer.config.vocab_size, (B, P), device=device)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, num_return_sequences=G)
    with autocast(device):  # generate is without gradient by itself
        return {"sampling": clock(lambda: peer.generate(ids, **options, do_sample=True, top_k=0), device, 2),
                "beam search": clock(lambda: peer.generate(ids, **options, do_sample=False, num_beams=G), device, 2)}


def bench_trl(shape, device):
    """A GRPO step of the same size by TRL: prompts, G, lengths, beta 0, one update; the mean of steps 2 and 3."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    _, P, B, G, new = shape_of(shape)
    peer = as_transformers(bench_model(shape)[0].llm)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(peer.config.vocab_size)}, unk_token="w6"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=f"w{PAD}", eos_token=f"w{EOS}", bos_token=f"w{BOS}")
    rng = np.random.default_rng(0)
    prompts = [" ".join(f"w{i}" for i in rng.integers(7, peer.config.vocab_size, P)) for _ in range(4 * B)]
    marks = []

    class Clock(TrainerCallback):
        on_step_begin = on_step_end = lambda self, *args, **kw: marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(folder, per_device_train_batch_size=B * G, num_generations=G, max_completion_length=new, beta=0.0, max_steps=3,
                            num_iterations=1, loss_type="grpo", gradient_checkpointing=False, bf16=device.type == "cuda", report_to=[],
                            use_cpu=device.type == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True, top_k=0,
                            generation_kwargs={"min_new_tokens": new})
        GRPOTrainer(peer, reward_funcs=lambda completions, **kw: [float(len(set(c))) for c in completions], args=config,
                    train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[Clock()]).train()
    return {"GRPO step": float(np.median([b - a for a, b in zip(marks[2::2], marks[3::2])])), "peak": peak_memory(device)}


ENGINES = {"earshot": bench_earshot, "transformers": bench_transformers, "trl": bench_trl}


def run_engine(engine, shape, device):
    """What one of ENGINES returns, measured in a process of its own, so that the peak memory is its own; {} and a line if it cannot be."""
    command = [sys.executable, __file__, "--bench", shape, "--engine", engine, "--device", str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
        if not done.returncode:
            return json.loads(done.stdout.strip().splitlines()[-1])
        why = (done.stderr.strip().splitlines() or ["no output"])[-1][:120]
    except subprocess.TimeoutExpired:
        why = "not done after 20 minutes"
    print(f"  {engine} left out: {why}")
    return {}


def pairs_a_second(N):
    """{scorer: pairs a second}, ours and, where installed, jiwer and sacreBLEU, over N pairs of 12 words that have little in common."""
    scorers = {name: REWARDS[name] for name in ("wer", "bleu")}
    with contextlib.suppress(ImportError):
        import jiwer
        scorers["jiwer"] = jiwer.wer
    with contextlib.suppress(ImportError):
        import sacrebleu
        scorers["sacreBLEU"] = lambda ref, hyp: sacrebleu.sentence_bleu(hyp, [ref]).score
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(["one", "two", "three", "four"], 12))
    rounds = [[(text(), text()) for _ in range(N)] for _ in range(4)]          # new ones for each of clock's: ours remembers texts

    def speed(score):
        turn = iter(rounds)
        return N / clock(lambda: [score(*pair) for pair in next(turn)], torch.device("cpu"))

    return {name: speed(score) for name, score in scorers.items()}


def bench(shapes, device):
    """Prints speed and memory of sampling, beam search and a GRPO step, as shares of the machine's limits and beside the peers'."""
    sizes = list(map(shape_of, shapes))
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; a multiplication and an addition are two "
          "operations.\nCounted are the products that no program can leave out: the prompt once for G samples, attention to the past.\n"
          "Torch's own route is what any torch program gets, the quicker of that and model.linear's what ours can get on this machine.")
    for shape, (name, P, B, G, new) in zip(shapes, sizes):
        c, N = LLAMAS[name], B * G
        print(f"\nshape {shape}: {name} decoder, {B} prompts of {P} positions, G {G}, {new} new tokens")
        ours, hf, trl = (run_engine(engine, shape, device) for engine in ENGINES)
        if not ours:
            continue
        peers = hf | trl
        beside = lambda mine, peer, unit: f"{peer:10.2f} {unit:<2}{peer / mine:8.1f}x" if peer else ""
        own, quicker, copy = (ours[limit] / 1e9 for limit in ("torch", "quicker", "copy"))
        print(f"  limits: {own:.0f} GFLOP/s of products by torch's own route, {quicker:.0f} by the quicker one; {copy:.1f} GB/s of copying")
        print("                   earshot   of torch's  of the quicker        peer     ratio")
        work = forward_flops(c, B, P, N, new)
        for what, operations in {"sampling": work, "beam search": work, "learning": 3 * work, "GRPO step": 4 * work}.items():
            mine, percent = ours[what], operations / ours[what] / 1e7
            tokens = f"   {N * new / mine:.0f} tokens/s" * (operations == work)
            print(f"  {what:<14}{mine:8.2f} s{percent / own:12.0f}%{percent / quicker:15.0f}%{beside(mine, peers.get(what), 's')}{tokens}")
        print(f"  {'peak memory':<14}{ours['peak'] / 1e9:8.2f} GB{'':28}{beside(ours['peak'] / 1e9, peers.get('peak', 0) / 1e9, 'GB')}")
        weights = forward_flops(c, 0, 0, 1, 1) / 2                             # one token alone: two operations a weight
        kv = 2 * c.n_layers * c.n_kv_heads * (c.d // c.n_heads) * (B * P + N * new / 2)
        read, speed = (2 if device.type == "cuda" else 4) * (weights + kv), new / (ours["sampling"] - ours["prompt"])
        print(f"  a step of sampling reads {read / 1e9:.3f} GB, weights, keys and values: {read * speed / copy / 1e7:.0f}% of the "
              "speed of copying" + (f"; with --graph sampling takes {ours['graph']:.2f} s" if "graph" in ours else ""))
        speeds = pairs_a_second(N)
        for reward, peer in (("wer", "jiwer"), ("bleu", "sacreBLEU")):
            share, theirs = 100 * N / speeds[reward] / ours["GRPO step"], f"; {peer} {speeds.get(peer, 0):.0f}" * (peer in speeds)
            print(f"  {'reward ' + reward:<14}{speeds[reward]:8.0f} pairs/s, {share:.2f}% of the step{theirs}")


# ---------------------------------------------------------------------------------------------- command line
def examine(args):
    """Transcribes the files, or the test sets, by --ckpt, and by --against as well, and prints the tables."""
    device = pick_device(args.device)
    model = load_model(args.ckpt, device)
    task, lang = model.run.get("task", "asr"), model.run.get("lang", "de")
    seed = model.run.get("seed", 0) if args.seed is None else args.seed
    write = lambda model, items: transcribe(model, items, args.beam, args.max_new or model.run.get("max_new", 64),
                                            temperature=args.temperature, top_p=args.top_p)
    if args.files:
        if (task == "sqa") != bool(args.question):
            data.die(f"--ckpt {args.ckpt}: " + ("answers no --question; leave it out" if args.question else
                                                "answers questions; ask one with --question \"how many digits are there\""))
        asked = data.instruct(task, lang, args.question)
        if args.question and model.tokenizer.unk_id() in model.tokenizer.encode(asked):
            print(f"--question {args.question}: has letters that this model never saw; ask as in training, such as in lower case",
                  file=sys.stderr)
        for path in args.files:
            frames, n, items = listen(model, collate([{"audio": data.load_audio(path), "prompt": asked}]), device)
            print(f"{path}\t{write(model, [{**items[0], 'frames': frames[0, :n].float()}])[0]}")
        return

    paths = [args.against, args.ckpt] if args.against else [args.ckpt]
    labels = ["/".join(os.path.normpath(path).split(os.sep)[-2:]) for path in paths]
    labels = labels if len(set(labels)) == len(paths) else paths
    models = dict(zip(labels, [*(load_model(path, device) for path in paths[:-1]), model]))
    for other in models.values():
        if (other.run.get("task", "asr"), other.run.get("lang", "de")) != (task, lang):
            data.die(f"--against {args.against}: is of another --task or --lang; compare runs of one task")
    # Else all of it is for testing.
    known = not args.data or any(data.manifest_of(args.data).resolve() in trained_on(one.run) for one in models.values())
    domain = model.run.get("domain") or (model.run.get("before") or {}).get("domain", "hard")
    corpus = data.open_corpus(args.data or model.run.get("data"), seed, args.test_size, task, lang, domain, train=known)
    names = args.sets.split(",") if args.sets else corpus.tests
    for name in names:
        if name not in corpus.sets:
            data.die(f"--sets {name}: no such set; there are {', '.join(corpus.sets)}")
    for name in names:
        hyps = {}
        for label, model in models.items():
            items = hear_set(model, corpus, name)
            torch.manual_seed(seed)  # of the samples, if any
            hyps[label] = write(model, items)
        refs = [item["target"] for item in items]
        print_table(name, task, refs, hyps, list(hyps)[:-1])
        langs = sorted({item["lang"] for item in items})
        for lang in langs if len(langs) > 1 else []:
            rows = [i for i, item in enumerate(items) if item["lang"] == lang]
            print_table(f"{name}, {lang}", task, [refs[i] for i in rows], {label: [h[i] for i in rows] for label, h in hyps.items()})
        for i in range(min(args.show, len(refs))):
            print(f"  ref  {refs[i]}", *(f"\n  hyp  {h[i]}" for h in hyps.values()))


def trained_on(run):
    """Where the recorded corpora lie that a model of this config has been trained on, in the runs that it began with, too."""
    lent = os.path.join(run.get("encoder") or "", "config.json")
    earlier = [run.get("before"), read_json(lent) if run.get("encoder") and os.path.exists(lent) else None]
    own = {data.manifest_of(run["data"]).resolve()} if run.get("data") else set()
    return own.union(*map(trained_on, filter(None, earlier)))


def check_arguments(args, defaults):
    """Ends the program where a number is out of range (or nan), a path is empty, or where flags do not go together."""
    for key in ("ckpt", "against", "data", "sets", "question"):
        if getattr(args, key) == "":
            data.die(f"--{key}: is empty; name something, or leave it out")
    for key, least in dict(test_size=1, beam=1, max_new=1, seed=0, temperature=0, top_p=1e-6).items():
        value, most = getattr(args, key), 1 if key == "top_p" else 2**32 - 1
        if value is not None and not least <= value <= most:
            data.die(f"--{key.replace('_', '-')} {value}: give {least} to {most}")
    unfit = dict.fromkeys(["run", "metric", "flags", "name", "lang", "seeds"], "goes with --table alone")
    if args.files:
        unfit |= dict.fromkeys(["against", "data", "sets", "seed", "test_size", "show"], "is not for audio files")
    else:
        unfit["question"] = "goes with audio files alone"
    if args.table:
        unfit = dict.fromkeys(["ckpt", "files", "question", "sets", "max_new", "seed", "beam", "show"], "is not for --table")
    if args.table and not (args.data or args.name):
        unfit["flags"] = "goes with --table and --data or --name"
    if args.table and not (args.data and args.table == "ast"):
        unfit["lang"] = "goes with --table ast and --data"
    for key, why in unfit.items():
        if getattr(args, key) != defaults[key]:
            data.die(f"{'audio files' if key == 'files' else '--' + key.replace('_', '-')}: {why}; leave out one of the two")
    data.refuse(
        (args.table == "rba" and args.data, "--table rba: what RBA's teacher invents is spoken by the synthesiser; leave out --data"),
        (args.beam > 1 and args.temperature, f"--beam {args.beam}: not with --temperature; leave one of them out"),
        (args.top_p != 1 and not args.temperature, f"--top-p {args.top_p}: is of samples; give --temperature, too"),
        (args.name is not None and not re.fullmatch(r"[\w.+-]+", args.name), f"--name {args.name}: give letters, digits, . + _ - alone"),
        (not all(map(str.isdecimal, args.seeds.split(","))), f"--seeds {args.seeds}: give whole numbers with commas between, as 0,1,2"))
    try:
        shlex.split(args.flags)
    except ValueError as e:
        data.die(f"--flags {args.flags}: {e}; close its quotes")


@data.plain_errors()
def main():
    """Command line: see the top of this file."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("files", nargs="*", help="audio files to transcribe, instead of a test set")
    p.add_argument("--table", choices=TABLES, help="print the miniature of a paper's table from the runs that exist")
    p.add_argument("--run", action="store_true", help="with --table: run first what is missing")
    p.add_argument("--flags", default="", help="with --table and --data or --name: more flags of grpo.py's commands, in quotes")
    p.add_argument("--name", help="with --table: what its runs' names begin with; default: the corpus's name")
    p.add_argument("--lang", default="de", help="with --table ast and --data: the language to translate into")
    p.add_argument("--bench", nargs="?", const="all", metavar="SHAPES",
                   help="speed and memory: A and B, a 29M decoder; C, the default's; D, 2B (a GPU's); or DECODER,PROMPT,UTTERANCES,G,NEW")
    p.add_argument("--engine", choices=ENGINES, help="with --bench SHAPE: measure one, print JSON")
    p.add_argument("--seeds", default="0,1,2", help="with --table: the seeds to average over")
    p.add_argument("--ckpt", help="folder of a run (its best.pt) or a checkpoint file")
    p.add_argument("--question", help="what to ask about the files, of a model of the task sqa")
    p.add_argument("--against", help="a second run, compared pairwise with the first; with --table: the rows to compare with, 'ROW;ROW'")
    p.add_argument("--metric", choices=["Ins", "Del", "Sub", *TEXT_METRICS], help="with --table: what to compare rows by, not WER or BLEU")
    p.add_argument("--data", help="LibriSpeech-style tree or JSON-lines manifest; default: the run's")
    p.add_argument("--sets", help="comma-separated sets; default: those of the run's table")
    p.add_argument("--seed", type=int, help="seed of the embedded corpus; default: the run's")
    p.add_argument("--test-size", type=int, default=400, help="utterances of each embedded test set")
    p.add_argument("--beam", type=int, default=1, help="1 is greedy")
    p.add_argument("--temperature", type=float, default=0.0, help="above 0: one sample each (2509.16990: 0.9, and --top-p 0.9); tables too")
    p.add_argument("--top-p", type=float, default=1.0, help="with --temperature: from the likeliest tokens that make up this share")
    p.add_argument("--max-new", type=int, help="tokens at which a transcript is cut off; default: the run's, or 64")
    p.add_argument("--show", type=int, default=3, help="examples printed for each set")
    p.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    args = p.parse_args()
    if args.engine in (None, "earshot"):  # the peers run as their users run them
        keep_pages()
    if args.bench:
        device = pick_device(args.device)
        which = args.bench if args.bench != "all" else "ABCD" if device.type == "cuda" else "ABC"
        if args.engine:
            return print(json.dumps(ENGINES[args.engine](which, device)))
        return bench(list(which) if which.isalpha() else [which], device)
    check_arguments(args, vars(p.parse_args([])))
    if args.table:
        return print_paper_table(args)
    if not args.ckpt:
        p.error("give --ckpt, the folder of a run, or --table")
    examine(args)


if __name__ == "__main__":
    main()
