"""The last stage: GRPO, DAPO and Dr. GRPO on a speech language model, with rewards as simple as the word error rate.

    python grpo.py --reward wer                     # everything from nothing: corpus, SFT, GRPO, control, the table
    python grpo.py --reward em --algo dr_grpo       # reuses the stages that are done, starts at RL
    python grpo.py --reward wer --data PATH         # the same on recorded speech
    python grpo.py --task ast --algo ibm --reward bleu            # translation into German; --task sqa answers questions
    python grpo.py --task sqa --algo rba_group --reward bleu      # RBA: a teacher LLM invents all that is said and answered
    python grpo.py --init runs/embedded-0/speech --domain far --name far-0      # adapts that model to echo; or to --data PATH

For each utterance q the model writes G transcripts o_1 .. o_G, a reward R_i scores each against the reference, and the
transcripts that did better than their group become likelier (DeepSeekMath, 2402.03300; for speech 2509.01939):

    Eq. 3   J = sum_i sum_t w_it { min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i) - beta k3_it }
    Eq. 4   A_i = (R_i - mean R) / std R                 over the group; Dr. GRPO (2503.20783) leaves the std out
    Eq. 5   k3_it = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1      against the frozen SFT model
    Eq. 6   r_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)

    --loss-norm   w_it
    sequence      1 / (G len_i)             GRPO: every transcript weighs the same
    token         1 / (sum_i len_i)         DAPO (2503.14476): every token weighs the same
    constant      1 / (G L), L = --max-new  Dr. GRPO: no length bias

    --off-policy  a member of the group may be no sample (mixed policy, MP-GRPO, 2509.16990, after LUFFY, 2504.14945)
    reference     G - 1 samples and, last, the reference, for which pi_old := 1 and nothing is clipped: r = pi_theta, or with
                  --shaping g r = pi_theta / (pi_theta + g), lest tokens that are unlikely learn next to nothing
    duplicate     where two samples are equal, one makes room for the reference, as if it had been sampled; not if it was

    --algo rba_*  no policy gradient but DPO (2305.18290) on pairs of answers to the same speech x, of which y_w is to be preferred (won)
                  to y_l (lost), as Reinforced Behavior Alignment has it (RBA, 2509.03526); ref is the frozen SFT model:
                  loss = -log sigmoid(beta [(log pi(y_w | x) - log ref(y_w | x)) - (log pi(y_l | x) - log ref(y_l | x))])
    rba_group     one sample for each of 4 voices that say the same; y_w is the best by --reward (scored against the teacher's
                  answer), y_l the worst. The paper does not say whose x: here the worst one's voice, to be answered as the best was
    rba_single    y_w is the teacher's answer, y_l a sample
    --ce X        in both: the two terms in log ref are left out, and X times the cross entropy of the teacher's answer, nats a token, is
                  added

(These w_it are for one utterance. Over the B utterances of an optimiser step, of all its batches and processes (with dynamic sampling
those whose groups vary), they are 1 / (B G len_i), 1 / (tokens of all B G transcripts) and 1 / (B G L). Beam hypotheses, --rollout beam,
are no samples of pi_old, so with them the gradient is biased; the paper uses them all the same. But for references of --off-policy
reference, r is 1 and the clip idle in the first update of a rollout; with --updates above 1 the last update's figures are logged.)

A policy gradient's logged loss is about zero by construction, but for --off-policy reference: with one update per rollout r is 1 and the
advantages of a group sum to 0, so what is left of it is beta k3 (and, with token or constant weights, the advantages' correlation with
length). Its gradient is not zero. Watch the reward, not the loss.

Letters: B utterances, G samples of each, N = B * G, T tokens of a transcript with its <EOS>, T' frames of 40 ms, D encoder channels.
Names: frames (B, T', D), of which lengths (B,) are real; tokens (N, T), of which n (N,) are. A reference is the correct text; but
`reference` in train and update is the frozen SFT model, and `ref` its log-probabilities. An item's `prompt` is its instruction, None for
the paper's; a `prompt` of model.prefill is keys and values; --prompts counts utterances.
"""
import argparse
import functools
import os

import numpy as np
import torch
import torch.nn.functional as F

import data
import sft
from encoder import length_mask
from eval import autocast, kept_transcripts, load_model, micro_batch, pick_device, print_table, write_json
from model import EOS, PAD, beam_search, generate
from rewards import REWARDS, normalize, parse_reward

# GRPO's beta: 0.04 in 2509.01939 "when used"; without the KL its runs do not diverge, and save the reference's forward pass.
# Dynamic sampling is DAPO's own (2503.14476); what 2509.01939 calls DAPO goes without, --no-dynamic-sampling.
GRPO = dict(G=12, beta=0.0, eps_low=0.2, eps_high=0.2, loss_norm="sequence", std=True, dynamic_sampling=False, dev_sampled=False, steps=200)
ALGOS = {
    "grpo": GRPO,
    "dapo": GRPO | dict(eps_high=0.28, loss_norm="token", dynamic_sampling=True),
    "dr_grpo": GRPO | dict(loss_norm="constant", std=False),
    "ibm": GRPO | dict(G=8, beta=0.02, loss_norm="token", dev_sampled=True, steps=600),  # 2509.16990
    # RBA's two hyper-parameters are 0.2 and 0.1; which is beta and which the cross entropy's weight is not known.
    **dict.fromkeys(("rba_group", "rba_single"), GRPO | dict(G=1, beta=0.1, std=False)),
}
# What else makes an RL run the one it is; a run's folder says which of these, and of the preset's, are not the default.
SWITCHES = [*(key for key in GRPO if key != "steps"), "rollout", "temperature", "off_policy", "shaping", "overlong", "ce", "steps",
            "prompts", "updates", "lr", "grpo_muon", "max_draws", "grpo_dev_evals"]
RBA = ("rba_group", "rba_single")
KEPT = 600  # RL's batches that are kept for the control, at most: with --prompts 24 some 600 MB


# ---------------------------------------------------------------------------------------------- the method
def group_advantages(rewards, std=True):
    """Eq. 4: rewards (B, G) -> advantages (B, G) and which groups vary, (B,) bool.

    A group of equal rewards has advantage 0, told by max - min: its fp32 std need not be 0 (eight times 0.9: 6e-8).
    The papers do not say which std: this is the sample's (G - 1), plus 1e-4.
    """
    varied = rewards.amax(1) - rewards.amin(1) > 1e-6                          # (B,)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if std:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    return advantages * varied[:, None], varied


def k3(ref, logp, mask):
    """Eq. 5 of log-probabilities ref and logp (N, T): (N, T), 0 where mask is false. Masked before exp, which padding could overflow."""
    gap = (ref - logp).masked_fill(~mask, 0.0)
    return gap.exp() - gap - 1


def policy_loss(logp, old, ref, advantages, mask, weight, beta, eps_low, eps_high, off=None, shaping=0.0):
    """Eq. 3 with its sign turned, summed over N transcripts, and how many tokens the clip held back.

    logp, old, ref (N, T): log-probabilities under the policy, under the one that wrote the rollout, and under the SFT
    model (None if beta is 0); advantages (N,); mask (N, T) true on o_1 .. <EOS>; weight (N, T) or broadcast: w_it.
    off (N,): true for references that stand in for samples (MP-GRPO); None for none.
    """
    A = advantages[:, None]
    ratio = (logp - old).masked_fill(~mask, 0.0).exp()                         # Eq. 6 (N, T)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    if off is not None:
        p = logp.masked_fill(~mask, 0.0).exp()
        ratio = torch.where(off[:, None], p / (p + shaping) if shaping else p, ratio)
        clipped = torch.where(off[:, None], ratio, clipped)
    gain = torch.minimum(ratio * A, clipped * A)
    if beta:
        gain = gain - beta * k3(ref, logp, mask)                               # Eq. 5
    held = ((clipped - ratio) * A < 0) & mask
    return -(gain * mask * weight).sum(), held.sum()


def dpo_loss(logp, ref, mask, differ, beta, ce=0.0):
    """DPO's loss summed over P pairs: rows of logp, ref and mask (2 P, T) or (3 P, T) are y_w and y_l of each x in turn, and the
    teacher's answer where it is neither. differ (P,): 0 for pairs of equals, which only the cross entropy learns from.

    ref None stands for no reference model; ce is the weight of the cross entropy of the teacher's answer, in nats a token."""
    total, n = ((logp * mask).sum(1).view(len(differ), -1), mask.sum(1).view(len(differ), -1))  # (P, 2 or 3)
    gap = total if ref is None else total - (ref * mask).sum(1).view(total.shape)
    loss = -F.logsigmoid(beta * (gap[:, 0] - gap[:, 1])) * differ              # (P,)
    teacher = 2 if total.shape[1] == 3 else 0
    return (loss - ce * total[:, teacher] / n[:, teacher]).sum()


def rba_pairs(tokens, n, targets, target_n, scores, args):
    """One sample an utterance, tokens (B, T), n (B,), scores (B,), and the teacher's answers -> for each pair y_w, y_l and, for
    --ce in rba_group, the teacher's answer (P, 2 or 3, T); their lengths; whose speech they are about (P,); which differ (P,)."""
    T = max(tokens.shape[1], targets.shape[1])
    tokens, targets = (F.pad(x, (0, T - x.shape[1]), value=PAD) for x in (tokens, targets))
    if args.algo == "rba_single":
        return torch.stack([targets, tokens], 1), torch.stack([target_n, n], 1), torch.arange(len(n), device=n.device), scores < 1 - 1e-6
    scores = scores.view(-1, data.TAKES)
    first = torch.arange(len(scores), device=n.device) * data.TAKES
    best, x = first + scores.argmax(1), first + scores.argmin(1)               # (P,)
    rows, lengths = [tokens[best], tokens[x]], [n[best], n[x]]
    if args.ce:
        rows, lengths = [*rows, targets[x]], [*lengths, target_n[x]]
    return torch.stack(rows, 1), torch.stack(lengths, 1), x, scores.amax(1) - scores.amin(1) > 1e-6


def token_weight(loss_norm, lengths, n_sequences, n_tokens, longest):
    """w_it of the three losses for transcripts of `lengths` (N,), with <EOS>: (N, 1). n_sequences, n_tokens: the transcripts and tokens of
    the whole optimiser step, all utterances together, of which these N may be a part; longest: L, --max-new."""
    if loss_norm == "sequence":
        return 1 / (n_sequences * lengths[:, None].float())
    weight = 1 / n_tokens if loss_norm == "token" else 1 / (n_sequences * longest)
    return torch.full((len(lengths), 1), weight, device=lengths.device)


def with_references(tokens, n, targets, lengths, G, how):
    """Puts the references, targets (B, U) and lengths (B,) with <EOS>, into the groups: see --off-policy above.

    tokens (B * G', T), n (B * G',) with G' = G - 1 for "reference", else G -> (B * G, max(T, U)), (B * G,).
    """
    B, T = len(targets), max(tokens.shape[1], targets.shape[1])
    tokens, targets = (F.pad(x, (0, T - x.shape[1]), value=PAD) for x in (tokens, targets))
    if how == "reference":
        tokens = torch.cat([tokens.view(B, G - 1, T), targets[:, None]], 1)    # (B, G, T)
        return tokens.view(B * G, T), torch.cat([n.view(B, G - 1), lengths[:, None]], 1).flatten()
    tokens, n = tokens.clone(), n.clone()
    for b in range(B):
        said = [tuple(tokens[i, :n[i]].tolist()) for i in range(b * G, (b + 1) * G)]
        reference = tuple(targets[b, :lengths[b]].tolist())
        repeated = [i for i in range(G) if said[i] in said[:i]]
        if repeated and reference not in said:
            tokens[b * G + repeated[-1]], n[b * G + repeated[-1]] = targets[b], lengths[b]
    return tokens, n


def overlong(lengths, longest, last):
    """DAPO's soft punishment (2503.14476) of transcripts of `lengths` (N,): 0, then up to 1 over the `last` tokens before `longest`."""
    return ((lengths - (longest - last)) / last).clamp(0, 1)


@torch.no_grad()
def rollout(model, frames, lengths, items, reward, args):
    """Encoder frames (B, T', D) -> N transcripts, samples, beams or references: tokens (N, T), lengths n (N,), rewards (B, G), N strings.
    The prompt runs once for the group. The log-probabilities are dropped: `update` computes log pi_old, with the code that trains."""
    model.eval()
    texts = [item["target"] for item in items]
    prompt = model.prefill(*model.embed_prompt(frames, lengths, [item["prompt"] for item in items]))
    G = args.G - (args.off_policy == "reference")
    if args.rollout == "beam":
        tokens, n, _ = beam_search(model, prompt, G, args.max_new)
    else:
        tokens, n, _ = generate(model, prompt, G, args.max_new, args.temperature, graph=args.graph)
    if args.off_policy:
        tokens, n = with_references(tokens, n, *sft.targets_of(model, texts, frames.device), args.G, args.off_policy)
    hyps = model.decode(tokens, n)
    refs, score = [normalize(text) for text in texts for _ in range(args.G)], functools.cache(parse_reward(reward))  # many are equal
    scores = torch.tensor([score(ref, hyp) for ref, hyp in zip(refs, hyps)], dtype=torch.float32, device=frames.device)
    return tokens, n, scores.view(-1, args.G), hyps


def gather_rollouts(model, supply, args, device, log):
    """One step's groups: for each batch drawn (frames, lengths, instructions, tokens (N, T), n (N,), advantages (B, G), varied (B,)).

    --accumulate batches of --prompts utterances are drawn. With dynamic sampling (DAPO) more are, up to --max-draws times as many, until
    --accumulate times --prompts groups vary in each process on average. Groups that vary beyond that number are learned from, too. With
    RBA a group is a pair (see rba_pairs), and its advantages are 1, or 0 where nothing is to be preferred.
    """
    parts, figures = [], np.zeros(6)  # over the samples: sums of reward, length and truncation, their number; groups that vary; groups
    own = args.G - (args.off_policy == "reference")  # what is logged is about samples (and what "duplicate" puts among them)
    for draw in range(args.accumulate * (args.max_draws if args.dynamic_sampling else 1)):
        _, (frames, lengths, items) = next(supply)
        with autocast(device):
            tokens, n, rewards, hyps = rollout(model, frames, lengths, items, args.reward, args)
        punished = overlong(n, args.max_new, args.overlong).view(rewards.shape) if args.overlong else 0
        cut = tokens.gather(1, n[:, None] - 1) != EOS  # no room left for its <EOS>
        sums = [float(x.view(rewards.shape)[:, :own].sum()) for x in (rewards - punished, n, cut)]
        if args.algo in RBA:
            targets = sft.targets_of(model, [item["target"] for item in items], device)
            same = [normalize(hyp) == normalize(item["target"]) for hyp, item in zip(hyps, items)]  # in words, of whatever pieces
            scores = torch.tensor(same, device=device).float() if args.algo == "rba_single" else rewards[:, 0]
            tokens, n, x, varied = rba_pairs(tokens, n, *targets, scores, args)
            advantages = varied.float()[:, None].expand(n.shape)  # DPO has none: 0 where there is nothing to prefer, else 1
            frames, lengths, items, tokens, n = frames[x], lengths[x], [items[i] for i in x.tolist()], tokens.flatten(0, 1), n.flatten()
        else:
            advantages, varied = group_advantages(rewards - punished, args.std)
            if args.dynamic_sampling:
                _, varied = group_advantages(rewards)  # DAPO filters by what is right, not by length
        parts.append((frames, lengths, [item["prompt"] for item in items], tokens, n, advantages, varied))
        figures += *sums, len(rewards) * own, int(varied.sum()), len(varied)
        if args.dynamic_sampling and draw + 1 >= args.accumulate:
            if sft.summed(figures[4:5], device)[0] >= args.prompts * args.accumulate * sft.world():
                break
    reward, length, cut, samples, vary, groups = sft.summed(figures, device)
    log.update(reward=reward / samples, zero_variance=1 - vary / groups, draws=len(parts), length=length / samples, truncated=cut / samples)
    return parts


def parse_arguments():
    """The command line, with the preset of --algo filled in and the RL stage's folder named."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--reward", default="wer", help=f"one of {', '.join(REWARDS)}, or a sum: wer+0.5*em")
    p.add_argument("--algo", choices=ALGOS, default="grpo", help="preset of the nine switches that follow")
    p.add_argument("-G", type=int, help="transcripts of an utterance, the group: 12, IBM's 8")
    p.add_argument("--beta", type=float, help="weight of the KL to the SFT model")
    p.add_argument("--eps-low", type=float, help="the clip's lower half-width")
    p.add_argument("--eps-high", type=float, help="the clip's upper half-width")
    p.add_argument("--loss-norm", choices=["sequence", "token", "constant"], help="what a token weighs: see Eq. 3")
    p.add_argument("--std", action=argparse.BooleanOptionalAction, help="divide advantages by the group's std")
    p.add_argument("--dynamic-sampling", action=argparse.BooleanOptionalAction, help="draw more for groups that do not vary")
    p.add_argument("--dev-sampled", action=argparse.BooleanOptionalAction, help="judge on dev by samples, temperature 0.9, top_p 0.9")
    p.add_argument("--steps", type=int, help="rollouts, each of --prompts utterances: 200, IBM's 600")
    p.add_argument("--prompts", type=int, default=24, help="utterances a step")
    p.add_argument("--updates", type=int, default=1, help="optimiser steps on each rollout")
    p.add_argument("--micro", type=int, help="utterances in one backward pass; default: see eval.micro_batch")
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate: 5 steps of warm-up, then falling linearly to zero")
    p.add_argument("--grpo-muon", type=float, default=10.0, help="as --muon, for GRPO; 0 is AdamW alone")
    p.add_argument("--rl-name", help="folder of the RL stage within the run's; default: such as grpo-wer-beta0.04, with what is changed")
    p.add_argument("--rollout", choices=["sample", "beam"], default="sample", help="where the G transcripts come from")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of scoring the samples (RBA scores at 1)")
    p.add_argument("--graph", action="store_true", help="on a GPU: sample by a CUDA graph, one launch a token")
    p.add_argument("--off-policy", choices=["reference", "duplicate"], help="the reference as a member of the group: see above")
    p.add_argument("--shaping", type=float, default=0.0, help="with --off-policy reference: LUFFY's p / (p + SHAPING), 0.1 there")
    p.add_argument("--overlong", type=int, default=0, help="DAPO's soft punishment of the last so many tokens before --max-new")
    p.add_argument("--ce", type=float, default=0.0, help="RBA: weight of the teacher's cross entropy, in place of the reference model")
    p.add_argument("--max-draws", type=int, default=4, help="batches that dynamic sampling may draw for each one of a step")
    p.add_argument("--grpo-dev-evals", type=int, default=4, help="how often dev is looked at")
    sft.add_arguments(p)
    p.set_defaults(control_steps=None, **ALGOS[p.parse_args().algo])
    args, defaults = p.parse_args(), vars(p.parse_args([]))
    if args.control_steps is None:  # about as long as RL takes; IBM's steps have a KL, and longer texts
        args.control_steps = round(args.steps * (11.5 if args.algo == "ibm" else 6.25))
    changed = [f"{key}{getattr(args, key)}" for key in SWITCHES if getattr(args, key) != defaults[key]]
    args.rl_name = args.rl_name or "-".join([args.algo, args.reward.replace("*", "x"), *changed])
    return args


@data.plain_errors()
def main():
    """Command line: see the top of this file."""
    args = parse_arguments()
    try:
        parse_reward(args.reward)
    except ValueError as e:
        data.die(f"--reward {args.reward}: {e}")
    rba = args.algo in RBA
    unfit = (args.G > 1 or args.off_policy or args.updates > 1 or args.overlong or args.rollout == "beam"
             or any(getattr(args, key) != ALGOS[args.algo][key] for key in ("eps_low", "eps_high", "loss_norm", "std", "dynamic_sampling")))
    data.refuse(
        (rba and (args.prompts % data.TAKES or unfit),
         f"--algo {args.algo}: --prompts in fours, G and --updates 1, no --off-policy, --overlong, beam or other switch of GRPO's"),
        (rba and (args.data or args.init),
         f"--algo {args.algo}: its teacher's sentences are spoken by the synthesiser; leave out --data and --init"),
        (rba and not (args.beta or args.ce), f"--algo {args.algo} --beta 0: nothing is learned so; give --beta or --ce"),
        (rba and args.dry_run, f"--dry-run: is not for --algo {args.algo}, whose audio is invented first; leave it out"),
        (args.ce and not rba, f"--ce {args.ce}: is for --algo rba_group and rba_single"),
        (args.G < 2 and not rba, f"-G {args.G}: a group of one has no advantage; give 2 or more"),
        (args.off_policy == "duplicate" and args.rollout == "beam",
         "--off-policy duplicate: no two beams are equal; leave out --rollout beam"),
        (args.rollout == "beam" and args.temperature != 1,
         f"--temperature {args.temperature}: beams are not sampled; leave out one of the two"),
        (args.max_draws != 4 and not args.dynamic_sampling, f"--max-draws {args.max_draws}: is for --dynamic-sampling"),
        (args.shaping and args.off_policy != "reference", f"--shaping {args.shaping}: is for --off-policy reference"),
        (os.sep in args.rl_name or args.rl_name in (".", "..", "teacher", *sft.ORDER),
         f"--rl-name {args.rl_name}: the name of a folder beside {', '.join(sft.ORDER)}, without {os.sep}"))
    args.teacher_steps = args.teacher_steps or 600 * rba
    args.control_batch = args.prompts  # the control hears what GRPO hears (with dynamic sampling, the first part of it)
    corpus = sft.finish_arguments(args)
    if args.overlong > args.max_new:
        data.die(f"--overlong {args.overlong}: more than the {args.max_new} tokens of --max-new")
    if args.dry_run:
        return sft.print_plan(args, corpus, args.prompts, args.G, reference=bool(args.beta) and not args.ce)
    sft.check_stages(args)
    sft.check_config(*rl_config(args))
    sft.teach(args, corpus)
    for stage in sft.stages_to("speech", args):
        sft.run_stage(stage, args, corpus)
    folder = train(args, corpus)
    sft.run_stage("control", args, corpus)
    if sft.rank() == 0:
        report(args, corpus, folder)
    sft.leave_processes()


def rl_config(args):
    """The RL stage's folder, its config.json and the flag that names another folder."""
    switches = ["reward", "algo", *SWITCHES, "max_new", "task", "lang", "data", "seed", "views", "spec_augment", "dev_size"]
    folder = os.path.join("runs", args.name, args.rl_name)
    config = {k: getattr(args, k) for k in switches}
    return folder, {**config, "accumulate": args.accumulate * sft.world(), "before": sft.stage_config("speech", args)}, "--rl-name"


def train(args, corpus):
    """GRPO from the SFT model. Returns the run's folder. best.pt is the best of GRPO's own checkpoints on dev, even where none beats SFT
    there: else the table would compare SFT with itself."""
    folder, config, remedy = rl_config(args)
    start = os.path.join("runs", args.name, "speech")
    row = sft.open_run(folder, config, remedy)
    if row["step"] == args.steps:
        return folder
    torch.manual_seed(args.seed * 10 + 5)
    device = pick_device(args.device)
    read = lambda path: sft.shard(load_model(path), device) if args.shard else load_model(path, device)
    model = read(os.path.join(folder, "last.pt") if row["step"] else start)
    reference = read(start) if args.beta and not args.ce else None
    if reference is not None and args.shard:
        reference.set_reshard_after_forward(True, recurse=False)  # it has no backward pass, after which FSDP would
    model.llm.recompute = args.recompute
    parameters = sft.trained_parameters("grpo", model)
    parallel = sft.data_parallel(model, parameters)
    opts = sft.optimizers(model, parameters, args.lr, args.grpo_muon)
    drawn = -(-row.get("drawn", 0) // sft.world())  # a process's batches; with dynamic sampling not the number of steps
    dev = sft.dev_set("speech", model, corpus, args) if sft.rank() == 0 else []
    most = args.steps * args.accumulate * (args.max_draws if args.dynamic_sampling else 1)
    control, *_, different, _ = sft.stage_plan("control", args)  # which will ask for these again, if it has yet to run
    again = 0 if os.path.exists(os.path.join(control, "last.pt")) else min(KEPT * sft.world(), different)
    keys = [("grpo", args.prompts, k * sft.world() + sft.rank()) for k in range(drawn, most)]
    supply = sft.heard(keys, model, corpus, args, device, keep=again)
    score = lambda: sft.dev_score("grpo", model, dev, corpus, device, args.max_new, args.dev_sampled)
    shown = {"reward": "reward", "flat": "zero_variance", "H": "entropy", **({} if reference is None else {"kl": "kl"})}
    for row in sft.training(args.algo, folder, row, args.steps, model, opts, device, args.seed * 10 + 5, args.grpo_dev_evals, score, shown):
        with sft.gathered(model):
            parts = model(lambda model: gather_rollouts(model, supply, args, device, row))
        drawn += len(parts)
        row["drawn"] = drawn * sft.world()
        update(parallel, reference, opts, parameters, parts, args, row, row["step"], device)
    return folder


def pieces_of(parts, args, config, device):
    """One step's groups, cut into pieces of --micro utterances for a backward pass each; how many sequences count, and their tokens.

    A piece: frames, lengths, instructions, tokens (N, T), n, advantages, off (N,), as policy_loss has them. A group without variance has
    no gradient but the KL's; without a KL it needs no backward pass. It still counts in the denominators, unless dynamic sampling has
    thrown it out: skipping what is zero changes no gradient.
    """
    pieces, n_sequences, n_tokens = [], 0, 0
    for frames, lengths, asked, tokens, n, advantages, varied in parts:
        G = len(n) // len(frames)
        counted = varied if args.dynamic_sampling else torch.ones_like(varied)
        n_sequences += int(counted.sum()) * G
        n_tokens += int((n.view(-1, G).sum(1) * counted).sum())
        keep = counted if args.ce or (args.beta and args.algo not in RBA) else varied
        micro = args.micro or micro_batch(config, frames.shape[1], G, tokens.shape[1], device)
        for rows in keep.nonzero()[:, 0].split(micro) if keep.any() else ():
            each = (rows[:, None] * G + torch.arange(G, device=device)).flatten()
            off = each % G == G - 1 if args.off_policy == "reference" else None
            pieces.append((frames[rows], lengths[rows], [asked[i] for i in rows.tolist()], tokens[each], n[each],
                           advantages[rows].flatten(), off))
    return pieces, n_sequences, n_tokens


def update(model, reference, opts, parameters, parts, args, row, step, device):
    """--updates optimiser steps on one step's groups; fills `row` with what to log."""
    pieces, n_sequences, n_tokens = pieces_of(parts, args, getattr(model, "module", model).llm.config, device)
    mine = len(pieces)
    counts = n_sequences, n_tokens, *(mine * (r == sft.rank()) for r in range(sft.world()))
    n_sequences, n_tokens, *each = sft.summed(counts, device)  # each: the processes' numbers of pieces
    # DDP exchanges gradients in the last backward pass and FSDP in each: who has fewer pieces than another adds some of no weight.
    frames, lengths, asked, tokens, n, advantages, _ = parts[-1]
    G = len(n) // len(frames)
    idle = frames[:1], lengths[:1], asked[:1], tokens[:G], n[:G], advantages[:1].flatten(), None
    pieces += [idle] * int(max(each) - mine)
    olds = [None] * len(pieces)  # of each piece log pi_old: the policy that wrote the rollout is this one, before its first update
    model.train()
    for _ in range(args.updates):
        figures = np.zeros(5)  # sums over the tokens that are learned from: loss, held by the clip, k3, entropy, their number
        for i, (frames, lengths, asked, tokens, n, advantages, off) in enumerate(pieces):
            tokens = tokens[:, :int(n.max())]
            mask = length_mask(n, tokens.shape[1])                             # (N, T)
            temperature = 1.0 if args.algo in RBA else args.temperature
            logps_of = lambda model: model.token_logps(tokens, model.prefill(*model.embed_prompt(frames, lengths, asked)), temperature)
            model.require_backward_grad_sync = i + 1 == len(pieces)  # DDP's switch; FSDP exchanges in each, lest it keep whole gradients
            with autocast(device):
                logp, entropy = model(logps_of)  # logps_of(model), by way of forward, where DDP and FSDP come in
                ref = None
                if reference is not None:
                    with torch.no_grad():
                        ref, _ = reference(logps_of)
            olds[i] = logp.detach() if olds[i] is None else olds[i]
            if args.algo in RBA:
                G = len(n) // len(frames)
                loss = dpo_loss(logp, ref, mask, advantages.view(-1, G)[:, 0], args.beta, args.ce) / (n_sequences / G)
                held = 0
            else:
                weight = token_weight(args.loss_norm, n, n_sequences, n_tokens, args.max_new)
                loss, held = policy_loss(logp, olds[i], ref, advantages, mask, weight, args.beta, args.eps_low, args.eps_high, off,
                                         args.shaping)
            real = float(i < mine)
            (loss * (real * sft.world())).backward()  # a sum over the processes, of which DDP and FSDP take the mean
            with torch.no_grad():
                kl = k3(ref, logp, mask).sum() if ref is not None else 0
                figures += real * np.array([float(x) for x in (loss, held, kl, (entropy * mask).sum(), mask.sum())])
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if any(each):  # else there are no gradients, or DDP's zeros, on which AdamW would move
            sft.step_all(opts, min(1, (step + 1) / 5) * (1 - step / args.steps), keep=sft.world() > 1 and not args.shard)
    if args.shard and reference is not None and pieces:
        reference.reset_iter_state()
    loss, held, kl, entropy, seen = sft.summed(figures, device)
    row.update(loss=loss, grad_norm=float(norm), clip=held / max(1, seen), kl=kl / seen if reference is not None and seen else None,
               entropy=entropy / seen if seen else None)  # None: not measured


def report(args, corpus, folder):
    """Evaluates SFT, SFT continued and GRPO on every test set, prints the table, writes result.json."""
    paths = {name: os.path.join("runs", args.name, stage) for name, stage in (("SFT", "speech"), ("SFT continued", "control"))}
    last = f"{args.algo} ({args.reward})"
    paths[last] = folder
    seconds = {name: line["seconds"] for name, path in paths.items() for line in sft.read_log(path)[-1:]}  # a stage of 0 steps has none
    result = {"config": vars(args), "sets": {}, "seconds": seconds}
    print("\nseconds of training: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()))
    ears = {(args.data, args.seed, args.test_size, args.task, args.lang): corpus}
    for test in corpus.tests:
        found = {name: kept_transcripts(path, test, ears, args.test_size, args.device, workers=args.workers, reuse=False)
                 for name, path in paths.items()}
        refs, rows = found["SFT"][0], {name: hyps for name, (_, hyps) in found.items()}
        result["sets"][test] = print_table(test, args.task, refs, rows, ("SFT", "SFT continued"))
        for i in sorted(range(len(refs)), key=lambda i: rows["SFT"][i] == rows[last][i])[:3]:  # where they differ, if so
            print(f"  reference  {refs[i]}\n  SFT        {rows['SFT'][i]}\n  {args.algo:10} {rows[last][i]}")
    write_json(os.path.join(folder, "result.json"), result)


if __name__ == "__main__":
    main()
