"""The stages before RL, from nothing: encoder (CTC), text (Eq. 1), read, speech (Eq. 2), and SFT's continuation as a control.

    python sft.py --stage encoder         # the conformer learns to hear, with CTC; frozen afterwards
    python sft.py --stage text            # the Llama learns to write: next token on text, Eq. 1 of 2509.01939
    python sft.py --stage read            # projection and Llama learn to read spelled-out text, one frame a phone
    python sft.py --stage speech          # projection and Llama learn to write what is heard, Eq. 2
    python sft.py --stage control         # SFT goes on, on GRPO's audio: the yardstick that GRPO has to beat

Each stage begins with the best checkpoint of the one before it (what is missing is run first), keeps the checkpoint that was best on dev
and leaves runs/NAME/STAGE/ with config.json, metrics.jsonl, last.pt and best.pt. Run again, a finished stage is reused and an interrupted
one goes on where it was, to the same numbers. Without --spec-augment (the embedded corpus) the stage speech hears the utterances of the
stage encoder and new ones, several times: making one costs more than learning from it. The control hears those of GRPO.

The stage read is ours, not the paper's, whose LLM comes with a knowledge of spelling that a tiny one does not have. It
is Eq. 2 on text alone: the prompt holds, in place of speech, one frame for each phone (or letter) of the transcript, the
mean of the encoder's frames for it in its first training utterances (embedded: clean ones). Prompts are a third as long
as speech's, so words are learned from their sounds at little cost, and speech has durations and noise left to teach
(what it brings: LOG.md, 2026-11-21). For the task sqa half of its items are transcribed, not answered.

Many processes: `torchrun --nproc_per_node N sft.py ..` (and grpo.py). Each takes its own batches, --accumulate of them a step, the
gradients are summed over all (DistributedDataParallel), and the first process alone looks at dev, writes and prints. So N processes are
one with N times the --accumulate, to the last digits but for what is drawn at random (masks, samples), which each draws for itself, and
anew when a run is resumed, and for dynamic sampling, which draws N batches at a time. With --shard (FSDP2) each keeps but its part of
the decoder, of its gradients and of AdamW's moments; all of the weights only while it samples.

Letters: B utterances, T frames, U tokens of a transcript with its <EOS>.
"""
import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode  # a CPU's operators, without data
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from encoder import EncoderConfig, length_mask, spec_augment
from eval import (ast_name, autocast, chunks, collate, finished, forward_flops, hear_set, keep_pages, limits, listen, load_model, loader,
                  micro_batch, pick_device, read_json, read_log, replacing, summary, transcribe, write_json)
from model import (BOS, EOS, INSTRUCTION, LLAMAS, S_BOS, SYSTEM, USER, LlamaConfig, SpeechLM, generate, load_tokenizer, right_pad,
                   train_tokenizer)
from rewards import normalize, word_error_rate

ORDER = ["encoder", "text", "read", "speech", "control"]
TEACHER = dict(d=128, n_layers=3, n_heads=4, n_kv_heads=2, ffn=384)  # the shape of RBA's teacher
MAY_BE_ZERO = {"seed", "workers", "teacher_steps", "text_steps", "read_steps", "control_steps", "spec_augment", "views", "muon",
               "grpo_muon", "beta", "eps_low", "eps_high", "shaping", "overlong", "ce"}
MEASURED = 512  # utterances, of which read's mean frames are made
SAMPLED = dict(temperature=0.9, top_p=0.9)  # how 2509.16990 evaluates
SAVE_SECONDS = 20  # from one checkpoint to the next, and as many times what saving took: so it costs under 5%


def add_arguments(p):
    """The flags that sft.py and grpo.py share."""
    p.add_argument("--data", help="LibriSpeech-style tree or JSON-lines manifest; default: the embedded corpus")
    p.add_argument("--task", choices=data.TASKS, default="asr", help="transcribe, translate (ast) or answer a question (sqa)")
    p.add_argument("--lang", default="de", help="--task ast: the language to translate into, of `translation` where that is an object")
    p.add_argument("--init", help="a run's stage, runs/NAME/speech: begin with its model in place of the stages before RL")
    p.add_argument("--encoder", help="a run's stage, runs/NAME/encoder: begin the encoder with its weights, all but CTC's output layer")
    p.add_argument("--domain", choices=["hard", *data.OOD_PARTS], default="hard", help="with --init: the embedded audio to adapt to")
    p.add_argument("--name", help="the run's folder under runs/; default: the data's name and the seed")
    p.add_argument("--seed", type=int, default=0, help="of everything random: weights, data, sampling")
    p.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    p.add_argument("--workers", type=int, default=1, help="processes that make or read audio beside the model")
    p.add_argument("--vocab", type=int, default=300, help="tokens of the sentencepiece BPE model trained on the texts")
    p.add_argument("--llm", choices=LLAMAS, default="tiny", help="the decoder's shape; its weights begin at random")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory for a third more time")
    p.add_argument("--dry-run", type=int, nargs="?", const=1, metavar="GPUS", help="print what a step takes, and train nothing")
    p.add_argument("--max-new", type=int, help="tokens at which a transcript is cut off; default: twice the longest of training")
    p.add_argument("--batch", type=int, default=24, help="utterances a step, of encoder, speech and, without RL, control")
    p.add_argument("--teacher-steps", type=int, default=0, help="above 0: a teacher invents all that is said and answered (RBA)")
    p.add_argument("--dialogues", type=int, default=12000, help="how many it invents")
    p.add_argument("--text-batch", type=int, default=64, help="sentences a step")
    p.add_argument("--read-batch", type=int, default=32, help="sentences a step")
    p.add_argument("--speech-batches", type=int,
                   help="different batches it hears, and keeps; the first are the encoder's; default: as --speech-steps, 420 or 1300")
    p.add_argument("--control-batches", type=int, help="different batches of GRPO's audio it hears; default: as many as RL, or 200")
    for stage, steps, lr, note in (("encoder", 240, 3e-3, ""), ("text", 80, 2e-3, ""),
                                   ("read", None, 3e-3, "; 0 leaves it out; default: 600, for sqa 1200"),
                                   ("speech", None, 3e-3, "; default: 2600, embedded ast and sqa without a teacher 8000"),
                                   ("control", 1250, 5e-4, ", SFT continued; grpo.py's default: about as long as RL's --steps take")):
        p.add_argument(f"--{stage}-steps", type=int, default=steps, help=f"optimiser steps of the stage {stage}{note}")
        p.add_argument(f"--{stage}-lr", type=float, default=lr, help=f"peak learning rate of the stage {stage}")
    p.add_argument("--muon", type=float, default=10.0, help="Muon's rate for hidden matrices, as a multiple of AdamW's; 0 is AdamW alone")
    p.add_argument("--spec-augment", type=int, choices=[0, 1], help="1: speech hears new batches, masked; default: recorded data only")
    p.add_argument("--views", type=int, choices=[0, 1], default=1,
                   help="recorded training speech in ever new noisy views; 0: as it is recorded, features kept on disk")
    p.add_argument("--shard", action="store_true", help="under torchrun: FSDP2, each process with its part of the decoder")
    p.add_argument("--accumulate", type=int, default=1, help="batches that each process gathers into one optimiser step")
    p.add_argument("--test-size", type=int, default=400, help="utterances of each embedded test set")
    p.add_argument("--dev-evals", type=int, default=4, help="how often a stage looks at dev, about; always at its end")
    p.add_argument("--dev-size", type=int, default=480, help="utterances of dev it looks at, at most")


# ---------------------------------------------------------------------------------------------- many processes
def join_processes(device=None):
    """Under torchrun: meets the other processes, one a GPU where there are GPUs; else does nothing. device: as --device."""
    if "RANK" in os.environ and not dist.is_initialized():
        if device and ":" in device:
            data.die(f"--device {device}: every process would take that one GPU; give cuda or cpu")
        kind, local = pick_device(device).type, int(os.environ["LOCAL_RANK"])
        if kind == "cuda":
            torch.cuda.set_device(local)
        # The others wait while the first looks at dev or writes its tables; a process that dies ends them, whatever the timeout.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=datetime.timedelta(days=1),
                                device_id=torch.device("cuda", local) if kind == "cuda" else None)


def rank():
    """This process's number; 0 looks at dev, writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait():
    """Until all processes are here: what the first has written can be read afterwards."""
    if world() > 1:
        dist.barrier()


def leave_processes():
    """The end of `join_processes`."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def summed(numbers, device):
    """Numbers, each summed over the processes."""
    total = torch.tensor(list(numbers), dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(total)
    return total.tolist()


def data_parallel(model, parameters):
    """DistributedDataParallel around a model of which `parameters` are trained; with one process, or FSDP, the model as it is. Both
    give every process the mean of the gradients over all, where our losses want the sum."""
    if world() == 1 or isinstance(model, FSDPModule):
        return model
    model.requires_grad_(False)
    for p in parameters:  # it waits for the gradients of all that require one
        p.requires_grad_()
    return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)


def shard(model, device):
    """FSDP2: each process keeps on `device` its part of the decoder and the projection; the encoder, frozen and small, is whole there."""
    for tensor in model.state_dict().values():  # DDP gives every process the first one's weights when it is made, FSDP does not
        dist.broadcast(tensor, 0)
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    # On a GPU weights are gathered in bf16: of fp32 ones autocast would make bf16 copies and keep them all for the backward pass.
    # Activations are left to autocast; cast_forward_inputs would round the rotations and the residual stream.
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    settings = dict(mesh=mesh, mp_policy=bf16 if mesh.device_type == "cuda" else MixedPrecisionPolicy())
    for layer in model.llm.layers:
        fully_shard(layer, **settings)
    fully_shard(model, **settings, ignored_params=set(model.encoder.parameters()))
    model.encoder.to(device)
    return model


@contextlib.contextmanager
def gathered(model):
    """While this lasts every process holds all of a sharded model's weights, and calls to it exchange nothing: to sample, where one
    process writes longer than another, and for the first to look at dev alone."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # FSDP's own choice
    if parts:
        model.reset_iter_state()  # lets go of the weights and forgets the calls, unlike in each process; no gradient is under way


def full(state):
    """A nest of lists and dictionaries with its sharded tensors made whole, for the first process to save; all have to ask."""
    if isinstance(state, dict):
        return {k: full(v) for k, v in state.items()}
    if isinstance(state, list):
        return [full(v) for v in state]
    if isinstance(state, DTensor):
        whole = state.full_tensor()
        state = whole.cpu() if rank() == 0 else whole.new_empty(0)
    return state


def finish_arguments(args):
    """Fills what depends on other flags, checks them, sets the threads and forgets what was kept for another run -> the corpus."""
    join_processes(args.device)
    args.data = os.path.abspath(args.data) if args.data else args.data
    for flag, folder, stage in (("init", args.init, "speech"), ("encoder", args.encoder, "encoder")):
        if folder and not finished(folder):
            data.die(f"--{flag} {folder}: no finished stage; give the folder of one, such as runs/embedded-0/{stage}")
    # (steps, batches) of the stage speech: embedded ast and sqa until going on brings nothing; the first command is to take minutes.
    steps, different = (2600, 420) if args.task == "asr" or args.data or args.teacher_steps else (8000, 1300)
    task, taught = {"asr": "", "ast": ast_name(args.lang), "sqa": "sqa"}[args.task], "taught" if args.teacher_steps else ""
    for key, default in dict(spec_augment=int(args.data is not None), read_steps=1200 if args.task == "sqa" else 600, speech_steps=steps,
                             speech_batches=different, control_batches=getattr(args, "steps", 200) * args.accumulate * world()).items():
        if getattr(args, key) is None:
            setattr(args, key, default)
    check_flags(args)
    args.name = args.name or "-".join(filter(None, [data.name_of(args.data), task, taught, str(args.seed)]))
    keep_pages()
    use_cores(args.workers)
    corpus = data.open_corpus(args.data, args.seed, args.test_size, args.task, args.lang, args.domain, args.views)
    args.contents = corpus.contents if args.data else None
    MADE.clear()
    HEARD.clear()
    if args.data and not (corpus.data["train"] and corpus.sets.get("dev")):
        data.die(f"{args.data}: no train or no dev utterances; give items a \"split\", or more of them")
    if args.init or args.max_new is None:
        tokenizer = load_tokenizer(tokenizer_of(corpus, args))
        items = corpus.items_of("train")
        targets, prompts = (tokenizer.encode(texts) for texts in ([normalize(item["target"]) for item in items],
                                                                  [item["prompt"] or "" for item in items]))
        unknown = [sum(tokenizer.unk_id() in ids for ids in texts) for texts in (targets, prompts)]
        if any(unknown) and rank() == 0:
            print(f"--init {args.init}: its tokenizer lacks letters of {unknown[0]} of {len(items)} targets, whose words it cannot write, "
                  f"and of {unknown[1]} prompts", file=sys.stderr)
        args.max_new = args.max_new or 2 * max(len(ids) + 1 for ids in targets)
    return corpus


def check_flags(args):
    """Ends the program where a number is out of range (or nan), or where flags do not go together."""
    for key, value in vars(args).items():
        least = 0 if key in MAY_BE_ZERO or isinstance(value, bool) else 1 if isinstance(value, int) else 1e-12
        if value == "":
            data.die(f"--{key.replace('_', '-')}: is empty; give something, or leave it out")
        if isinstance(value, (int, float)) and not least <= value < 2**32:
            data.die(f"--{key.replace('_', '-')} {value}: not from {least} to {2**32}; see --help for what it means and its default")
    on_cpu = pick_device(args.device).type == "cpu"
    data.refuse(
        (args.init and read_json(os.path.join(args.init, "config.json")).get("stage") in ("encoder", "text", "read"),
         f"--init {args.init}: has heard no speech yet; give a run's speech, control or RL stage"),
        (args.name and (os.sep in args.name or args.name in (".", "..")), f"--name {args.name}: a folder under runs/, without {os.sep}"),
        (args.init and not args.name, f"--init {args.init}: give the run that begins with it a --name of its own"),
        (args.init and args.encoder, f"--encoder {args.encoder}: --init brings an encoder of its own; leave one of the two out"),
        (args.domain != "hard" and (args.data or not args.init),
         f"--domain {args.domain}: is for the embedded corpus and a model that exists; leave out --data and give --init"),
        (args.lang != "de" and not (args.task == "ast" and args.data),
         f"--lang {args.lang}: is for --task ast with --data; the embedded corpus is translated into German alone"),
        (not (args.views or args.data), "--views 0: is for recorded speech; give --data"),
        (args.shard and (world() == 1 and not args.dry_run or args.muon or getattr(args, "grpo_muon", 0)),
         "--shard: is for torchrun and AdamW alone, since Muon wants whole matrices; give --muon 0 (and --grpo-muon 0)"),
        (getattr(args, "graph", False) and (args.shard or args.rollout == "beam" or on_cpu),
         "--graph: not on a CPU, with --rollout beam or with --shard; leave it out"),
        (args.dialogues < 20, f"--dialogues {args.dialogues}: too few; four fifths are for SFT, a twentieth for dev, the rest for RL"),
        (args.teacher_steps and (args.data or args.init),
         f"--teacher-steps {args.teacher_steps}: the synthesiser speaks the teacher's sentences; leave out --data and --init"))


def use_cores(workers):
    """One core for each busy worker, the rest for the model: threads that wait for a busy core cost more than they bring."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # fewer under taskset, slurm
    torch.set_num_threads(max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - workers))


# ---------------------------------------------------------------------------------------------- runs on disk
def save(path, state):
    """torch.save, by the first process."""
    if rank():
        return
    try:
        with replacing(path, "wb") as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as e:
        data.die(f"{path}: cannot be written ({str(e).splitlines()[0]}); make room and call again: what was saved before is as it was")


def check_config(folder, config, remedy="--name"):
    """Ends the program if a folder holds what a run with another config has made. Leaves everything as it is."""
    path = os.path.join(folder, "config.json")
    made = [name for name in ("last.pt", "best.pt", "dialogues.jsonl") if os.path.exists(os.path.join(folder, name))]
    if not made or not os.path.exists(path):
        return
    found, config = read_json(path), json.loads(json.dumps(config))
    for key in sorted(config.keys() | found.keys()):
        if found.get(key) != config.get(key):
            was = {"before": "other settings of an earlier stage", "contents": f"other contents of {config.get('data')}"}.get(
                key, f"{key} {found.get(key)}, now {config.get(key)}")
            data.die(f"{path}: was made with {was}; set it back, give another {remedy} or remove {folder}")
    if "best.pt" not in made and found.get("steps") and [row.get("step") for row in read_log(folder)[-1:]] == [found["steps"]]:
        data.die(f"{folder}: its best.pt is gone; put it back, or remove {folder} to train it again")


def take_turns(folder):
    """Waits until no other program trains in a folder, as when rows of a table run side by side and share SFT and control; it is this
    program's until it goes on to another folder, or ends."""
    while LOCK:
        fcntl.flock(LOCK.pop(), fcntl.LOCK_UN)  # as closing it would not: workers hold it open, too
    LOCK.append(open(os.path.join(folder, "lock"), "w"))
    try:
        fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: waiting for the program that trains there", file=sys.stderr)
        fcntl.flock(LOCK[0], fcntl.LOCK_EX)
    for path in Path(folder).glob("*.pt.*.tmp"):  # of a program that was killed while it saved
        path.unlink()


def open_run(folder, config, remedy="--name"):
    """Makes the folder and its config.json, or checks them. Returns the row of metrics that last.pt holds, {"step": 0} in a new run."""
    if rank() == 0:
        with contextlib.suppress(OSError):  # no right to write: said below; no locks on that disk: then without
            os.makedirs(folder, exist_ok=True)
            take_turns(folder)
    wait()
    check_config(folder, config, remedy)
    there = os.path.exists(os.path.join(folder, "last.pt"))
    row = last_state(folder, json.loads(json.dumps(config)))["row"] if there else {"step": 0}
    if rank() == 0:
        os.makedirs(folder, exist_ok=True)
        write_json(os.path.join(folder, "config.json"), config)
        if 0 < row["step"] == config.get("steps"):  # its config is the same, but the code may have been changed
            print(f"{folder}: trained by an earlier call, reused; after a change of the code remove it, or give another name",
                  file=sys.stderr)
    wait()
    return row


def last_state(folder, config):
    """What last.pt holds, each tensor read when it is looked at. One that is damaged or of another config ends the program."""
    path = os.path.join(folder, "last.pt")
    try:
        with torch.serialization.safe_globals([EncoderConfig, LlamaConfig]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if state["run"] == config:
            return state
        fault = "it is of a run with other settings"
    except Exception as e:  # cut short, something else, a folder: all bad input
        fault = str(e).splitlines()[0][:150]
    data.die(f"{path}: not the checkpoint that config.json is of ({fault}); remove {folder} to train that stage again")


def look_at_dev(model, folder, run, best, score):
    """score() by the first process, with all of the weights at hand; of equals the later is kept as best.pt -> the score, the best."""
    weights, found = full(model.state_dict()), math.nan
    with gathered(model):
        if rank() == 0:
            found = score()
            if found <= best:
                best = found
                save(os.path.join(folder, "best.pt"), {"configs": model.configs, "model": weights, "run": run})
        wait()
    return found, best


def restore(state, opts, device):
    """Sets optimisers and random states back to what `training` saved -> the best score on dev."""
    for opt, saved in zip(opts, state["opts"]):
        opt.load_state_dict(saved)
        for p, moments in opt.state.items():
            for k, v in moments.items():
                if isinstance(p, DTensor) and v.shape == p.shape and not isinstance(v, DTensor):
                    moments[k] = distribute_tensor(v, p.device_mesh, p.placements)
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
    return state["best"]


def training(label, folder, row, steps, model, opts, device, seed, looks, score, shown):
    """The loop of every stage, a generator: the body of the caller's `for` is one step. Yields `row`, always the same dictionary, before
    each step that is left; row["step"] is then the number of steps done, and the body fills in what metrics.jsonl is to say of the step.
    Between steps it looks at dev, about `looks` times, by score(), and saves all that is needed to go on as if nothing had happened (the
    data's order follows from the step). shown: {label on the bar: key in row}."""
    first, run = row["step"], read_json(os.path.join(folder, "config.json"))
    best = restore(last_state(folder, run), opts, device) if first else math.inf
    if world() > 1:  # all began with the same weights; from here on each has its own masks, slips and samples
        torch.manual_seed(seed + 1000 * (1 + rank()) + 10**6 * first)
    path = os.path.join(folder, "metrics.jsonl") if rank() == 0 else os.devnull
    if rank() == 0:  # lines after the checkpoint's step will come again
        with replacing(path) as f:
            f.writelines(json.dumps(line) + "\n" for line in read_log(folder) if line.get("step", math.inf) <= first)
    log = open(path, "a", buffering=1)
    bar = tqdm(range(first, steps), desc=f"{label:8}", initial=first, total=steps, disable=rank() > 0)
    started, saved = time.time() - row.get("seconds", 0.0), time.time()
    for step in bar:
        row.pop("dev", None)
        yield row
        if not math.isfinite(row.get("grad_norm", 0.0)):
            data.die(f"{folder}: step {step + 1} has a gradient of {row['grad_norm']}; give a lower learning rate, and another name or "
                     "remove that folder")
        row["step"], end = step + 1, step + 1 == steps
        bar.set_postfix({**{name: f"{row[key]:.3f}" for name, key in shown.items() if row[key] is not None}, "dev": f"{best:.2f}"})
        if end or (step + 1) % max(1, steps // looks) == 0:
            row["dev"], best = look_at_dev(model, folder, run, best, score)
        began = time.time()
        row["seconds"] = began - started
        log.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        if summed([float(end or rank() == 0 and began - saved > SAVE_SECONDS)], device)[0]:  # all have to know: weights may be shared out
            save(os.path.join(folder, "last.pt"), {
                "configs": model.configs, "run": run, "model": full(model.state_dict()), "opts": full([o.state_dict() for o in opts]),
                "step": step + 1, "row": row, "best": best, "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None})
            saved = time.time() + SAVE_SECONDS * (time.time() - began)
    wait()


def orthogonal(g):
    """The nearest thing to a matrix whose singular values are all 1, roughly (0.7 to 1.2): Muon's Newton-Schulz iteration.

    In fp32: torch.optim.Muon does it in bf16, which many CPUs emulate slowly and some virtual ones die of.
    """
    x = g / (g.norm() + 1e-7)
    x = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(5):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if g.shape[0] <= g.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al., 2024): every direction of a matrix learns at the same pace."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(mean, group["momentum"]))      # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def optimizers(model, parameters, lr, muon):
    """AdamW; and Muon at lr * muon for the matrices between the layers, with which the tiny conformer gets in 200 steps where AdamW gets in
    far more (LOG.md, 2026-11-20); muon = 0 is AdamW alone."""
    hidden = {id(p) for part in (model.encoder.blocks, model.llm.layers) for p in part.parameters() if p.dim() == 2}
    matrices = [p for p in parameters if muon and id(p) in hidden]
    opts = [torch.optim.AdamW([p for p in parameters if not (muon and id(p) in hidden)], lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        opts.append(Muon(matrices, lr=lr * muon))
    return opts


def step_all(opts, scale, keep=False):
    """One step of every optimiser at `scale` times its peak learning rate; clears the gradients, or for DDP keeps them, as zeros: they
    lie in the buffers it exchanges, and new ones would lie beside them."""
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = opt.defaults["lr"] * scale
        opt.step()
        opt.zero_grad(set_to_none=not keep)


def cosine(step, steps, warmup):
    """Linear warm-up to 1, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------- data for a stage
MADE = {}   # key -> batch of features that the stage speech wants again; with the defaults some 600 MB
HEARD = {}  # key, or "dev" -> frames of the frozen encoder, which never change: so an utterance is heard once; 0.5 GB; ast, sqa 1 GB
LOCK = []   # the open file by which this program holds a stage's folder


def make(corpus, ear, keys):
    """Batches by key (stream, size, k), functions of key and seed alone: so a resumed run sees what it would have seen.

    One worker makes these together; with `ear`, a model, it hears them as well. Tensors go home as numpy arrays: as tensors each
    would hold a file descriptor for as long as it lives, and 1,024 are often all there are.
    """
    made = []
    for stream, size, k in keys:
        if stream in ("text", "read"):
            made.append(corpus.texts(stream, k, size))
            continue
        batch = MADE.get((stream, size, k)) or collate(corpus.train_batch(stream, k, size))  # without fork (macOS) MADE is empty here
        if ear is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(repr((corpus.seed, (stream, size, k))).encode()))  # of the masks: "speech" is masked
                batch = listen(ear, batch, torch.device("cpu"), stream == "speech")
        made.append(tuple(x.numpy() if torch.is_tensor(x) else x for x in batch))
    return made


def batches(corpus, keys, workers, ear=None, depth=2):
    """(key, batch) for these keys, made by workers, each up to `depth` groups of the corpus's ahead: a group's are made together."""
    groups = {}
    for key in keys:
        groups.setdefault((key[0], key[2] // data.GROUP), []).append(key)
    groups = list(map(sorted, groups.values()))
    for keys, group in zip(groups, loader(functools.partial(make, corpus, ear), groups, workers, depth)):
        for key, batch in zip(keys, group):
            yield key, tuple(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch)


def heard(keys, model, corpus, args, device, keep=0):
    """Yields (key, (frames (B, T', D), lengths, items)) for each key. Those numbered below `keep` stay in HEARD, for another stage.

    On a CPU the workers hear, beside the training; on a GPU they make features and this process hears. They bring a group's batches
    together: what is not yet asked for waits in HEARD, and what will be asked for again.
    """
    ear = model if device.type == "cpu" else None
    last = {key: i for i, key in enumerate(keys)}  # when it is asked for the last time
    missing = [key for key in last if key not in HEARD]
    # What is kept anyway may be heard as early as the workers can; else they wait when they are two groups ahead.
    made = batches(corpus, missing, args.workers, ear, depth=200 if len(last) < len(keys) or all(key[2] < keep for key in keys) else 2)
    for i, key in enumerate(keys):
        while key not in HEARD:
            got, batch = next(made)
            HEARD[got] = batch if ear else listen(model, batch, device, got[0] == "speech")
        yield key, HEARD[key] if i < last[key] or key[2] < keep else HEARD.pop(key)


def replay(at_hand, different, steps):
    """Which of a stage's `different` batches each step gets. A worker hears one of the first `at_hand`, which are made already,
    in less than the time of 3 steps, and makes and hears another in 8 (with the defaults; else one waits for the other);
    meanwhile those that it has heard come again, in turn."""
    pace = min(1, steps / (3 * min(at_hand, different) + 8 * max(0, different - at_hand)))  # quicker, and waiting, where time is short
    order, known, turn, due = [], 0, 0, 0.0
    for step in range(steps):
        if known < different and step >= due:
            order.append(known)
            due += (3 if known < at_hand else 8) * pace
            known += 1
        else:
            order.append(turn)
            turn = (turn + 1) % known
    return order


def tokenizer_of(corpus, args):
    """The tokenizer of the training transcripts, or that of --init, as bytes."""
    if args.init:
        return load_model(args.init).tokenizer_bytes
    try:
        items = corpus.items_of("train")
        texts = [normalize(item["target"]) for item in items] + [item["prompt"] for item in items if item["prompt"]]
        if args.teacher_steps or args.task == "sqa":  # the teacher writes what is said, too, and so does the stage read
            texts += [normalize(item["text"]) for item in items]
        return train_tokenizer(texts, args.vocab)
    except RuntimeError as e:
        data.die(f"--vocab {args.vocab}: no tokenizer of that size for these texts ({str(e).splitlines()[-1][-100:]}); the default is 300")


def new_model(corpus, args, device="cpu", **shape):
    """Random weights and a tokenizer of the training texts. shape: of the decoder, where it is not that of --llm."""
    tokenizer = tokenizer_of(corpus, args)
    units = tuple(sorted({unit for item in corpus.items_of("train") for unit in corpus.spell(normalize(item["text"]))}))
    llama = dataclasses.replace(LLAMAS[args.llm], vocab=load_tokenizer(tokenizer).get_piece_size(), **shape)
    with torch.device(device):  # "meta": without weights
        return SpeechLM(EncoderConfig(units=units), llama, tokenizer)


# ---------------------------------------------------------------------------------------------- losses
def trained_parameters(stage, model):
    """Encoder: the encoder. Text: the LLM. Read, speech and control: projection and LLM, never the encoder."""
    parts = {"encoder": [model.encoder], "text": [model.llm]}.get(stage, [model.projection, model.llm])
    return [p for part in parts for p in part.parameters()]


def targets_of(model, texts, device):
    """Texts -> x_1 .. x_T <EOS> as (B, U) padded with PAD, and lengths (B,) that count <EOS>: it is inside the loss."""
    return right_pad([ids + [EOS] for ids in model.tokenizer.encode([normalize(text) for text in texts])], device)


@torch.no_grad()
def measure_units(model, corpus, size, device):
    """Fills encoder.unit_frames (units + 1, D): the mean frame of each unit, as CTC's best path labels the first of
    the encoder's training utterances (embedded: clean ones). A unit that never wins gets the mean of all."""
    frames = []
    for _, (mel, lengths, _) in batches(corpus, [("encoder", size, k) for k in range(max(1, MEASURED // size))], workers=0):
        heard, lengths = model.hear(mel.to(device), lengths.to(device))
        frames += [row[:n] for row, n in zip(heard, lengths.tolist())]
    frames = torch.cat(frames)                                                 # (all T, D)
    label = model.encoder.ctc_head(frames).argmax(-1)                          # (all T,)
    for u in range(len(model.encoder.unit_frames)):
        model.encoder.unit_frames[u] = frames[label == u].mean(0) if (label == u).any() else frames.mean(0)


def saved_bytes(c, B, P, G, T, kind, recompute=False):
    """Bytes that the learning phase keeps for its backward pass, bf16 weights among them, counted on tensors without data."""
    def count(n_layers, recompute):
        model = SpeechLM(EncoderConfig(units=("a",)), dataclasses.replace(c, n_layers=n_layers), train_tokenizer(["a"], 40))
        model.llm.recompute = recompute
        x = torch.empty(B, P, c.d, requires_grad=True)
        weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}
        keep = lambda t: kept.setdefault(t.untyped_storage()._cdata, t)  # held, lest another tensor gets its number
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            graph = model.token_logps(torch.zeros(B * G, T, dtype=torch.long), model.prefill(x, torch.full((B,), P)))
        return sum(t.untyped_storage().nbytes() for number, t in kept.items() if number not in weights), graph

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        inside = count(3, False)[0] - count(2, False)[0]  # of one layer: made again, one at a time
        return count(c.n_layers, recompute)[0] + inside * recompute


def print_plan(args, corpus, B, G=1, samples=True, reference=False):
    """--dry-run: parameters, memory of each GPU like the one at hand (or CPU) and time of a step, with the mean length of 64 training
    utterances and of their targets. B utterances a batch, G responses each; samples: whether there are rollouts; reference: whether a
    frozen SFT model stands beside."""
    items = [item for k in range(-(-64 // B)) for item in corpus.train_batch("grpo", k, B)][:64]
    model = load_model(args.init) if args.init else new_model(corpus, args, device="meta")
    tokenize, c = model.tokenizer.encode, model.llm.config
    seconds = np.mean([item["duration"] if args.data else len(item["audio"]) / data.SAMPLE_RATE for item in items])
    P = round(25 * seconds + np.mean([len(tokenize(item["prompt"] or INSTRUCTION)) + 4 for item in items]))
    T = round(np.mean([len(ids) + 1 for ids in tokenize([normalize(item["target"]) for item in items])]))
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.llm))
    device, n, N = pick_device(args.device), args.dry_run, B * G
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, share = kind.itemsize, 1 / n if args.shard else 1
    micro = min(B, args.micro or micro_batch(c, P, G, T, device)) if samples else B
    ends = c.vocab * c.d * (1 if c.tie else 2)                                 # embedding and head, which FSDP gathers for a whole pass
    logits = 12 * micro * G * min(T, max(1, 2**26 // (micro * G * c.vocab))) * c.vocab      # fp32: themselves, softmax, gradient
    memory = {"frozen encoder": 4 * encoder, "weights, fp32": 4 * decoder * share, "gradients, fp32": 4 * decoder * share,
              "AdamW's moments, fp32": 8 * decoder * share, "frozen SFT model, fp32": 4 * decoder * share * reference,
              "rollouts: keys, values": 2 * size * c.n_layers * c.n_kv_heads * (c.d // c.n_heads) * (B * P + N * args.max_new) * samples,
              "rollouts: copies of weights": size * decoder * (args.shard + (device.type == "cpu")) * samples,  # FSDP's; model.packed's
              "learning: gathered weights": size * ends * args.shard,
              "learning: kept for backward": saved_bytes(c, micro, P, G, T, kind, args.recompute) + logits}
    batches = n * args.accumulate
    print(f"decoder {decoder / 1e6:,.2f}M parameters, frozen encoder {encoder / 1e6:,.2f}M\na step: {n} process(es) x {args.accumulate} "
          f"batch(es) x {B} utterances: {batches * B * P:,} prompt positions, {batches * N:,} responses of {T} tokens\n\n"
          "memory of each process, GB (rollouts and learning take turns)")
    for name, amount in memory.items():
        print(f"  {name:<28}{amount / 1e9:10.3f}")
    _, rate, copy = limits(device)
    forward = args.accumulate * forward_flops(c, B, P, N, T)
    passes = (3 + args.recompute + reference) * getattr(args, "updates", 1)    # a backward pass costs two forward ones
    seconds = {"hearing": args.accumulate * 2 * encoder * B * P / rate, "learning": passes * forward / rate,
               "rollouts": max(forward / rate, args.accumulate * T * size * decoder / copy) * samples}
    print(f"\nseconds of a step, at the least: {rate / 1e12:.2f} TFLOP/s and {copy / 1e9:.1f} GB/s measured now on this {device.type}")
    for name, amount in {**seconds, "together": sum(seconds.values())}.items():
        print(f"  {name:<28}{amount:10.3f}")


def spelled(model, texts, corpus, slip=0.05):
    """Texts -> fake frames (B, T, D) and lengths: a mean frame for each unit and, after half of them, one of the blank.
    Of the units, `slip` are taken for another and half as many missed, as the encoder will. Draws from torch's generator."""
    number, rows = model.encoder.number, []
    for text in texts:
        row = []
        for unit in corpus.spell(normalize(text)):
            chance, blank, other = torch.rand(3).tolist()
            if chance < slip:
                row.append(1 + int(other * len(number)))
            elif chance < 1.5 * slip:
                continue
            elif unit in number:
                row.append(number[unit])
            row += [0] * (blank < 0.5)
        rows.append(row or [0])
    ids, lengths = right_pad(rows, model.encoder.unit_frames.device)
    return model.encoder.unit_frames[ids], lengths


def stage_loss(stage, model, batch, corpus, device):
    """Summed negative log-likelihood of a batch in nats, and the number of tokens or units that it is over.

    batch: for text and read a list of items, for encoder (mel, lengths, items), for speech and control what `listen` makes of it.
    """
    if stage == "text":
        targets, n = targets_of(model, [item["target"] for item in batch], device)
        logp, _ = model.token_logps(targets)                                   # Eq. 1: log p(x_t | x_<t)
    elif stage == "encoder":
        mel, lengths, items = batch
        mel, lengths = mel.to(device), lengths.to(device)
        targets, n = right_pad([[model.encoder.number[u] for u in corpus.spell(normalize(item["text"]))] for item in items], device)
        return model.encoder.ctc_loss(spec_augment(mel, lengths), lengths, targets, n), n.sum()
    else:
        if stage == "read":
            # An answer holds one word of what was said: half of the items are transcribed instead, or words are hardly learned (LOG.md).
            items = [{**item, "prompt": None, "target": item["text"]} if corpus.task == "sqa" and i % 2 else item
                     for i, item in enumerate(batch)]
            frames, lengths = spelled(model, [item["text"] for item in items], corpus)
        else:
            frames, lengths, items = batch
        targets, n = targets_of(model, [item["target"] for item in items], device)
        prompt = model.prefill(*model.embed_prompt(frames, lengths, [item["prompt"] for item in items]))
        logp, _ = model.token_logps(targets, prompt)                           # Eq. 2: log p(x_t | s, x_<t)
    return -(logp * length_mask(n, targets.shape[1])).sum(), n.sum()


@torch.no_grad()
def dev_score(stage, model, dev, corpus, device, max_new, sampled=False):
    """What a stage is judged by, lower is better: % of units wrong (CTC), nats a token, WER or 100 - BLEU (greedy, or sampled)."""
    model.eval()
    if stage == "encoder":
        hyps = [hyp for mel, n, _ in dev for hyp in model.encoder.ctc_greedy(mel.to(device), n.to(device))]
        return word_error_rate([" ".join(corpus.spell(normalize(item["text"]))) for _, _, items in dev for item in items], hyps)
    with torch.random.fork_rng():  # the same slips of spelling or samples every time, and none of training's numbers used up
        torch.manual_seed(0)
        if stage in ("text", "read"):
            with autocast(device):  # FSDP's gathered weights are bf16 on a GPU
                total = [stage_loss(stage, model, dev[k:k + 64], corpus, device) for k in range(0, len(dev), 64)]
            return float(sum(loss for loss, _ in total) / sum(n for _, n in total))
        hyps = transcribe(model, dev, max_new=max_new, **SAMPLED if sampled else {})
    found = summary(corpus.task, [item["target"] for item in dev], hyps)
    return found["wer"] if corpus.task == "asr" else 100 - found["bleu"]


def dev_set(stage, model, corpus, args):
    """What dev_score wants: texts, batches of features, or items with the frozen encoder's frames."""
    if stage in ("text", "read"):
        return corpus.items_of("dev")[:args.dev_size]
    if stage == "encoder":
        return list(chunks(corpus, "dev", min(240, args.dev_size)))  # four times as many phones as words: fewer will do
    if "dev" not in HEARD:
        HEARD["dev"] = hear_set(model, corpus, "dev", args.workers, args.dev_size)
    return HEARD["dev"]


def stage_plan(stage, args):
    """Of a stage: its folder, steps, learning rate, batch size, stream of data, different batches in it, folder before it."""
    steps, lr = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_lr")
    size = getattr(args, f"{stage}_batch", args.batch)
    stream = {"control": "grpo", "speech": "speech" if args.spec_augment else "encoder"}.get(stage, stage)
    fresh = {"control": args.control_batches, "speech": math.inf if args.spec_augment else args.speech_batches}.get(stage, math.inf)
    fresh = min(steps * args.accumulate * world(), fresh)  # from there on they come again
    before = os.path.join("runs", args.name, ORDER[ORDER.index(stage) - 1]) if stage != "encoder" else None
    return os.path.join("runs", args.name, stage), steps, lr, size, stream, fresh, before


def stage_config(stage, args):
    """A stage's config.json: its own settings and, in `before`, those of the stages that it stands on."""
    _, steps, lr, size, _, fresh, before = stage_plan(stage, args)
    if args.init and stage == "speech":
        return {**{k: getattr(args, k) for k in ("init", "task", "lang", "data", "contents", "seed", "domain", "max_new")},
                "before": read_json(os.path.join(args.init, "config.json"))}
    keys = ["task", "lang", "data", "contents", "seed", "views", "teacher_steps", "dialogues", "vocab", "muon", "dev_evals", "dev_size"]
    config = {"stage": stage, **{k: getattr(args, k) for k in keys}, "steps": steps, "lr": lr, "batch": size,
              "accumulate": args.accumulate * world(), "before": before and stage_config(os.path.basename(before), args)}
    if stage == "encoder":
        models = EncoderConfig(units=()), dataclasses.replace(LLAMAS[args.llm], vocab=args.vocab)
        config |= {"encoder": args.encoder, "models": [*map(dataclasses.asdict, models)]}
    if stage in ("speech", "control"):
        config |= {f"{stage}_batches": fresh, "spec_augment": args.spec_augment, "max_new": args.max_new}
    return config


def stages_to(last, args):
    """The stages up to `last`: with --init only from speech on, which then is that model."""
    return [stage for stage in ORDER[:ORDER.index(last) + 1] if not args.init or stage in ("speech", "control")]


def check_stages(args, last="control"):
    """Ends the program if a stage has been run with other settings: before hours go into the first."""
    for stage in stages_to(last, args):
        check_config(os.path.join("runs", args.name, stage), stage_config(stage, args))


# ---------------------------------------------------------------------------------------------- loop
def run_stage(stage, args, corpus):
    """Trains one stage, or goes on with it, or finds it done. Returns its folder."""
    folder, steps, lr, size, stream, fresh, before = stage_plan(stage, args)
    row = open_run(folder, stage_config(stage, args))
    if args.init and stage == "speech":
        before, steps = args.init, 0
    if row["step"] == steps:
        if steps == 0 and rank() == 0 and not os.path.exists(os.path.join(folder, "best.pt")):
            model = load_model(before)
            run = read_json(os.path.join(folder, "config.json"))
            save(os.path.join(folder, "best.pt"), {"configs": model.configs, "model": model.state_dict(), "run": run})
        wait()
        return folder
    first, seed = row["step"], args.seed * 10 + ORDER.index(stage)
    torch.manual_seed(seed)
    device = pick_device(args.device)
    home = torch.device("cpu") if args.shard else device  # where a model is whole
    begin = os.path.join(folder, "last.pt") if first else before
    model = load_model(begin, home) if begin else new_model(corpus, args).to(home)
    if stage == "encoder" and args.encoder and not first:
        found = load_model(args.encoder).encoder.state_dict()
        try:
            model.encoder.load_state_dict({k: v for k, v in found.items() if not k.startswith(("ctc_head", "unit_frames"))}, strict=False)
        except RuntimeError:
            data.die(f"--encoder {args.encoder}: its conformer has another shape than EncoderConfig; give another, and remove {folder}")
    if stage == "read" and not first:
        measure_units(model, corpus, args.batch, home)
    model = shard(model, device) if args.shard and stage != "encoder" else model.to(device)
    model.llm.recompute = args.recompute
    parameters = trained_parameters(stage, model)
    parallel = data_parallel(model, parameters)
    opts = optimizers(model, parameters, lr, args.muon)
    dev = dev_set(stage, model, corpus, args) if rank() == 0 else None
    each = args.accumulate * world()  # batches a step
    draws = steps * each
    order = replay(args.encoder_steps * each, fresh, draws) if stage == "speech" else [k % fresh for k in range(draws)]
    order = [(stream, size, k) for k in order[first * each + rank()::world()]]
    supply = heard(order, model, corpus, args, device) if stage in ("speech", "control") else batches(corpus, order, args.workers)
    use_cores(0 if stage in ("text", "read") else args.workers)  # texts cost a worker next to nothing
    score = lambda: dev_score(stage, model, dev, corpus, device, args.max_new)
    for row in training(stage, folder, row, steps, model, opts, device, seed, args.dev_evals, score, {"loss": "loss"}):
        model.train()
        total, tokens = 0.0, 0
        for i in range(args.accumulate):
            key, batch = next(supply)
            if stage == "encoder" and not args.spec_augment and key[2] < args.speech_batches:
                MADE[key] = batch
            parallel.require_backward_grad_sync = i + 1 == args.accumulate  # DDP's switch: it exchanges gradients once a step
            with autocast(device):
                loss, n = parallel(lambda model: stage_loss(stage, model, batch, corpus, device))
            loss.backward()
            total, tokens = total + loss.item(), tokens + int(n)
        total, tokens = summed((total, tokens), device)
        for parameter in parameters:  # the mean over the tokens of the whole optimiser step, from the processes' mean of sums
            if parameter.grad is not None:
                parameter.grad /= tokens / world()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        step_all(opts, cosine(row["step"], steps, warmup=max(1, steps // 10)), keep=parallel is not model)
        row["loss"] = 0.95 * row["loss"] + 0.05 * total / tokens if "loss" in row else total / tokens  # nats a token (unit), a running mean
        row["grad_norm"] = float(norm)
    use_cores(args.workers)
    if stage == "speech":
        MADE.clear()
    return folder


# ---------------------------------------------------------------------------------------------- the teacher of RBA
def teach(args, corpus):
    """With --teacher-steps: trains RBA's teacher on text dialogues, lets it invent others and gives them to the corpus. 2509.03526: what is
    said and how it is answered both come from a teacher LLM. From here on training hears nothing else."""
    if not args.teacher_steps:
        return
    folder = os.path.join("runs", args.name, "teacher")
    keys = ("task", "lang", "seed", "vocab", "teacher_steps", "dialogues", "muon", "max_new")
    open_run(folder, {k: getattr(args, k) for k in keys})
    path = os.path.join(folder, "dialogues.jsonl")
    if rank() == 0 and not os.path.exists(path):
        torch.manual_seed(args.seed * 10 + 6)
        device = pick_device(args.device)
        use_cores(0)
        model = new_model(corpus, args, **TEACHER).to(device)  # half a minute to two: an interrupted one begins again
        opts = optimizers(model, list(model.llm.parameters()), 2e-3, args.muon)
        for step in (bar := tqdm(range(args.teacher_steps), desc="teacher ")):
            loss = dialogue_loss(model, corpus.texts("text", step, 64), device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.llm.parameters(), 1.0)
            step_all(opts, cosine(step, args.teacher_steps, warmup=max(1, args.teacher_steps // 10)))
            bar.set_postfix(loss=f"{loss.item():.3f}")
        found, drawn = {}, 0
        with tqdm(total=args.dialogues, desc="dialogues") as bar:
            while len(found) < args.dialogues:
                for d in invent(model, 256, args.max_new):
                    found.setdefault((d["prompt"], d["text"]), d)
                drawn += 256
                bar.update(min(len(found), args.dialogues) - bar.n)
                if drawn > 100 * args.dialogues:
                    data.die(f"{folder}: of {drawn} dialogues {len(found)} were usable and new; give more --teacher-steps")
        # By a hash of the sentence: so its dialogues lie together, and what is dealt out to SFT, RL and dev shares next to no sentence.
        found = sorted(list(found.values())[:args.dialogues], key=lambda d: zlib.crc32(d["text"].encode()))
        with replacing(path) as f:
            f.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in found)
        use_cores(args.workers)
    wait()
    corpus.dialogues = read_log(folder, "dialogues.jsonl")
    if len(corpus.dialogues) != args.dialogues:
        data.die(f"{path}: holds {len(corpus.dialogues)} dialogues, not {args.dialogues}; remove {folder} to have them invented again")


def dialogue_loss(model, items, device):
    """Nats a token of <User> | <BOS> instruction <S-BOS> what is said <System> <BOS> answer <EOS>, the bar's right side."""
    texts = [[normalize(item[k] or INSTRUCTION) for item in items] for k in ("prompt", "text", "target")]
    rows = [[*a, S_BOS, *b, SYSTEM, BOS, *c, EOS] for a, b, c in zip(*map(model.tokenizer.encode, texts))]
    targets, n = right_pad(rows, device)
    logp, _ = model.token_logps(targets, user_turns(model, [[]], device))  # one for all rows
    return -(logp * length_mask(n, targets.shape[1])).sum() / n.sum()


def user_turns(model, rows, device):
    """Prompts <User> row, for lists of tokens."""
    tokens, lengths = right_pad([[USER, *row] for row in rows], device)
    return model.prefill(model.llm.embed(tokens), lengths)


@torch.no_grad()
def invent(model, n, max_new):
    """The teacher, given no more than the opening of a user's turn, samples n instructions at temperature 1; those that can
    be used it answers, greedily. -> items without audio: text, prompt (None for the paper's), target."""
    device = model.llm.embed.weight.device
    model.eval()
    said, length, _ = generate(model, user_turns(model, [[]], device), n, 3 * max_new, 1.0)
    turns = {}
    for row, length in zip(said.tolist(), length.tolist()):
        row = row[:length]
        if row.count(S_BOS) == row.count(SYSTEM) == 1 and row.index(S_BOS) < row.index(SYSTEM):
            asked, text = row[:row.index(S_BOS)], row[row.index(S_BOS) + 1:row.index(SYSTEM)]
            words = [" ".join(model.tokenizer.decode(ids).split()) for ids in (asked, text)]  # a lone "_" piece is a space
            if words[0] and usable(words[1]):
                turns[tuple(words)] = [BOS, *asked, S_BOS, *text, SYSTEM]
    if not turns:
        return []
    answers, length, _ = generate(model, user_turns(model, list(turns.values()), device), 1, max_new, 0.0)
    ended = answers.gather(1, length[:, None] - 1)[:, 0] == EOS
    return [{"text": text, "prompt": None if asked == normalize(INSTRUCTION) else asked, "target": answer, "lang": "en"}
            for (asked, text), answer, end in zip(turns, model.decode(answers, length), ended.tolist()) if end and answer]


def usable(text):
    """What the synthesiser can speak in a breath, and what belongs to no dev or test set."""
    words = text.split()
    return 0 < len(words) <= 10 and all(word in data.LEXICON for word in words) and data.split_of(text) == "train"


@data.plain_errors()
def main():
    """Command line: see the top of this file."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--stage", choices=ORDER, default="speech", help="the last stage to run; those before it are run or reused")
    add_arguments(p)
    args = p.parse_args()
    if args.init and args.stage not in ("speech", "control"):
        data.die(f"--stage {args.stage}: --init brings these stages; give speech or control")
    corpus = finish_arguments(args)
    if args.dry_run:
        return print_plan(args, corpus, args.batch, samples=False)
    check_stages(args, args.stage)
    teach(args, corpus)
    for stage in stages_to(args.stage, args):
        folder = run_stage(stage, args, corpus)
        if rank() == 0:
            print(f"{stage}: {folder}")
    leave_processes()


if __name__ == "__main__":
    main()
