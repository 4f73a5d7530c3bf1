"""The examiner: word error rates with Ins/Del/Sub and bootstrap intervals, by set and by language; single files too.

    python eval.py --ckpt runs/embedded-0/grpo-wer                          # the embedded test sets
    python eval.py --ckpt runs/digit_strings-0/grpo-wer --data ../shared/speech/digit_strings --beam 4
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
import functools
import hashlib
import inspect
import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from encoder import HOP, N_FFT, SAMPLE_RATE, WINDOW, EncoderConfig, length_mask, log_mel, mel_filters, n_frames, spec_augment
from model import BOS, EOS, INSTRUCTION, LLAMAS, PAD, SpeechLM, beam_search, generate, linear, train_tokenizer
from rewards import REWARDS, bleu_counts, bleu_of, corpus_bleu, edit_counts, normalize, sentence_bleu, word_error_rate


# ---------------------------------------------------------------------------------------------- loading
def pick_device(name=None):
    """"cuda" where there is a GPU, else "cpu", unless a name is given. One that is not there ends the program."""
    if name and name.split(":")[0] not in ("cpu", "cuda"):
        data.die(f"--device {name}: give cpu, cuda or cuda:N")
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        data.die(f"--device {name}: torch sees no GPU here; leave the flag out, or give --device cpu")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # what asks for no device by name, a CUDA graph and the bench's clock, means this one
    except RuntimeError as e:
        data.die(f"--device {name}: {str(e).splitlines()[0]}; give cpu, cuda or cuda:N")
    return device


def autocast(device):
    """bf16 compute on a GPU; the weights stay fp32. On CPU nothing changes."""
    return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else contextlib.nullcontext()


def read_json(path):
    """What a .json file of a run holds. A file that is damaged ends the program."""
    try:
        found = json.loads(Path(path).read_text())
        if isinstance(found, dict):
            return found
        raise ValueError("no object")
    except (OSError, ValueError) as e:
        data.die(f"{path}: cannot be read ({e}); remove {os.path.dirname(path)} to make it again, or put the file back")


def read_log(folder):
    """The lines of a run's metrics.jsonl as dictionaries, without one that was cut off."""
    rows = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, "metrics.jsonl")) as f:
        for line in f:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


def load_model(path, device="cpu"):
    """A run's folder (its best.pt) or a checkpoint file -> SpeechLM in evaluation mode. Bad input ends the program."""
    path = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    if not os.path.exists(path):
        data.die(f"{path}: no such checkpoint; give a folder under runs/ that holds best.pt, or a .pt file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)
        config = os.path.join(os.path.dirname(path), "config.json")
        if "run" in saved and os.path.exists(config) and saved["run"] != read_json(config):
            raise ValueError("it is of another run than the config.json beside it")
        model = SpeechLM(*saved["configs"])
        model.load_state_dict(saved["model"])
    except Exception as e:  # a damaged zip, a pickle of something else, a state dict of another shape: all bad input
        data.die(f"{path}: not a checkpoint of this code ({str(e).splitlines()[0][:150]}); train it again or give another")
    return model.to(device).eval()


FEATURES = os.path.join("runs", "features")  # 115 MB an hour of speech
# What makes features is part of their key, with its code: whoever changes a line of it hears new features, not the old ones.
MAKERS = log_mel, mel_filters, n_frames, length_mask, data.load_audio, data.not_too_long, data.resample
RECIPE = (SAMPLE_RATE, WINDOW, HOP, N_FFT, *map(inspect.getsource, MAKERS))


def features(path):
    """Log-mel features (T, M) of an audio file, made once and kept under FEATURES."""
    if not os.path.exists(path):
        data.die(f"{path}: no such file; check the path")
    about = os.stat(path)
    key = hashlib.sha256(repr((os.path.abspath(path), about.st_size, about.st_mtime_ns, RECIPE)).encode()).hexdigest()
    file = os.path.join(FEATURES, key[:2], f"{key}.npy")
    try:
        return torch.from_numpy(np.load(file))
    except Exception:  # not there, cut short, or whatever else a broken disk makes of a file
        pass
    audio = torch.from_numpy(data.load_audio(path))
    mel = log_mel(audio[None], torch.tensor([len(audio)]))[0][0]
    with contextlib.suppress(OSError):  # a disk that is full or not ours to write to: made again next time
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(file), delete=False) as f:
            np.save(f, mel.numpy())
        os.replace(f.name, file)
    return mel


def collate(items):
    """Items -> mel (B, T, M), lengths (B,) in frames of 10 ms, and the items without `audio`, which is samples (n,), or None: then the
    features of the item's file, from the disk."""
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


def watch(worker, every=3):
    """Ends a worker whose parent is gone, however that went: one with much to tell would wait for a listener for ever."""
    parent = os.getppid()

    def look():
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def loader(make, keys, workers, depth=4):
    """make(key) for each of a list of keys, in order, made in worker processes, each up to `depth` of them ahead."""
    # A generator of its own: a loader draws a seed, and from the global one that would shift our random numbers.
    made = DataLoader(keys, batch_size=None, num_workers=workers, prefetch_factor=depth if workers else None,
                      collate_fn=functools.partial(careful, make), generator=torch.Generator(), worker_init_fn=watch,
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


def hear_all(model, batches, **bar):
    """Runs the frozen encoder once over batches of features -> items, each with `frames` (T, D) on the CPU.

    SFT, control and GRPO share the encoder, so these frames serve all three; 3 s of speech at D = 128 are 38 kB.
    """
    heard = []
    for batch in tqdm(batches, leave=False, **bar):
        frames, lengths, items = listen(model, batch, next(model.parameters()).device)
        heard += [{**item, "frames": row[:n].clone()} for item, row, n in zip(items, frames.float().cpu(), lengths.tolist())]
    return heard


def hear_set(model, corpus, name, workers=1, n=None):
    """`hear_all` of a set, or of its first n."""
    return hear_all(model, chunks(corpus, name, n, workers), desc=f"hear {name}")


# ---------------------------------------------------------------------------------------------- decoding a set
@torch.no_grad()
def transcribe(model, heard, beam=1, max_new=64, batch=64, temperature=0.0, top_p=1.0):
    """Items with `frames` (T, D) and perhaps a `prompt` -> hypotheses in the items' order.

    Greedy, the best of `beam`, or one sample each at a temperature above 0. Batches by length, so that little of a batch is padding.
    """
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
def count_errors(refs, hyps):
    """(n, 4) integers, a row an utterance: substitutions, deletions, insertions, reference words, on normalised text."""
    rows = []
    for ref, hyp in zip(refs, hyps, strict=True):
        ref, hyp = normalize(ref), normalize(hyp)
        rows.append((*edit_counts(ref, hyp), len(ref.split())))
    return np.array(rows).reshape(-1, 4)


TEXT_METRICS = {"R-1": "rouge1", "R-2": "rouge2", "R-L": "rougeL", "METEOR": "meteor"}


def counts_of(task, refs, hyps, metric=None):
    """(n, c) numbers that add up over a corpus, of whose sums `rate` makes a metric: the WER (count_errors), its Sub, Del or Ins, BLEU
    (bleu_counts, on normalised references) or a mean of TEXT_METRICS. None: the WER for ASR, else BLEU."""
    if metric in TEXT_METRICS:
        return np.array([(REWARDS[TEXT_METRICS[metric]](normalize(ref), hyp), 0, 0, 1) for ref, hyp in zip(refs, hyps)])
    if task != "asr":
        return np.array([bleu_counts(normalize(ref), hyp) for ref, hyp in zip(refs, hyps)])
    parts = ("Sub", "Del", "Ins")
    return count_errors(refs, hyps) * [*((metric not in parts or metric == part) for part in parts), 1]


def rate(totals):
    """Sums of `counts_of` over a corpus, a row a draw of it, in percent: BLEU (10 columns), else all but the last by the last."""
    if totals.shape[1] == 4:
        return 100.0 * totals[:, :3].sum(1) / np.maximum(1, totals[:, 3])
    return np.array([100.0 * bleu_of(row, False) for row in totals.tolist()])


def shortfall(task, refs, hyps):
    """What a task's dev set is judged by, lower is better: the WER, or for translations and answers 100 - BLEU."""
    score = float(rate(counts_of(task, refs, hyps).sum(0, keepdims=True))[0])
    return score if task == "asr" else 100 - score


def columns(task):
    """What a table of this task shows; in result.json the same in lower case."""
    return ("WER", "Ins", "Del", "Sub", "CER", "ED", "EM") if task == "asr" else ("BLEU", *TEXT_METRICS)


def summary(task, refs, hyps):
    """One system on one set. ASR, on normalised text: the WER and its three parts in percent of the reference words, the CER in percent of
    the characters, ED, the mean edits of an utterance, and EM, how many percent are exact. Else BLEU of the corpus and the means of ROUGE
    and METEOR, in percent, on normalised references and hypotheses as they are."""
    if task == "asr":
        refs, hyps = (list(map(normalize, texts)) for texts in (refs, hyps))
        (sub, dele, ins, words), n = count_errors(refs, hyps).sum(0), len(refs)
        parts = {k: 100.0 * v / max(1, words) for k, v in (("wer", sub + dele + ins), ("ins", ins), ("del", dele), ("sub", sub))}
        cer = word_error_rate(*([" ".join(text.replace(" ", "_")) for text in texts] for texts in (refs, hyps)))  # characters as words
        exact = 100.0 * sum(ref == hyp for ref, hyp in zip(refs, hyps)) / n
        return {**parts, "cer": cer, "ed": float(sub + dele + ins) / n, "em": exact, "utterances": n, "words": int(words)}
    refs = list(map(normalize, refs))
    means = {k.lower(): 100 * float(np.mean([REWARDS[name](*pair) for pair in zip(refs, hyps)])) for k, name in TEXT_METRICS.items()}
    return {"bleu": corpus_bleu(refs, hyps), **means, "utterances": len(refs)}


def draws(counts, seed=0):
    """A corpus's rate, and those of 10,000 bootstrap draws of its utterances (10000,): one seed, the same utterances."""
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
    """Prints a test set's table, a row for each model in hyps {model: transcripts}, then the last against each of `bases`.

    Returns its figures as result.json holds them.
    """
    names, entry, drawn = columns(task), {}, {}
    print(f"\n{name}: {len(refs)} utterances\n{'':<26}" + "".join(f"{c:>7}" for c in names) + f"   95% interval of the {names[0]}")
    for model, rows in hyps.items():
        drawn[model] = draws(counts_of(task, refs, rows))
        low, high = interval(drawn[model][1])
        entry[model] = {**summary(task, refs, rows), "interval": [low, high]}
        print(f"{model:<26}" + "".join(f"{entry[model][c.lower()]:7.2f}" for c in names) + f"   [{low:.2f}, {high:.2f}]")
    for base in bases:
        by, (low, high) = change(drawn[base], drawn[model])
        print(f"from {base} to {model}: {by:+.1f}% [{low:+.1f}, {high:+.1f}] of the {names[0]}, relative, paired bootstrap")
        entry[model][f"against {base}"] = {"relative_change": by, "interval": [low, high]}
    return entry


def keep_transcripts(folder, name, source, refs, hyps):
    """Writes one model's transcripts of a test set to folder/NAME.hyps.json: what the tables of the papers are made of.
    source: the path of the recorded corpus, None for the embedded one."""
    path = os.path.join(folder, f"{name}.hyps.json")
    with open(f"{path}.{os.getpid()}.tmp", "w") as f:  # rows of a table that run side by side write SFT's at once
        json.dump({"data": source and os.path.abspath(source), "refs": refs, "hyps": hyps}, f, indent=0)
    os.replace(f.name, path)


# ---------------------------------------------------------------------------------------------- the papers' tables
def chain(run, flags, *paper):
    """The rows to compare with: SFT, and SFT continued for as long as RL took, which the papers do not have."""
    return [("SFT", f"{run}/speech", flags, *paper), ("SFT continued", f"{run}/control", flags)]


E, Q, T, R = "embedded-{s}", "embedded-sqa-{s}", "embedded-ast-{s}", "embedded-sqa-taught-{s}"  # runs: plain, SQA, AST, RBA
ADAPT = f"--reward wer --init runs/{E}/speech --domain far --name far-{{s}}"
IBM = "--task {t} --algo ibm --reward "


def spoken_table(task, run, of, base, sft, grpo):
    """SQA's and AST's tables have the same rows; base, sft and grpo are the paper's figures, on its test set `of`."""
    flags = IBM.format(t=task) + "bleu"
    return dict(task=task, title=f"{task.upper()}, 2509.16990 (2B), BLEU", bases=("SFT", "SFT continued"),
                sets={"clean": of, "hard": "", "ood": ""}, rows=[
        ("before speech", f"{run}/read", flags, base), *chain(run, flags, sft), ("GRPO (BLEU)", f"{run}/ibm-bleu", flags, grpo),
        ("MP-GRPO", f"{run}/ibm-bleu-off_policyreference", f"{flags} --off-policy reference"),
        ("MP-GRPO, shaped", f"{run}/ibm-bleu-off_policyreference-shaping0.1", f"{flags} --off-policy reference --shaping 0.1"),
        ("MP-GRPO, duplicate", f"{run}/ibm-bleu-off_policyduplicate", f"{flags} --off-policy duplicate")])


# sets: {test set: what the paper's figures beside it are of}; bases: the rows that the others are compared with.
TABLES = {
    "2": dict(task="asr", title="Table II of 2509.01939 (2B), WER (here beta 0 but where it is named; DAPO with dynamic sampling)",
              bases=("SFT", "SFT continued"),
              sets={"clean": "MLS, all", "hard": "People's Speech", "ood": "VoxPopuli, all (in domain there)"}, rows=[
        *chain(E, "--reward wer", "5.48", "23.5", "10.12"),
        ("GRPO (WER), beta 0", f"{E}/grpo-wer", "--reward wer", "5.59", "21.3", "9.24"),
        ("GRPO (WER), beta .04", f"{E}/grpo-wer-beta0.04", "--reward wer --beta 0.04", "5.49", "21.53", "9.47"),
        ("GRPO (ED)", f"{E}/grpo-ed", "--reward ed", "5.64", "21.48", "9.51"),
        ("GRPO (EM)", f"{E}/grpo-em", "--reward em", "5.62", "22.29", "9.76"),
        ("DAPO (EM)", f"{E}/dapo-em", "--algo dapo --reward em", "5.51", "21.71", "9.57"),
        ("DAPO (WER)", f"{E}/dapo-wer", "--algo dapo --reward wer", "5.53", "21.30", "9.30"),
        ("Dr. GRPO (EM)", f"{E}/dr_grpo-em", "--algo dr_grpo --reward em", "5.56", "22.24", "9.70"),
        ("GRPO (WER), beam", f"{E}/grpo-wer-G6-rolloutbeam", "--reward wer --rollout beam -G 6"),
        ("GRPO (WER), G 6", f"{E}/grpo-wer-G6", "--reward wer -G 6"),
        ("GRPO (WER), G 10", f"{E}/grpo-wer-G10", "--reward wer -G 10")]),
    "3": dict(task="asr", title="Table III of 2509.01939 (2B), out of domain, Ins/Del/Sub (other conditions than its sets)",
              bases=("SFT", "SFT continued"), sets={
                  "far": "AMI-SDM", "babble": "AMI-IHM", "pauses": "TED-LIUM", "test@../shared/speech/digit_strings": ""}, rows=[
        *chain(E, "--reward wer", "56.7/16.6/14.6", "38.4/10.3/7.3", ".5/1.7/1.6"),
        ("GRPO (WER)", f"{E}/grpo-wer", "--reward wer", "7.4/18.1/12.1", "2.8/10.96/6.3", ".4/1.6/1.6"),
        ("GRPO (ED)", f"{E}/grpo-ed", "--reward ed", "8.9/17.6/12.1", "5.6/11/6.3", ".5/1.7/1.6"),
        ("GRPO (EM)", f"{E}/grpo-em", "--reward em", "7.4/18.1/12.1", "2.7/11.1/6.3", ".4/1.8/1.7")]),
    "4": dict(task="asr", title="Table IV of 2509.01939 (2B), adapting to another domain (echo), WER", bases=("base", "SFT"),
              sets={"far": "AMI-SDM", "clean": "MLS En (old)", "hard": "VoxPopuli En (old)", "ood": ""}, rows=[
        ("base", f"{E}/speech", "--reward wer", "87.88", "4.83", "7.92"),
        ("SFT", "far-{s}/control", ADAPT, "44.34", "6.91", "9.80"),
        ("GRPO (WER)", "far-{s}/grpo-wer", ADAPT, "31.98", "6.59", "9.10")]),
    "sqa": spoken_table("sqa", Q, "LibriSQA I", "27.74", "40.88", "44.90"),
    "ast": spoken_table("ast", T, "CoVoST2 En-De", "29.06", "30.50", "31.47"),
    "rewards": dict(task="sqa", title="Reward choice, 2509.16990 (2B), BLEU/R-1/R-2/R-L/METEOR", bases=("SFT",),
                    sets={"clean": "LibriSQA I", "hard": ""}, rows=[
        *chain(Q, IBM.format(t="sqa") + "bleu", "40.88/65.1/49.1/61.5/64.6"),
        *((f"GRPO ({reward})", f"{Q}/ibm-{reward}", IBM.format(t="sqa") + reward, paper) for reward, paper in
          [("bleu", "44.9/68.6/53.4/64.9/68.5"), ("rouge1", "38.8/68.9/53.5/64.8/60.7"), ("rouge2", "37.8/68.6/54.2/65.3/58.9"),
           ("rougeL", "38.0/68.7/53.8/65.4/59.3"), ("meteor", "37.7/67.0/51.7/62.6/70.3")])]),
    "rba": dict(task="sqa", title="RBA, 2509.03526", bases=("SFT, teacher's", "SFT continued"),
                sets={"clean": "BLEU, translation En-X", "hard": "", "voices": "agreement over 4 voices, its own measure"}, rows=[
        *((label, f"{R}/{stage}", "--task sqa --algo rba_group --reward bleu", *paper) for label, stage, *paper in
          [("before speech", "read", "30.3", "", "82.6"), ("SFT, teacher's", "speech", "30.5", "", "89.3"), ("SFT continued", "control")]),
        ("RBA-Group", f"{R}/rba_group-bleu", "--task sqa --algo rba_group --reward bleu", "33.0", "", "94.5"),
        ("RBA-Single", f"{R}/rba_single-bleu", "--task sqa --algo rba_single --reward bleu", "32.6"),
        ("RBA-Group, CE", f"{R}/rba_group-bleu-ce0.2", "--task sqa --algo rba_group --reward bleu --ce 0.2"),
        ("RBA-Single, CE", f"{R}/rba_single-bleu-ce0.2", "--task sqa --algo rba_single --reward bleu --ce 0.2")]),
}


def mean_change(a, b):
    """Two rows {seed: draws} -> relative change of the mean over the seeds that both have, and its 95% interval, as text."""
    by, (low, high) = change(*([np.mean([row[s][i] for s in a.keys() & b.keys()], axis=0) for i in (0, 1)] for row in (a, b)))
    return f"{by:+.1f}% [{low:+.1f}, {high:+.1f}]"


def agreement(hyps):
    """Sentence BLEU of the answers to the same words in two voices: a row of counts for each group of voices (sum over all such pairs,
    0, 0, pairs), whose `rate` over all groups is the mean in percent; 100 if the voice changes nothing."""
    groups = [list(itertools.permutations(hyps[i:i + data.TAKES], 2)) for i in range(0, len(hyps), data.TAKES)]
    return np.array([(sum(sentence_bleu(a, b) for a, b in pairs), 0, 0, len(pairs)) for pairs in groups])


def kept_transcripts(folder, name, args, ears):
    """References and transcripts of a stage on a set, NAME of the run's own data, NAME@PATH or NAME@embedded: those that are there
    already, or made and left there now; greedy, or with --temperature one sample each.

    ears: {(folder of the run, set): items with frames} and the corpora, filled here; the stages of a run share their encoder.
    """
    name, _, path = name.partition("@")
    config = read_json(os.path.join(folder, "config.json"))
    source = None if path == "embedded" else os.path.abspath(path) if path else config["data"]
    stem = (f"{name}-{data.name_of(source)}" if path else name) + f"-T{args.temperature}-p{args.top_p}" * (args.temperature > 0)
    key = source, config["seed"], args.test_size, config["task"], config["lang"]
    corpus = ears[key] = ears.get(key) or data.open_corpus(*key)
    if os.path.exists(file := os.path.join(folder, f"{stem}.hyps.json")):
        found = read_json(file)
        same = found["refs"] == [item["target"] for item in corpus.data[name]] if source else len(found["refs"]) == args.test_size
        if found["data"] == source and same:
            return found["refs"], found["hyps"]
    model = load_model(folder, pick_device(args.device))
    key = os.path.dirname(folder), name, source
    if key not in ears:
        ears[key] = hear_set(model, corpus, name)
    refs = [item["target"] for item in ears[key]]
    if "max_new" not in config:  # of the stage read, which never wrote a transcript
        config = read_json(os.path.join(os.path.dirname(folder), "speech", "config.json"))
    torch.manual_seed(0)  # of the samples, if any
    hyps = transcribe(model, ears[key], max_new=config["max_new"], temperature=args.temperature, top_p=args.top_p)
    keep_transcripts(folder, stem, source, refs, hyps)
    return refs, hyps


def ast_name(lang):
    """What a run of --task ast calls its task: each language has runs of its own, German's are plain."""
    return "ast" + f"-{lang}" * (lang != "de")


def on_recorded(table, path, flags, lang):
    """A table's rows on recorded speech: other runs, its test sets, and nothing of the paper's to put beside them."""
    kind, extra = data.name_of(path), f"--data {shlex.quote(path)} {flags}".rstrip()
    extra += f" --lang {lang}" * (table["task"] == "ast")
    stages = {of: folder.split("/")[1] for _, folder, of, *_ in table["rows"] if not folder.endswith(("/read", "/speech", "/control"))}
    called = lambda of: f" --rl-name {stages[of]}" if flags and of in stages else ""  # else the folder were called after `flags`, too
    sets = dict.fromkeys(data.open_corpus(path, 0, task=table["task"], lang=lang).tests, "")
    if table is TABLES["4"]:  # here the embedded corpus is the domain that one comes from
        table = {**table, "title": table["title"].replace("(echo)", f"(from embedded to {kind})")}
        sets = {**{f"{name}@{path}": "" for name in sets}, "clean@embedded": "", "hard@embedded": ""}
        rows = [(label, *(x.replace("--domain far", extra).replace("far-{s}", kind + "-from-{s}") for x in (folder, args + called(args))))
                for label, folder, args, *_ in table["rows"]]
    else:
        named = lambda folder: folder.replace("embedded-ast", f"embedded-{ast_name(lang)}").replace("embedded", kind)
        rows = [(label, named(folder), f"{args} {extra}{called(args)}") for label, folder, args, *_ in table["rows"]]
    return {**table, "rows": rows, "sets": sets}


def finished(folder):
    """Whether a stage has come to its end: a checkpoint that was best so far is there before."""
    if not os.path.exists(os.path.join(folder, "best.pt")):
        return False
    steps = read_json(os.path.join(folder, "config.json")).get("steps")  # none for --init
    return not steps or bool(rows := read_log(folder)) and rows[-1]["step"] == steps


def print_paper_table(args):
    """The miniature of a paper's table, from the runs that exist, and its rows' commands; what is missing is named, or run."""
    table, seeds = TABLES[args.table], args.seeds.split(",")
    if not all(s.isdecimal() for s in seeds):
        data.die(f"--seeds {args.seeds}: give whole numbers with commas between, such as 0,1,2")
    if args.data and args.table == "rba":
        data.die("--table rba: what RBA's teacher invents is spoken by the synthesiser; leave out --data")
    if not args.data and (args.flags or args.lang != "de"):
        data.die("--flags and --lang: are for tables of recorded speech; give --data, or leave them out")
    try:
        shlex.split(args.flags)
    except ValueError as e:
        data.die(f"--flags {args.flags}: {e}; close its quotes")
    if args.data:
        table = on_recorded(table, args.data, args.flags, args.lang)
    if args.against:
        bases = [base.strip() for base in args.against.split(";")]
        if not set(bases) <= {row[0] for row in table["rows"]}:
            data.die(f"--against {args.against}: no row of table {args.table}; give {'; '.join(row[0] for row in table['rows'])}")
        table = {**table, "bases": bases, "rows": sorted(table["rows"], key=lambda row: row[0] not in bases)}
    at = lambda folder, s: os.path.join("runs", folder.replace("{s}", s))
    missing = lambda: list(dict.fromkeys(f"grpo.py {flags.replace('{s}', s)} --seed {s}" for s in seeds
                                         for _, folder, flags, *_ in table["rows"] if not finished(at(folder, s))))
    if args.run and missing():
        print(f"{len(missing())} runs; on two cores about 2 minutes each, and 5 more where their SFT does not exist yet")
        for command in tqdm(missing(), desc="runs"):
            script, *flags = shlex.split(command)
            done = subprocess.run([sys.executable, Path(__file__).with_name(script), *flags], capture_output=True, text=True)
            if done.returncode:
                data.die(f"python {command} ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    names = columns(table["task"])
    if args.metric and args.metric not in names:
        data.die(f"--metric {args.metric}: table {args.table} has {', '.join(names)}; give one of these, or leave it out")
    how = f"sampled at temperature {args.temperature}, top_p {args.top_p}" if args.temperature else "greedy"
    voices = " (on voices: Agree)" * ("voices" in table["sets"])
    print(f"{table['title']}; here {how}, the mean of seeds {', '.join(seeds)}.\nChanges are of the mean {args.metric or names[0]}{voices},"
          " with the 95% interval of a paired bootstrap over utterances: what another seed of training would change is not in it")
    ears = {}
    for column, (name, of) in enumerate(table["sets"].items()):
        test, _, where = name.partition("@")  # where: a corpus that is not the run's own
        if where not in ("", "embedded") and not os.path.exists(where):
            print(f"\n{name}: not on this machine, left out")
            continue
        extra = ("Agree",) if name == "voices" else ()
        title = test + (f" of {data.name_of(where)}" if where else "")
        print(f"\n{title:<20}" + "".join(f"{c:>7}" for c in (*names, *extra))
              + "".join(f"   {'from ' + base:<26}" for base in table["bases"]) + (f"   paper: {of}" if of else ""))
        seen = {}
        for label, folder, _, *paper in table["rows"]:
            figures, drawn = [], {}
            for s in seeds:
                path = at(folder, s)
                if finished(path):
                    refs, hyps = kept_transcripts(path, name, args, ears)
                    entry = summary(table["task"], refs, hyps)
                    counts = agreement(hyps) if extra else counts_of(table["task"], refs, hyps, args.metric)
                    figures.append([entry[c.lower()] for c in names] + [rate(counts.sum(0, keepdims=True))[0] for _ in extra])
                    recorded = where != "embedded" if where else args.data     # every seed has the same utterances there
                    drawn[s] = draws(counts, 0 if recorded else int(s))
            changes = [mean_change(seen[base], drawn) if seen.get(base, {}).keys() & drawn.keys() and base != label else ""
                       for base in table["bases"]]
            seen[label] = drawn
            cells = "".join(f"{x:7.2f}" for x in np.mean(figures, 0)) if figures else "      -" * (len(names) + len(extra))
            few = f"   ({len(drawn)} of {len(seeds)} seeds)" if len(drawn) < len(seeds) else ""
            theirs = paper[column] if column < len(paper) else ""
            print(f"{label:<20}{cells}" + "".join(f"   {c:<26}" for c in changes) + f"   {theirs}{few}")
    print("\nthe rows' commands")
    for label, _, flags, *_ in table["rows"]:
        print(f"  {label:<22}python grpo.py {flags.replace('{s}', 'S')} --seed S")
    for command in missing():
        print(f"missing: python {command}")


# ---------------------------------------------------------------------------------------------- speed
# Decoder, prompt positions, utterances, G (and beams), new tokens. B's prompt is 30 s of audio; D is for a GPU.
SHAPES = {"A": ("29m", 200, 4, 8, 40), "B": ("29m", 750, 4, 8, 40), "C": ("tiny", 84, 24, 12, 16), "D": ("2b", 750, 16, 8, 64)}


def forward_flops(c, B, P, N, T):
    """Operations (a multiplication and an addition are two) of the matrix products that nobody can leave out: B prompts of P
    positions, whose last layer makes keys and values alone, and N responses of T tokens after them; attention to the past alone."""
    kv = 2 * c.d * c.n_kv_heads * (c.d // c.n_heads)
    layer = 2 * c.d * c.d + kv + 3 * c.d * c.ffn
    prompt = 2 * B * P * ((c.n_layers - 1) * layer + kv) + 2 * B * P * (P + 1) * c.d * (c.n_layers - 1)
    return prompt + 2 * N * T * (c.n_layers * layer + c.d * c.vocab) + 2 * N * T * (2 * P + T + 1) * c.d * c.n_layers


def shape_of(name):
    """A shape by its letter, or as it is written above: 29m,750,4,16,40."""
    try:
        llm, *sizes = SHAPES[name] if name in SHAPES else name.split(",")
        P, B, G, new = map(int, sizes)
        if P > 20 and min(B, G, new) > 0 and llm in LLAMAS:
            return llm, P, B, G, new
    except ValueError:
        pass
    data.die(f"--bench {name}: give letters of {''.join(SHAPES)}, or DECODER,PROMPT,UTTERANCES,G,NEW such as 29m,750,4,16,40; "
             f"decoders: {', '.join(LLAMAS)}")


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
    """What this machine can do: operations a second of a large matrix product (fp32, on a GPU bf16), by torch's own or model.linear's
    route if that is quicker, and bytes a second of a copy (read and written)."""
    n, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, layer = torch.randn(n, n, device=device, dtype=kind), torch.nn.Linear(n, n, bias=False, device=device, dtype=kind)
    source, target = torch.ones(2, 2**26, device=device)  # both written to: the first touch of a page costs more than a copy
    with torch.no_grad():
        product = min(clock(lambda: a @ layer.weight, device), clock(lambda: linear(a, layer), device))
    return 2 * n**3 / product, 2 * source.nbytes / clock(lambda: target.copy_(source), device)


def micro_batch(c, P, G, T, device):
    """Utterances in one backward pass, where --micro does not say: so many that attention's scores of their G responses of T tokens against
    prompts of P positions, where these are long the largest tensor, take 16 MB at most on a CPU, on a GPU 128; one at the least. (Over 32
    MB a tensor gets new pages from the system each time, and learning took half as long again.)"""
    return max(1, (2**25 if device.type == "cuda" else 2**22) // (c.n_heads * G * T * P))


def bench_model(shape):
    """A speech LM with random weights and this shape's frames (B, T, 128), lengths and, in place of a rollout, tokens (B * G, new)."""
    name, P, B, G, new = shape_of(shape)
    torch.manual_seed(0)
    model = SpeechLM(EncoderConfig(units=("a",)), LLAMAS[name], train_tokenizer(["a"], 40))
    frames = torch.randn(B, P - 4 - len(model.tokenizer.encode(INSTRUCTION)), 128)
    return model, frames, torch.full((B,), frames.shape[1]), torch.randint(7, LLAMAS[name].vocab, (B * G, new))


def bench_earshot(shape, device):
    """Seconds of the parts of one GRPO step, of sampling and beam search, and the peak memory of a step."""
    model, *data_ = bench_model(shape)
    model, (frames, lengths, tokens) = model.to(device), [x.to(device) for x in data_]
    name, P, B, G, new = shape_of(shape)
    parameters = [p for part in (model.projection, model.llm) for p in part.parameters()]
    opt = torch.optim.AdamW(parameters, lr=1e-6)
    micro = min(B, micro_batch(LLAMAS[name], P, G, new, device))

    @torch.no_grad()
    def prefill():
        with autocast(device):
            return model.prefill(*model.embed_prompt(frames, lengths))

    def rollout(search=False, graph=False):
        with autocast(device), torch.no_grad():
            return beam_search(model, prefill(), G, new) if search else generate(model, prefill(), G, new, graph=graph)

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

    out = {"rollout": clock(rollout, device), "learn": clock(learn, device), "peak": peak_memory(device)}  # of a step: the rest is later
    rate, copy = limits(device)
    out |= {"prefill": clock(prefill, device), "beam": clock(lambda: rollout(True), device, 2), "rate": rate, "copy": copy}
    if device.type == "cuda":
        out["graph"] = clock(lambda: rollout(graph=True), device)
    return out


def peak_memory(device):
    """Bytes: a GPU's, or the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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

    def run(**how):
        with torch.no_grad(), autocast(device):
            peer.generate(ids, **options, **how)

    sample = clock(lambda: run(do_sample=True, top_k=0), device, 2)
    return {"sample": sample, "beam": clock(lambda: run(do_sample=False, num_beams=G), device, 2)}


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
        def on_step_begin(self, *args, **kw):
            marks.append(time.perf_counter())

        on_step_end = on_step_begin

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(folder, per_device_train_batch_size=B * G, num_generations=G, max_completion_length=new, beta=0.0, max_steps=3,
                            num_iterations=1, loss_type="grpo", gradient_checkpointing=False, bf16=device.type == "cuda", report_to=[],
                            use_cpu=device.type == "cpu", save_strategy="no", logging_strategy="no", disable_tqdm=True, top_k=0,
                            generation_kwargs={"min_new_tokens": new})
        GRPOTrainer(peer, reward_funcs=lambda completions, **kw: [float(len(set(c))) for c in completions], args=config,
                    train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer, callbacks=[Clock()]).train()
    return {"step": float(np.median([b - a for a, b in zip(marks[2::2], marks[3::2])])), "peak": peak_memory(device)}


def run_engine(engine, shape, device):
    """What bench_ENGINE returns, measured in a process of its own, so that the peak memory is its own; {} and a line if it cannot be."""
    command = [sys.executable, __file__, "--bench", shape, "--engine", engine, "--device", str(device)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    except subprocess.TimeoutExpired:
        print(f"  {engine} left out: not done after 20 minutes")
        return {}
    if done.returncode:
        print(f"  {engine} left out: {(done.stderr.strip().splitlines() or ['no output'])[-1][:120]}")
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


def pairs_a_second(N):
    """{reward: [ours, its peer's where that is installed]}, over N pairs of 12 words that have little in common."""
    scorers = {"wer": [REWARDS["wer"]], "bleu": [REWARDS["bleu"]]}
    with contextlib.suppress(ImportError):
        import jiwer
        scorers["wer"].append(jiwer.wer)
    with contextlib.suppress(ImportError):
        import sacrebleu
        scorers["bleu"].append(lambda ref, hyp: sacrebleu.sentence_bleu(hyp, [ref]).score)
    rng = np.random.default_rng(0)
    pairs = [[" ".join(rng.choice(["one", "two", "three", "four"], 12)) for _ in range(2)] for _ in range(N)]
    time_of = lambda scorer: clock(lambda: [scorer(*pair) for pair in pairs], torch.device("cpu"))
    return {name: [N / time_of(scorer) for scorer in both] for name, both in scorers.items()}


def bench(shapes, device):
    """Prints the speed of sampling, of beam search and of a GRPO step, as shares of what the machine can multiply and, where they are
    installed, beside transformers and TRL at the same work."""
    print(f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; a multiplication and an addition are two "
          "operations.\nCounted are the products that no program can leave out: the prompt once for G samples, attention to the past.")
    for shape in shapes:
        name, P, B, G, new = shape_of(shape)
        N = B * G
        print(f"\nshape {shape}: {name} decoder, {B} prompts of {P} positions, G {G}, {new} new tokens")
        ours, hf, trl = (run_engine(engine, shape, device) for engine in ("earshot", "transformers", "trl"))
        if not ours:
            continue
        work, step = forward_flops(LLAMAS[name], B, P, N, new), ours["rollout"] + ours["learn"]
        beside = lambda mine, peer, unit: f"{peer:10.2f} {unit}{peer / mine:8.1f}x" if peer else ""
        print(f"  limits: {ours['rate'] / 1e9:.0f} GFLOP/s of matrix products, {ours['copy'] / 1e9:.1f} GB/s of copying\n"
              f"  {'':<14}{'earshot':>8}{'of the limit':>18}{'peer':>12}{'ratio':>10}")
        rows = [("sampling", ours["rollout"], hf.get("sample"), work), ("beam search", ours["beam"], hf.get("beam"), work),
                ("learning", ours["learn"], None, 3 * work), ("GRPO step", step, trl.get("step"), 4 * work)]
        for what, mine, peer, operations in rows:
            tokens = f"   {N * new / mine:.0f} tokens/s" if operations == work else ""
            print(f"  {what:<14}{mine:8.2f} s{100 * operations / mine / ours['rate']:15.0f}%{beside(mine, peer, 's ')}{tokens}")
        print(f"  {'peak memory':<14}{ours['peak'] / 1e9:8.2f} GB{'':15}{beside(ours['peak'] / 1e9, trl.get('peak', 0) / 1e9, 'GB')}")
        c, size = LLAMAS[name], 2 if device.type == "cuda" else 4
        weights = forward_flops(c, 0, 0, 1, 1) / 2                             # one token alone: two operations a weight
        kv = 2 * c.n_layers * c.n_kv_heads * (c.d // c.n_heads) * (B * P + N * new / 2)
        read, speed = size * (weights + kv), new / (ours["rollout"] - ours["prefill"])
        print(f"  a step of sampling reads {read / 1e9:.3f} GB, weights, keys and values: {100 * read * speed / ours['copy']:.0f}% of the "
              "speed of copying" + (f"; with --graph sampling takes {ours['graph']:.2f} s" if "graph" in ours else ""))
        for reward, speeds in pairs_a_second(N).items():
            print(f"  {'reward ' + reward:<14}{speeds[0]:8.0f} pairs/s, {100 * N / speeds[0] / step:.2f}% of the step"
                  + (f"; {dict(wer='jiwer', bleu='sacreBLEU')[reward]} {speeds[1]:.0f}" if speeds[1:] else ""))


def main():
    """Command line: see the top of this file."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("files", nargs="*", help="audio files to transcribe, instead of a test set")
    p.add_argument("--table", choices=TABLES, help="print the miniature of a paper's table from the runs that exist")
    p.add_argument("--run", action="store_true", help="with --table: run first what is missing")
    p.add_argument("--flags", default="", help="with --table and --data: more flags of grpo.py's commands, in quotes")
    p.add_argument("--lang", default="de", help="with --table ast and --data: the language to translate into")
    p.add_argument("--bench", nargs="?", const="all", metavar="SHAPES",
                   help="speed and memory: A and B, a 29M decoder; C, the default's; D, 2B (a GPU's); or DECODER,PROMPT,UTTERANCES,G,NEW")
    p.add_argument("--engine", choices=["earshot", "transformers", "trl"], help="with --bench SHAPE: measure one, print JSON")
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
    if args.bench:
        device = pick_device(args.device)
        letters = "ABC" + "D" * (device.type == "cuda") if args.bench == "all" else args.bench
        shapes = list(letters) if letters.isalpha() else [letters]
        for shape in shapes:
            shape_of(shape)
        if not args.engine:
            return bench(shapes, device)
        engine = {"earshot": bench_earshot, "transformers": bench_transformers, "trl": bench_trl}[args.engine]
        return print(json.dumps(engine(args.bench, device)))
    for key, least in dict(test_size=1, beam=1, max_new=1, seed=0, temperature=0, top_p=1e-6).items():
        value = getattr(args, key)
        if value is not None and not least <= value < 2**32:
            data.die(f"--{key.replace('_', '-')} {value}: {least} at the least")
    if args.beam > 1 and (args.temperature or args.table):
        data.die(f"--beam {args.beam}: not with --temperature or --table; leave one of them out")
    if args.top_p != 1 and not args.temperature:
        data.die(f"--top-p {args.top_p}: is of samples; give --temperature, too")
    unfit = [flag for flag in ("ckpt", "files", "sets", "max_new", "seed") if getattr(args, flag) not in (None, [])] if args.table else [
        flag for flag in ("run", "metric", "flags") if getattr(args, flag)]
    if unfit:
        data.die(f"--{unfit[0].replace('_', '-')}: is not for {'--table' if args.table else '--ckpt'}; leave one of the two out")
    if args.table:
        return print_paper_table(args)
    if not args.ckpt:
        p.error("give --ckpt, the folder of a run, or --table")
    model = load_model(args.ckpt, pick_device(args.device))
    config = os.path.join(args.ckpt if os.path.isdir(args.ckpt) else os.path.dirname(args.ckpt), "config.json")
    of_run = read_json(config) if os.path.exists(config) else {}
    args.seed = of_run.get("seed", 0) if args.seed is None else args.seed
    known = not args.data or os.path.abspath(args.data) == of_run.get("data")  # else all of it is for testing
    args.data = args.data or of_run.get("data")
    args.max_new = args.max_new or of_run.get("max_new", 64)

    task, lang = of_run.get("task", "asr"), of_run.get("lang", "de")
    if args.files:
        if task == "sqa" and not args.question:
            data.die(f"--ckpt {args.ckpt}: answers questions; ask one with --question \"how many digits are there\"")
        asked = data.instruct(task, lang, args.question)
        for path in args.files:
            heard = hear_all(model, [collate([{"audio": data.load_audio(path), "prompt": asked}])], disable=True)
            print(f"{path}\t{transcribe(model, heard, args.beam, args.max_new, temperature=args.temperature, top_p=args.top_p)[0]}")
        return

    domain = of_run.get("domain") or (of_run.get("before") or {}).get("domain", "hard")
    corpus = data.open_corpus(args.data, args.seed, args.test_size, task, lang, domain, train=known)
    names = args.sets.split(",") if args.sets else corpus.tests
    for name in names:
        if name not in corpus.sets:
            data.die(f"--sets {name}: no such set; there are {', '.join(corpus.sets)}")
    models = {args.against: load_model(args.against, pick_device(args.device))} if args.against else {}
    models[args.ckpt] = model
    short = {"/".join(os.path.normpath(path).split(os.sep)[-2:]): m for path, m in models.items()}
    models = short if len(short) == len(models) else models
    for name in names:
        heard = {ckpt: hear_set(m, corpus, name) for ckpt, m in models.items()}
        items = heard[list(models)[-1]]
        refs = [item["target"] for item in items]
        hyps = {}
        for ckpt, m in models.items():
            torch.manual_seed(args.seed)  # of the samples, if any
            hyps[ckpt] = transcribe(m, heard[ckpt], args.beam, args.max_new, temperature=args.temperature, top_p=args.top_p)
        print_table(name, task, refs, hyps, list(hyps)[:-1])
        langs = sorted({item["lang"] for item in items})
        for lang in langs if len(langs) > 1 else []:
            rows = [i for i, item in enumerate(items) if item["lang"] == lang]
            print_table(f"{name}, {lang}", task, [refs[i] for i in rows], {ckpt: [h[i] for i in rows] for ckpt, h in hyps.items()})
        for i in range(min(args.show, len(refs))):
            print(f"  ref  {refs[i]}", *(f"\n  hyp  {h[i]}" for h in hyps.values()))


if __name__ == "__main__":
    main()
